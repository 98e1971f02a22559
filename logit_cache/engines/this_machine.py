"""Jobs on this machine: this process as the worker, or a pool of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import OpenJob, open_job
from logit_cache.caching.status import Survey, survey
from logit_cache.engines.attempts import Attempts
from logit_cache.engines.driver import Driver, Pool
from logit_cache.engines.local_processes import LocalPool, local_devices, threads_for
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import NotDone, Outcome, WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import Worker, positions_of
from logit_cache.engines.worker_index import Rank, rank_of
from storage.cache.failures import failures_of


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
    return options.workers or (len(_devices(job)) if _rank(options).count == 1 else 1)


def _rank(options: EngineOptions) -> Rank:
    """The rank of this process among those of another launcher; rank 0 of 1 where it starts workers of its own."""
    return rank_of(options.worker, os.environ) if options.workers is None else Rank()


def run_job_here(job: CacheJob, options: EngineOptions, log: JobLog, opened: OpenJob | None = None) -> Outcome:
    """`run_job` for the engine "local": in this process or in several."""
    return run_to_end(job, options, log, lambda stopping: _run_on_this_machine(job, options, log, stopping, opened))


def run_to_end(job: CacheJob, options: EngineOptions, log: JobLog, run: Callable[[Stopping], Outcome]) -> Outcome:
    """Run a job and log its end. Raises NotDone if shards failed permanently, workers were lost, or it was stopped."""
    began = time.monotonic()
    try:
        outcome = run(Stopping(options.grace_seconds))
    except WorkersLost as error:
        raise NotDone(str(error)) from None
    if outcome.submitted:
        return outcome
    log.event("end", "", built=outcome.built, given_up=sorted(outcome.failed), stopped=outcome.stopped,
              seconds=round(time.monotonic() - began, 3))  # fmt: skip
    _raise_unless_done(job, outcome)
    return outcome


def _raise_unless_done(job: CacheJob, outcome: Outcome) -> None:
    """Raise NotDone where the job was stopped or shards failed permanently."""
    if outcome.stopped:
        raise NotDone(f"{job.cache}: {job.name} was stopped with {survey(job)}: run the same command again to resume")
    if outcome.failed:
        shards = sorted(outcome.failed)
        named = ", ".join(map(str, shards[:8])) + (" …" if len(shards) > 8 else "")
        raise NotDone(
            f"{job.cache}: {job.name}: {len(shards)} shard(s) failed permanently, in every attempt: {named} "
            f"({outcome.failed[shards[0]].splitlines()[-1]}); run the same command again to retry them"
        )


def _run_on_this_machine(
    job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, opened: OpenJob | None
) -> Outcome:
    workers = local_workers(job, options)
    if workers > 1:
        found = survey(job)
        workers = found.workers(workers)
    if workers == 1:
        return _run_here(job, options, log, stopping, _rank(options), opened)
    with LocalPool(job, workers, _devices(job), threads_for(workers), options) as pool:
        return run_pool(pool, job, options, log, stopping, found)


def _run_here(
    job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, rank: Rank, opened: OpenJob | None
) -> Outcome:
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
                    opened, stopping, advance, rank=rank, help_others=options.help_others, checked=True
                ) as worker:
                    take_turns(worker, tally, stopping)
            finally:
                opened.writer.failures.record_all(tally.failed, options.attempts)
        if not stopping.wanted:
            worker.conclude(job.fidelity_positions, log)
    return tally.outcome(stopping.wanted)


def run_pool(
    pool: Pool, job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, found: Survey
) -> Outcome:
    """Run a job on a pool; one of its workers then writes the index and the fidelity report of a complete entry."""
    log.event(
        "start", "", shards=found.missing_shards, positions=found.missing, engine=options.engine, workers=pool.workers
    )
    done = found.positions - found.missing
    with stopping.on_sigterm(), log.progress(f"cache {job.name}", found.positions, "tokens", done) as advance:
        driver = Driver(pool, log, stopping, options.attempts, advance)
        try:
            outcome = driver.run()
        finally:
            failures_of(job.cache, job.name).record_all(driver.failed, options.attempts)
    if not outcome.stopped and not outcome.failed:
        pool.conclude(driver.free_worker(), job.fidelity_positions)
    return outcome


def _devices(job: CacheJob) -> list[str]:
    """The devices of this machine's workers; a teacher whose layers are spread over all devices is one worker."""
    return local_devices(job.device) if job.device_map is None else [job.device]


def _device(job: CacheJob, rank: Rank) -> str:
    """The device of a process of another launcher: those of one machine take its GPUs in turn."""
    devices = _devices(job)
    return job.device if rank.count == 1 else devices[rank.local % len(devices)]
