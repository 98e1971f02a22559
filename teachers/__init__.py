"""Dense models that predict the next token: scoring windows of tokens, and reducing logits to sparse targets.

The names in `__all__` are the public interface: `from teachers import HuggingFaceTeacher`, whose `load` returns a model
that scores windows, by the contract of `teachers.base.Teacher`. Importing the package imports nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teachers.base import Teacher
    from teachers.ensemble import EnsembleTeacher
    from teachers.huggingface.teacher import HuggingFaceTeacher
    from teachers.live import LiveTeacher, load_live
    from teachers.reduction.reduce import reduce_topk, reduce_varopt
    from teachers.reduction.varopt import Sampling, random_bits

_HOMES = {
    "EnsembleTeacher": "teachers.ensemble",
    "HuggingFaceTeacher": "teachers.huggingface.teacher",
    "LiveTeacher": "teachers.live",
    "Sampling": "teachers.reduction.varopt",
    "Teacher": "teachers.base",
    "load_live": "teachers.live",
    "random_bits": "teachers.reduction.varopt",
    "reduce_topk": "teachers.reduction.reduce",
    "reduce_varopt": "teachers.reduction.reduce",
}
__all__ = [
    "EnsembleTeacher",
    "HuggingFaceTeacher",
    "LiveTeacher",
    "Sampling",
    "Teacher",
    "load_live",
    "random_bits",
    "reduce_topk",
    "reduce_varopt",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'teachers' has no attribute {name!r}")
