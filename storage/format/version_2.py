"""Rows of targets in version 2 of the format: encoding, decoding, and the rules that stored values obey.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size. `storage.format`, "Targets in version 2", has
the arrays, by name, the equations by which they are read, and the errors of what is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.chance import ROUNDING, ROUNDING_AGAIN, uniforms
from storage.format.encoding import MAX_UINT16, ROUNDING_NATS, encode_logprobs, token_id_dtype
from storage.format.layout import VALUES, field_array
from storage.format.manifest.entry import TeacherEntry
from storage.format.targets import SparseTargets, leading_columns

Arrays = Mapping[str, NDArray[Any]]

# Codes of 16 bits with a meaning of their own; the largest one is the fill value, which is never stored.
NONE = -(1 << 15)  # no row of targets; of the label, no next token
NOTHING_OUTSIDE = NONE + 1  # log 0: no mass outside the certain ids
NOTHING_INSIDE = (1 << 15) - 2  # of the mass alone: no id is certain
_LEAST, _MOST = NOTHING_OUTSIDE + 1, NOTHING_INSIDE - 1
_FLOAT32 = 2.0**-23  # of a number: more than its rounding to float32


def encode(entry: TeacherEntry, targets: SparseTargets) -> dict[str, NDArray[Any]]:
    """The stored arrays of targets that hold the entry's fields; sampled ids may come in any order."""
    targets = _sampled_ids_ascending(targets)
    certain, kept = targets.is_certain, targets.is_kept
    ids = targets.token_ids
    # Before the least sampled id stands 0; the differences beyond `kept`, which may wrap around, are not stored.
    differences = np.diff(ids * ~certain, axis=1, prepend=ids.dtype.type(0))
    codes = _codes if entry.encoding.step_nats is not None else _floats
    return {
        "ids": np.where(certain, ids, differences) * kept,
        "kept": targets.kept,
        "certain": targets.certain,
        **{
            field_array(entry, field): values
            for field, values in codes(entry, targets, certain, kept & ~certain).items()
        },
    }


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
    values = {field: getattr(targets, name) for field, name in VALUES.items() if entry.targets.has(field)}
    values["certain"] = np.where(certain, targets.logprobs, np.float32(0))
    if entry.targets.has("sampled-logprobs"):
        values["sampled-logprobs"] = np.where(sampled, targets.logprobs, np.float32(0))
    return values


def _codes(
    entry: TeacherEntry, targets: SparseTargets, certain: NDArray[np.bool_], sampled: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    step, value_step = entry.encoding.step_nats, entry.encoding.value_step_nats
    assert step is not None
    assert value_step is not None
    found: dict[str, NDArray[Any]] = {}
    if targets.k:
        found["certain"] = encode_logprobs(targets.logprobs, targets.logprobs[:, 0], targets.certain, step)
    for field in ("half-tail", "label", "entropy"):
        if entry.targets.has(field):
            found[field] = _value_codes(getattr(targets, VALUES[field]), value_step)
    if entry.targets.has("tail"):
        found["tail"] = _mass_codes(targets, certain, step)
    if entry.targets.has("sampled-logprobs"):
        found["sampled-logprobs"] = _sampled_codes(entry, targets, found, sampled)
    return found


def _value_codes(values: NDArray[np.float32], step: float) -> NDArray[np.int16]:
    finite = np.where(np.isfinite(values), values, np.float32(0)).astype(np.float64)
    codes = np.rint(finite / step).clip(_LEAST, _MOST)
    codes = np.where(np.isneginf(values), NOTHING_OUTSIDE, codes)
    return np.where(np.isnan(values), NONE, codes).astype(np.int16)


def _mass_codes(targets: SparseTargets, certain: NDArray[np.bool_], step: float) -> NDArray[np.int16]:
    assert targets.log_tail is not None
    top = np.where(targets.certain > 0, targets.logprobs[:, 0], 0.0)[:, None]
    # In float64, although the targets are float32: a last bit that differs by machine hardly ever changes a code.
    below = np.subtract(targets.logprobs, top, dtype=np.float64)
    inside = np.exp(below, where=certain, out=np.zeros(certain.shape))
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = targets.log_tail - (top[:, 0] + np.log(inside.sum(axis=1)))
        codes = np.rint(odds / step).clip(_LEAST, _MOST)
    codes = np.where(np.isneginf(targets.log_tail), NOTHING_OUTSIDE, codes)
    codes = np.where(targets.certain == 0, NOTHING_INSIDE, codes)
    return np.where(targets.kept == 0, NONE, codes).astype(np.int16)


def _sampled_codes(
    entry: TeacherEntry, targets: SparseTargets, found: Arrays, sampled: NDArray[np.bool_]
) -> NDArray[np.uint16]:
    """Codes c of log-probs between reference - step * c and the next: the lower one (larger p) with the probability
    that makes the mean of 1 / p exact, ``(exp(d) - 1) / (exp(step) - 1)`` for the next, d nats below the reference."""
    step = entry.encoding.sampled_step_nats
    assert step is not None
    masses = {field: decoded_value(entry, field, found[field]) for field in ("tail", "half-tail") if field in found}
    logprobs = np.where(sampled, targets.logprobs, np.float32(0))  # of others, both sides may be infinite
    below = (_reference(entry, targets.kept, targets.certain, masses) - logprobs) / step
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


def _reference(entry: TeacherEntry, kept: NDArray[Any], certain: NDArray[Any], masses: Arrays) -> NDArray[np.float64]:
    """The log-prob [T, 1] from which those of sampled ids are counted down: their threshold, which none exceeds, and
    one step above it, since the threshold is rounded."""
    temperature = entry.targets.temperature
    outside = masses["tail" if temperature == 1.0 else "half-tail"]
    number = np.maximum(kept.astype(np.int64) - certain, 1)
    step = entry.encoding.step_nats or 0.0
    reference: NDArray[np.float64] = (temperature * (outside - np.log(number)) + step)[:, None]
    return reference


def decode(entry: TeacherEntry, start: int, arrays: Arrays) -> SparseTargets:
    """The targets of the positions `start .. start + T`."""
    if not entry.targets.k:
        return _labels_alone(entry, start, arrays[field_array(entry, "label")])
    kept, certain, raw = arrays["kept"], arrays["certain"], arrays["ids"]
    is_kept, is_certain = leading_columns(kept, raw.shape[1]), leading_columns(certain, raw.shape[1])
    ids = np.where(is_certain, raw, np.cumsum(raw * ~is_certain, axis=1, dtype=raw.dtype))
    values = {
        field: decoded_value(entry, field, arrays[field_array(entry, field)])
        for field in VALUES
        if entry.targets.has(field)
    }
    logprobs = np.where(is_certain, _certain_logprobs(entry, arrays, is_certain), -np.inf)
    if not np.array_equal(certain, kept):
        logprobs = np.where(is_kept & ~is_certain, _sampled_logprobs(entry, arrays, values), logprobs)
    return SparseTargets(
        start=start,
        token_ids=np.where(is_kept, ids, np.iinfo(raw.dtype).max).astype(raw.dtype),
        kept=kept,
        certain=certain,
        logprobs=logprobs.astype(np.float32),
        **{VALUES[field]: value.astype(np.float32) for field, value in values.items()},
    )


def _labels_alone(entry: TeacherEntry, start: int, stored: NDArray[Any]) -> SparseTargets:
    none = np.zeros(len(stored), dtype=np.uint16)
    return SparseTargets(
        start=start,
        token_ids=np.empty((len(stored), 0), dtype=token_id_dtype(entry.vocabulary_size)),
        kept=none,
        certain=none,
        logprobs=np.empty((len(stored), 0), dtype=np.float32),
        label_logprob=decoded_value(entry, "label", stored).astype(np.float32),
    )


def _certain_logprobs(entry: TeacherEntry, arrays: Arrays, is_certain: NDArray[np.bool_]) -> NDArray[Any]:
    stored = arrays[field_array(entry, "certain")]
    if entry.encoding.step_nats is None:
        return stored
    below = np.cumsum(stored, axis=1, dtype=np.uint32) * -entry.encoding.step_nats
    # Column 0 adds 1 to the sum; where no id is certain nothing does, and nothing is read from the row.
    total = np.exp(below, where=is_certain, out=np.zeros(below.shape)).sum(axis=1).clip(1.0)
    found: NDArray[np.float64] = below + (_log_head(entry, arrays) - np.log(total))[:, None]
    return found


def _sampled_logprobs(entry: TeacherEntry, arrays: Arrays, values: Arrays) -> NDArray[Any] | float:
    if not entry.targets.has("sampled-logprobs"):
        return np.nan
    stored = arrays[field_array(entry, "sampled-logprobs")]
    if entry.encoding.sampled_step_nats is None:
        return stored
    reference = _reference(entry, arrays["kept"], arrays["certain"], values)
    return reference - entry.encoding.sampled_step_nats * stored


def decoded_value(entry: TeacherEntry, field: str, stored: NDArray[Any]) -> NDArray[Any]:
    """The numbers per position [T] that stored ones stand for, NaN for "none"; codes as float64."""
    step = entry.encoding.step_nats if field == "tail" else entry.encoding.value_step_nats
    if entry.encoding.value_step_nats is None:
        return stored
    assert step is not None
    values = step * stored.astype(np.float64)
    if field == "tail":
        values = np.where(stored == NOTHING_INSIDE, 0.0, -np.logaddexp(0.0, -values))
    values = np.where(stored == NOTHING_OUTSIDE, -np.inf, values)
    return np.where(stored == NONE, np.nan, values)


def _log_head(entry: TeacherEntry, arrays: Arrays) -> NDArray[np.float64]:
    """Log of the mass of the certain ids [T]; 0 where nothing is outside, or the tail is not known."""
    if not entry.targets.has("tail"):
        return np.zeros(len(arrays["kept"]))
    stored = arrays[field_array(entry, "tail")]
    odds = (entry.encoding.step_nats or 0.0) * stored.astype(np.float64)
    return np.where(stored <= NOTHING_OUTSIDE, 0.0, -np.logaddexp(0.0, odds))


def broken_rule(entry: TeacherEntry, arrays: Arrays) -> str | None:
    """The first rule that stored values break, or None; of the label, `storage.format.stored` knows the rule."""
    if not entry.targets.k:
        return _fill_value(entry, "label", arrays)
    kept, certain = arrays["kept"], arrays["certain"]
    if (kept > entry.targets.k).any() or (certain > kept).any():
        return "kept exceeds K, or certain exceeds kept"
    if entry.targets.in_every_row and not kept.all():
        return "a row is without targets, and the entry says that none is"
    if entry.targets.method == "top-k" and not np.array_equal(certain, kept):
        return "an id is sampled in an entry of top-k targets"
    return _broken_ids(entry, arrays) or _broken_logprobs(entry, arrays) or _broken_values(entry, arrays)


def _broken_ids(entry: TeacherEntry, arrays: Arrays) -> str | None:
    kept, certain, ids = arrays["kept"], arrays["certain"], arrays["ids"]
    k, size = entry.targets.k, entry.vocabulary_size
    outside = f"a token id is not below the vocabulary size {size}"
    if ids.max(initial=0) >= size:
        return outside
    # Most entries keep all columns of all rows, and many sample none: they are spared the passes over [T, K].
    whole = int(kept.min(initial=k)) == k
    if not whole and (ids * ~leading_columns(kept, k)).any():
        return "an id beyond kept is not 0"
    if np.array_equal(certain, kept):
        return None
    is_certain = leading_columns(certain, k)
    # The sum of the differences is the largest sampled id; K of them below V stay below 2**32 where ids are uint16.
    if (ids * ~is_certain).sum(axis=1, dtype=np.uint32 if ids.itemsize == 2 else np.uint64).max(initial=0) >= size:
        return outside
    if entry.made != "projected":
        # An id that is the difference to no other may be 0, that of column `certain`.
        differences = np.arange(k, dtype=np.uint16) > certain[:, None]
        if ((ids == 0) & differences & leading_columns(kept, k)).any():
            return "an id comes twice in a row"
    return None


def _broken_logprobs(entry: TeacherEntry, arrays: Arrays) -> str | None:
    kept, certain, k = arrays["kept"], arrays["certain"], entry.targets.k
    is_certain = leading_columns(certain, k)
    columns = {"certain": is_certain}
    if entry.targets.has("sampled-logprobs"):
        columns["sampled-logprobs"] = leading_columns(kept, k) & ~is_certain
    for field, own in columns.items():
        name = field_array(entry, field)
        stored = arrays[name]
        if entry.encoding.kind == "float32" and not (np.isfinite(stored).all() and (stored <= ROUNDING_NATS).all()):
            return "a log-prob is not finite, or positive"
        if (stored * ~own).any():
            return f"{name} is not 0 in a column that is none of its own"
    heads = arrays[field_array(entry, "certain")]
    if entry.encoding.kind == "codes" and heads[:, 0].any():
        return "column 0 of certain_codes is not 0"
    if entry.encoding.kind == "float32" and ((heads[:, 1:] > heads[:, :-1]) & is_certain[:, 1:]).any():
        return "log-probs do not descend along a row"
    return None


def _broken_values(entry: TeacherEntry, arrays: Arrays) -> str | None:
    """The rules of the numbers per position, as they are stored."""
    kept, certain = arrays["kept"], arrays["certain"]
    codes = entry.encoding.kind == "codes"
    for field in VALUES:
        if not entry.targets.has(field):
            continue
        name = field_array(entry, field)
        stored = arrays[name]
        filled = _fill_value(entry, field, arrays)
        if filled is not None:
            return filled
        if field == "label":
            continue
        none, empty = (stored == NONE, stored == NOTHING_OUTSIDE) if codes else (np.isnan(stored), np.isneginf(stored))
        if not np.array_equal(none, kept == 0):
            return f"{name} is there in a row without targets, or none in a row that has some"
        # A teacher that masks ids has no mass outside the others: then none of them was sampled.
        if (stored == np.inf).any() or (empty & (certain < kept) if field != "entropy" else empty).any():
            return f"{name} is infinite where it cannot be"
        if field != "entropy" and not empty[certain == entry.vocabulary_size].all():
            return f"{name} is not -inf where all ids are certain"
        if field == "entropy" and ((stored < (0 if codes else -ROUNDING_NATS)) & ~none).any():
            return f"{name} is negative"
        if field == "tail" and not codes and (stored > ROUNDING_NATS).any():
            return f"{name} is positive: no probability exceeds 1"
        if field == "tail" and codes and not np.array_equal(stored == NOTHING_INSIDE, (certain == 0) & (kept > 0)):
            return f"{name} says that no id is certain, or does not where it must"
    return None


def _fill_value(entry: TeacherEntry, field: str, arrays: Arrays) -> str | None:
    """What is wrong with the codes of a field that hold the fill value, or None."""
    name = field_array(entry, field)
    if entry.encoding.kind == "codes" and (arrays[name] > NOTHING_INSIDE).any():
        return f"{name} holds the fill value"
    return None
