"""Where workers run. Every engine has `logit_cache.worker.Worker` build the shards, so all give the same cache.

local   this process (`logit_cache.this_process`); or, with several workers, a process for each (`local_pool`)
ray     an actor for each device of a cluster (`ray_pool`; extra `ray`)
slurm   a task of a job array for each worker (`slurm`; extra `slurm`)

And any scheduler that starts processes and tells each which one it is (`ranks`): worker i of n does the
shards whose number leaves rest i by n, and then helps with what others have not begun, where the store keeps claims.
The receipts in the cache are the only state, so a job may go on with any other engine and number of workers.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from logit_cache.driver import Driver, Outcome, Pool, WorkersLost
from logit_cache.engine_options import EngineOptions
from logit_cache.job import CacheJob, OpenJob, check_stream, open_job
from logit_cache.job_log import JobLog
from logit_cache.local_pool import LocalPool, local_devices, threads_for
from logit_cache.ranks import Rank, rank_of
from logit_cache.stopping import Stopping
from logit_cache.survey import Survey, survey
from logit_cache.this_process import run_local
from logit_cache.worker import positions_of, publish_report
from storage.cache.failures import failures_of
from storage.errors import InputError


class ManyWorkers(Pool, Protocol):
    """A pool whose workers are elsewhere."""

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        """Have a worker write what belongs to a complete entry; raises what goes wrong there."""
        ...


class NotDone(Exception):
    """A job that ended before its work was done, and not for a user's error; the message is one line."""


def run_job(job: CacheJob, options: EngineOptions, log: JobLog, opened: OpenJob | None = None) -> Outcome:
    """Do what is missing of a job on the engine that was asked for, and conclude a complete entry.

    opened: the job, where this process has checked and opened it already. Raises the errors of `storage.errors`, and
    NotDone where shards were given up, workers were lost, or the job was stopped.
    """
    began = time.monotonic()
    stopping = Stopping(options.grace_seconds)
    try:
        if options.engine == "slurm":
            from logit_cache.slurm import run_array

            outcome = run_array(job, options, log, stopping)
        elif options.engine == "ray":
            from logit_cache.ray_cluster import connect
            from logit_cache.ray_pool import RayPool

            if job.device_map is not None:
                raise InputError(
                    "--device-map spreads a teacher over the devices of a machine, and a worker of Ray has one: leave "
                    "it out, or start cache-logits on each machine with --worker i/n"
                )
            check_stream(job)
            found = survey(job)
            with connect(options.ray_address) as alone, RayPool(job, options, log, found, alone) as pool:
                outcome = _run_pool(pool, job, options, log, stopping, found)
        else:
            outcome = _run_on_this_machine(job, options, log, stopping, opened)
    except WorkersLost as error:
        raise NotDone(str(error)) from None
    if outcome.submitted:
        return outcome
    log.event("end", "", built=outcome.built, given_up=sorted(outcome.given_up), stopped=outcome.stopped,
              seconds=round(time.monotonic() - began, 3))  # fmt: skip
    _raise_unless_done(job, outcome)
    return outcome


def local_workers(job: CacheJob, options: EngineOptions) -> int:
    """Processes that a job has on this machine: as many as asked for, else one per device; one of several has one."""
    return options.workers or (len(_devices(job)) if _rank(options).count == 1 else 1)


def _rank(options: EngineOptions) -> Rank:
    """Which of several processes this one is, unless it was asked to have workers of its own."""
    return rank_of(options.worker, os.environ) if options.workers is None else Rank()


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
        return _run_pool(pool, job, options, log, stopping, found)


def _run_here(
    job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, rank: Rank, opened: OpenJob | None
) -> Outcome:
    if rank.source:
        log.event("rank", f"worker {rank.index} of {rank.count} (from {rank.source})", index=rank.index, of=rank.count)
    opened = opened or open_job(job.model_copy(update={"device": _device(job, rank)}))
    pending, entry = opened.writer.pending(), opened.writer.entry
    mine = [shard for shard in pending if rank.owns(shard)]
    left = positions_of(opened, mine)
    total = left if rank.count > 1 else entry.positions
    log.event(
        "start", "", shards=len(mine), positions=left, engine="local", workers=1, device=str(opened.teacher.device)
    )
    with log.progress(f"cache {job.name}", total, "tokens", total - left) as advance:
        outcome = run_local(
            opened,
            pending,
            rank,
            advance,
            log=log,
            stopping=stopping,
            attempts=options.attempts,
            help_others=options.help_others,
        )
    if not outcome.stopped:
        publish_report(opened, job.fidelity_positions, log)
    return outcome


def _run_pool(
    pool: ManyWorkers, job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, found: Survey
) -> Outcome:
    log.event(
        "start", "", shards=found.missing_shards, positions=found.missing, engine=options.engine, workers=pool.workers
    )
    done = found.positions - found.missing
    with stopping.on_sigterm(), log.progress(f"cache {job.name}", found.positions, "tokens", done) as advance:
        driver = Driver(pool, log, stopping, attempts=options.attempts, advance=advance)
        outcome = driver.run()
    failures_of(job.cache, job.name).record_all(outcome.given_up, options.attempts)
    if not outcome.stopped and not outcome.given_up:
        if not driver.workers:
            raise WorkersLost("every worker was lost before the entry was concluded")
        pool.conclude(driver.workers[0], job.fidelity_positions)
    return outcome


def _raise_unless_done(job: CacheJob, outcome: Outcome) -> None:
    """Raise NotDone where something is left to be done that somebody has to know of."""
    if outcome.stopped:
        raise NotDone(f"{job.cache}: {job.name} was stopped with {survey(job)}: run the same command again to go on")
    if outcome.given_up:
        shards = sorted(outcome.given_up)
        named = ", ".join(map(str, shards[:8])) + (" …" if len(shards) > 8 else "")
        raise NotDone(
            f"{job.cache}: {job.name}: {len(shards)} shard(s) failed every time and were given up: {named} "
            f"({outcome.given_up[shards[0]].splitlines()[-1]}); run the same command again to try them once more"
        )


def _devices(job: CacheJob) -> list[str]:
    """The devices of this machine's workers. One whose layers are spread over all of them is one worker."""
    return local_devices(job.device) if job.device_map is None else [job.device]


def _device(job: CacheJob, rank: Rank) -> str:
    """The device of a process that something else started: those of a machine share its GPUs."""
    devices = _devices(job)
    return job.device if rank.count == 1 else devices[rank.local % len(devices)]
