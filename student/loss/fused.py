"""The student's LM head fused with the loss: one pass over the positions in chunks, never holding all their logits.

Legend: `P` positions (flattened), `R` rows of one chunk, `H` hidden size, `V` vocabulary of the cache, `W` columns of
the head (W >= V), `K` stored ids of a position.

The naive form, with `loss` a `student.loss.distillation.DistillationLoss`::

    z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)    # [P, W]
    loss(z, labels, targets)

Here the rows go in chunks through one buffer [R, W], which holds the logits and then the gradient by them
(`student.loss.chunk`: `logit_chunk`; on CUDA its passes over the buffer are Triton kernels, `triton_chunk`). The loss
itself is a function of tensors [R, K], differentiated by autograd, so any divergence works.

A chunk's gradient can only be computed while its logits exist. So the gradients by the hidden states and the weights
are computed in the forward pass, at one matrix product each beside that of the logits, and the backward pass
multiplies them by the upstream gradient. They reach autograd as the gradients of `hidden`, `weight` and `bias`: a tied
embedding adds its own, a frozen head costs nothing, and DDP sees each parameter once.

Precision: the product has float32 output where the device can widen it (float64 for float64); all work on the buffer,
the sums, and the gradients accumulated over chunks are float32.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from storage.errors import InputError
from student.loss.chunk.logit_chunk import Gradients, LogitChunk
from student.loss.student_logprobs import check_columns

if TYPE_CHECKING:
    from student.loss.distillation import LossSums, PreparedLoss

# Device types on which Triton kernels process a float32 buffer, where triton is installed and runs.
_TRITON_DEVICES = {"cuda"}
# Logits in the buffer: 64 MiB of float32 on a CPU, 256 MiB elsewhere.
_BUFFER_LOGITS = {"cpu": 1 << 24, "elsewhere": 1 << 26}
# Rows of the weight gradient per product, where that has to be widened by hand.
_WEIGHT_ROWS = 1 << 13


def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: PreparedLoss,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> LossSums:
    """The loss of ``softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``; no tanh without a softcap.

    hidden     [P, H]: the last hidden states
    weight     [W, H], W >= V, and bias [W] or None: the LM head's; the model may use them elsewhere too (tied)
    prepared   `DistillationLoss.prepare` of the same P positions

    Any float types; under autocast the product takes its dtype. The sums are float32 (float64 for float64), and
    `loss_sum` is differentiable once by those of hidden, weight and bias that require a gradient. Memory beside the
    arguments: one chunk of logits, and the gradients.

    Raises InputError for shapes that do not fit, W < V, sharded weights, and a logit_scale or softcap that is not a
    positive number.
    """
    _check(hidden, weight, bias, prepared)
    walk = _Walk(prepared, logit_scale, softcap, _product_dtype(hidden, weight))
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if not any(wanted):
        return walk(hidden, weight, bias, wanted)[0]
    sums: list[LossSums] = []
    loss_sum = _FusedLoss.apply(hidden, weight, bias, walk, sums)  # type: ignore[no-untyped-call]
    return replace(sums[0], loss_sum=loss_sum)


class _FusedLoss(torch.autograd.Function):
    """A `_Walk` in forward; its gradients times the upstream gradient in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, walk: _Walk, sums: list[LossSums]
    ) -> Tensor:
        found, ctx.gradients = walk(hidden, weight, bias, ctx.needs_input_grad[:3])
        ctx.walk = walk
        ctx.save_for_backward(hidden, weight, bias)
        sums.append(found)
        return found.loss_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # Returned already, and scaled in-place: another backward pass of a retained graph computes them again.
            gradients = ctx.walk(hidden, weight, bias, ctx.needs_input_grad[:3])[1]
        scaled = (
            None if gradient is None else gradient.mul_(upstream).to(like.dtype)
            for gradient, like in zip(gradients, (hidden, weight, bias), strict=True)
        )
        return (*scaled, None, None)


class _Gradients(NamedTuple):
    """Gradients of loss_sum by the inputs of the head; None where not wanted. Sums over chunks are float32."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(self, rows: slice, by_logits: Tensor, h: Tensor, weight: Tensor) -> None:
        """Add those of some rows, from the gradient by their products with the weights [R, W]."""
        if self.bias is not None:
            self.bias.add_(by_logits.sum(0))
        operand = by_logits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = _product(operand, weight)
        if self.weight is not None:
            _add_product(self.weight, operand.t(), h)


@dataclass(frozen=True)
class _Walk:
    """One pass over the positions in chunks: the LM head's scale and softcap, the dtype of its product's operands."""

    prepared: PreparedLoss
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("logit_scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is a positive number; got {value}")

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
    ) -> tuple[LossSums, _Gradients]:
        """The sums, without gradient; and the wanted gradients of loss_sum by hidden, weight and bias."""
        wide = torch.promote_types(self.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            weight = weight.to(self.dtype)
            gradients = _Gradients(
                torch.empty_like(hidden) if wanted[0] else None,
                torch.zeros_like(weight, dtype=wide) if wanted[1] else None,
                torch.zeros_like(weight[:, 0], dtype=wide) if wanted[2] else None,
            )
            total: LossSums | None = None
            step = _rows_at_once(hidden, weight)
            buffer = hidden.new_empty(step, len(weight), dtype=wide) if self.dtype == wide else None
            for start in range(0, max(1, len(hidden)), step):
                rows = slice(start, start + step)
                h = hidden[rows].to(self.dtype)
                z = self._logits(h, weight, bias, buffer)
                sums = self._loss(z, rows, any(wanted))
                if any(wanted):
                    gradients.add(rows, z, h, weight)
                total = sums if total is None else total + sums
                # Without a buffer to reuse, the next chunk must not be allocated beside this one.
                del z
            assert total is not None
            return total, gradients

    def _logits(self, h: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None) -> Tensor:
        """The logits [R, W] of some rows, in the buffer if there is one; float32 or float64."""
        if buffer is not None:
            z = torch.mm(h, weight.t(), out=buffer[: len(h)])
        else:
            z = _product(h, weight.t()).to(torch.float32)
        if bias is not None:
            z += bias
        if self.logit_scale != 1.0:
            z *= self.logit_scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z

    def _loss(self, z: Tensor, rows: slice, differentiate: bool) -> LossSums:
        """The sums of the logits of some rows; then z is the gradient by the head's product, if asked for."""
        prepared = self.prepared
        chunk = _chunk_kind(z.device, z.dtype, prepared.temperature, self.softcap)(
            z,
            prepared.labels[rows],
            prepared.trained[rows],
            [support[rows] for support in prepared.supports],
            prepared.sizes,
            prepared.temperature,
            self.softcap,
        )
        if not differentiate:
            return prepared.sums(rows, chunk.cross_entropy, chunk.buckets)
        sums, by_label, by_bucket = _differentiated(prepared, rows, chunk)
        chunk.to_gradient(by_label, by_bucket)
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        return sums


def _chunk_kind(
    device: torch.device, dtype: torch.dtype, temperature: float, softcap: float | None
) -> type[LogitChunk]:
    """The kind of passes over the buffer: Triton's where they run, torch's elsewhere. Their results are the same."""
    if device.type in _TRITON_DEVICES and dtype == torch.float32 and _triton_runs(device, temperature != 1.0, softcap):
        from student.loss.chunk.triton_chunk import TritonChunk

        return TritonChunk
    return LogitChunk


@functools.cache
def _triton_runs(device: torch.device, tempered: bool, softcap: float | None) -> bool:
    """Whether triton is installed, compiles for this device and agrees with torch; tried once per combination.

    The kernels are others where the temperature is 1. Elsewhere it is an argument of theirs: one stands for all.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from student.loss.chunk.triton_chunk import check

        check(device, 2.0 if tempered else 1.0, softcap)
    except Exception as error:  # compilers fail in many ways; the loss does not depend on them
        logging.getLogger(__name__).warning(
            "the fused loss runs without its Triton kernels on %s, slower: %s: %s", device, type(error).__name__, error
        )
        return False
    return True


def _differentiated(
    prepared: PreparedLoss, rows: slice, chunk: LogitChunk
) -> tuple[LossSums, Tensor | None, list[Gradients]]:
    """The sums of some rows, without gradient, and the gradients of their loss_sum by the chunk's log-probs."""
    leaves = [chunk.cross_entropy, *(tensor for pair in chunk.buckets for tensor in pair)]
    with torch.enable_grad():
        cross_entropy, *rest = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        sums = prepared.sums(rows, cross_entropy, list(zip(rest[::2], rest[1::2], strict=True)))
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if sums.loss_sum.requires_grad:
            found = torch.autograd.grad(sums.loss_sum, leaves, allow_unused=True)
    by_label, *by_bucket = found
    pairs = list(zip(by_bucket[::2], by_bucket[1::2], strict=True))
    return replace(sums, loss_sum=sums.loss_sum.detach()), by_label, pairs


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, without rounding to half precision where the device supports float32 output."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    for start in range(0, len(total), _WEIGHT_ROWS):
        rows = slice(start, start + _WEIGHT_ROWS)
        total[rows] += _product(a[rows], b)


def _rows_at_once(hidden: Tensor, weight: Tensor) -> int:
    logits = _BUFFER_LOGITS.get(hidden.device.type, _BUFFER_LOGITS["elsewhere"])
    return max(1, min(len(hidden), logits // len(weight)))


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the product's operands: autocast's where it is enabled, their common one elsewhere."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, prepared: PreparedLoss) -> None:
    if hasattr(weight, "full_tensor"):
        raise InputError(
            "the output layer's weights are sharded where the loss is computed: wrap the model so that they belong to "
            "its outermost FSDP unit, or turn the fused head off"
        )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise InputError(
            f"hidden states are [positions, H] and the output layer's weights [columns, H]; got {list(hidden.shape)} "
            f"and {list(weight.shape)}"
        )
    check_columns(len(weight), prepared.vocabulary_size)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"the output layer's bias must be [{len(weight)}]; got {list(bias.shape)}")
    if len(prepared.trained) != len(hidden):
        raise InputError(
            f"the loss was prepared for {len(prepared.trained)} positions, there are {len(hidden)} hidden states"
        )
