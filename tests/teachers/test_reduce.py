"""The reducer against a dense float64 reference: order, ties, tails, masks, and its stated error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references.reducer import (
    FLOOR,
    INVALID,
    any_rows,
    assert_same_bits,
    check,
    far_logits,
    invalid_logits,
    masked_logits,
    reference,
    spread_logits,
    tied_logits,
)
from support.references.varopt import sampling_of
from torch import Tensor

import teachers.reduction.rows
from storage.errors import InputError
from teachers.huggingface.scoring import rows_per_chunk
from teachers.reduction.reduce import InvalidLogits, reduce_topk, reduce_varopt


@pytest.mark.parametrize(
    ("rows", "vocabulary_size", "k"),
    [
        (7, 507, 123),  # direct
        (3, 5, 5),  # K = V
        (5, 1, 1),  # one id
        (9, 333, 1),
        (33, 4096, 64),
        (17, 16_000, 64),  # blocks, and blocks again among the candidates
        (6, 16_003, 64),  # a remainder shorter than a block
        (5, 9_001, 1),
        (4, 50_257, 128),
        (2, 50_257, 6_000),
        (2, 131_073, 64),
        (1, 8_193, 2),
    ],
)
def test_random_rows_equal_the_float64_reference(rows: int, vocabulary_size: int, k: int) -> None:
    labels = torch.randint(-1, vocabulary_size, (rows,), generator=torch.Generator().manual_seed(1))
    labels[0] = -1
    check(spread_logits(rows, vocabulary_size), vocabulary_size, k, labels)


def test_no_rows_give_no_rows() -> None:
    empty = reduce_topk(torch.empty(0, 40), 40, 3, torch.empty(0, dtype=torch.int64), FLOOR)
    assert empty.token_ids.shape == (0, 3)
    assert empty.entropy.shape == (0,)


@pytest.mark.parametrize("vocabulary_size", [507, 9_000, 16_003, 70_001])
@pytest.mark.parametrize("k", [1, 63, 64])
def test_equal_logits_come_by_ascending_id(vocabulary_size: int, k: int) -> None:
    check(tied_logits(vocabulary_size, k), vocabulary_size, k)


def test_ties_across_blocks_and_at_the_last_kept_id() -> None:
    vocabulary_size, k = 16_003, 8
    logits = spread_logits(40, vocabulary_size, scale=1.0) - 20
    for row in range(40):
        # Twelve equal maxima in runs that begin and end at block boundaries, and in the remainder.
        step = 31 + row
        logits[row, torch.arange(12) * step * 32 % vocabulary_size] = 5.0
        logits[row, 16_000:] = 5.0
        logits[row, 32 * row + 31] = 5.0
    found = check(logits, vocabulary_size, k)
    assert bool((found.logprobs[:, 0] == found.logprobs[:, -1]).all()), "the last kept id is one of the ties"


@settings(max_examples=60, deadline=None)
@given(logits=any_rows(5, 700), data=st.data())
def test_any_row_with_ties_and_masks(logits: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, logits.shape[1]))
    check(logits, logits.shape[1], k)


@pytest.mark.parametrize("vocabulary_size", [1_000, 16_000])
@pytest.mark.parametrize("k", [1, 2, 64])
def test_very_sharp_rows_keep_their_tails(vocabulary_size: int, k: int) -> None:
    """p1 = 1 - 1e-6 and 1 - 1e-30, and the second id 87, 104, 200 and 500 nats below the first."""
    missing = torch.tensor([1e-6, 1e-12, 1e-30]).double()
    gaps = torch.cat([(1 / missing * (vocabulary_size - 1)).log(), torch.tensor([87.0, 104.0, 200.0, 500.0])])
    logits = spread_logits(len(gaps), vocabulary_size, scale=0.5)
    logits[:, 7] = (gaps + logits.double().logsumexp(1)).float()
    found = check(logits, vocabulary_size, k, torch.full((len(gaps),), 7))
    expected = reference(logits, vocabulary_size, k, torch.full((len(gaps),), 7))
    # The absolute bound does not cover a log-prob of -1e-6: column 0 has to keep its digits too.
    np.testing.assert_allclose(found.logprobs[:3, 0].double(), expected["logprobs"][:3, 0], rtol=1e-5)
    assert bool((found.logprobs[:, 0] <= 0).all() and (found.log_tail < 0).all())


def test_tails_far_below_the_kept_ids() -> None:
    assert check(far_logits(16_000), 16_000, 64).log_tail[5] < -1_800


def test_very_flat_rows() -> None:
    found = check(torch.cat([torch.zeros(1, 16_000), spread_logits(3, 16_000, scale=1e-3)]), 16_000, 64)
    np.testing.assert_allclose(found.entropy[0], math.log(16_000), rtol=1e-6)
    np.testing.assert_allclose(found.log_tail[0], math.log1p(-64 / 16_000), rtol=1e-5)


def test_large_vocabulary_sums_stay_accurate() -> None:
    check(torch.cat([spread_logits(2, 262_144, 1.0), torch.zeros(1, 262_144) + 3]), 262_144, 16)


@pytest.mark.parametrize("vocabulary_size", [300, 16_003])
def test_masked_ids_are_floored_and_add_nothing(vocabulary_size: int) -> None:
    logits = masked_logits(vocabulary_size)
    found = check(logits, vocabulary_size, 64, torch.tensor([2, 11, 0, 200, -1]))
    assert [found.logprobs[1, 10], found.label_logprob[1], found.log_tail[3]] == [FLOOR] * 3
    assert [found.entropy[2], found.logprobs[2, 0]] == [0, 0]
    assert found.token_ids[2, 1:].tolist() == list(range(1, 64)), "masked ids are equal: they come by id"
    everything = check(logits, vocabulary_size, vocabulary_size)
    assert bool((everything.log_tail == -math.inf).all() and (everything.log_tail_half == -math.inf).all())


def test_logits_at_the_ends_of_float32() -> None:
    logits = spread_logits(2, 507)
    logits[0, 3], logits[0, 4] = 3e38, -3e38
    logits[1] += 5e4
    check(logits, 507, 9)


@pytest.mark.parametrize(("vocabulary_size", "columns"), [(507, 640), (16_003, 16_128), (16_000, 16_001)])
def test_padded_columns_do_not_exist(vocabulary_size: int, columns: int) -> None:
    logits = spread_logits(6, columns)
    logits[:, vocabulary_size:] = 1e4
    padded = check(logits, vocabulary_size, 32)
    cut = reduce_topk(logits[:, :vocabulary_size].contiguous(), vocabulary_size, 32, torch.arange(6), FLOOR)
    assert_same_bits(cut, padded)
    logits[2, vocabulary_size] = math.nan
    check(logits, vocabulary_size, 32)


@pytest.mark.parametrize("vocabulary_size", [100, 16_003])
@pytest.mark.parametrize(("invalid", "found"), INVALID)
@pytest.mark.parametrize("column", [0, -1])
def test_rows_without_a_softmax_are_named(vocabulary_size: int, invalid: float, found: str, column: int) -> None:
    logits = invalid_logits(70, vocabulary_size, invalid, column)
    with pytest.raises(InvalidLogits, match=f"row 66.*{found}") as caught:
        reduce_topk(logits, vocabulary_size, 4, torch.zeros(70, dtype=torch.int64), FLOOR)
    assert caught.value.row == 66


def test_the_cut_into_tiles_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = spread_logits(37, 9_001), torch.arange(37)
    logits[3, 5] = 300.0  # one row that is summed again
    whole = reduce_topk(logits, 9_001, 64, labels, FLOOR)
    for rows in (1, 5, 36):
        monkeypatch.setattr(teachers.reduction.rows, "_tile_logits", lambda device, rows=rows: 9_001 * rows)
        assert_same_bits(reduce_topk(logits, 9_001, 64, labels, FLOOR), whole)


@pytest.mark.parametrize("rows", [1, 5, 9])
def test_the_number_of_threads_changes_no_bit(rows: int) -> None:
    """Four rows fill a tile of one thread at this vocabulary, so that a single one is left over."""
    logits = torch.from_numpy(np.random.default_rng(9).normal(0, 3, (rows, 120_000))).float()
    labels = torch.arange(rows)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            topk = reduce_topk(logits, 120_000, 9, labels, FLOOR)
            varopt = reduce_varopt(logits, 120_000, 9, labels, FLOOR, sampling_of(rows, 3, 2.0, 2))
            found.append((topk, varopt))
    finally:
        torch.set_num_threads(before)
    for topk, varopt in found[1:]:
        assert_same_bits(topk, found[0][0])
        assert_same_bits(varopt, found[0][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("vocabulary_size", "k"), [(507, 123), (16_003, 64), (131_073, 64)])
def test_a_gpu_reduces_to_the_same_numbers(vocabulary_size: int, k: int) -> None:
    logits = torch.cat([spread_logits(40, vocabulary_size), spread_logits(40, vocabulary_size).bfloat16().float()])
    logits[3, 5] = 300.0
    labels = torch.arange(80)
    here = reduce_topk(logits, vocabulary_size, k, labels, FLOOR)
    there = reduce_topk(logits.cuda(), vocabulary_size, k, labels.cuda(), FLOOR)
    assert torch.equal(there.token_ids.cpu(), here.token_ids)
    for name, value in vars(here).items():
        torch.testing.assert_close(getattr(there, name).cpu(), value, atol=2e-6, rtol=1e-6, equal_nan=True)


def test_inference_tensors_are_accepted() -> None:
    with torch.inference_mode():
        logits = spread_logits(3, 9_001)
    check(logits, 9_001, 16)


def test_a_head_smaller_than_the_vocabulary_and_a_wrong_k_are_refused() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InputError, match="head has 10 columns, the vocabulary 11"):
        reduce_topk(torch.zeros(2, 10), 11, 2, labels, FLOOR)
    for k in (0, 11):
        with pytest.raises(InputError, match=rf"k must be in 1\.\.10.*found {k}"):
            reduce_topk(torch.zeros(2, 10), 10, k, labels, FLOOR)


def test_rows_per_chunk_stays_within_the_budget() -> None:
    for columns in (1, 507, 16_000, 262_144):
        for budget in (1, 4 * columns, 1 << 20, 64 << 20):
            rows = rows_per_chunk(columns, budget)
            assert rows == 1 or 4 * columns * rows <= budget
            assert rows < 64 or (rows % 64 == 0 and 4 * columns * (rows + 64) > budget)
