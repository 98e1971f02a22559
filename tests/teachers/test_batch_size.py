"""The choice of a batch size for an entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import teachers.batch_size
from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import open_job
from teachers.batch_size import choose_batch_windows, largest_worthwhile

GIB = 1 << 30


def device(launch_s: float, window_s: float, bytes_of_window: int, memory: int = 80 * GIB) -> Any:
    """A device on which a pass takes a fixed time and a time per window."""

    def measure(count: int) -> tuple[float, int]:
        assert count & (count - 1) == 0
        if count * bytes_of_window > memory:
            raise torch.OutOfMemoryError
        return launch_s + count * window_s, count * bytes_of_window

    return measure


def test_grows_while_it_pays() -> None:
    # rate(n) = n / (1 + n / 8): from 64 to 128 windows it grows by 6 %, from 128 to 256 by 3 %.
    assert largest_worthwhile(device(1.0, 1 / 8, 1), 1 << 20, GIB) == 128
    assert largest_worthwhile(device(0.0, 1.0, 1), 1 << 20, GIB) == 1  # a pass of one window fills the device
    assert largest_worthwhile(device(1.0, 1e-9, 1), 100, GIB) == 64  # the most that is allowed


def test_stays_within_the_memory() -> None:
    assert largest_worthwhile(device(1.0, 1e-9, GIB), 1 << 20, 20 * GIB) == 16
    assert largest_worthwhile(device(1.0, 1e-9, GIB, memory=5 * GIB), 1 << 20, 20 * GIB) == 4  # the limit was wrong
    assert largest_worthwhile(device(1.0, 1e-9, 30 * GIB), 1 << 20, 20 * GIB) == 1


def test_on_a_cpu_it_is_a_constant() -> None:
    class OnCpu:
        device = torch.device("cpu")

    teacher: Any = OnCpu()
    assert [choose_batch_windows(teacher, length) for length in (64, 4_096, 10_000)] == [64, 1, 1]


def test_two_workers_that_choose_differently_at_the_same_time_agree(
    cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one makes the entry after this one looked for it."""
    job = CacheJob(cache=str(cache), teacher=(str(teacher),), name="a", k=8, context_tokens=64)

    def choose(*_: Any) -> int:
        open_job(job.model_copy(update={"batch_windows": 3}))
        return 7

    monkeypatch.setattr(teachers.batch_size, "choose_batch_windows", choose)
    assert open_job(job).writer.entry.execution.batch_windows == 3
