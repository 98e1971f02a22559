"""VarOpt targets against a dense float64 reference: which ids are certain, unbiased weights, exact log-probs, tails."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references.reducer import FLOOR, any_rows, assert_same_bits, spread_logits
from support.references.varopt import check, check_systematic, duels, sample, sampling_of
from torch import Tensor

import teachers.reduction.rows
from teachers.reduction.reduce import reduce_topk, reduce_varopt
from teachers.reduction.varopt import random_bits, random_words


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head_ids", [0, 3])
@pytest.mark.parametrize(
    ("rows", "vocabulary_size", "k"),
    [(50, 507, 13), (9, 16_003, 64), (3, 131_073, 64), (40, 40, 39), (40, 12, 4), (5, 70_001, 4), (7, 5_000, 1_000)],
)
@pytest.mark.parametrize("threshold", [False, True])
def test_rows_keep_the_rule(
    rows: int, vocabulary_size: int, k: int, threshold: bool, head_ids: int, temperature: float
) -> None:
    for scale, pivotal in ((0.01, False), (1.0, False), (4.0, False), (0.01, True), (3.0, True)):
        logits = spread_logits(rows, vocabulary_size, scale)
        found = sample(logits, k, 0, head_ids, temperature, pivotal=pivotal, threshold=threshold)
        check(found, logits, k, head_ids, temperature, threshold)
        assert bool((found.certain >= head_ids).all())


def test_a_threshold_gives_ids_to_the_rows_that_need_them() -> None:
    """As many ids in all as a fixed number, spread by the threshold: less variance over the rows together."""
    logits = spread_logits(400, 2_000, 3.0) * torch.linspace(0.3, 2.5, 400)[:, None]
    p = torch.softmax(logits.double(), 1)
    found = sample(logits, 96, threshold=True)

    def variance(kept: Tensor, certain: Tensor, ids: Tensor) -> float:
        """The sum over the rows and ids of the variance of the weights, p (s - p) with s the weight of sampled ids."""
        columns = torch.arange(ids.shape[1])
        rest = p.scatter(1, torch.where(columns < certain[:, None], ids, ids[:, :1]), 0.0)
        rest = torch.where(certain[:, None] > 0, rest, p)
        s = rest.sum(1, keepdim=True) / (kept - certain).clamp_min(1)[:, None]
        return float((rest * (s - rest)).sum())

    mean = int(found.kept.double().mean())
    assert 24 < mean < 72
    fixed = sample(logits, mean)
    by_threshold = variance(found.kept, found.certain, found.token_ids)
    assert by_threshold < 0.8 * variance(fixed.kept, fixed.certain, fixed.token_ids)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("pivotal", [False, True])
@pytest.mark.parametrize(
    ("k", "head_ids", "threshold"),
    [(12, 0, False), (12, 6, False), (1, 0, False), (2, 1, False), (60, 0, False), (90, 0, True)],
)
def test_the_mean_of_the_weights_is_the_distribution(
    k: int, head_ids: int, threshold: bool, pivotal: bool, temperature: float
) -> None:
    """E[w] = p at the temperature, for every id with 20 expected samples or more, over seeds and positions."""
    vocabulary_size, seeds, positions = 300, 20, 1_000
    row = spread_logits(1, vocabulary_size, scale=2.5, seed=5)
    logits = row.expand(positions, -1)
    total, columns = np.zeros(vocabulary_size), k
    for seed in range(seeds):
        found = sample(logits, columns, seed, head_ids, temperature, pivotal=pivotal, threshold=threshold)
        assert bool((found.certain == found.certain[0]).all())
        j, k = int(found.certain[0]), int(found.kept[0])
        assert j < k
        assert (k < columns) == threshold
        logs = found.logprobs[:, :k].double() / temperature
        tail = float(found.log_tail[0] if temperature == 1.0 else found.log_tail_half[0])
        weights = np.where(np.arange(k) < j, logs.exp().numpy(), math.exp(tail) / (k - j))
        weights /= np.exp(logs[0, :j].numpy()).sum() + math.exp(tail)  # 1 at temperature 1
        assert np.abs(weights.sum(1) - 1).max() < 1e-12
        np.add.at(total, found.token_ids[:, :k].numpy(), weights)
    samples = seeds * positions
    p = torch.softmax(row[0].double() / temperature, 0).numpy()
    order = np.argsort(-p)
    rest = p[order[j:]].sum()
    probability = np.minimum((k - j) * p / rest, 1.0)
    probability[order[:j]] = 1.0
    often = probability * samples >= 20
    assert often.sum() > vocabulary_size / 5
    deviation = rest / (k - j) * np.sqrt(probability * (1 - probability) / samples)
    assert (np.abs(total / samples - p)[often] <= 5 * deviation[often] + 1e-6 * p[often]).all()
    # The mass of ids below 20 expected samples is not lost either.
    assert np.abs(total[~often].sum() / samples - p[~often].sum()) <= 5 * rest / (k - j) * math.sqrt(
        max(probability[~often].sum(), 20) / samples
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ids_are_a_systematic_sample_in_id_order(temperature: float) -> None:
    logits = spread_logits(100, 2_000, scale=3.0)
    check_systematic(sample(logits, 24, seed=9, temperature=temperature), logits, 9, temperature)


@settings(max_examples=80, deadline=None)
@given(logits=any_rows(5, 200), data=st.data())
def test_any_row_with_ties_and_masks(logits: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, logits.shape[1]))
    head_ids = data.draw(st.integers(0, k - 1))
    temperature = data.draw(st.sampled_from([1.0, 2.0]))
    pivotal, threshold = data.draw(st.booleans()), data.draw(st.booleans())
    seed = data.draw(st.integers(0, 3))
    found = sample(logits, k, seed, head_ids, temperature, pivotal=pivotal, threshold=threshold)
    check(found, logits, k, head_ids, temperature, threshold and k < logits.shape[1])


@settings(max_examples=80, deadline=None)
@given(logits=any_rows(5, 200), data=st.data())
def test_columns_in_an_order_are_named_by_it(logits: Tensor, data: st.DataObject) -> None:
    """The same rows are drawn as from the same columns without names; labels and ids are those that columns stand for,
    also where equal logits and masks leave the order to ids."""
    rows, columns = logits.shape
    k = data.draw(st.integers(1, columns))
    sampling = sampling_of(rows, 0, 1.0, data.draw(st.integers(0, k - 1)), data.draw(st.sampled_from([0, k])))
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    labels = torch.arange(rows) % columns
    padded = torch.cat([logits, torch.full((rows, 3), 1e4)], dim=1)
    unnamed = reduce_varopt(padded, columns, k, labels, FLOOR, sampling)
    named = reduce_varopt(padded, columns, k, order[labels], FLOOR, replace(sampling, order=order))
    for name, value in vars(named).items():
        assert name == "token_ids" or torch.equal(value, getattr(unnamed, name)), name
    for row in range(rows):
        sampled = [column >= int(named.certain[row]) for column in range(k)]
        drawn = unnamed.token_ids[row]
        expected = sorted(zip(sampled, (-logits[row, drawn]).tolist(), order[drawn].tolist(), strict=True))
        assert named.token_ids[row].tolist() == [key[-1] for key in expected]


def test_pivotal_samples_are_those_of_duels() -> None:
    """The probability of every set of ids, against the duels of Deville and Tille one by one."""
    mass = [0.1, 0.17, 0.13, 0.2, 0.08, 0.22, 0.1]
    k, rows = 3, 60_000
    found = sample(torch.tensor(mass).log().expand(rows, -1), k, pivotal=True)
    assert not bool(found.certain.any())
    expected = duels([k * each for each in mass])
    assert sum(expected.values()) == pytest.approx(1)
    counts = Counter(frozenset(ids) for ids in found.token_ids.tolist())
    assert set(counts) <= set(expected)
    chi2 = sum((counts[ids] - rows * p) ** 2 / (rows * p) for ids, p in expected.items())
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_extreme_rows() -> None:
    vocabulary_size, k = 1_000, 8
    logits = spread_logits(8, vocabulary_size, 3.0)
    logits[0] = -math.inf
    logits[0, 77] = 3.0  # one id has all mass
    logits[1, 5] += 400.0  # nearly so
    logits[2] = 0.0  # uniform: nothing is certain
    logits[3, k:] = -math.inf  # as many live ids as are kept
    logits[4, k + 1 :] = -math.inf  # one more
    logits[5, :] = -50.0
    logits[5, :8] = 0.0  # a rest of 1e-19 beside eight equal heads
    logits[6, :] = -10.0
    logits[6, 500:508] = 0.0
    found = sample(logits, k)
    check(found, logits, k)
    assert found.certain[[0, 1, 2, 3, 5]].tolist() == [8, 8, 0, 8, 8]
    assert found.log_tail[0] == FLOOR
    assert found.log_tail[2] == 0.0
    assert [int(found.certain[4]) < 8, int(found.certain[6]) < 8] == [True, True]


def test_equal_logits_are_sampled_alike() -> None:
    """Ties at the border of the head: which of them are certain follows the order, all others share the samples."""
    logits = torch.full((4_000, 64), -4.0)
    logits[:, 3] = 3.0
    logits[:, 20:40] = 0.0
    k = 10
    found = sample(logits, k)
    check(found.each(lambda value: value[:5]), logits[:5], k)
    j = int(found.certain[0])
    counts = torch.bincount(found.token_ids[:, j:].flatten(), minlength=64)[20:40].double()
    p = torch.softmax(logits[0].double(), 0)
    rest = float(1 - p[3]) if j == 1 else 1.0
    probability = (k - j) * float(p[20]) / rest
    assert float((counts / 4_000 - probability).abs().max()) < 5 * math.sqrt(probability * (1 - probability) / 4_000)


@pytest.mark.parametrize("vocabulary_size", [1, 2, 7, 507])
def test_all_ids_are_certain_at_k_equal_v(vocabulary_size: int) -> None:
    logits = spread_logits(6, vocabulary_size, 3.0)
    found = sample(logits, vocabulary_size)
    top = reduce_topk(logits, vocabulary_size, vocabulary_size, torch.arange(6) % vocabulary_size, FLOOR)
    assert_same_bits(top, found)
    assert bool((found.certain == vocabulary_size).all() and (found.log_tail == -math.inf).all())


def test_padded_columns_are_never_sampled() -> None:
    logits = spread_logits(30, 640, 3.0)
    logits[:, 507:] = 1e4
    padded = sample(logits, 20, vocabulary_size=507)
    cut = sample(logits[:, :507].contiguous(), 20)
    assert_same_bits(cut, padded, but="label_logprob")
    assert int(padded.token_ids.max()) < 507


def test_the_cut_into_tiles_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = spread_logits(37, 9_001, 3.0)
    whole = [sample(logits, 64, pivotal=pivotal) for pivotal in (False, True)]
    for rows in (1, 5, 36):
        monkeypatch.setattr(teachers.reduction.rows, "_tile_logits", lambda device, rows=rows: 9_001 * rows)
        for pivotal in (False, True):
            assert_same_bits(sample(logits, 64, pivotal=pivotal), whole[pivotal])


def test_random_bits_are_keyed_by_seed_and_position() -> None:
    whole = random_bits(7, 0, 1_000)
    assert whole.dtype == np.int64
    assert whole.min() >= 0
    assert whole.max() < 1 << 32
    for start, stop in ((0, 1), (1, 2), (3, 9), (4, 8), (509, 1_000)):
        assert np.array_equal(random_bits(7, start, stop), whole[start:stop])
    far = 3 << 40
    assert np.array_equal(random_bits(7, far + 5, far + 9), random_bits(7, far, far + 9)[5:])
    assert not np.array_equal(random_bits(8, 0, 1_000), whole)
    # Recorded once: another NumPy, or another machine, has to sample the same ids.
    assert random_bits(0, 0, 4).tolist() == [49592932, 1037445899, 478570405, 2424142341]
    values = np.sort(random_bits(1, 0, 100_000) / 2**32)
    assert np.abs(values - (np.arange(100_000) + 0.5) / 100_000).max() < 2 / math.sqrt(100_000)


def test_random_words_are_keyed_by_seed_position_and_interval() -> None:
    whole = random_words(7, 0, 1_000, 5)
    assert np.array_equal(random_words(7, 509, 603, 3), whole[509:603, :3]), "K changes none"
    assert len(np.unique(np.concatenate([whole, random_words(8, 0, 1_000, 5)]))) == 10_000
    assert not np.intersect1d(whole.view(np.uint64) >> np.uint64(32), random_bits(7, 0, 1_000)).size
    assert random_words(0, 3, 4, 2).tolist() == [[246619093854210513, -1484087098959424315]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pivotal", [False, True])
@pytest.mark.parametrize(("vocabulary_size", "k"), [(507, 123), (16_003, 64), (131_073, 64)])
def test_a_gpu_samples_the_same_ids(vocabulary_size: int, k: int, pivotal: bool) -> None:
    logits = spread_logits(200, vocabulary_size, 3.0)
    labels = torch.arange(200)
    sampling = sampling_of(200, 0, pivotal=k if pivotal else 0)
    here = reduce_varopt(logits, vocabulary_size, k, labels, FLOOR, sampling)
    on_gpu = replace(sampling, random=sampling.random.cuda())
    there = [reduce_varopt(logits.cuda(), vocabulary_size, k, labels.cuda(), FLOOR, on_gpu) for _ in range(2)]
    assert_same_bits(*there)
    # exp differs in its last bit between the two, and a point may be that close to an id's end.
    assert float((there[0].token_ids.cpu() == here.token_ids).all(1).double().mean()) > 0.95
    torch.testing.assert_close(there[0].log_tail.cpu(), here.log_tail, atol=2e-6, rtol=1e-6)
