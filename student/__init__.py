"""The student's side: stored targets in, a trained model out.

The names in `__all__` are the public interface: `from student import DistillationLoss`. Importing the package imports
nothing else, so that command lines can describe themselves without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student.data.batches import collate
    from student.data.windows import DistillationWindows, reading_order
    from student.job import StudentJob
    from student.labels import NOT_TRAINED
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member
    from student.models.loading import load_student
    from student.report import TrainingReport
    from student.training.bound_forward import bind_loss, unbind_loss
    from student.training.run import train
    from student.training.trainer import DistillationTrainer

_HOMES = {
    "DistillationLoss": "student.loss.distillation",
    "DistillationTrainer": "student.training.trainer",
    "DistillationWindows": "student.data.windows",
    "Member": "student.loss.teacher_targets",
    "NOT_TRAINED": "student.labels",
    "StudentJob": "student.job",
    "TrainingReport": "student.report",
    "bind_loss": "student.training.bound_forward",
    "collate": "student.data.batches",
    "load_student": "student.models.loading",
    "reading_order": "student.data.windows",
    "train": "student.training.run",
    "unbind_loss": "student.training.bound_forward",
}
__all__ = [
    "NOT_TRAINED",
    "DistillationLoss",
    "DistillationTrainer",
    "DistillationWindows",
    "Member",
    "StudentJob",
    "TrainingReport",
    "bind_loss",
    "collate",
    "load_student",
    "reading_order",
    "train",
    "unbind_loss",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'student' has no attribute {name!r}")
