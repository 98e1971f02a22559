"""The condition of offline on-policy distillation: the text is what the student itself sampled, before its training."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from storage import LogitCache
from storage.errors import IdentityMismatch, InputError
from storage.format.manifest.cache import Rollouts
from student.data.windows import DistillationWindows
from student.models.configuration import has_weights
from student.models.model_files import find_model, model_digests

_SAMPLE = "sample them from it (examples/sample_rollouts.py)"


def check_rollouts(windows: DistillationWindows, model: str, window_tokens: int) -> None:
    """Check that a stream is rollouts of a student as it is before training, by the digests of its files, and that each
    is read by itself and whole, as it was sampled, by the teachers and in windows of `window_tokens`.

    A new LoRA changes nothing that its base says, so the base is the student then. The student's files are read whole.
    Raises InputError for a stream that is nobody's rollouts, for windows that cross documents or cut them, or a student
    without weights; IdentityMismatch where another model made them.
    """
    cache, rollouts = windows.cache_url, windows.record.corpus.rollouts
    if rollouts is None:
        raise InputError(
            f"{cache}: loss lightning-opd trains on rollouts of the student, and the record of this stream names no "
            f"model that made it: {_SAMPLE}, and tokenize those"
        )
    if not windows.isolate_documents:
        raise InputError(
            f"{cache}: the teacher read a rollout behind others ({', '.join(windows.teachers)}), and the student "
            f"sampled it by itself: cache the teacher again, with --isolate-documents"
        )
    _check_whole(windows, window_tokens)
    if not has_weights(model):
        raise InputError(
            f"{model}: loss lightning-opd trains the model that made the rollouts in {cache} ({rollouts.source}), and "
            f"this is a new one: give that model with --model"
        )
    student = _digests(model)
    made_by = rollouts.digests
    differing = [
        f"{name}: theirs {made_by.get(name, 'none')}, the student's {student.get(name, 'none')}"
        for name in sorted(made_by.keys() | student.keys())
        if made_by.get(name) != student.get(name)
    ]
    if differing:
        raise IdentityMismatch(
            f"{cache}: its rollouts are of another model ({rollouts.source}) than the student {model}",
            differing,
            f"Loss lightning-opd is for a student's own rollouts: {_SAMPLE}, or train the model that made these",
        )


def _check_whole(windows: DistillationWindows, window_tokens: int) -> None:
    """A token is as likely as its rollout says only behind all of the rollout that comes before it."""
    starts = LogitCache.open(windows.cache_url).document_starts.astype(np.int64)
    longest = int(np.diff(starts, append=windows.record.corpus.positions).max()) - 1
    if longest > window_tokens:
        raise InputError(
            f"{windows.cache_url}: its longest rollout reads {longest:,} tokens, windows of {window_tokens:,} would "
            f"cut it: take --window-tokens {longest}"
        )
    for name, entry in windows.entries.items():
        if longest > entry.windowing.context_tokens:
            raise InputError(
                f"{windows.cache_url}: its longest rollout reads {longest:,} tokens, and teacher {name} read it in "
                f"windows of {entry.windowing.context_tokens:,}: cache the teacher again, with --context-tokens "
                f"{longest} or without"
            )


@functools.cache
def _digests(model: str) -> dict[str, str]:
    """A sweep asks once for each of its trials."""
    return model_digests(find_model(model))


def rollout_field(
    model: str, *, temperature: float, top_p: float, top_k: int, max_new_tokens: int, seed: int
) -> dict[str, Any]:
    """The field `rollout` of rows that a model directory or hub id samples: who it is, and how it was sampled.

    The model's files are read whole. Raises InputError for anything that is no model with safetensors weights.
    """
    files = find_model(model)
    source = files.source if files.adapter is None else files.adapter.directory.name
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
    made_by = {"source": source, **model_digests(files), **settings, "seed": seed}
    return Rollouts.model_validate(made_by).model_dump(mode="json")
