"""Work that overlaps the computation of a job: order, bounds, and errors that reach the caller."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.jobs import whole

import logit_cache.caching.pipeline
from logit_cache.caching.job import CacheJob
from logit_cache.caching.pipeline import Committer, HostCopies
from logit_cache.caching.prepare import OpenJob, open_job
from logit_cache.engines.this_machine import build_missing
from storage.errors import InputError
from teachers.reduction.reduce import ReducedRows, reduce_topk

WAIT_S = 20.0


class Recorder:
    """A writer whose commits wait to be let through, one by one."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.done: list[int] = []
        self.let = threading.Semaphore(0)
        self.fails: int | None = None
        self.leases = self
        self.kept = 0

    def keep(self) -> None:
        self.kept += 1

    def commit(self, shard: int, targets: Any, began: float) -> None:
        self.started.append(shard)
        assert self.let.acquire(timeout=WAIT_S)
        if shard == self.fails:
            raise InputError(f"shard {shard}: the disk is full")
        self.done.append(shard)


def until(condition: Any) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_one_shard_is_committed_while_the_next_is_computed_and_no_more() -> None:
    writer: Any = Recorder()
    with closing(Committer(writer)) as committer:
        committer.put(0, None, 0.0)  # type: ignore[arg-type]
        until(lambda: writer.started == [0])
        assert writer.done == []  # `put` came back before the shard had its receipt
        second = threading.Thread(target=committer.put, args=(1, None, 0.0))
        second.start()
        second.join(0.1)
        assert second.is_alive()  # a second one has to wait for the first
        assert writer.started == [0]
        writer.let.release(2)
        second.join(WAIT_S)
        assert not second.is_alive()
    assert writer.done == [0, 1], "its end waits for the last one"


def test_leases_are_renewed_while_a_commit_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_cache.caching.pipeline, "_SECONDS_BETWEEN_RENEWALS", 0.01)
    writer: Any = Recorder()
    with closing(Committer(writer)) as committer:
        committer.put(0, None, 0.0)  # type: ignore[arg-type]
        waiting = threading.Thread(target=committer.wait)
        waiting.start()
        until(lambda: writer.kept > 2)
        writer.let.release()
        waiting.join(WAIT_S)
    assert writer.done == [0]


def commit_all(writer: Any, shards: int, then: Any = None) -> None:
    with closing(Committer(writer)) as committer:
        for shard in range(shards):
            committer.put(shard, None, 0.0)  # type: ignore[arg-type]
        if then is not None:
            then()
        committer.wait()


@pytest.mark.parametrize("shards", [2, 3])
def test_a_commit_that_fails_is_raised_at_the_next_shard_or_at_the_end(shards: int) -> None:
    writer: Any = Recorder()
    writer.fails = 1
    writer.let.release(9)
    with pytest.raises(InputError, match="disk is full"):
        commit_all(writer, shards)
    assert writer.started == [0, 1]


def test_the_commit_in_flight_is_finished_when_the_next_shard_fails() -> None:
    def fail() -> None:
        writer.let.release()
        raise ZeroDivisionError

    writer: Any = Recorder()
    with pytest.raises(ZeroDivisionError):
        commit_all(writer, 1, fail)
    assert writer.done == [0]


def job(cache: Path, teacher: Path, name: str) -> OpenJob:
    fields: dict[str, Any] = {"context_tokens": 64, "shard_tokens": 1_024, "k": 16, "fields": "all"}
    return open_job(CacheJob(cache=str(cache), teacher=(str(teacher),), name=name, **fields))


def test_a_failing_commit_ends_the_job_and_the_next_run_completes_it(cache: Path, teacher: Path) -> None:
    opened = job(cache, teacher, "a")
    assert opened.writer.shards > 2
    commit, calls = opened.writer.commit, []

    def fails_once(shard: int, *rest: Any) -> Any:
        calls.append(shard)
        if shard == 1:
            raise InputError("no space left")
        return commit(shard, *rest)

    opened.writer.commit = fails_once  # type: ignore[method-assign]
    with pytest.raises(InputError, match="no space left"):
        build_missing(opened)
    assert calls == [0, 1]
    again = job(cache, teacher, "a")
    assert again.writer.pending() == list(range(1, again.writer.shards))
    build_missing(again)
    plain = job(cache, teacher, "b")
    build_missing(plain)
    (_, one), (_, other) = whole(cache, "a"), whole(cache, "b")
    for name in ("token_ids", "kept", "certain", "logprobs", "log_tail", "log_tail_half", "label_logprob", "entropy"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_rows_reach_the_host_in_order_and_unchanged(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    stored: list[tuple[np.ndarray, ReducedRows]] = []
    copies = HostCopies(torch.device(device), lambda position, rows: stored.append((position, rows)))
    expected = []
    for number in range(12):
        logits = torch.randn(7, 50, generator=generator).to(device)
        labels = torch.randint(50, (7,), generator=generator).to(device)
        rows = reduce_topk(logits, 50, 4, labels, -2000.0)
        expected.append({name: value.cpu().clone() for name, value in vars(rows).items()})
        copies.add(np.arange(7) + 7 * number, rows)
    copies.finish()
    assert np.array_equal(np.concatenate([position for position, _ in stored]), np.arange(84))
    for (_, rows), wanted in zip(stored, expected, strict=True):
        for name, value in wanted.items():
            assert torch.equal(getattr(rows, name).to(value.dtype), value), name
