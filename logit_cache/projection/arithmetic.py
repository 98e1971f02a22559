"""Rows of targets in the student's vocabulary: ``P(b) = sum of p_i over the ids i whose first token f(i) is b``.

Legend: `R` rows, `K` stored ids, `V` ids of the student.

It is linear in p, so drawn ids stay an unbiased sample: each is mapped by itself and keeps its weight, so that an id
may be drawn twice, or be a certain one, too. Certain ids that are mapped to one are added up, and no more than a lower
bound of it is known: what the ids outside would add to them lies in the mass outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logit_cache.projection.first_tokens import FirstTokens
from storage.format.targets import SparseTargets, leading_columns


@dataclass(frozen=True)
class Projected:
    """Rows in the student's vocabulary.

    ids         int64 [R, K]    certain ones by descending log-prob, then drawn ones ascending
    logprobs    float64 [R, K]  of the certain ids; NaN of drawn ones
    kept, certain  int64 [R]
    log_tail    float64 [R]     mass outside the certain ids; None where the source does not know it
    uncertain   float64 [R]     the mass of the ids whose first token is uncertain, of the drawn ones by their weight
    stakes      float64 [R]     that of the certain ids alone, which does not depend on the draw
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    kept: NDArray[np.int64]
    certain: NDArray[np.int64]
    log_tail: NDArray[np.float64] | None
    uncertain: NDArray[np.float64]
    stakes: NDArray[np.float64]


def projected(targets: SparseTargets, first: FirstTokens, vocabulary_size: int) -> Projected:
    """The rows of `targets` with V = `vocabulary_size`. Rows without targets stay without."""
    kept, certain = targets.kept.astype(np.int64), targets.certain.astype(np.int64)
    source = np.where(targets.is_kept, targets.token_ids.astype(np.int64), 0)
    mapped, uncertain = first.ids[source], first.uncertain[source] & targets.is_kept
    masses = np.exp(np.where(targets.is_certain, targets.logprobs.astype(np.float64), -np.inf))
    ids, sums, count = _added_up(mapped, masses, targets.is_certain)
    with np.errstate(divide="ignore"):
        logs = np.log(sums)
    tail = None if targets.log_tail is None else targets.log_tail.astype(np.float64)
    if tail is not None:
        # Nothing is left for other ids where all of them are named.
        full = (count == vocabulary_size) & (kept == certain) & (count > 0)
        logs = np.where(full[:, None], logs - np.log(np.where(full, sums.sum(axis=1), 1.0))[:, None], logs)
        tail = np.where(full, -np.inf, tail)
    drawn = targets.is_kept & ~targets.is_certain
    stakes = (masses * uncertain).sum(axis=1)
    at_stake = stakes
    if drawn.any():
        assert tail is not None, "the mass outside is known where ids are drawn"
        share = np.exp(np.where(kept > 0, tail, -np.inf)) / (kept - certain).clip(1)
        at_stake = stakes + share * (drawn & uncertain).sum(axis=1)
        ids, logs = _with_drawn(ids, logs, count, mapped, drawn)
    return Projected(ids, logs, count + kept - certain, count, tail, at_stake, stakes)


def _added_up(
    ids: NDArray[np.int64], masses: NDArray[np.float64], is_certain: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """The certain ids of each row once each, by descending sums of their masses [R, K], and how many there are [R]."""
    rows, columns = ids.shape
    order = np.where(is_certain, ids, np.iinfo(np.int64).max).argsort(axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    masses = np.take_along_axis(masses, order, axis=1)
    there = np.take_along_axis(is_certain, order, axis=1)
    first = there.copy()
    first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    group = first.cumsum(axis=1) - 1
    place = (np.arange(rows)[:, None] * columns + group)[there]
    total = np.bincount(place, weights=masses[there], minlength=rows * columns)
    sums: NDArray[np.float64] = total.astype(np.float64).reshape(rows, columns)
    found = np.zeros(rows * columns, dtype=np.int64)
    found[place] = ids[there]
    # Equal sums stay in the order of the source, whose codes may be equal where its numbers were not.
    earliest = np.full(rows * columns, columns)
    np.minimum.at(earliest, place, order[there])
    by_mass = np.lexsort((earliest.reshape(rows, columns), -sums), axis=1)
    by_mass += np.arange(rows)[:, None] * columns
    count: NDArray[np.int64] = first.sum(axis=1)
    return found[by_mass], sums.reshape(-1)[by_mass], count


def _with_drawn(
    ids: NDArray[np.int64],
    logs: NDArray[np.float64],
    count: NDArray[np.int64],
    mapped: NDArray[np.int64],
    drawn: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The certain ids, `count` of each row, and behind them those drawn, ascending."""
    columns = ids.shape[1]
    rest = np.sort(np.where(drawn, mapped, np.iinfo(np.int64).max), axis=1)
    behind: NDArray[np.int64] = (np.arange(columns) - count[:, None]).clip(0)
    is_certain = leading_columns(count, columns)
    found = np.where(is_certain, ids, np.take_along_axis(rest, behind, axis=1))
    return found, np.where(is_certain, logs, np.nan)
