"""Rows with fewer ids: a sample that is sampled again against its rule in float64, and rows without some fields."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.caches.small import dense_targets
from support.references.varopt import sampled_targets

from storage import SparseTargets
from storage.format.pruning import prune, shrink, without_rows

V, K = 97, 16


def varied_logits(rows: int = 600) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, V)) * rng.choice([0.0, 0.5, 2.0, 5.0], size=(rows, 1))


def weights(targets: SparseTargets, temperature: float) -> np.ndarray:
    """What each id of a row stands for, float64 [T, V], of p ** (1 / temperature), not normalised."""
    tail = (targets.log_tail if temperature == 1.0 else targets.log_tail_half).astype(np.float64)
    share = np.exp(tail) / np.maximum(targets.kept.astype(int) - targets.certain, 1)
    own = np.exp(targets.logprobs.astype(np.float64) / temperature)
    per_id = np.where(targets.is_certain, own, share[:, None])
    found = np.zeros((len(targets), V))
    rows, columns = np.nonzero(targets.is_kept)
    np.add.at(found, (rows, targets.token_ids[rows, columns].astype(int)), per_id[rows, columns])
    return found


def certain_by_the_rule(weighed: np.ndarray, certain: int, k: int, head_ids: int, slack: float) -> int:
    """Of the weights [K] of a stored row, the certain ids first: the least j at which the others can be sampled."""
    for j in range(head_ids, k):
        rest = weighed[j:]
        if max(weighed[j], weighed[certain:].max(initial=0.0)) * (k - j) <= rest.sum() * slack:
            return j
    return k


@pytest.mark.parametrize(("temperature", "head_ids"), [(1.0, 0), (1.0, 3), (2.0, 0)])
@pytest.mark.parametrize("k", [4, 7, K - 1])
def test_a_smaller_sample_obeys_the_rule_of_the_first(k: int, temperature: float, head_ids: int) -> None:
    before = sampled_targets(varied_logits(), K, 0, temperature, head_ids)
    after = shrink(before, k, temperature, head_ids, seed=1)
    assert (after.kept == k).all()
    old, new = weights(before, temperature), weights(after, temperature)
    np.testing.assert_allclose(new.sum(1), old.sum(1), rtol=1e-6)
    demoted = 0
    for row in range(len(before)):
        ids = before.token_ids[row].astype(int)
        weighed = old[row, ids]
        certain, j = int(before.certain[row]), int(after.certain[row])
        low, high = (certain_by_the_rule(weighed, certain, k, head_ids, slack) for slack in (1 + 1e-9, 1 - 1e-9))
        assert low <= j <= high
        demoted += certain > j
        chosen = after.token_ids[row].astype(int)
        assert len(set(chosen)) == k
        assert (chosen[:j] == ids[:j]).all()
        assert set(chosen[j:]) <= set(ids[j:])
        assert (np.diff(chosen[j:]) > 0).all()
        at = [ids.tolist().index(token) for token in chosen]
        assert np.array_equal(after.logprobs[row], before.logprobs[row, at])
        joined = before.logprobs[row, j:certain].astype(np.float64)
        for name, power in (("log_tail", 1.0), ("log_tail_half", 0.5)):
            terms = np.append(power * joined, getattr(before, name)[row])
            np.testing.assert_allclose(getattr(after, name)[row], np.logaddexp.reduce(terms), rtol=1e-6, atol=1e-7)
    assert demoted > 20
    for name in ("label_logprob", "entropy"):
        assert np.array_equal(getattr(after, name), getattr(before, name))


ROW = np.log(np.concatenate([[0.4, 0.2, 0.1, 0.05], np.full(V - 4, 0.25 / (V - 4))]))


def coarse_row() -> SparseTargets:
    """Two certain ids that weigh less than the four sampled ones, as coarse codes can leave them."""
    logp = np.log([[0.01, 0.01, 0.1, 0.1, 0.1, 0.1]]).astype(np.float32)
    counts = (np.array([6], dtype=np.uint16), np.array([2], dtype=np.uint16))
    return SparseTargets(0, np.arange(6, dtype=np.uint16)[None], *counts, logp, np.log([0.98]).astype(np.float32))


@pytest.mark.parametrize(
    ("k", "temperature", "head_ids"),
    [(1, 1.0, 0), (3, 1.0, 0), (9, 1.0, 0), (9, 1.0, 4), (6, 2.0, 0), (15, 2.0, 1), (5, None, 0), (2, None, 0)],
)
def test_ids_are_included_in_proportion_to_their_weights(k: int, temperature: float | None, head_ids: int) -> None:
    """One stored row, sampled again at many positions, each a random number of its own."""
    count = 40_000
    one = sampled_targets(ROW[None], K, 0, temperature) if temperature else coarse_row()
    temperature = temperature or 1.0
    many = SparseTargets(0, **{name: np.repeat(values, count, axis=0) for name, values in one.arrays().items()})
    after = shrink(many, k, temperature, head_ids, seed=2)
    old, new = weights(one, temperature)[0], weights(after, temperature)
    j = int(after.certain[0])
    assert (after.certain == j).all()
    assert ((new > 0).sum(1) == k).all()
    sampled = old.copy()
    sampled[one.token_ids[0, :j].astype(int)] = 0.0
    expected = (k - j) * sampled / sampled.sum()
    assert expected.max() <= 1 + 1e-9
    found = (new > 0).mean(0)
    found[one.token_ids[0, :j].astype(int)] = 0.0
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected).clip(0) / count) + 1e-6).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_smaller_sample_by_a_threshold_has_sizes_by_it(temperature: float) -> None:
    k = 27
    before = sampled_targets(varied_logits(), 60, 0, temperature, threshold=True)
    before = without_rows(before, np.arange(600) % 5 > 0)
    after = shrink(before, k, temperature, 0, seed=1, threshold=True)
    old, new = weights(before, temperature), weights(after, temperature)
    there = before.kept > 0
    np.testing.assert_allclose(new[there].sum(1), old[there].sum(1), rtol=1e-6)
    is_certain = np.zeros(old.shape, dtype=bool)
    rows, columns = np.nonzero(before.is_certain)
    is_certain[rows, before.token_ids[rows, columns]] = True
    share = old / np.where(there, old.sum(1), 1)[:, None]
    for row in np.flatnonzero(there):
        allowed = set()
        for slack in (1 - 1e-6, 1 + 1e-6):
            likely = is_certain[row] & (share[row] * k * slack >= 1)
            units = np.ceil((likely.sum() + np.ceil(k * slack * share[row][~likely].sum())) / 8)
            allowed.add(min(int(8 * units), k, int(before.kept[row])))
        assert int(after.kept[row]) in allowed
    assert len(np.unique(after.kept)) > 3
    sampled = after.is_kept & ~after.is_certain
    rows, columns = np.nonzero(sampled)
    of_row = (new / np.where(there, new.sum(1), 1)[:, None])[rows, after.token_ids[rows, columns]]
    assert of_row.max() <= 1 / k * (1 + 1e-6)
    assert (after.token_ids[~after.is_kept] == 65_535).all()
    assert np.isneginf(after.logprobs[~after.is_kept]).all()


@pytest.mark.parametrize(
    ("temperature", "head_ids", "sizes"),
    [(1.0, 0, (K, 9, 5)), (1.0, 3, (K, 9, 5)), (2.0, 0, (K, 9, 5)), (1.0, 0, (80, 40, 15)), (2.0, 0, (80, 40, 15))],
)
def test_the_mean_over_both_samples_is_the_teacher_s(
    temperature: float, head_ids: int, sizes: tuple[int, int, int]
) -> None:
    """Of K ids in each row, or, with more of them, by a threshold."""
    count, threshold = 24_000, sizes[0] > K
    once = sampled_targets(np.tile(ROW, (count, 1)), sizes[0], 3, temperature, head_ids, threshold)
    twice = shrink(once, sizes[1], temperature, head_ids, 4, threshold=threshold)
    thrice = shrink(twice, sizes[2], temperature, head_ids, 5, threshold=threshold)
    assert (once.kept[0] < sizes[0]) == threshold
    p = np.exp(ROW / temperature)
    for targets in (once, twice, thrice):
        found = weights(targets, temperature)
        error = found.std(0) / np.sqrt(count)
        assert (np.abs(found.mean(0) - p) <= 5 * error + 1e-6).all()
    assert thrice.certain.max() < once.certain.min()


def test_a_row_depends_on_seed_and_position_alone() -> None:
    before = sampled_targets(varied_logits(), K)
    after = shrink(before, 5, 1.0, 0, seed=1)
    parts = [shrink(before.rows(a, b), 5, 1.0, 0, seed=1) for a, b in ((0, 1), (1, 130), (130, 600))]
    for name, values in after.arrays().items():
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), values), name
    other = shrink(before, 5, 1.0, 0, seed=2)
    assert np.array_equal(other.certain, after.certain)
    assert (other.token_ids == after.token_ids).all(1).mean() < 0.5


def test_ids_lie_in_the_order_of_the_entry() -> None:
    """Sampled as ids that are numbered in that order would be."""
    before = sampled_targets(varied_logits(), K)
    before = without_rows(replace(before, kept=np.where(np.arange(600) % 5, K, 11)), np.arange(600) % 7 > 0)
    before = replace(before, certain=np.minimum(before.certain, before.kept))
    order = np.random.default_rng(2).permutation(V)
    place = np.argsort(order).astype(np.uint16)
    numbered = np.where(before.is_kept, place[np.where(before.is_kept, before.token_ids, 0)], 65_535)
    expected = shrink(replace(before, token_ids=numbered), 6, 1.0, 0, seed=1)
    found = shrink(before, 6, 1.0, 0, seed=1, order=order)
    kept = found.is_kept
    assert np.array_equal(found.token_ids[kept], order[expected.token_ids[kept]])
    assert not np.array_equal(found.token_ids, shrink(before, 6, 1.0, 0, seed=1).token_ids)


def test_rows_of_no_more_ids_and_of_none_stay_as_they_are() -> None:
    whole = sampled_targets(varied_logits(40), K)
    few = replace(whole, kept=np.where(np.arange(40) < 20, 7, 16).astype(np.uint16))
    few = replace(few, certain=np.minimum(few.certain, 5), logprobs=np.where(few.is_kept, few.logprobs, -np.inf))
    few = replace(few, token_ids=np.where(few.is_kept, few.token_ids, np.uint16(65_535)))
    few = without_rows(few, np.arange(40) % 4 > 0)
    for k, rows in ((K, slice(None)), (7, slice(0, 20))):
        after = shrink(few, k, 1.0, 0, seed=1)
        for name, values in few.arrays().items():
            expected = values[rows, :k] if values.ndim == 2 else values[rows]
            assert np.array_equal(getattr(after, name)[rows], expected, equal_nan=values.dtype.kind == "f"), name
    assert (after.kept[20:] == np.where(np.arange(20, 40) % 4 > 0, 7, 0)).all()
    assert np.isnan(after.log_tail[::4]).all()
    assert np.isneginf(after.logprobs[::4]).all()


def test_a_row_whose_ids_are_all_certain() -> None:
    """Those with mass stay certain as far as the rule goes; of ids without any, none is sampled."""
    logp = np.full((1, K), -2000.0, dtype=np.float32)
    logp[0, :5] = np.log([0.5, 0.3, 0.1, 0.06, 0.04])
    row = SparseTargets(
        0,
        np.arange(K, dtype=np.uint16)[None],
        np.array([K], dtype=np.uint16),
        np.array([K], dtype=np.uint16),
        logp,
        np.array([-1995.0], dtype=np.float32),
    )
    kept = shrink(row, 8, 1.0, 0, seed=1)
    assert (kept.certain, kept.kept) == (8, 8)
    assert np.array_equal(kept.token_ids[0], np.arange(8))
    assert kept.log_tail[0] == pytest.approx(-1995 + np.log1p(8 * np.exp(-5.0)), abs=1e-3)
    sampled = shrink(row, 3, 1.0, 0, seed=1)
    assert (sampled.certain, sampled.kept) == (2, 3)
    assert sampled.log_tail[0] == pytest.approx(np.log(0.2), abs=1e-6)
    assert set(sampled.token_ids[0, 2:]) <= {2, 3, 4}


def test_a_sample_of_hardly_any_mass_is_sampled_again_all_the_same() -> None:
    ids = np.arange(K, dtype=np.uint16)[None]
    logp = np.where(ids < 2, np.log(0.5), -1100.0).astype(np.float32)
    counts = (np.array([K], dtype=np.uint16), np.array([2], dtype=np.uint16))
    after = shrink(SparseTargets(0, ids, *counts, logp, np.array([-1000.0], dtype=np.float32)), 5, 1.0, 0, seed=1)
    assert (after.certain, after.kept) == (2, 5)
    assert len(set(after.token_ids[0])) == 5
    assert after.log_tail == -1000.0


def test_ids_without_log_probs_are_sampled_as_those_with_them() -> None:
    with_them = sampled_targets(varied_logits(), K)
    lean = replace(
        with_them,
        logprobs=np.where(with_them.is_certain, with_them.logprobs, np.float32(np.nan)),
        log_tail_half=None, label_logprob=None, entropy=None,
    )  # fmt: skip
    one, other = (shrink(each, 6, 1.0, 0, seed=1) for each in (with_them, lean))
    for name in ("token_ids", "certain", "log_tail"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert other.log_tail_half is other.label_logprob is other.entropy is None
    certain = other.is_certain
    assert np.array_equal(other.logprobs[certain], one.logprobs[certain])


def test_pruned_rows_without_targets_and_without_fields() -> None:
    wanted = np.arange(30) % 3 > 0
    whole = dense_targets(varied_logits(30), K, np.arange(30))
    lean = replace(whole, log_tail_half=None, label_logprob=None, entropy=None)
    for targets in (whole, lean):
        expected = without_rows(prune(targets, 7, 0.6, -2000.0), wanted)
        found = prune(without_rows(targets, wanted), 7, 0.6, -2000.0)
        assert (found.kept[wanted] > 0).all()
        assert not found.kept[~wanted].any()
        for name, values in expected.arrays().items():
            assert np.array_equal(getattr(found, name), values, equal_nan=values.dtype.kind == "f"), name
    without_tail = prune(replace(lean, log_tail=None), 7, 0.6, -2000.0)
    mass = np.exp(whole.logprobs.astype(np.float64)).cumsum(1)
    assert np.array_equal(without_tail.kept, ((mass < 0.6 * mass[:, -1:]).sum(1) + 1).clip(max=7))
