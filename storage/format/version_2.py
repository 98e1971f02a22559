"""Rows of targets in version 2 of the format: encoding, decoding, and the rules that stored values obey.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size, `m = kept - certain` sampled ids of a row, `P`
the mass of its certain ids and `R` that outside them. Arrays are as in `storage.format`, by name; `step` is the
encoding's `step_nats`.

What is stored of a row, and what a reader makes of it::

    ids            the certain ids by descending probability; then the least sampled id, and the difference of each
                   further one to the one before:      id_i = sum of ids over columns certain .. i
    mass_code      round(log(R / P) / step):           x = step * mass_code, log R = -log(1 + exp(-x)),
                                                       log P = -log(1 + exp(x)), so that P + R = 1
    certain_codes  as in version 1, over the certain ids, the sum of all being P:
                   logprob_i = log P - log sum_j exp(-step * cumsum_j) - step * cumsum_i
    sampled_codes  each by itself, rounded up or down at random so that the mean of 1 / p is that of the teacher:
                   logprob_i = tau * (log R_tau - log m) + step - sampled_step * code_i

with tau the temperature that ids were sampled for and R_tau the sum of p**(1/tau) outside the certain ids, as decoded.
No sampled id exceeds its threshold (R_tau / m)**tau, and the `step` leaves room for the rounding of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.chance import ROUNDING, ROUNDING_AGAIN, uniforms
from storage.format.encoding import MAX_UINT16, encode_logprobs
from storage.format.layout import field_array
from storage.format.manifest import TeacherEntry
from storage.format.targets import SparseTargets, leading_columns

Arrays = Mapping[str, NDArray[Any]]

# Codes of 16 bits with a meaning of their own; the largest one is the fill value, which is never stored.
NONE = -(1 << 15)  # no row of targets; of the label, no next token
NOTHING_OUTSIDE = NONE + 1  # log 0: no mass outside the certain ids
NOTHING_INSIDE = (1 << 15) - 2  # of the mass alone: no id is certain
_LEAST, _MOST = NOTHING_OUTSIDE + 1, NOTHING_INSIDE - 1
_FLOAT32 = 2.0**-23  # of a number: more than its rounding to float32

ROUNDING_NATS = 1e-3  # of an exact log-prob: far more than float32 adds to log 1
_VALUES = {"tail": "log_tail", "half-tail": "log_tail_half", "label": "label_logprob", "entropy": "entropy"}


def encode(entry: TeacherEntry, targets: SparseTargets) -> dict[str, NDArray[Any]]:
    """The stored arrays of targets that hold the entry's fields; sampled ids may come in any order."""
    targets = _sampled_ids_ascending(targets)
    certain, sampled = targets.is_certain, targets.is_kept & ~targets.is_certain
    ids = targets.token_ids.astype(np.int64)
    first = np.arange(targets.k) == targets.certain[:, None]
    before = np.where(first, 0, np.roll(ids, 1, axis=1))
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.where(sampled, ids - before, np.where(certain, ids, 0)).astype(targets.token_ids.dtype),
        "kept": targets.kept,
        "certain": targets.certain,
    }
    codes = _codes if entry.encoding.step_nats is not None else _floats
    return arrays | codes(entry, targets, certain, sampled)


def _sampled_ids_ascending(targets: SparseTargets) -> SparseTargets:
    if np.array_equal(targets.certain, targets.kept):
        return targets
    columns = np.arange(targets.k)
    key = np.where(targets.is_certain, columns - targets.k, targets.token_ids.astype(np.int64))
    order = np.where(targets.is_kept, key, columns + (1 << 32)).argsort(axis=1)
    per_id = {name: np.take_along_axis(getattr(targets, name), order, axis=1) for name in ("token_ids", "logprobs")}
    return SparseTargets(targets.start, **{**targets.arrays(), **per_id})


def _floats(
    entry: TeacherEntry, targets: SparseTargets, certain: NDArray[np.bool_], sampled: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    values = {field: getattr(targets, name) for field, name in _VALUES.items() if entry.targets.has(field)}
    values["certain"] = np.where(certain, targets.logprobs, np.float32(0))
    if entry.targets.has("sampled-logprobs"):
        values["sampled-logprobs"] = np.where(sampled, targets.logprobs, np.float32(0))
    return {field_array(entry, field): array for field, array in values.items()}


def _codes(
    entry: TeacherEntry, targets: SparseTargets, certain: NDArray[np.bool_], sampled: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    step, value_step = entry.encoding.step_nats, entry.encoding.value_step_nats
    assert step is not None
    assert value_step is not None
    found: dict[str, NDArray[Any]] = {
        "certain": encode_logprobs(targets.logprobs, targets.logprobs[:, 0], targets.certain, step)
    }
    for field in ("half-tail", "label", "entropy"):
        if entry.targets.has(field):
            found[field] = _value_codes(getattr(targets, _VALUES[field]), value_step)
    if entry.targets.has("tail"):
        found["tail"] = _mass_codes(targets, certain, step)
    if entry.targets.has("sampled-logprobs"):
        found["sampled-logprobs"] = _sampled_codes(entry, targets, found, sampled)
    return {field_array(entry, field): codes for field, codes in found.items()}


def _value_codes(values: NDArray[np.float32], step: float) -> NDArray[np.int16]:
    finite = np.where(np.isfinite(values), values, np.float32(0)).astype(np.float64)
    codes = np.rint(finite / step).clip(_LEAST, _MOST)
    codes = np.where(np.isneginf(values), NOTHING_OUTSIDE, codes)
    return np.where(np.isnan(values), NONE, codes).astype(np.int16)


def _mass_codes(targets: SparseTargets, certain: NDArray[np.bool_], step: float) -> NDArray[np.int16]:
    assert targets.log_tail is not None
    inside = np.where(certain, targets.logprobs, np.float32(-np.inf)).astype(np.float64)
    log_head = np.logaddexp.reduce(inside, axis=1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        odds = (targets.log_tail - log_head) / step
    codes = np.where(odds < _LEAST, NOTHING_OUTSIDE, np.rint(odds).clip(_LEAST, _MOST))
    codes = np.where(targets.certain == 0, NOTHING_INSIDE, codes)
    return np.where(targets.kept == 0, NONE, codes).astype(np.int16)


def _sampled_codes(
    entry: TeacherEntry, targets: SparseTargets, found: Arrays, sampled: NDArray[np.bool_]
) -> NDArray[np.uint16]:
    """Codes c of log-probs between reference - step * c and the next: the lower one (larger p) with the probability
    that makes the mean of 1 / p exact, ``(exp(d) - 1) / (exp(step) - 1)`` for the next, d nats below the reference."""
    step = entry.encoding.sampled_step_nats
    assert step is not None
    masses = {name: _decoded_value(entry, name, found[name]) for name in ("tail", "half-tail") if name in found}
    below = (_reference(entry, targets.kept, targets.certain, masses) - targets.logprobs) / step
    below = np.where(sampled, below, 0.0).clip(0.0)
    # A log-prob that was decoded is the same code again, as near as its float32 can tell.
    near = np.abs(below - np.rint(below)) * step <= _FLOAT32 * np.abs(targets.logprobs)
    below = np.where(near, np.rint(below), below)
    codes = np.floor(below)
    chance = np.expm1((below - codes) * step) / np.expm1(step)
    drawn = uniforms(*_rounding_key(entry), targets.start, targets.stop, targets.k)
    rounded: NDArray[np.float64] = (codes + (drawn < chance)).clip(max=MAX_UINT16 - 1)
    return rounded.astype(np.uint16)


def _rounding_key(entry: TeacherEntry) -> tuple[int, int]:
    """Seed and use of the random numbers of rounding. What was rounded in an entry's source is rounded by others here:
    the mean would be off if both were the same."""
    if entry.derived_from is None:
        return entry.targets.seed or 0, ROUNDING
    return int(entry.derived_from[:16], 16), ROUNDING_AGAIN


def _reference(
    entry: TeacherEntry, kept: NDArray[Any], certain: NDArray[Any], masses: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The log-prob [T, 1] from which those of sampled ids are counted down."""
    temperature = entry.targets.temperature
    outside = masses["tail" if temperature == 1.0 else "half-tail"]
    number = np.maximum(kept.astype(np.int64) - certain, 1)
    step = entry.encoding.step_nats or 0.0
    reference: NDArray[np.float64] = (temperature * (outside - np.log(number)) + step)[:, None]
    return reference


def decode(entry: TeacherEntry, start: int, arrays: Arrays) -> SparseTargets:
    """The targets of the positions `start .. start + T`."""
    kept, certain, raw = arrays["kept"], arrays["certain"], arrays["ids"]
    is_kept, is_certain = leading_columns(kept, raw.shape[1]), leading_columns(certain, raw.shape[1])
    sums = np.where(is_certain, 0, raw).cumsum(axis=1, dtype=np.int64)
    ids = np.where(is_certain, raw, sums)
    values = {field: decoded_value(entry, field, arrays) for field in _VALUES}
    logprobs = _logprobs(entry, arrays, values, is_kept, is_certain)
    return SparseTargets(
        start=start,
        token_ids=np.where(is_kept, ids, np.iinfo(raw.dtype).max).astype(raw.dtype),
        kept=kept,
        certain=certain,
        logprobs=logprobs.astype(np.float32),
        **{_VALUES[field]: None if value is None else value.astype(np.float32) for field, value in values.items()},
    )


def _logprobs(
    entry: TeacherEntry,
    arrays: Arrays,
    values: Mapping[str, NDArray[np.float64] | None],
    is_kept: NDArray[np.bool_],
    is_certain: NDArray[np.bool_],
) -> NDArray[np.float64]:
    heads = arrays[field_array(entry, "certain")]
    step = entry.encoding.step_nats
    if step is None:
        found = np.where(is_certain, heads, -np.inf)
    else:
        found = np.where(is_certain, -step * heads.cumsum(axis=1, dtype=np.int64), -np.inf)
        total = np.logaddexp.reduce(found, axis=1, initial=-np.inf)
        total = np.where(np.isneginf(total), 0.0, total) - log_head(entry, arrays)
        found = found - total[:, None]
    if not entry.targets.has("sampled-logprobs"):
        return np.where(is_kept & ~is_certain, np.nan, found)
    tails = arrays[field_array(entry, "sampled-logprobs")]
    if step is None:
        return np.where(is_kept & ~is_certain, tails, found)
    masses = {name: value for name, value in values.items() if value is not None}
    below = (
        _reference(entry, arrays["kept"], arrays["certain"], masses) - (entry.encoding.sampled_step_nats or 0) * tails
    )
    return np.where(is_kept & ~is_certain, below, found)


def decoded_value(entry: TeacherEntry, field: str, arrays: Arrays) -> NDArray[np.float64] | None:
    """A number per position [T] from its codes, NaN for "none"; None where the entry does not have it."""
    if not entry.targets.has(field):
        return None
    return _decoded_value(entry, field, arrays[field_array(entry, field)])


def _decoded_value(entry: TeacherEntry, field: str, stored: NDArray[Any]) -> NDArray[np.float64]:
    if entry.encoding.step_nats is None:
        return stored.astype(np.float64)
    step = entry.encoding.step_nats if field == "tail" else entry.encoding.value_step_nats
    assert step is not None
    values = step * stored.astype(np.float64)
    if field == "tail":
        values = np.where(stored == NOTHING_INSIDE, 0.0, -np.logaddexp(0.0, -values))
    values = np.where(stored == NOTHING_OUTSIDE, -np.inf, values)
    return np.where(stored == NONE, np.nan, values)


def log_head(entry: TeacherEntry, arrays: Arrays) -> NDArray[np.float64]:
    """Log of the mass of the certain ids [T]; 0 where nothing is outside, or the tail is not known."""
    if not entry.targets.has("tail"):
        return np.zeros(len(arrays["kept"]))
    stored = arrays[field_array(entry, "tail")]
    odds = (entry.encoding.step_nats or 0.0) * stored.astype(np.float64)
    return np.where((stored == NOTHING_OUTSIDE) | (stored == NONE), 0.0, -np.logaddexp(0.0, odds))


def broken_rule(entry: TeacherEntry, arrays: Arrays) -> str | None:
    """The first rule that stored values break, or None; of the label, `storage.format.stored` knows the rule."""
    kept, certain = arrays["kept"], arrays["certain"]
    if (kept > entry.targets.k).any() or (certain > kept).any():
        return "kept exceeds K, or certain exceeds kept"
    if entry.targets.positions == "all" and (kept < 1).any():
        return "a row is without targets, and the entry says that none is"
    if entry.targets.method == "top-k" and (certain != kept).any():
        return "an id is sampled in an entry of top-k targets"
    return _broken_columns(entry, arrays) or _broken_values(entry, arrays)


def _broken_columns(entry: TeacherEntry, arrays: Arrays) -> str | None:
    kept, certain, ids = arrays["kept"], arrays["certain"], arrays["ids"]
    k = entry.targets.k
    is_certain = leading_columns(certain, k)
    if (ids >= entry.vocabulary_size).any() or (
        # All columns together are at least the largest sampled id.
        np.where(is_certain, 0, ids).sum(axis=1, dtype=np.uint64) >= entry.vocabulary_size
    ).any():
        return f"a token id is not below the vocabulary size {entry.vocabulary_size}"
    whole = not len(kept) or int(kept.min()) == k
    if not whole and ids[~leading_columns(kept, k)].any():
        return "an id beyond kept is not 0"
    if entry.made != "projected" and ((ids == 0) & (np.arange(k) > certain[:, None]) & leading_columns(kept, k)).any():
        return "an id comes twice in a row"
    heads = arrays[field_array(entry, "certain")]
    if np.where(is_certain, 0, heads).any():
        return f"{field_array(entry, 'certain')} is not 0 beyond the certain ids"
    if entry.encoding.kind == "codes" and heads[:, 0].any():
        return "column 0 of certain_codes is not 0"
    if entry.encoding.kind == "float32":
        if not np.isfinite(heads).all() or (heads > ROUNDING_NATS).any():
            return "a log-prob is not finite, or positive"
        if ((np.diff(heads, axis=1) > 0) & is_certain[:, 1:]).any():
            return "log-probs do not descend along a row"
    if entry.targets.has("sampled-logprobs"):
        tails = arrays[field_array(entry, "sampled-logprobs")]
        if np.where(leading_columns(kept, k) & ~is_certain, 0, tails).any():
            return f"{field_array(entry, 'sampled-logprobs')} is not 0 outside the sampled ids"
        if entry.encoding.kind == "float32" and not (np.isfinite(tails).all() and (tails <= ROUNDING_NATS).all()):
            return "a log-prob is not finite, or positive"
    return None


def _broken_values(entry: TeacherEntry, arrays: Arrays) -> str | None:
    """The rules of the numbers per position, which hold of floats and of codes."""
    kept, certain = arrays["kept"], arrays["certain"]
    if entry.encoding.kind == "codes":
        for field in _VALUES:
            if entry.targets.has(field) and (arrays[field_array(entry, field)] == NOTHING_INSIDE + 1).any():
                return f"{field_array(entry, field)} holds the fill value"
    for field in ("tail", "half-tail", "entropy"):
        values = decoded_value(entry, field, arrays)
        if values is None:
            continue
        name = field_array(entry, field)
        if (np.isnan(values) != (kept == 0)).any():
            return f"{name} is there in a row without targets, or none in a row that has some"
        # A teacher that masks ids has no mass outside the others: then none of them was sampled.
        may_be_empty = certain == kept if field != "entropy" else np.zeros(len(kept), dtype=bool)
        if np.isposinf(values).any() or (np.isneginf(values) & ~may_be_empty).any():
            return f"{name} is infinite where it cannot be"
        if field != "entropy" and not np.isneginf(values[certain == entry.vocabulary_size]).all():
            return f"{name} is not -inf where all ids are certain"
        if (field == "entropy" and (values < -ROUNDING_NATS).any()) or (
            field == "tail" and (values > ROUNDING_NATS).any()
        ):
            return f"{name} is out of range: an entropy is not negative, and no mass exceeds 1"
    if entry.targets.has("tail") and entry.encoding.kind == "codes":
        inside = arrays[field_array(entry, "tail")] == NOTHING_INSIDE
        if (inside != ((certain == 0) & (kept > 0))).any():
            return "mass_code says that no id is certain, or does not where it must"
    return None
