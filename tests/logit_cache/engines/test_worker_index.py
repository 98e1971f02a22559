"""The rank of a process, by its flag or the variables of its launcher."""

from __future__ import annotations

import pytest

from logit_cache.engines.worker_index import Rank, rank_of
from storage.errors import InputError

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}
STEP = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("worker", "environment", "expected"),
    [
        (None, {}, (0, 1, 0)),
        ("2/5", {"RANK": "1", "WORLD_SIZE": "2"}, (2, 5, 0)),
        (None, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
        (None, ARRAY, (2, 4, 0)),
        (None, {**ARRAY, "SLURM_ARRAY_TASK_STEP": "2"}, (1, 4, 0)),
        (None, STEP, (1, 2, 1)),
        (None, ARRAY | STEP, (5, 8, 1)),
        # A batch script without srun: one process, whatever was asked for.
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),
    ],
)
def test_ranks(worker: str | None, environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    rank = rank_of(worker, environment)
    assert (rank.index, rank.count, rank.local) == expected
    assert bool(rank.source) == (rank != Rank())


@pytest.mark.parametrize(
    ("worker", "environment", "message"),
    [
        ("4/4", {}, "0 <= i < n"),
        ("a/4", {}, "0 <= i < n"),
        ("1", {}, "0 <= i < n"),
        (None, {"RANK": "2", "WORLD_SIZE": "2"}, "worker 2 of 2"),
        (None, {"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        # --array=0,9: two tasks, and the second is not number 1.
        (None, {**ARRAY, "SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2"}, "consecutive"),
    ],
)
def test_ranks_that_make_no_sense(worker: str | None, environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rank_of(worker, environment)
