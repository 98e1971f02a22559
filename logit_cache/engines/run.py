"""`cache-logits`: runs a job on the requested engine. Every engine builds shards with `Worker`, so all give the same
cache.

local   this process (`this_machine`); with several workers, a process for each (`local_processes`)
ray     an actor for each device of a cluster (`ray`; extra `ray`)
slurm   a task of a job array for each worker (`slurm`; extra `slurm`)

Any scheduler that starts processes works, too (`worker_index`): workers share the missing shards by leases.
The receipts in the cache are the only state, so a job may resume with any other engine and number of workers.
"""

from __future__ import annotations

import time

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import OpenJob, check_stream
from logit_cache.caching.survey import Survey, survey
from logit_cache.engines.driver import Driver, Pool
from logit_cache.engines.local_processes import LocalPool, local_devices, threads_for
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import NotDone, Outcome, WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.this_machine import local_workers, run_here
from storage.cache.failures import failures_of
from storage.errors import InputError
from storage.text import counted


def run_job(job: CacheJob, options: EngineOptions, log: JobLog, opened: OpenJob | None = None) -> Outcome:
    """Build the missing shards of a job on the requested engine, then the index and report of a complete entry.

    opened: the job, where this process has checked and opened it already. Raises the errors of `storage.errors`, and
    NotDone where shards failed permanently, workers were lost, or the job was stopped.
    """
    began = time.monotonic()
    try:
        outcome = _run(job, options, log, Stopping(options.grace_seconds), opened)
    except WorkersLost as error:
        raise NotDone(str(error)) from None
    if outcome.submitted:
        return outcome
    log.event("end", "", built=outcome.built, given_up=sorted(outcome.failed), stopped=outcome.stopped,
              seconds=round(time.monotonic() - began, 3))  # fmt: skip
    _raise_unless_done(job, outcome)
    return outcome


def _run(job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, opened: OpenJob | None) -> Outcome:
    if options.engine == "slurm":
        from logit_cache.engines.slurm.array import run_array

        return run_array(job, options, log, stopping, run_job)
    if options.engine == "ray":
        return _run_ray(job, options, log, stopping)
    workers = local_workers(job, options)
    if workers > 1:
        found = survey(job)
        workers = found.workers(workers)
    if workers == 1:
        return run_here(job, options, log, stopping, opened)
    with LocalPool(job, workers, local_devices(job), threads_for(workers), options) as pool:
        return _run_pool(pool, job, options, log, stopping, found)


def _run_ray(job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping) -> Outcome:
    from logit_cache.engines.ray.actors import RayPool
    from logit_cache.engines.ray.cluster import connect

    if job.device_map is not None:
        raise InputError(
            "--device-map spreads a teacher over the devices of a machine, and a worker of Ray has one: leave "
            "it out, or start cache-logits on each machine with --worker i/n"
        )
    check_stream(job)
    found = survey(job)
    with connect(options.ray_address) as alone, RayPool(job, options, log, found, alone) as pool:
        return _run_pool(pool, job, options, log, stopping, found)


def _run_pool(
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


def _raise_unless_done(job: CacheJob, outcome: Outcome) -> None:
    if outcome.stopped:
        raise NotDone(f"{job.cache}: {job.name} was stopped with {survey(job)}: run the same command again to resume")
    if outcome.failed:
        shards = sorted(outcome.failed)
        named = ", ".join(map(str, shards[:8])) + (" …" if len(shards) > 8 else "")
        raise NotDone(
            f"{job.cache}: {job.name}: {counted(len(shards), 'shard')} failed permanently, in every attempt: {named} "
            f"({outcome.failed[shards[0]].splitlines()[-1]}); run the same command again to retry them"
        )
