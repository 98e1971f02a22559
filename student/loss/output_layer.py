"""Whether a model's logits are its LM head (output layer) on its last hidden states, and with which scale and softcap.

Legend: `B` windows, `T` positions, `W` columns of the head, `H` hidden size.

The fused loss (`student.loss.fused`) replaces the model's own forward from the output layer on, so it has to know all
that happens there. The configuration of a family gives a guess, which is then tested: on a few tokens it must give the
model's own logits, also with the hidden states scaled up until the logits reach hundreds, where a softcap or a factor
shows in any model, trained or not. All in training mode and with the same random numbers, so that a dropout in front
of the output layer shows too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.errors import InputError
from student.loss.fused import fused_loss
from student.models.adapters.attach import inner_model
from student.models.logit_agreement import agree, amplification, amplified, difference, replaced_forward

if TYPE_CHECKING:
    from student.loss.distillation import LossSums, PreparedLoss

# Configuration names of a factor on the logits, and its possible powers: Granite divides, HyperCLOVA X multiplies.
_SCALES = {"logit_scale": (1,), "logits_scaling": (-1, 1), "lm_head_multiplier": (1,)}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9}
_TOLERANCE_OF_FLOAT32 = 2e-5
_TEST_TOKENS = (2, 6)


@dataclass(frozen=True)
class PlainHead:
    """An LM head whose logits are ``softcap * tanh(logit_scale * linear(hidden) / softcap)``; no tanh without a cap."""

    linear: nn.Linear
    backbone: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None

    def hidden(self, input_ids: Tensor | None, **others: Any) -> Tensor:
        """The last hidden states [B, T, H]; `others` are the model's own arguments."""
        hidden: Tensor = self.backbone(input_ids=input_ids, use_cache=False, **others).last_hidden_state
        return hidden

    def loss_sums(self, hidden: Tensor, prepared: PreparedLoss) -> LossSums:
        """The prepared loss of the logits of these hidden states [R, H]; the logits are never held whole.

        It is computed inside the output layer's own call: FSDP2 all-gathers sharded weights there for as long as they
        are needed, whichever of its units they belong to.
        """
        found: list[LossSums] = []

        def loss_of(hidden: Tensor) -> Tensor:
            weight, bias = self.linear.weight, self.linear.bias
            sums = fused_loss(hidden, weight, bias, prepared, logit_scale=self.logit_scale, softcap=self.softcap)
            found.append(sums)
            return sums.loss_sum

        with replaced_forward(self.linear, loss_of):
            loss_sum: Tensor = self.linear(hidden)
        return replace(found[0], loss_sum=loss_sum)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [B, T, W] of these hidden states, float32, without gradient."""
        bias = None if self.linear.bias is None else self.linear.bias.detach()
        logits = self.logit_scale * F.linear(hidden.detach(), self.linear.weight.detach(), bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def tolerance_of(dtype: torch.dtype) -> float:
    """Error of one rounding of the logits to a dtype and of another order of summation, relative to the largest."""
    return _TOLERANCE.get(dtype, _TOLERANCE_OF_FLOAT32)


def choose_head(model: nn.Module, fused: Literal["auto", "on", "off"]) -> PlainHead | str:
    """The head to fuse with the loss, or the reason not to: it was turned off, or is no `plain_head`.

    The head of a model in peft's wrapper is that of the model inside. Raises InputError, naming the model's class, if
    fusing was turned on and the head is no `plain_head`.
    """
    model = inner_model(model)
    head = "it was turned off" if fused == "off" else plain_head(model)
    if fused == "on" and isinstance(head, str):
        raise InputError(f"{type(model).__name__}: the fused head was asked for, but {head}; take auto or off")
    return head


def plain_head(model: nn.Module) -> PlainHead | str:
    """The LM head of a transformers causal language model, or the reason its loss needs the model's own forward.

    Runs the model on a few tokens, on its own device. Restores its training modes and the random state.
    """
    try:
        with torch.no_grad(), in_mode(model, training=True):
            return _tested_head(model)
    except Exception as error:  # architectures and remote code fail in ways of their own; their forward remains
        return f"its head cannot be tested by itself ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _tested_head(model: Any) -> PlainHead | str:
    linear, backbone = model.get_output_embeddings(), model.base_model
    # Subclasses of Linear are quantised or adapted layers with another product, and a hook may do anything.
    if type(linear) is not nn.Linear:
        kind = type(linear)
        name = f"{kind.__name__} of {kind.__module__.split('.')[0]}" if kind.__name__ == "Linear" else kind.__name__
        return f"its output layer is a {name}, not a plain Linear"
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        return "its output layer has hooks, which would not be called"
    if backbone is model:
        return "it has no backbone that can be called by itself"
    columns = min(len(linear.weight), model.get_input_embeddings().weight.shape[0])
    tokens = torch.arange(math.prod(_TEST_TOKENS), device=linear.weight.device).reshape(_TEST_TOKENS) * 7919 % columns
    with _same_random_numbers(tokens.device):
        own: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    with _same_random_numbers(tokens.device):
        hidden = PlainHead(linear, backbone).hidden(tokens)
    largest = float(linear(hidden).abs().max())
    if not 0 < largest < math.inf:
        return f"its logits on a few tokens are of size {largest:g}, so they cannot be compared"
    factor = amplification(largest)
    with amplified(linear, factor), _same_random_numbers(tokens.device):
        larger: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    config = model.config.get_text_config(decoder=True)
    tolerance = tolerance_of(linear.weight.dtype)
    found = ""
    for scale, softcap in _guesses(config):
        head = PlainHead(linear, backbone, scale, softcap)
        pairs = ((head.logits(hidden), own), (head.logits(hidden * factor), larger))
        if all(agree(a, b, tolerance) for a, b in pairs):
            return head
        found = found or next(difference(a, b) for a, b in pairs if not agree(a, b, tolerance))
    return f"its output layer on its backbone does not give its logits: {found}"


def _guesses(config: Any) -> Iterator[tuple[float, float | None]]:
    """(logit_scale, softcap) that a configuration may mean: its own values first, then without them."""
    scales = [value**power for name, powers in _SCALES.items() if (value := _number(config, name)) for power in powers]
    softcaps: list[float | None] = [value for name in _SOFTCAPS if (value := _number(config, name))]
    yield from itertools.product([*scales, 1.0], [*softcaps, None])


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and 0 < value < math.inf else None


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside; restores every module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _same_random_numbers(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Restores the random state at the end, so that the next call uses the same random numbers."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
