"""One job, resumed by engine after engine: numbers of workers, ways to start and to end them, all at random."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.clusters.slurm import Cluster, until
from support.jobs import Job, committed, contents, copy_of, shards_of, start

from storage.cache.verify import verify


class World:
    """A cache, a teacher, and a generator that decides what happens next; on a cluster of Slurm where one is given."""

    def __init__(self, cache: Path, teacher: Path, seed: int, slurm: Cluster | None = None) -> None:
        self.cache, self.teacher, self.random = cache, teacher, random.Random(seed)
        self.slurm = slurm
        self.log: list[str] = []

    def attempt(self) -> None:
        """One run of the job: some workers are started, then killed, stopped or left alone."""
        begin = self.random.choice([self._one, self._several, self._several, self._ranks, self._ranks, self._ray])
        if self.slurm is not None and len(self.log) % 2 == 0:
            begin = self._array
        jobs = begin()
        self._wait_for_shards(jobs, self.random.randrange(0, 4))
        self._harm(jobs)
        for job in jobs:
            job.end()
        with contextlib.suppress(ProcessLookupError):
            for job in jobs:
                os.killpg(job.process.pid, signal.SIGKILL)

    def _start(self, *options: object) -> Job:
        return start(self.cache, self.teacher, *options)

    def _one(self) -> list[Job]:
        self.log.append("one process")
        return [self._start()]

    def _several(self) -> list[Job]:
        workers = self.random.choice([2, 3])
        self.log.append(f"{workers} workers")
        return [self._start("--workers", workers)]

    def _ranks(self) -> list[Job]:
        """Some of the processes of a job that is split by hand; the others are never started."""
        count = self.random.choice([2, 3, 7])
        chosen = self.random.sample(range(count), self.random.choice([1, 2]))
        self.log.append(f"ranks {chosen} of {count}")
        return [self._start("--worker", f"{index}/{count}") for index in chosen]

    def _ray(self) -> list[Job]:
        self.log.append("ray with 2 workers")
        return [self._start("--engine", "ray", "--workers", 2)]

    def _array(self) -> list[Job]:
        """An array, of which a task may be killed, and which runs on beside what follows unless it is cancelled."""
        assert self.slurm is not None
        self.log.append("an array of 2 tasks")
        folder = self.cache.parent / "slurm-logs"
        options = ("--engine", "slurm", "--workers", 2, "--slurm", "partition=main", "--slurm-folder", folder)
        job = start(self.cache, self.teacher, *options, **self.slurm.environment)
        job.until("start")
        return [job]

    def _wait_for_shards(self, jobs: list[Job], more: int) -> None:
        before = committed(self.cache)
        while committed(self.cache) < before + more and any(job.process.poll() is None for job in jobs):
            time.sleep(0.02)
        time.sleep(self.random.random() * 0.3)

    def _harm(self, jobs: list[Job]) -> None:
        job = self.random.choice(jobs)
        if self.slurm is not None and self.log[-1] == "an array of 2 tasks":
            how = self.random.choice(["cancelled", "its tasks killed", "left to run on"])
            if how != "left to run on":
                signal_of = () if how == "cancelled" else ("--signal", "KILL", "--full")
                self.slurm.call("scancel", "--user", os.getuid(), *signal_of)
            self.log.append(how)
            job.kill()
            return
        how: Any = self.random.choice(["killed whole", "killed whole", "stopped", "its parent killed", "left alone"])
        self.log.append(how)
        with contextlib.suppress(ProcessLookupError):
            if how == "killed whole":
                os.killpg(job.process.pid, signal.SIGKILL)
            elif how == "stopped":
                job.kill(signal.SIGTERM)
            elif how == "its parent killed":
                job.kill()


SOAK = [pytest.param(seed, 7, marks=pytest.mark.soak) for seed in range(6)]


@pytest.mark.parametrize(("seed", "attempts"), [pytest.param(6, 4, marks=pytest.mark.slow), *SOAK])
def test_engines_and_kills_in_any_order_give_the_same_bytes(
    seed: int, attempts: int, small_cache: Path, slow_teacher: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    _interleave(World(copy_of(small_cache, tmp_path / "cache"), slow_teacher, seed), attempts, small_cache)


@pytest.mark.slurm
def test_arrays_of_slurm_among_other_engines_give_the_same_bytes(
    slurm: Cluster, small_cache: Path, slow_teacher: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    _interleave(World(copy_of(small_cache, tmp_path / "cache"), slow_teacher, 3, slurm), 5, small_cache)


def _interleave(world: World, attempts: int, small_cache: Path) -> None:
    """Run the job in so many attempts, then to its end; check that it has the bytes of one undisturbed process."""
    alone = copy_of(small_cache, world.cache.parent / "alone")
    assert start(alone, world.teacher).end() == 0
    for _ in range(attempts):
        world.attempt()
        if committed(world.cache) == shards_of(world.cache):
            break
    print(f"\n{committed(world.cache)} of {shards_of(world.cache)} shards after: {', '.join(world.log)}")
    # The remaining shards, and the index and the report where the last run ended before them.
    last = start(world.cache, world.teacher)
    assert last.end() == 0, (last.other, world.log)
    if world.slurm is not None:
        until(lambda: not world.slurm.queue(), world.slurm, "the arrays end", 120)
    assert verify(str(world.cache), deep=True).problems == [], world.log
    assert contents(world.cache) == contents(alone), world.log
