"""The student's side: stored targets in, a trained model out.

The names in `__all__` are the public interface: `from student import DistillationLoss`. Importing the package imports
nothing else, so that command lines can describe themselves without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.lazy import public_names

if TYPE_CHECKING:
    from student.data.batches import collate as collate
    from student.data.iterable import IterableWindows as IterableWindows
    from student.data.rollouts import rollout_field as rollout_field
    from student.data.windows import DistillationWindows as DistillationWindows
    from student.data.windows import reading_order as reading_order
    from student.job import StudentJob as StudentJob
    from student.labels import NOT_TRAINED as NOT_TRAINED
    from student.loss.distillation import DistillationLoss as DistillationLoss
    from student.loss.figures import LossFigures as LossFigures
    from student.loss.teacher_targets import Member as Member
    from student.models.loading import load_student as load_student
    from student.report import TrainingReport as TrainingReport
    from student.target_batch import StoredBatch as StoredBatch
    from student.target_batch import TargetBatch as TargetBatch
    from student.training.bound_forward import bind_loss as bind_loss
    from student.training.bound_forward import unbind_loss as unbind_loss
    from student.training.run import train as train
    from student.training.trainer import DistillationTrainer as DistillationTrainer

__all__, __getattr__ = public_names(__name__, {
    "student.data.batches": ("collate",),
    "student.data.iterable": ("IterableWindows",),
    "student.data.rollouts": ("rollout_field",),
    "student.data.windows": ("DistillationWindows", "reading_order"),
    "student.job": ("StudentJob",),
    "student.labels": ("NOT_TRAINED",),
    "student.loss.distillation": ("DistillationLoss",),
    "student.loss.figures": ("LossFigures",),
    "student.loss.teacher_targets": ("Member",),
    "student.models.loading": ("load_student",),
    "student.report": ("TrainingReport",),
    "student.target_batch": ("StoredBatch", "TargetBatch"),
    "student.training.bound_forward": ("bind_loss", "unbind_loss"),
    "student.training.run": ("train",),
    "student.training.trainer": ("DistillationTrainer",),
})  # fmt: skip
