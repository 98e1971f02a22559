"""Two workers of this machine against one, a thread each: what a token costs, and how much sooner all of them are done.

Both are processes of `cache-logits --workers`, told their shards by the same driver. The time counts from when the last
of them has its teacher to the last receipt, so start-up, which is paid once per worker, is no part of it. Where the
machine has fewer free cores than workers, the ratio of the times says so and nothing else.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_caching import prepare
from bench_sizes import workshop
from harness import Table, in_child, in_turn, ratios, spread

VOCABULARY, LAYERS, HIDDEN = 16_000, 4, 256
POSITIONS, SHARD, CONTEXT, BATCH = 49_152, 4_096, 128, 8
ROUNDS = 3


def tables() -> Iterator[Table]:
    """The one table."""
    folder = str(workshop() / "workers")
    in_child("bench_workers", "make", folder=folder)
    found, _ = in_child("bench_workers", "measure", folder=folder)
    seconds, processor = found["seconds"], found["processor"]
    rows = [
        (
            f"{workers}",
            spread(ratios(processor[workers], processor["1"])),
            spread(ratios(seconds[workers], seconds["1"])),
            spread([1e6 * value / POSITIONS for value in processor[workers]], 0),
            spread([POSITIONS / value for value in seconds[workers]], 0),
        )
        for workers in ("1", "2")
    ]
    yield Table(
        "`cache-logits --workers`, one thread for each",
        (
            "workers",
            "processor time per token, over one's",
            "time, over one's",
            "µs of processor per token",
            "tokens/s",
        ),
        rows,
        note=f"V = {VOCABULARY:,}, {LAYERS} layers of {HIDDEN}, K = 64; {POSITIONS:,} positions, shards of {SHARD:,}.",
    )


def make(folder: str) -> None:
    """The teacher and the token stream."""
    if not Path(folder, "cache").exists():
        prepare(folder, VOCABULARY, LAYERS, HIDDEN, POSITIONS)


def measure(folder: str) -> dict[str, Any]:
    """Seconds, passed and of processor time, of one and of two workers in each round."""
    processor: dict[str, list[float]] = {"1": [], "2": []}

    def run(workers: str) -> float:
        seconds, cpu = _cached(folder, int(workers))
        processor[workers].append(cpu)
        return seconds

    seconds = in_turn({name: lambda name=name: run(name) for name in processor}, ROUNDS)
    return {"seconds": seconds, "processor": processor}


def _cached(folder: str, workers: int) -> tuple[float, float]:
    from logit_cache.caching.job import CacheJob
    from logit_cache.caching.log import JobLog
    from logit_cache.engines.driver import Driver, Ready
    from logit_cache.engines.local_processes import LocalPool
    from logit_cache.engines.options import EngineOptions
    from logit_cache.engines.shutdown import Stopping

    shutil.rmtree(Path(folder, "cache/teachers/a"), ignore_errors=True)
    job = CacheJob(
        cache=f"{folder}/cache", teacher=(f"{folder}/teacher",), name="a", context_tokens=CONTEXT, dtype="float32",
        device="cpu", shard_tokens=SHARD, chunk_tokens=SHARD, batch_windows=BATCH,
    )  # fmt: skip

    class Together(LocalPool):
        """A pool whose workers begin at the same moment, with their processor time from then on."""

        began = 0.0

        def events(self, timeout: float) -> list[Any]:
            told = list(super().events(timeout))
            if any(isinstance(event, Ready) for event in told):
                while any(child.busy for child in self._children.values()):
                    told += super().events(1.0)
                self.began, self.cpu = time.perf_counter(), self.processor()
            return told

        def processor(self) -> float:
            return sum(_processor_seconds(child.process.pid) for child in self._children.values())

    with Together(job, workers, ["cpu"], 1, EngineOptions()) as pool:
        outcome = Driver(pool, JobLog(), Stopping()).run()
        took = time.perf_counter() - pool.began
        cpu = pool.processor() - pool.cpu
    assert outcome.built == -(-POSITIONS // SHARD)
    return took, cpu


def _processor_seconds(pid: int) -> float:
    """Processor time of a process so far (Linux)."""
    import os

    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
