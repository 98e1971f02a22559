"""The rules of the format for a row of targets, which writers and readers both check."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.manifest import TeacherEntry
from storage.format.targets import SparseTargets

_ROUNDING = 1e-3  # nats: far more than float32 and a rounded mantissa add to log 1


def broken_rule(targets: SparseTargets, entry: TeacherEntry, document_starts: NDArray[Any] | None = None) -> str | None:
    """The first rule of the format that decoded values break, or None; exposes fill values and foreign data.

    `document_starts` [D] gives, for entries with isolated documents, the positions that no token follows.
    """
    vocabulary_size = entry.vocabulary_size
    kept, certain, label = targets.kept, targets.certain, targets.label_logprob
    if (kept < 1).any() or (kept > targets.k).any() or (certain > kept).any():
        return "kept is not within 1..K, or certain exceeds it"
    broken = _broken_columns(targets, vocabulary_size)
    if broken:
        return broken
    if not (np.isfinite(targets.top_logprob).all() and np.isfinite(targets.entropy).all()):
        return "top_logprob or entropy is not finite"
    if (targets.top_logprob > _ROUNDING).any() or (targets.log_tail > _ROUNDING).any() or (label > _ROUNDING).any():
        return "a log-prob is positive: no probability exceeds 1"
    whole = certain == vocabulary_size
    for name in ("log_tail", "log_tail_half"):
        tail = getattr(targets, name)
        if not (np.isfinite(tail) | whole).all() or not np.isneginf(tail[whole]).all():
            return f"{name} is not finite, or not -inf where all ids are certain"
    if entry.targets.has_label_logprob:
        return _broken_label(targets, entry, document_starts)
    return None


def _broken_columns(targets: SparseTargets, vocabulary_size: int) -> str | None:
    # Most entries keep all columns of all rows; picking the valid ones out of them would cost as much as decoding.
    whole = not len(targets) or int(targets.kept.min()) == targets.k
    valid: Any = slice(None) if whole else np.arange(targets.k) < targets.kept[:, None]
    ids, codes, exact = targets.token_ids, targets.codes, targets.exact_logprobs
    if ids[valid].size and ids[valid].max() >= vocabulary_size:
        return f"a token id is not below the vocabulary size {vocabulary_size}"
    if not whole and (ids[~valid] != np.iinfo(ids.dtype).max).any():
        return "an id beyond kept is not the type's maximum"
    if codes is not None and (codes[:, 0].any() or (not whole and codes[~valid].any())):
        return "column 0 of logprob_codes, or a column beyond kept, is not 0"
    if exact is not None:
        if not np.isfinite(exact[valid]).all():
            return "a log-prob is not finite"
        falls = np.diff(exact, axis=1) <= 0
        if not (falls if whole else falls[valid[:, 1:]]).all():
            return "log-probs do not descend along a row"
    return None


def _broken_label(targets: SparseTargets, entry: TeacherEntry, document_starts: NDArray[Any] | None) -> str | None:
    unlabelled = np.isnan(targets.label_logprob)
    at_end = np.arange(targets.start, targets.stop) == entry.positions - 1
    if entry.windowing.isolate_documents and document_starts is not None:
        inside = slice(*np.searchsorted(document_starts, [targets.start + 1, targets.stop + 1]))
        at_end[document_starts[inside].astype(np.int64) - 1 - targets.start] = True
    if np.isinf(targets.label_logprob).any() or not unlabelled[at_end].all():
        return "label_logprob is infinite, or not NaN where no token follows"
    known = not entry.windowing.isolate_documents or document_starts is not None
    if known and (unlabelled & ~at_end).any():
        return "label_logprob is NaN where a token follows"
    return None
