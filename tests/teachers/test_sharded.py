"""The reducer over columns that are spread over ranks: against float64, against the unsharded one, alike on each."""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clusters.thread_ranks import ThreadRanks, on_ranks
from support.references import reducer
from support.references import varopt as varopt_reference
from support.references.reducer import (
    FLOOR,
    INVALID,
    any_rows,
    assert_same_bits,
    far_logits,
    invalid_logits,
    masked_logits,
    spread_logits,
    tied_logits,
)
from support.references.varopt import sampling_of
from torch import Tensor

import teachers.reduction.passes
import teachers.reduction.sharded
from storage.errors import InputError
from teachers.ranks import ColumnShard, Ranks, equal_runs
from teachers.reduction.reduce import InvalidLogits, ReducedRows, reduce_rows, reduce_topk, reduce_varopt
from teachers.reduction.sharded import ShardedMasses
from teachers.reduction.varopt import Sampling, TensorMasses, sample

Runs = tuple[tuple[int, int], ...]
SHAPES = [
    # rows, V, columns of the head, K, ranks
    (7, 507, 512, 123, 2),
    (5, 403, 416, 64, 3),  # V is no multiple of the ranks
    (3, 5, 5, 5, 2),  # K = V
    (5, 1, 1, 1, 2),  # one id; the second rank has no column
    (4, 9, 40, 4, 4),  # V ends inside the first run, the other ranks come after it
    (6, 30, 40, 30, 4),  # V ends where a run does, and K is more than a rank's columns
    (9, 333, 333, 1, 4),
    (17, 16_003, 16_128, 64, 2),
    (4, 50_257, 50_304, 128, 4),
    (2, 9_000, 9_000, 2_500, 4),  # K is more than a rank's columns
    (3, 131_073, 131_200, 64, 3),
]


def sharded(
    logits: Tensor, vocabulary_size: int, k: int, labels: Tensor, runs: Runs, sampling: Sampling | None = None
) -> ReducedRows:
    """The result of every rank; they are equal, bit for bit."""

    def work(ranks: Ranks) -> ReducedRows:
        shard = ColumnShard(ranks, runs)
        own = logits[:, shard.own].contiguous()
        before = own.clone()
        found = reduce_rows(own, vocabulary_size, k, labels, FLOOR, sampling, shard)
        assert torch.equal(own.nan_to_num(), before.nan_to_num()), "the input was written to"
        return found

    first, *others = on_ranks(len(runs), work)
    for other in others:
        assert_same_bits(other, first)
    return first


def check(logits: Tensor, vocabulary_size: int, k: int, runs: Runs, labels: Tensor | None = None) -> ReducedRows:
    """The stated error of the unsharded reducer, and its ids."""
    return reducer.check(logits, vocabulary_size, k, labels, lambda *of: sharded(*of[:4], runs))


def check_sample(found: ReducedRows, logits: Tensor, k: int, head_ids: int = 0, temperature: float = 1.0) -> None:
    """The rule of a sample. Entropy and label, which are of all columns, may differ by the order of additions."""
    labels = torch.arange(len(logits)) % logits.shape[1]
    top = reduce_topk(logits, logits.shape[1], k, labels, FLOOR)
    torch.testing.assert_close(found.entropy, top.entropy, rtol=2e-6, atol=0)
    torch.testing.assert_close(found.label_logprob, top.label_logprob, atol=2e-6, rtol=6e-7)
    found = replace(found, entropy=top.entropy, label_logprob=top.label_logprob)
    varopt_reference.check(found, logits, k, head_ids, temperature)


@pytest.mark.parametrize(("rows", "vocabulary_size", "columns", "k", "size"), SHAPES)
def test_top_k_of_random_rows(rows: int, vocabulary_size: int, columns: int, k: int, size: int) -> None:
    labels = torch.randint(-1, vocabulary_size, (rows,), generator=torch.Generator().manual_seed(1))
    labels[0] = -1
    logits = spread_logits(rows, columns)
    logits[:, vocabulary_size:] = 1e4  # softmax must not see them
    check(logits, vocabulary_size, k, equal_runs(columns, size), labels)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("rows", "vocabulary_size", "columns", "k", "size"), SHAPES)
def test_varopt_of_random_rows(
    rows: int, vocabulary_size: int, columns: int, k: int, size: int, temperature: float
) -> None:
    labels = torch.arange(rows) % vocabulary_size
    for scale, pivotal in ((0.01, 0), (1.0, k), (4.0, 0), (4.0, k)):
        logits = spread_logits(rows, columns, scale)
        logits[:, vocabulary_size:] = 1e4
        for head_ids in {0, k // 2}:
            sampling = sampling_of(rows, 3, temperature, head_ids, pivotal)
            found = sharded(logits, vocabulary_size, k, labels, equal_runs(columns, size), sampling)
            check_sample(found, logits[:, :vocabulary_size], k, head_ids, temperature)
            whole = reduce_varopt(logits, vocabulary_size, k, labels, FLOOR, sampling)
            # Another last bit of the unit may sample another id, about once in 10**5 rows.
            same = (found.token_ids == whole.token_ids).all(1)
            assert int((~same).sum()) <= 1
            assert torch.equal(found.certain[same], whole.certain[same])
            torch.testing.assert_close(found.log_tail[same], whole.log_tail[same], atol=2e-6, rtol=6e-7)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_uneven_runs_and_ranks_without_columns(size: int) -> None:
    logits = spread_logits(6, 1_000)
    cuts = sorted(torch.randint(0, 1_000, (size - 1,), generator=torch.Generator().manual_seed(size)).tolist())
    cuts[0] = 0  # the first rank has nothing
    runs = tuple(zip([0, *cuts], [*cuts, 1_000], strict=True))
    check(logits, 990, 20, runs)
    order = torch.randperm(990, generator=torch.Generator().manual_seed(0))
    for sampling in (sampling_of(6, 0), replace(sampling_of(6, 0, pivotal=20), order=order)):
        found = sharded(logits, 990, 20, torch.arange(6), runs, sampling)
        whole = reduce_varopt(logits, 990, 20, torch.arange(6), FLOOR, sampling)
        assert torch.equal(found.token_ids, whole.token_ids)
        torch.testing.assert_close(found.label_logprob, whole.label_logprob)
    logits[2, 700:702] = math.nan
    with pytest.raises(InvalidLogits, match=f"row 2: .*2 NaN, the first at id {int(order[700:702].min())};"):
        sharded(logits, 990, 20, torch.arange(6), runs, sampling)


@pytest.mark.parametrize("vocabulary_size", [507, 16_003])
@pytest.mark.parametrize("k", [1, 63, 64])
def test_equal_logits_come_by_ascending_id_across_ranks(vocabulary_size: int, k: int) -> None:
    at_the_border = spread_logits(1, vocabulary_size, 1.0) - 20
    run = -(-vocabulary_size // 4)
    at_the_border[0, run - k // 2 : run + k] = 5.0  # equal maxima on both sides of a border, more than K of them
    logits = torch.cat([tied_logits(vocabulary_size, k), at_the_border])
    check(logits, vocabulary_size, k, equal_runs(vocabulary_size, 4))
    sampling = sampling_of(len(logits), 5)
    labels = torch.arange(len(logits))
    found = sharded(logits, vocabulary_size, k, labels, equal_runs(vocabulary_size, 4), sampling)
    check_sample(found, logits, k)


@settings(max_examples=60, deadline=None)
@given(logits=any_rows(4, 200), data=st.data())
def test_any_row_and_any_runs(logits: Tensor, data: st.DataObject) -> None:
    columns = logits.shape[1]
    vocabulary_size = data.draw(st.integers(1, columns))
    size = data.draw(st.integers(2, 4))
    cuts = sorted(data.draw(st.lists(st.integers(0, columns), min_size=size - 1, max_size=size - 1)))
    k = data.draw(st.integers(1, vocabulary_size))
    check(logits, vocabulary_size, k, tuple(zip([0, *cuts], [*cuts, columns], strict=True)))


@pytest.mark.parametrize("vocabulary_size", [300, 16_003])
def test_masked_ids_and_tails_far_below(vocabulary_size: int) -> None:
    runs = equal_runs(vocabulary_size, 3)
    check(masked_logits(vocabulary_size), vocabulary_size, 64, runs, torch.tensor([2, 11, 0, 200, -1]))
    assert check(far_logits(vocabulary_size), vocabulary_size, 64, runs).log_tail[5] < -1_800
    missing = torch.tensor([1e-6, 1e-30]).double()
    sharp = spread_logits(2, vocabulary_size, scale=0.5)
    sharp[:, 7] = ((1 / missing * (vocabulary_size - 1)).log() + sharp.double().logsumexp(1)).float()
    check(sharp, vocabulary_size, 64, runs)
    ends = spread_logits(1, vocabulary_size)
    ends[0, 3], ends[0, 250] = 3e38, -3e38
    check(ends, vocabulary_size, 9, runs)


def test_a_tile_of_rows_changes_no_bit_and_tails_are_summed_again_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, runs = spread_logits(37, 9_001), torch.arange(37), equal_runs(9_001, 2)
    logits[::3, 5] = 300.0  # rows that are summed again
    whole = sharded(logits, 9_001, 64, labels, runs)
    for rows in (1, 5):
        monkeypatch.setattr(teachers.reduction.sharded, "_CPU_TILE_LOGITS", 4_501 * rows)
        assert_same_bits(sharded(logits, 9_001, 64, labels, runs), whole)


@pytest.mark.parametrize(("invalid", "found"), INVALID)
@pytest.mark.parametrize("column", [0, 299])
def test_rows_without_a_softmax_are_named_on_every_rank(invalid: float, found: str, column: int) -> None:
    logits = invalid_logits(70, 320, invalid, column)
    messages: list[str] = []

    def work(ranks: ThreadRanks) -> None:
        shard = ColumnShard(ranks, equal_runs(320, 4))
        with pytest.raises(InvalidLogits, match=f"row 66.*{found}") as caught:
            reduce_topk(logits[:, shard.own], 300, 4, torch.zeros(70, dtype=torch.int64), FLOOR, shard)
        assert caught.value.row == 66
        messages.append(caught.value.found)

    on_ranks(4, work)
    assert len(set(messages)) == 1
    assert invalid == -math.inf or messages[0].endswith(f" {column}")


def test_a_head_smaller_than_the_vocabulary_is_refused_on_every_rank() -> None:
    def work(ranks: ThreadRanks) -> None:
        shard = ColumnShard(ranks, equal_runs(10, 2))
        with pytest.raises(InputError, match="head has 10 columns, the vocabulary 11"):
            reduce_topk(torch.zeros(2, 5), 11, 2, torch.zeros(2, dtype=torch.int64), FLOOR, shard)

    on_ranks(2, work)


@pytest.mark.parametrize(("pivotal", "threshold"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("columns", "k"), [(40, 7), (1_000, 16), (9_001, 64), (50, 49)])
def test_under_one_unit_the_same_ids_are_sampled(
    columns: int, k: int, size: int, pivotal: bool, threshold: bool
) -> None:
    """Masses that are whole numbers have sums without rounding, so the unit is equal, and with it everything."""
    rows = 200
    mass = torch.randint(0, 30, (rows, columns), generator=torch.Generator().manual_seed(columns + k)).float()
    order = mass.sort(dim=1, descending=True, stable=True)
    top, top_ids = order.values[:, :k], order.indices[:, :k]
    rest = mass.scatter(1, top_ids, 0.0)
    sampling = sampling_of(rows, 11, pivotal=k if pivotal else 0, threshold=threshold)
    expected = sample(TensorMasses(rest.clone(), torch.empty(rows, columns)), top, top_ids, sampling)

    def work(ranks: ThreadRanks) -> tuple[Tensor, Tensor, Tensor]:
        start, stop = equal_runs(columns, size)[ranks.rank]
        own = TensorMasses(rest[:, start:stop].clone(), torch.empty(rows, stop - start))
        local = teachers.reduction.sharded._LocalMasses(own)
        return sample(ShardedMasses(local, ranks, columns, start, stop - start), top, top_ids, sampling)

    for found in on_ranks(size, work):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_the_bytes_sent_per_row_do_not_grow_with_the_vocabulary() -> None:
    k, rows = 64, 10
    sent: dict[int, int] = {}
    for vocabulary_size in (1_000, 64_000):
        logits = spread_logits(rows, vocabulary_size, 1.0)

        def work(ranks: ThreadRanks, logits: Tensor = logits) -> int:
            shard = ColumnShard(ranks, equal_runs(logits.shape[1], 2))
            reduce_varopt(
                logits[:, shard.own], logits.shape[1], k, torch.zeros(rows, dtype=torch.int64), FLOOR,
                sampling_of(rows, 0), shard,
            )  # fmt: skip
            return ranks.sent

        sent[vocabulary_size] = on_ranks(2, work)[0]
    assert sent[1_000] == sent[64_000]
    # Keys and a maximum, the label, three sums; mass, length, sampled ids and their logits.
    assert sent[1_000] == rows * (8 * (k + 1) + 4 + 12 + 4 + 8 + 8 * k + 4 * k)


def test_whole_rows_are_put_together_in_order() -> None:
    logits = spread_logits(3, 10)
    runs = ((0, 0), (0, 7), (7, 10))
    for whole in on_ranks(3, lambda ranks: ColumnShard(ranks, runs).whole(logits[:, ColumnShard(ranks, runs).own])):
        assert torch.equal(whole, logits)


def test_runs_cover_the_head() -> None:
    for columns in (1, 2, 7, 403, 512):
        for size in (1, 2, 3, 8):
            runs = equal_runs(columns, size)
            assert [len(part) for part in torch.arange(columns).chunk(size)] == [b - a for a, b in runs if b > a]
            ColumnShard(ThreadRanks(0, size, [], threading.Barrier(1)), runs)


def two_methods(rows: int) -> Iterator[tuple[str, Sampling | None]]:
    yield "topk", None
    yield "varopt", sampling_of(rows, 3, 2.0)


def _reduce_in_a_group(rank: int, size: int, folder: str, logits: Tensor, runs: Runs, wanted: tuple[int, int]) -> None:
    """As one process of a group: save what it has of both methods."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    shard = ColumnShard(Ranks(), runs)
    for name, sampling in two_methods(len(logits)):
        fixed = (logits[:, shard.own].contiguous(), *wanted, torch.arange(len(logits)), FLOOR)
        torch.save(vars(reduce_rows(*fixed, sampling, shard)), Path(folder) / f"{name}-{rank}")
    assert torch.equal(shard.whole(logits[:, shard.own]), logits)
    dist.destroy_process_group()


def gloo_logits() -> Tensor:
    logits = spread_logits(9, 16_128)
    logits[2, 5] = 300.0
    return logits


def _one_process(rank: int, size: int, folder: str) -> None:
    _reduce_in_a_group(rank, size, folder, gloo_logits(), equal_runs(16_128, size), (16_003, 64))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_with_gloo_give_what_threads_give(size: int, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_process, (size, str(tmp_path)), nprocs=size)
    logits, labels = gloo_logits(), torch.arange(9)
    for name, sampling in two_methods(9):
        expected = sharded(logits, 16_003, 64, labels, equal_runs(16_128, size), sampling)
        for rank in range(size):
            assert_same_bits(ReducedRows(**torch.load(tmp_path / f"{name}-{rank}")), expected)


def _one_process_with_kernels(rank: int, size: int, folder: str) -> None:
    """The kernels as Triton's interpreter runs them; threads would share its state."""
    teachers.reduction.passes.has_kernels = teachers.reduction.sharded.has_kernels = lambda device: True  # type: ignore[assignment]
    _reduce_in_a_group(rank, size, folder, kernel_logits(), ((0, 0), (0, 5_001), (5_001, 9_100)), (9_003, 40))


def kernel_logits() -> Tensor:
    logits = spread_logits(6, 9_100)
    logits[2, 5] = 300.0  # its tail is summed again
    logits[4] = -3.25  # ties everywhere
    logits[:, 9_003:] = 1e4
    return logits


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_keep_ids_of_other_ranks_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch.multiprocessing.spawn(_one_process_with_kernels, (3, str(tmp_path)), nprocs=3)
    logits, labels = kernel_logits(), torch.arange(6)
    for name, sampling in two_methods(6):
        found, *others = (ReducedRows(**torch.load(tmp_path / f"{name}-{rank}")) for rank in range(3))
        for other in others:
            assert_same_bits(other, found)
        if sampling is not None:
            check_sample(found, logits[:, :9_003], 40, 0, 2.0)
        else:
            reducer.check_rows(found, logits, 9_003, 40, labels)
