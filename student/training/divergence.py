"""Finds the step at which a run diverged, without a synchronisation of its own at every step.

Whether a step's loss and gradient norm were finite is noted on the device; the note is read where the trainer
synchronises anyway, before it logs, evaluates or saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# float16 scales its loss by up to 2**16 and halves that at each step whose gradients overflow, which it skips. When
# this many were skipped in a row, no scale is left that could help.
_SKIPPED_STEPS = 32


@dataclass(frozen=True)
class BadStep:
    """The first of the steps that are not finite, with its loss (of all processes) and gradient norm."""

    step: int
    loss: float
    gradient_norm: float


class FiniteSteps:
    """The note of one process: float32 [4], in `_note`.

    bad steps in a row up to the last one; the first of them; its loss; its gradient norm
    """

    def __init__(self, skips_steps: bool) -> None:
        """skips_steps: whether a gradient scaler skips steps that are not finite, so that some of them are harmless."""
        self._allowed = _SKIPPED_STEPS if skips_steps else 0
        self._note: Tensor | None = None

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor | float | None) -> None:
        """Note the figures of a step; `loss` is this process's part of it, on the device."""
        if self._note is None:
            self._note = torch.zeros(4, device=loss.device)
        if isinstance(gradient_norm, DTensor):
            gradient_norm = gradient_norm.to_local()
        norm = torch.as_tensor(0.0 if gradient_norm is None else gradient_norm, device=loss.device)
        figures = torch.stack([loss.float(), norm.float()])
        begins = torch.cat([torch.full_like(figures[:1], step), figures])
        in_row, first = self._note[:1], self._note[1:]
        longer = torch.cat([in_row + 1, torch.where(in_row > 0, first, begins)])
        noted = torch.where(figures.isfinite().all(), 0.0, longer)
        self._note = torch.where(in_row > self._allowed, self._note, noted)

    def first_bad(self, accelerator: Accelerator) -> BadStep | None:
        """The step at which the run diverged, the same in all processes; all of them call this at the same step."""
        if self._note is None:
            return None
        notes: Tensor = accelerator.gather(self._note[None])
        bad = notes[notes[:, 0] > self._allowed]
        if not len(bad):
            return None
        _, step, loss, norm = bad[bad[:, 1] == bad[:, 1].min()].mean(0).tolist()
        return BadStep(int(step), loss, norm)


@torch.no_grad()
def are_finite(model: nn.Module, accelerator: Accelerator) -> bool:
    """Whether all weights are finite, in all processes; all of them call this at the same step."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    finite = [part.isfinite().all() for part in parts if part.numel()]
    whole = torch.stack(finite).all() if finite else torch.ones((), dtype=torch.bool, device=accelerator.device)
    return bool(accelerator.gather(whole.to(accelerator.device, torch.int32)[None]).all())
