"""The student's log-probs of some ids and log-mass of the tail bucket outside them, with an explicit gradient.

Legend: `P` positions of a batch (flattened), `K` ids per position, `V` vocabulary of a teacher, `W` columns of the
student's LM head, `tau` the temperature. Everything is in nats.

One autograd function implements the gradient of any loss of the log-probs of some ids and of the mass outside them.
Unlike plain autograd it keeps only the logits and a few numbers per position: no float32 copy, no softmax and no
masked copy of [P, W] lives until the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from storage.errors import InputError
from student.loss.logit_chunk import row_slices

# Logits per chunk of rows, which bounds the temporaries: 1 MiB of float32 on a CPU, where staying in the processor's
# cache saves a tenth of the time, and 256 MiB elsewhere, where fewer kernel launches matter more.
_CHUNK_LOGITS = {"cpu": 1 << 18, "elsewhere": 1 << 26}


def student_buckets(
    logits: Tensor,
    labels: Tensor | None,
    supports: Sequence[Tensor],
    sizes: Sequence[int],
    temperature: float,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """``ell = log q[ids]`` and ``theta = log sum of q outside the ids``, q = softmax(logits / tau), for each teacher.

    With ``u = logits / tau`` and ``lse = logsumexp(u)`` over all W columns, for each support int [P, K] (-1 where
    a column holds no id): ``ell = u[ids] - lse`` [P, K], 0 where there is no id, and ``theta = logsumexp of u[j]
    over j < V outside the ids - lse`` [P], -inf when nothing is outside. `sizes` are the teachers' V, which may differ
    and exceed W (a student of fewer columns than a teacher has ids has them all). Besides, when `labels` are given, the
    cross-entropy [P] at temperature 1, 0 where the label is `NOT_TRAINED`. Returns (cross-entropy or None, pairs).

    logits [P, W] of any float type; results are float32 (float64 for float64 logits), in nats, differentiable once.
    """
    outputs = _StudentBuckets.apply(  # type: ignore[no-untyped-call]
        logits, labels, sizes, temperature, *supports
    )
    rest = outputs[1:] if labels is not None else outputs
    return (outputs[0] if labels is not None else None), list(zip(rest[::2], rest[1::2], strict=True))


class _StudentBuckets(torch.autograd.Function):
    """Forward and backward of `student_buckets`, in chunks of rows.

    For a loss L(ell, theta) with g = dL/d ell, h = dL/d theta, G = sum(g) + h, q = softmax(u), the gradient by u is
    g_i - q_i G on the ids, exp(u_j - lse_tail) (h - G q_t) outside them below V, and -q_j G from V on. It is written
    out rather than left to autograd because the derivative of a masked logsumexp is 0/0 when nothing is outside the
    ids (K = V), and because autograd would keep several [P, W] tensors per teacher.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor | None, sizes: Sequence[int], temperature: float, *supports: Tensor
    ) -> tuple[Tensor, ...]:
        # float32 from here on: exp and its sum over the vocabulary lose digits in half precision.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        per_position = logits.new_empty(logits.shape[:1], dtype=dtype)
        peak, lse_one, lse, cross_entropy = (torch.empty_like(per_position) for _ in range(4))
        ells = [logits.new_empty(support.shape, dtype=dtype) for support in supports]
        tails = [torch.empty_like(per_position) for _ in supports]
        for rows in row_slices(logits, _CHUNK_LOGITS):
            # Nothing below depends on a shift of the row. With its maximum at 0, normalisers are small numbers that
            # round finely (a logit of 20 has a float32 spacing of 2e-6) and exp cannot overflow.
            peak[rows] = logits[rows].amax(1)
            z = logits[rows].to(dtype) - peak[rows, None]
            if labels is not None or temperature == 1.0:
                lse_one[rows] = z.exp().sum(1).log()
            if labels is not None:
                trained, ids = _safe(labels[rows, None])
                picked = lse_one[rows] - z.gather(1, ids)[:, 0]
                cross_entropy[rows] = picked.masked_fill(~trained[:, 0], 0.0)
            if not supports:
                continue
            u = z if temperature == 1.0 else z / temperature
            lse[rows] = lse_one[rows] if temperature == 1.0 else u.exp().sum(1).log()
            for support, size, ell, tail in zip(supports, sizes, ells, tails, strict=True):
                valid, ids = _safe(support[rows])
                ell[rows] = (u.gather(1, ids) - lse[rows, None]).masked_fill(~valid, 0.0)
                tail[rows] = torch.logsumexp(_without(u[:, :size], ids, valid), 1)
        ctx.save_for_backward(logits, labels, peak, lse_one, lse, *supports, *ells, *tails)
        ctx.members, ctx.sizes, ctx.temperature = len(supports), sizes, temperature
        ctx.set_materialize_grads(False)
        outputs = [] if labels is None else [cross_entropy]
        for ell, tail in zip(ells, tails, strict=True):
            outputs += [ell, tail - lse]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, peak, lse_one, lse, *rest = ctx.saved_tensors
        n, tau = ctx.members, ctx.temperature
        supports, ells, tails = rest[:n], rest[n : 2 * n], rest[2 * n :]
        if all(gradient is None for gradient in gradients):
            return tuple(None for _ in range(4 + n))
        by_label = gradients[0] if labels is not None else None
        by_member = gradients[1:] if labels is not None else gradients
        result = torch.empty_like(logits)
        for rows in row_slices(logits, _CHUNK_LOGITS):
            z = logits[rows].to(lse.dtype) - peak[rows, None]
            u = z if tau == 1.0 else z / tau
            parts = []
            for i in range(n):
                g, h = by_member[2 * i], by_member[2 * i + 1]
                if g is None and h is None:
                    continue
                g = torch.zeros_like(ells[i][rows]) if g is None else g[rows]
                h = torch.zeros_like(lse[rows]) if h is None else h[rows]
                # Dividing the small [rows, K] and [rows] gradients by tau is dividing their image by it.
                student = (ells[i][rows], lse[rows], tails[i][rows])
                parts.append(_bucket_gradient(u, supports[i][rows], *student, g / tau, h / tau, ctx.sizes[i]))
            if by_label is not None:
                trained, ids = _safe(labels[rows, None])
                weight = by_label[rows, None].masked_fill(~trained, 0.0)
                parts.append((z - lse_one[rows, None]).exp_().mul_(weight).scatter_add_(1, ids, -weight))
            # Summed in float32 and rounded once to the logits' type.
            result[rows] = sum(parts[1:], parts[0]).to(result.dtype)
        return (result, None, None, None, *(None for _ in range(n)))


def _bucket_gradient(
    u: Tensor, support: Tensor, ell: Tensor, lse: Tensor, lse_tail: Tensor, g: Tensor, h: Tensor, size: int
) -> Tensor:
    """The gradient [rows, W] by u of one member's loss: the three lines of `_StudentBuckets`."""
    valid, ids = _safe(support)
    g = g.masked_fill(~valid, 0.0)
    total = g.sum(1) + h
    padding = (u[:, size:] - lse[:, None]).exp_().mul_(-total[:, None])
    # With nothing outside the ids, lse_tail is -inf; any finite number instead makes exp(-inf - it) 0, as it is.
    tail = _without(u[:, :size], ids, valid).sub_(lse_tail.masked_fill(lse_tail.isneginf(), 0.0)[:, None])
    tail.exp_().mul_((h - total * (lse_tail - lse).exp())[:, None])
    tail.scatter_add_(1, ids, (g - ell.exp() * total[:, None]).masked_fill(~valid, 0.0))
    return torch.cat([tail, padding], dim=1) if padding.shape[1] else tail


def _without(u: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """A copy of u [rows, V] with -inf at the valid ids.

    Columns that are not valid add 0 to id 0, so they need no slot of their own and may hold anything.
    """
    return u.scatter_add(1, ids, torch.zeros_like(valid, dtype=u.dtype).masked_fill(valid, -math.inf))


def _safe(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(bool, the entries that are ids, i.e. not negative; int64 indices, 0 at the other entries)."""
    return ids >= 0, ids.clamp(min=0).to(torch.int64)


def check_batch(logits: Tensor, labels: Tensor, vocabulary_size: int) -> None:
    """Raise InputError unless logits are [P, W] with W >= V and labels are [P]."""
    if logits.ndim != 2:
        raise InputError(f"logits must be flattened to [positions, columns]; got {list(logits.shape)}")
    check_columns(logits.shape[1], vocabulary_size)
    if labels.shape != logits.shape[:1]:
        raise InputError(f"labels must be [{len(logits)}], one for each row of logits; got {list(labels.shape)}")


def check_columns(columns: int, vocabulary_size: int) -> None:
    """Raise InputError where a head has fewer columns than there are ids."""
    if columns < vocabulary_size:
        raise InputError(
            f"the model's head has {columns} columns, fewer than the {vocabulary_size} ids of the cache's tokenizer: "
            "resize its embeddings or take another model"
        )
