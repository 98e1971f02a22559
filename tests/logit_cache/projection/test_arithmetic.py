"""Projected rows against sums over all ids, in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.caches.small import dense_targets, varopt_targets, without_rows

from logit_cache.projection.arithmetic import projected
from logit_cache.projection.first_tokens import FirstTokens
from storage.format.targets import SparseTargets

T, V_T, V_S = 40, 60, 25
RNG = np.random.default_rng(0)
FIRST = FirstTokens(RNG.integers(0, V_S, V_T), RNG.random(V_T) < 0.3)
LOGITS = RNG.normal(size=(T, V_T)) * RNG.uniform(0.5, 5, (T, 1))
P = np.exp(LOGITS - np.logaddexp.reduce(LOGITS, axis=1)[:, None])
NONE = np.full(T, -1)


def brute_force(first: FirstTokens = FIRST) -> np.ndarray:
    """``P(b) = sum of p_i over f(i) = b`` [T, V_S], id by id."""
    found = np.zeros((T, V_S))
    for id, b in enumerate(first.ids):
        found[:, b] += P[:, id]
    return found


def dense(targets: SparseTargets) -> np.ndarray:
    """The distributions that projected rows stand for [T, V_S]: certain ids, and drawn ones at their weight."""
    rows = projected(targets, FIRST, V_S)
    found = np.zeros((len(targets), V_S))
    for row in range(len(targets)):
        certain, kept = int(rows.certain[row]), int(rows.kept[row])
        for column in range(kept):
            outside = np.exp(rows.log_tail[row])
            weight = np.exp(rows.logprobs[row, column]) if column < certain else outside / (kept - certain)
            found[row, rows.ids[row, column]] += weight
    return found


def test_with_all_ids_it_is_the_sum_over_all_ids() -> None:
    targets = dense_targets(LOGITS, V_T, NONE)
    np.testing.assert_allclose(dense(targets), brute_force(), rtol=1e-5, atol=1e-9)
    rows = projected(targets, FIRST, V_S)
    np.testing.assert_allclose(rows.uncertain, P[:, FIRST.uncertain].sum(axis=1), rtol=1e-5)


def test_certain_ids_are_lower_bounds_in_order() -> None:
    targets = dense_targets(LOGITS, 9, NONE)
    rows, whole = projected(targets, FIRST, V_S), brute_force()
    for row in range(T):
        count = int(rows.kept[row])
        ids, masses = rows.ids[row, :count], np.exp(rows.logprobs[row, :count])
        assert count == rows.certain[row] == len(set(ids.tolist()))
        assert (np.diff(masses) <= 0).all()
        gap = whole[row, ids] - masses
        assert (gap > -1e-6).all()
        assert gap.sum() <= np.exp(rows.log_tail[row]) + 1e-6
    np.testing.assert_array_equal(rows.log_tail, targets.log_tail.astype(np.float64))


def test_drawn_ids_are_unbiased_by_the_central_limit() -> None:
    row, draws = LOGITS[:1], 4000
    every = varopt_targets(np.repeat(row, draws, axis=0), 6, np.full(draws, -1), seed=5)
    found = dense(every)
    error, spread = found.mean(axis=0) - brute_force()[0], found.std(axis=0) / np.sqrt(draws)
    assert (every.certain < every.kept).all()
    assert np.abs(error[spread > 0] / spread[spread > 0]).max() < 4.5
    # Certain ids are exact, and of others some are too rare to be drawn once.
    assert np.abs(error[spread == 0]).max(initial=0) < 1 / draws
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_an_id_may_be_drawn_twice_and_be_a_certain_one_too() -> None:
    targets = varopt_targets(LOGITS, 12, NONE)
    rows = projected(targets, FIRST, V_S)
    repeated = 0
    for ids, certain, kept in zip(rows.ids, rows.certain, rows.kept, strict=True):
        assert (np.diff(ids[certain:kept]) >= 0).all()
        repeated += kept - len(set(ids[:kept].tolist()))
    assert repeated > 0
    np.testing.assert_array_equal(rows.kept - rows.certain, targets.kept.astype(int) - targets.certain)


@pytest.mark.parametrize("make", [dense_targets, varopt_targets])
def test_equal_tokenizers_change_nothing(make) -> None:  # type: ignore[no-untyped-def]
    targets = make(LOGITS, 7, NONE)
    rows = projected(targets, FirstTokens(np.arange(V_T), np.zeros(V_T, dtype=bool)), V_T)
    order = np.argsort(np.where(targets.is_certain, np.arange(7) - 7, targets.token_ids.astype(int)), axis=1)
    np.testing.assert_array_equal(rows.ids, np.take_along_axis(targets.token_ids, order, axis=1))
    np.testing.assert_allclose(rows.logprobs[targets.is_certain], targets.logprobs[targets.is_certain], atol=1e-6)
    np.testing.assert_array_equal(rows.certain, targets.certain)
    assert not rows.uncertain.any()


def test_rows_without_targets_and_without_a_tail_stay_so() -> None:
    targets = without_rows(dense_targets(LOGITS, 5, NONE), np.arange(T) % 2 == 0)
    rows = projected(replace(targets, log_tail=None), FIRST, V_S)
    assert rows.log_tail is None
    np.testing.assert_array_equal(rows.kept > 0, targets.kept > 0)
