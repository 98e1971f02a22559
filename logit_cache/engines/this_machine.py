"""Jobs on this machine: this process as the worker, for its own share and then for others', or a pool of processes."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import OpenJob, open_job
from logit_cache.caching.survey import Survey, survey
from logit_cache.engines.driver import Driver, Event, Gone, ManyWorkers, Ready, Reported
from logit_cache.engines.local_processes import LocalPool, local_devices, threads_for
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import NotDone, Outcome, WorkersLost
from logit_cache.engines.shard_queue import ATTEMPTS
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import Worker, positions_of, publish_report
from logit_cache.engines.worker_index import Rank, rank_of
from storage.cache.failures import failures_of
from storage.text import counted


class ThisProcess:
    """A pool whose only worker is this process."""

    workers = 1

    def __init__(
        self,
        opened: OpenJob,
        shards: Sequence[int],
        stopping: Stopping,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self._worker = Worker(opened, stopping, advance)
        self._shards = shards
        self._todo: deque[int] = deque()
        self._events: list[Event] = []
        self._started = 0

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.__exit__()

    def start(self) -> str:
        """The worker runs already; it cannot be replaced."""
        name = str(self._started)
        self._started += 1
        if self._started == 1:
            self._events.append(Ready(name, tuple(self._shards), {}))
        else:
            self._events.append(Gone(name, "the device of this process is broken: restart the process"))
        return name

    def build(self, worker: str, shard: int) -> None:
        """Queue a shard, which `events` builds."""
        self._todo.append(shard)

    def events(self, timeout: float) -> Sequence[Event]:
        """Build one queued shard and return the events since the last call; sleep `timeout` seconds without either."""
        if not self._events and not self._todo:
            time.sleep(timeout)
        if self._todo:
            self._events.append(self._build(self._todo.popleft()))
        events, self._events = self._events, []
        ended = [
            item for event in events if isinstance(event, Reported) for item in event.outcomes if item.state == "ended"
        ]
        if ended:
            self._todo.clear()
            events.append(Gone("0", ended[0].error or "", ended[0].cause))
        return events

    def _build(self, shard: int) -> Reported:
        outcomes = self._worker.build(shard)
        if not self._todo:
            outcomes += self._worker.finish()
        return Reported("0", tuple(outcomes))

    def stop(self) -> None:
        """Nothing to do: the worker checks `stopping` itself."""


def run_local(
    opened: OpenJob,
    pending: Sequence[int],
    rank: Rank | None = None,
    advance: Callable[[int], None] | None = None,
    *,
    log: JobLog | None = None,
    stopping: Stopping | None = None,
    attempts: int = ATTEMPTS,
    help_others: bool = True,
) -> Outcome:
    """Build the pending shards in this process: its own share, or all if it is the only worker; then help the others.

    Then the only missing shards are those that failed permanently, and others' shares where the store has no leases
    or without `help_others`. `advance` is called with the number of positions of its own share done since the
    last call. Raises the LogitCacheError that a shard raises, and WorkersLost where the device is broken.
    """
    rank, stopping, log = rank or Rank(), stopping or Stopping(), log or JobLog()
    writer = opened.writer
    mine = [shard for shard in pending if rank.owns(shard)]
    # In reverse order, as their own workers start with the first.
    theirs = [shard for shard in reversed(pending) if not rank.owns(shard)]
    outcome = Outcome()

    def build(shards: Sequence[int], advance: Callable[[int], None] | None, wait: bool) -> Outcome:
        with ThisProcess(opened, shards, stopping, advance) as pool:
            outcome = Driver(pool, log, stopping, attempts=attempts, wait_for_others=wait).run()
        writer.failures.record_all(outcome.failed, attempts)
        return outcome

    with stopping.on_sigterm():
        if mine:
            outcome = build(mine, advance, wait=not theirs)
        if theirs and help_others and not outcome.stopped and writer.leases.exclusive:
            # Shards of its own share that others had leased come last: the holder may have been killed.
            outcome = outcome.then(build([*theirs, *outcome.elsewhere], None, wait=True))
    writer.finish()
    return outcome


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
            f"{job.cache}: {job.name}: {counted(len(shards), 'shard')} failed permanently, in every attempt: {named} "
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


def run_pool(
    pool: ManyWorkers, job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, found: Survey
) -> Outcome:
    """Run a job on a pool; one of its workers then writes the index and the fidelity report of a complete entry."""
    log.event(
        "start", "", shards=found.missing_shards, positions=found.missing, engine=options.engine, workers=pool.workers
    )
    done = found.positions - found.missing
    with stopping.on_sigterm(), log.progress(f"cache {job.name}", found.positions, "tokens", done) as advance:
        driver = Driver(pool, log, stopping, attempts=options.attempts, advance=advance)
        outcome = driver.run()
    failures_of(job.cache, job.name).record_all(outcome.failed, options.attempts)
    if not outcome.stopped and not outcome.failed:
        if not driver.workers:
            raise WorkersLost("every worker was lost before one wrote the index and the fidelity report")
        pool.conclude(driver.workers[0], job.fidelity_positions)
    return outcome


def _devices(job: CacheJob) -> list[str]:
    """The devices of this machine's workers; a teacher whose layers are spread over all devices is one worker."""
    return local_devices(job.device) if job.device_map is None else [job.device]


def _device(job: CacheJob, rank: Rank) -> str:
    """The device of a process of another launcher: those of one machine take its GPUs in turn."""
    devices = _devices(job)
    return job.device if rank.count == 1 else devices[rank.local % len(devices)]
