"""Figures of training for a log, summed on the device from step to step.

Legend: `M` members of the mixture.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import reduce
from torch import Tensor

from student.loss.distillation import DistillationLoss


class LossFigures:
    """Figures for a log, from the outputs of a bound model since the last ones."""

    def __init__(self, loss: DistillationLoss) -> None:
        self._loss = loss
        self._parts: Tensor | None = None

    def add(self, output: Any) -> None:
        """Count in an output of a bound model (`parts` [1 + M, 2]), on its device and without a synchronisation."""
        self._parts = output["parts"] if self._parts is None else self._parts + output["parts"]

    def take(self) -> dict[str, float]:
        """Cross-entropy and divergences, over all processes, which call it together; empty without outputs.

        Nats per trained token, a divergence per trained token with targets; left out without any. Besides, by name, the
        coefficients of the loss that change from step to step, as the last step had them.
        """
        if self._parts is None:
            return {}
        parts, self._parts = reduce(self._parts, "sum").tolist(), None
        loss = self._loss
        figures = {name: getattr(loss.current, name) for name in loss.objective.scheduled}
        figures |= {f"control_{name}": float(control.value) for name, control in loss.controls.items()}
        names = ["cross_entropy", *(loss.log_name(member.name) for member in loss.members)]
        return figures | {name: value / count for name, (count, value) in zip(names, parts, strict=True) if count}
