"""Dense models that predict the next token: scoring windows of tokens, and reducing logits to sparse targets.

The names in `__all__` are the public interface: `from teachers import HuggingFaceTeacher`, whose `load` returns a model
that scores windows, by the contract of `teachers.base.Teacher`. Importing the package imports nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.lazy import public_names

if TYPE_CHECKING:
    from teachers.base import Teacher as Teacher
    from teachers.ensemble import EnsembleTeacher as EnsembleTeacher
    from teachers.huggingface.teacher import HuggingFaceTeacher as HuggingFaceTeacher
    from teachers.live import LiveTeacher as LiveTeacher
    from teachers.live import load_live as load_live
    from teachers.reduction.reduce import reduce_topk as reduce_topk
    from teachers.reduction.reduce import reduce_varopt as reduce_varopt
    from teachers.reduction.sampling_order import sampling_order as sampling_order
    from teachers.reduction.varopt import Sampling as Sampling
    from teachers.reduction.varopt import random_bits as random_bits
    from teachers.reduction.varopt import random_words as random_words

__all__, __getattr__ = public_names(__name__, {
    "teachers.base": ("Teacher",),
    "teachers.ensemble": ("EnsembleTeacher",),
    "teachers.huggingface.teacher": ("HuggingFaceTeacher",),
    "teachers.live": ("LiveTeacher", "load_live"),
    "teachers.reduction.reduce": ("reduce_topk", "reduce_varopt"),
    "teachers.reduction.sampling_order": ("sampling_order",),
    "teachers.reduction.varopt": ("Sampling", "random_bits", "random_words"),
})  # fmt: skip
