"""The rules of the format that a row of targets must keep; writers and readers both hold it to them.

What needs more than the row to be checked is not checked here: that `label_logprob` is NaN at the ends of isolated
documents, and only there.
"""

from __future__ import annotations

import numpy as np

from storage.manifest import TeacherEntry
from storage.records import SparseTargets


def broken_rule(targets: SparseTargets, entry: TeacherEntry) -> str | None:
    """The first rule of the format that decoded values break, or None: fill values and foreign data show here."""
    vocabulary_size = entry.vocabulary_size
    columns = np.arange(targets.k)
    kept, certain = targets.kept, targets.certain
    if (kept < 1).any() or (kept > targets.k).any() or (certain > kept).any():
        return "kept is not within 1..K, or certain exceeds it"
    valid = columns < kept[:, None]
    if (targets.token_ids[valid] >= vocabulary_size).any():
        return f"a token id is not below the vocabulary size {vocabulary_size}"
    if (targets.token_ids[~valid] != np.iinfo(targets.token_ids.dtype).max).any():
        return "an id beyond kept is not the type's maximum"
    if targets.codes is not None and (targets.codes[:, 0].any() or targets.codes[~valid].any()):
        return "column 0 of logprob_codes, or a column beyond kept, is not 0"
    if targets.exact_logprobs is not None and not np.isfinite(targets.exact_logprobs[valid]).all():
        return "a log-prob is not finite"
    if targets.exact_logprobs is not None:
        falls = np.diff(targets.exact_logprobs, axis=1) <= 0
        if not falls[valid[:, 1:]].all():
            return "log-probs do not descend along a row"
    if not (np.isfinite(targets.top_logprob).all() and np.isfinite(targets.entropy).all()):
        return "top_logprob or entropy is not finite"
    whole = certain == vocabulary_size
    for name in ("log_tail", "log_tail_half"):
        tail = getattr(targets, name)
        if not (np.isfinite(tail) | whole).all() or not np.isneginf(tail[whole]).all():
            return f"{name} is not finite, or not -inf where all ids are certain"
    label = targets.label_logprob
    if entry.targets.has_label_logprob:
        at_end = np.arange(targets.start, targets.stop) == entry.positions - 1
        unlabelled = np.isnan(label)
        if np.isinf(label).any() or not unlabelled[at_end].all():
            return "label_logprob is infinite, or not NaN at the last position"
        if not entry.windowing.isolate_documents and (unlabelled & ~at_end).any():
            return "label_logprob is NaN where a token follows"
    return None
