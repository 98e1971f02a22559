"""Rows of targets in version 1 of the format: encoding, decoding, and the rules that stored values obey.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size. Arrays are as in `storage.format`, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.encoding import ROUNDING_NATS, decode_logprobs, encode_logprobs, round_mantissa
from storage.format.layout import VALUES, field_array
from storage.format.manifest.entry import TeacherEntry
from storage.format.targets import SparseTargets, leading_columns

Arrays = Mapping[str, NDArray[Any]]


def encode(entry: TeacherEntry, targets: SparseTargets) -> dict[str, NDArray[Any]]:
    """The stored arrays of targets that hold all fields, their ids in descending order."""
    floats = {"top_logprob": targets.logprobs[:, 0], **{name: getattr(targets, name) for name in VALUES.values()}}
    bits = entry.encoding.mantissa_bits
    assert bits is not None
    values: dict[str, NDArray[Any]] = {
        "token_ids": targets.token_ids,
        "kept": targets.kept,
        "certain": targets.certain,
        **{name: round_mantissa(value, bits) for name, value in floats.items() if value is not None},
    }
    step = entry.encoding.step_nats
    if step is not None:
        return {**values, "logprob_codes": encode_logprobs(targets.logprobs, values["top_logprob"], targets.kept, step)}
    # In memory an unused column is -inf; stored it is 0, because the format keeps infinity for one meaning.
    return {**values, "logprobs": np.where(targets.is_kept, targets.logprobs, np.float32(0))}


def decode(entry: TeacherEntry, start: int, arrays: Arrays) -> SparseTargets:
    """The targets of the positions `start .. start + T`."""
    logprobs = arrays[field_array(entry, "certain")]
    if entry.encoding.step_nats is not None:
        logprobs = decode_logprobs(logprobs, arrays["top_logprob"], entry.encoding.step_nats)
    valid = leading_columns(arrays["kept"], logprobs.shape[1])
    return SparseTargets(
        start=start,
        token_ids=arrays["token_ids"],
        kept=arrays["kept"],
        certain=arrays["certain"],
        logprobs=np.where(valid, logprobs, np.float32(-np.inf)),
        **{name: arrays.get(name) for name in VALUES.values()},
    )


def broken_rule(entry: TeacherEntry, arrays: Arrays) -> str | None:
    """The first rule that stored values break, or None; of the label, `storage.format.stored` knows the rule."""
    kept, certain, columns = arrays["kept"], arrays["certain"], entry.targets.k
    if (kept < 1).any() or (kept > columns).any() or (certain > kept).any():
        return "kept is not within 1..K, or certain exceeds it"
    broken = _broken_columns(entry, arrays)
    if broken:
        return broken
    top, tail = arrays["top_logprob"], arrays["log_tail"]
    if not (np.isfinite(top).all() and np.isfinite(arrays["entropy"]).all()):
        return "top_logprob or entropy is not finite"
    if (top > ROUNDING_NATS).any() or (tail > ROUNDING_NATS).any():
        return "a log-prob is positive: no probability exceeds 1"
    whole = certain == entry.vocabulary_size
    for name in ("log_tail", "log_tail_half"):
        tail = arrays[name]
        if not (np.isfinite(tail) | whole).all() or not np.isneginf(tail[whole]).all():
            return f"{name} is not finite, or not -inf where all ids are certain"
    return None


def _broken_columns(entry: TeacherEntry, arrays: Arrays) -> str | None:
    kept, ids, logprobs = arrays["kept"], arrays["token_ids"], arrays[field_array(entry, "certain")]
    # Most entries keep all columns of all rows; picking the valid ones out of them would cost as much as decoding.
    whole = not len(kept) or int(kept.min()) == entry.targets.k
    valid: Any = slice(None) if whole else leading_columns(kept, entry.targets.k)
    if ids[valid].size and ids[valid].max() >= entry.vocabulary_size:
        return f"a token id is not below the vocabulary size {entry.vocabulary_size}"
    if not whole and (ids[~valid] != np.iinfo(ids.dtype).max).any():
        return "an id beyond kept is not the type's maximum"
    if entry.encoding.kind == "codes":
        if logprobs[:, 0].any() or (not whole and logprobs[~valid].any()):
            return "column 0 of logprob_codes, or a column beyond kept, is not 0"
        return None
    if not np.isfinite(logprobs[valid]).all():
        return "a log-prob is not finite"
    falls = np.diff(logprobs, axis=1) <= 0
    if not (falls if whole else falls[valid[:, 1:]]).all():
        return "log-probs do not descend along a row"
    return None
