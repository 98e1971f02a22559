"""The numbers of imported rows, checked, and as log-probs.

Legend: `R` rows, `K` columns, `V` vocabulary size. With `S` the sum of a row's probabilities::

    log-probs or probabilities over the vocabulary    S <= 1, and the mass outside the ids is 1 - S
    without the normaliser                            log-prob = value - log sum exp(values); nothing is known outside

The difference 1 - S is taken in float64, so its error is that of the numbers themselves, which files have in float32
or less. A sum that exceeds 1 by the format's rounding is made 1. Numbers that were decoded with wrong settings, and ids
that were sampled, leave more mass to the others than these can have (`logit_cache.fidelity.row_bounds`).

Numbers of a fitted curve are off by nats. Their mean is right, and takes the place of the least. Where they make a row
exceed a sum of 1 by more than rounding, they are scaled to what the exact ones leave.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logit_cache.fidelity.row_bounds import least_logprob, log_sums, most_outside
from logit_cache.importing.document import NO_ID, Rows, Values
from storage.errors import InputError

MOST_DROPPED_MASS = 0.01
# Sums of rows that were normalised among their own ids, by the precision of float32.
_CLOSED_NATS = 1e-5
# Of rows that exceed a sum of 1, and of those whose mass outside exceeds its bound: more are no accident of a format's
# rounding, or of its fits.
_MOST_OVER = {False: 0.0, True: 0.5}
_MOST_UNBOUNDED = {False: 0.01, True: 0.5}
# Of the sum of a row's exact numbers, where they leave nothing to the fitted ones but their rounding.
_LEAST_ROOM = 0.01


@dataclass(frozen=True)
class Cleaned:
    """Rows with the ids that have a number first, largest first, equal ones by ascending id.

    ids        int64 [R, K]    NO_ID beyond `kept`
    values     float64 [R, K]  -inf beyond `kept`
    kept       int64 [R]
    strange    float64 [R, 2]  of the ids outside the vocabulary, which are left out: the log of the sum of exp of their
               numbers, and the log of the sum of the numbers
    dropped    how many ids were left out
    fitted     bool [R, K], those of a curve; None: all are exact
    """

    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    kept: NDArray[np.int64]
    strange: NDArray[np.float64]
    dropped: int
    fitted: NDArray[np.bool_] | None


def cleaned(rows: Rows, vocabulary_size: int, where: str, probabilities: bool) -> Cleaned:
    """Raises InputError for an infinite number, and for an id that comes twice in a row.

    probabilities: whether the numbers may be such. Where they look so, an id of probability 0 has none: rows of one
    length are filled with those, of any id.
    """
    ids, values = rows.ids, rows.values
    if (values == np.inf).any():
        raise InputError(f"{where}: a row holds an infinite number; the file is damaged, or not of this format")
    finite = np.isfinite(values)
    if probabilities:
        positive = (values > 0).any(axis=1, keepdims=True)
        negative = (finite & (values < 0)).any(axis=1, keepdims=True)
        finite &= (values != 0) | ~positive | negative
    inside = (ids >= 0) & (ids < vocabulary_size)
    outside = np.where(finite & ~inside, values, -np.inf)
    strange = np.stack([log_sums(outside), log_sums(as_logs(np.maximum(outside, 0.0)))], axis=1)
    here = finite & inside
    dropped = int(np.count_nonzero((ids != NO_ID) & ~here))
    ids, values = np.where(here, ids, NO_ID), np.where(here, values, -np.inf)
    order, ids, values = _by_value(ids, values)
    _check_distinct(ids, rows.start, where)
    fitted = None if rows.exact is None or rows.exact >= ids.shape[1] else order >= rows.exact
    return Cleaned(ids, values, here.sum(axis=1), strange, dropped, fitted)


def _by_value(
    ids: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.float64]]:
    """The order of the columns of each row, largest first, equal ones by ascending id; and the rows in it."""
    order = np.lexsort(np.stack([ids, -values]), axis=-1)
    return order, np.take_along_axis(ids, order, axis=1), np.take_along_axis(values, order, axis=1)


def _check_distinct(ids: NDArray[np.int64], start: int, where: str) -> None:
    ascending = np.sort(ids, axis=1)
    twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] != NO_ID)
    if twice.any():
        row, column = (int(found[0]) for found in np.nonzero(twice))
        raise InputError(
            f"{where}: row {start + row} holds the id {ascending[row, column]} twice; the file is damaged, or was "
            f"written with other settings than those that it is read with (see docs/sharing.md)"
        )


def as_logs(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logs of probabilities; -inf of what is none."""
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = np.log(np.where(np.isfinite(values), np.maximum(values, 0.0), 0.0))
    return found


class ValueKind:
    """What the numbers of a file are, decided from all of its rows.

    All rows must look alike: numbers that are logits look like log-probs only where a row's sum is at most 1 by chance.
    """

    def __init__(self, allowed: tuple[Values, ...], slack_nats: float, vocabulary_size: int) -> None:
        self._allowed = allowed
        self._slack = slack_nats
        self._vocabulary_size = vocabulary_size
        self.rows = 0
        self._over = 0  # rows whose sum exceeds 1 by more than the format's rounding
        self._fitted = False
        self._are_probabilities = "probabilities" in allowed
        self._largest_log_sum = -np.inf
        self._worst = ""
        self._largest_sum = -np.inf
        self._furthest = 0.0  # from a sum of 1, of rows that do not hold the whole vocabulary
        self._partial = 0
        self._unbounded = 0

    def add(self, rows: Cleaned, start: int, where: str) -> NDArray[np.float64]:
        """Take note of rows, and return them as log-probs [R, K] by what they look like alone, normalised."""
        there = rows.kept > 0
        looks = self.looks_like_probabilities(rows)
        self._are_probabilities &= bool(looks[there].all())
        sums = np.where(rows.values > -np.inf, rows.values, 0.0).sum(axis=1)
        logs = log_sums(rows.values)
        self.rows += int(np.count_nonzero(there))
        self._over += int(np.count_nonzero(logs > self._slack))
        self._fitted |= rows.fitted is not None
        self._largest_sum = max(self._largest_sum, float(sums[there].max(initial=-np.inf)))
        largest = float(logs.max(initial=-np.inf))
        if largest > self._largest_log_sum:
            self._largest_log_sum = largest
            self._worst = f"{where}, row {start + int(logs.argmax())}"
        partial = there & (rows.kept < self._vocabulary_size)
        self._partial += int(np.count_nonzero(partial))
        with np.errstate(invalid="ignore", divide="ignore"):
            off = np.abs(np.where(looks, np.log(sums), logs))[partial]
        self._furthest = max(self._furthest, float(off.max(initial=0.0)))
        shown = np.where(looks[:, None], as_logs(np.where(looks[:, None], rows.values, 0.0)), rows.values)
        shown = shown - np.maximum(log_sums(shown), 0.0)[:, None]
        self._unbounded += self._count_unbounded(shown[partial], rows.kept[partial], rows.fitted is not None)
        return shown

    def _count_unbounded(self, logprobs: NDArray[np.float64], kept: NDArray[np.int64], fitted: bool) -> int:
        """The rows that leave more mass than V - kept ids can have, each with no more than the least one there."""
        if not len(kept):
            return 0
        least = least_logprob(logprobs)
        if fitted:
            least = np.where(logprobs > -np.inf, logprobs, 0.0).sum(axis=1) / kept
        with np.errstate(divide="ignore"):
            outside = np.log(-np.expm1(np.minimum(log_sums(logprobs), 0.0)))
        bound = most_outside(least, self._vocabulary_size - kept)
        return int(np.count_nonzero(outside > bound + 0.1 + 10 * self._slack))

    def looks_like_probabilities(self, rows: Cleaned) -> NDArray[np.bool_]:
        if "probabilities" not in self._allowed:
            return np.zeros(len(rows.kept), dtype=bool)
        there = rows.values > -np.inf
        low = np.where(there, rows.values, 0.0)
        found: NDArray[np.bool_] = (low >= 0).all(axis=1) & (low.sum(axis=1) <= np.exp(self._slack))
        return found

    def decided(self) -> tuple[Values, bool]:
        """What the numbers are, and whether they are probabilities and not their logs.

        Raises InputError where the data contradict all that the format allows.
        """
        are_probabilities = self._are_probabilities
        largest = np.log(self._largest_sum) if are_probabilities else self._largest_log_sum
        fits = largest <= self._slack or self._over <= _MOST_OVER[self._fitted] * self.rows
        exact: Values = "probabilities" if are_probabilities else "logprobs"
        closed = self._partial > 0 and self._furthest <= _CLOSED_NATS
        if exact in self._allowed and fits and not (closed and "unnormalised" in self._allowed):
            self._check_bounds()
            return exact, are_probabilities
        if "unnormalised" in self._allowed:
            return "unnormalised", are_probabilities
        if self._allowed == ("probabilities",):
            raise InputError(
                "--values probabilities: numbers are below 0, or add up to more than 1: they are log-probs or logits; "
                "leave --values out, and the data decide"
            )
        raise InputError(
            f"{self._worst}: the probabilities of its ids add up to e^{largest:.3g}, more than 1: these are no "
            f"log-probs over the vocabulary. The file was written with other settings than those that it is read with, "
            f"or holds logits without their normaliser: then give --values logits"
        )

    @property
    def scaled(self) -> int:
        """How many rows have fitted numbers that are scaled, where they are log-probs."""
        return self._over if self._fitted else 0

    def _check_bounds(self) -> None:
        if self._unbounded > _MOST_UNBOUNDED[self._fitted] * self._partial:
            raise InputError(
                f"in {self._unbounded:,} of {self._partial:,} rows the ids leave more mass to the others than these "
                f"can have, if none is more probable than the least one of the row: the file was written with other "
                f"settings than those that it is read with, or its ids are not the most probable ones"
            )


@dataclass(frozen=True)
class Normalised:
    """Rows as they are stored: ids int64 [R, K]; logprobs float64 [R, K], -inf beyond `kept` [R]; log_tail float64 [R],
    NaN for a row without ids, None where it is not known."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    kept: NDArray[np.int64]
    log_tail: NDArray[np.float64] | None


def normalised(
    rows: Cleaned, kind: Values, are_probabilities: bool, k: int, vocabulary_size: int, slack_nats: float
) -> Normalised:
    """The `k` most probable ids of each row as log-probs; the mass of the others goes to the tail where it is known.

    Distributions are over the vocabulary: the mass of ids outside it is taken out of them.
    """
    ids, logs = rows.ids, as_logs(rows.values) if are_probabilities else rows.values
    if rows.fitted is not None and kind == "logprobs":
        _, ids, logs = _by_value(ids, _within_one(logs, rows.fitted, slack_nats))
    logs = logs[:, :k]
    kept = (logs > -np.inf).sum(axis=1)
    ids = np.where(logs > -np.inf, ids[:, :k], NO_ID)
    sums = log_sums(logs)
    empty = kept == 0
    if kind == "unnormalised":
        return Normalised(ids, logs - np.where(empty, 0.0, sums)[:, None], kept, None)
    strange = np.exp(rows.strange[:, int(are_probabilities)])
    inside = np.log1p(-np.minimum(strange, MOST_DROPPED_MASS))
    logs, sums = logs - inside[:, None], sums - inside
    # A sum above 1 is rounding; one of the whole vocabulary is 1.
    full = (sums > 0) | (kept == vocabulary_size)
    logs = logs - np.where(full & ~empty, sums, 0.0)[:, None]
    with np.errstate(divide="ignore"):
        tail = np.where(full, -np.inf, np.log(-np.expm1(np.minimum(sums, 0.0))))
    return Normalised(ids, logs, kept, np.where(empty, np.nan, tail))


def _within_one(logs: NDArray[np.float64], fitted: NDArray[np.bool_], slack_nats: float) -> NDArray[np.float64]:
    """Log-probs [R, K], of which the fitted ones have the mass that the exact ones leave, where the sum exceeds 1."""
    exact = log_sums(np.where(fitted, -np.inf, logs))
    room = np.log(-np.expm1(np.minimum(exact, -_LEAST_ROOM)))
    excess = log_sums(np.where(fitted, logs, -np.inf)) - room
    over = (log_sums(logs) > slack_nats) & (excess > 0)
    return np.where(over[:, None] & fitted, logs - np.where(over, excess, 0.0)[:, None], logs)
