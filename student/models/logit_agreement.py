"""Whether another way to compute a model's logits gives them: agreement, and probes of its output layer.

Legend: `H` hidden size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Large enough for any soft cap in use (30, 50) to show, small enough for hidden states in float16.
_TEST_LOGIT = 256.0
# Some models mask ids with the lowest number of their dtype instead of -inf.
MASKED = -1e30


def agree(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether logits differ by at most `tolerance` of the largest, and mask the same ids; NaN never agrees."""
    if a.shape != b.shape:
        return False
    masked = a < MASKED
    if not torch.equal(masked, b < MASKED):
        return False
    a, b = a.masked_fill(masked, 0.0), b.masked_fill(masked, 0.0)
    largest = torch.maximum(a.abs().max(), b.abs().max())
    return bool(((a - b).abs().max() <= tolerance * largest) & largest.isfinite())


def difference(a: Tensor, b: Tensor) -> str:
    """A description of how logits that do not agree differ."""
    if a.shape != b.shape:
        return f"shape, {tuple(a.shape)} against {tuple(b.shape)}"
    return f"up to {float((a - b).abs().max()):.3g} from logits of up to {float(b.abs().max()):.3g}"


def amplification(largest: float) -> float:
    """The power of two, exact in any dtype, that scales hidden states so that logits of `largest` reach hundreds."""
    return 2.0 ** round(math.log2(_TEST_LOGIT / max(largest, 1e-30)))


@contextlib.contextmanager
def amplified(linear: nn.Linear, factor: float) -> Iterator[None]:
    """Inside, the hidden states [..., H] that `linear` gets are times `factor`."""
    scaling = linear.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        scaling.remove()


@dataclass
class Replacement:
    """A replacement forward; it stays if `stays` is set before the block ends."""

    stays: bool = False


@contextlib.contextmanager
def replaced_forward(linear: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[Replacement]:
    """Replace the forward of `linear`; the one before (its class's or its own) is restored on exit, unless `stays`."""
    before = linear.__dict__.get("forward")
    linear.forward = forward  # type: ignore[method-assign,assignment]
    replacement = Replacement()
    try:
        yield replacement
    finally:
        if not replacement.stays:
            del linear.forward
            if before is not None:
                linear.forward = before  # type: ignore[method-assign]
