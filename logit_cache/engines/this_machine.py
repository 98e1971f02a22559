"""The workers of this machine: this process as one, or a pool of processes."""

from __future__ import annotations

import os
import time

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import OpenJob, open_job
from logit_cache.engines.attempts import Attempts
from logit_cache.engines.local_processes import local_devices
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import Outcome, WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import Worker, positions_of
from logit_cache.engines.worker_index import Rank, rank_of


def build_missing(opened: OpenJob) -> None:
    """Build every missing shard of an open job in this process, and the index of receipts.

    Raises the LogitCacheError that a shard raises, and WorkersLost where the device is broken.
    """
    with Worker(opened) as worker:
        take_turns(worker, Attempts(JobLog()), Stopping())
    opened.writer.finish()


def take_turns(worker: Worker, tally: Attempts, stopping: Stopping) -> None:
    """Have a worker build shards in this process until none is left for it, or the job is stopped.

    Then the only missing shards are those that failed permanently, and others' shares where the worker has one. Raises
    as `build_missing` does.
    """
    while True:
        turn = worker.turn(tally.failed)
        for item in turn.outcomes:
            tally.record(item, "0")
            if item.state == "ended":
                reason = (item.error or "").splitlines()[-1]
                raise item.cause or WorkersLost(f"this process cannot continue, and must be started again: {reason}")
        if turn.taken is not None:
            tally.working()
            continue
        if stopping.wanted:
            return
        if turn.missing is not None:
            left = [shard for shard in tally.left(turn.missing) if worker.builds(shard)]
            if not left:
                return
            until = time.monotonic() + tally.waiting(left)
            while time.monotonic() < until and not stopping.wanted:
                time.sleep(0.1)


def local_workers(job: CacheJob, options: EngineOptions) -> int:
    """Processes of a job on this machine: `workers`, else one per device; a process of another launcher is one."""
    return options.workers or (len(local_devices(job)) if _rank(options).count == 1 else 1)


def _rank(options: EngineOptions) -> Rank:
    """The rank of this process among those of another launcher; rank 0 of 1 where it starts workers of its own."""
    return rank_of(options.worker, os.environ) if options.workers is None else Rank()


def run_here(
    job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, opened: OpenJob | None = None
) -> Outcome:
    """Run a job in this process, which is all of it, or one of those of another launcher; then conclude the entry."""
    rank = _rank(options)
    if rank.source:
        log.event("rank", f"worker {rank.index} of {rank.count} (from {rank.source})", index=rank.index, of=rank.count)
    opened = opened or open_job(job.model_copy(update={"device": _device(job, rank)}))
    missing = opened.writer.pending()
    left, total = positions_of(opened, missing), opened.writer.entry.positions
    device = str(opened.teacher.device)
    log.event("start", "", shards=len(missing), positions=left, engine="local", workers=1, device=device)
    with stopping.on_sigterm():
        with log.progress(f"cache {job.name}", total, "tokens", total - left) as advance:
            tally = Attempts(log, options.attempts, advance)
            try:
                with Worker(
                    opened, stopping, advance, rank=rank, help_others=options.help_others, missing=missing
                ) as worker:
                    take_turns(worker, tally, stopping)
            finally:
                opened.writer.failures.record_all(tally.failed, options.attempts)
        if not stopping.wanted:
            worker.conclude(job.fidelity_positions, log)
    return tally.outcome(stopping.wanted)


def _device(job: CacheJob, rank: Rank) -> str:
    """The device of a process of another launcher: those of one machine take its GPUs in turn."""
    devices = local_devices(job)
    return job.device if rank.count == 1 else devices[rank.local % len(devices)]
