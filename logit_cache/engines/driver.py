"""Drives a job from its first shard to its last, on workers of any kind.

A `Pool` is the interface of an engine: it starts workers, hands them shards and returns their events. The rest is the
same for all engines, and here: which worker gets which shard (`logit_cache.engines.shard_queue`), retries, replacements
for lost workers, and when the job is over. The store alone records progress, so a driver that is killed loses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from logit_cache.caching.log import JobLog
from logit_cache.engines.outcome import Outcome, WorkersLost
from logit_cache.engines.shard_queue import ATTEMPTS, ShardQueue
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import ShardOutcome
from storage.errors import LogitCacheError, StorageFull, StoreUnavailable
from storage.text import counted

# Seconds between retries of shards that another job has leased.
_LOOK_SECONDS = 2.0
_POLL_SECONDS = 0.5
# A job that only waits for another one logs this after so many seconds, and then at this interval.
_LOG_SECONDS, _LOG_AGAIN_SECONDS = 30.0, 300.0


@dataclass(frozen=True)
class Ready:
    """A worker has opened the job. `pending`: the shards missing then; `location`: its host, process and device."""

    worker: str
    pending: tuple[int, ...]
    location: dict[str, str | int]


@dataclass(frozen=True)
class Reported:
    """A worker reports the outcomes of shards."""

    worker: str
    outcomes: tuple[ShardOutcome, ...]


@dataclass(frozen=True)
class Gone:
    """A worker has ended. `refusal`: its error for the user, if any; `blame`: whether its shard may be the cause."""

    worker: str
    why: str
    refusal: LogitCacheError | None = None
    blame: bool = True


Event = Ready | Reported | Gone


class Pool(Protocol):
    """Workers of one engine."""

    workers: int

    def start(self) -> str:
        """Start a worker and return its name. `Ready` or `Gone` follows."""
        ...

    def build(self, worker: str, shard: int) -> None:
        """Queue a shard for a worker; `Reported` or `Gone` follows. A worker may have several shards queued."""
        ...

    def events(self, timeout: float) -> Sequence[Event]:
        """The events since the last call; waits up to `timeout` seconds for one."""
        ...

    def stop(self) -> None:
        """Ask all workers to finish or drop their shards; the outcomes still arrive as events."""
        ...


class ManyWorkers(Pool, Protocol):
    """A pool whose workers are other processes."""

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        """Have a worker write the index and the report of a complete entry; raises its error, or WorkersLost."""
        ...


class Driver:
    """Runs a job on a pool.

    attempts         how often a shard is tried before it has failed permanently
    wait_for_others  whether the job is over only when the shards that other jobs have leased are done, too
    advance          is called with the number of positions of each shard that is done
    """

    def __init__(
        self,
        pool: Pool,
        log: JobLog,
        stopping: Stopping,
        *,
        attempts: int = ATTEMPTS,
        wait_for_others: bool = True,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self._pool, self._log, self._stopping = pool, log, stopping
        self._attempts, self._wait_for_others = attempts, wait_for_others
        self._advance = advance or (lambda positions: None)
        self._queue: ShardQueue | None = None
        self._started: list[str] = []
        self._ready: list[str] = []
        self._losses = 0  # since the last shard that was built
        self._refusal: LogitCacheError | None = None
        self._unlogged: list[Gone] = []
        self._accounted: set[str] = set()  # workers that reported which shard ended them
        self._looked = self._idle_since = time.monotonic()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Build the missing shards. Raises WorkersLost; errors of `storage.errors` where the job cannot be done."""
        stop_sent = False
        for _ in range(self._pool.workers):
            self._start()
        while not self._is_over():
            if self._stopping.wanted and not stop_sent:
                stop_sent = True
                self._log.event("stopping", f"stopping within {self._stopping.grace_seconds:g} seconds")
                self._pool.stop()
            if not self._stopping.wanted:
                self._hand_out()
            for event in self._pool.events(_POLL_SECONDS):
                self._receive(event)
            self._retry_leased()
        assert self._queue is not None or self._stopping.wanted
        self.outcome.failed = {} if self._queue is None else dict(self._queue.failed_permanently)
        self.outcome.stopped = self._stopping.wanted
        self.outcome.elsewhere = () if self._queue is None else tuple(self._queue.elsewhere)
        return self.outcome

    @property
    def workers(self) -> Sequence[str]:
        """Names of the workers that have opened the job and are still running."""
        return self._ready

    def _start(self) -> None:
        self._started.append(self._pool.start())

    def _is_over(self) -> bool:
        if self._stopping.wanted:
            return not any(self._queue and self._queue.held(worker) for worker in self._started)
        if self._queue is None:
            return False
        if not self._queue.unfinished:
            return True
        working = any(self._queue.held(worker) for worker in self._started)
        return not self._wait_for_others and not working and not self._queue.waiting

    def _hand_out(self) -> None:
        queue = self._queue
        if queue is None:
            return
        # Every worker gets its first shard before any worker gets a second.
        given = True
        while given:
            given = False
            for worker in sorted(self._ready, key=queue.held):
                shard = queue.take(worker, self._pool.workers)
                if shard is not None:
                    self._pool.build(worker, shard)
                    given = True

    def _receive(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._ready.append(event.worker)
            self._log.event("worker", "", worker=event.worker, **event.location)
            if self._queue is None:
                self._queue = ShardQueue(event.pending, self._attempts)
                for gone in self._unlogged:
                    self._log_loss(gone)
        elif isinstance(event, Reported):
            for item in event.outcomes:
                self._record(event.worker, item)
        else:
            self._lose(event)

    def _record(self, worker: str, item: ShardOutcome) -> None:
        queue = self._queue
        assert queue is not None
        if item.state == "ended":
            self._accounted.add(worker)
        if item.state == "built":
            queue.done(worker, item.shard)
            self.outcome.built += 1
            self._losses = 0
            self._refusal = None
            self._log.event(
                "shard", "", shard=item.shard, worker=worker, positions=item.positions, seconds=item.seconds
            )
            self._advance(item.positions)
        elif item.state == "there":
            queue.done(worker, item.shard)
            self._advance(item.positions)
        elif item.state == "leased":
            queue.leased(worker, item.shard)
        elif item.state == "dropped":
            queue.dropped(worker, item.shard)
        elif item.cause is None:
            error = item.error or "unknown"
            count = queue.failed(worker, item.shard, error)
            self._log_failure(item.shard, count, error, worker)
        elif isinstance(item.cause, StorageFull | StoreUnavailable):
            # Perhaps a fault of this worker's machine alone; its `Gone` follows.
            queue.dropped(worker, item.shard)
        else:
            raise item.cause

    def _log_failure(self, shard: int, count: int, error: str, worker: str) -> None:
        last = error.splitlines()[-1]
        if self._queue is not None and shard in self._queue.failed_permanently:
            event, text = "given up", f"shard {shard} failed permanently, after {count} attempts: {last}"
        else:
            event, text = "retry", f"shard {shard} failed, attempt {count} of {self._attempts}: {last}"
        self._log.event(event, text, shard=shard, attempt=count, worker=worker, error=error)

    def _lose(self, event: Gone) -> None:
        self._started.remove(event.worker)
        if event.worker in self._ready:
            self._ready.remove(event.worker)
        self._losses += 1
        self._refusal = event.refusal or self._refusal
        if event.refusal is not None and self._queue is None:
            # If no other worker can open the job either, this refusal is raised, and must reach the user only once.
            self._unlogged.append(event)
        else:
            self._log_loss(event)
        before = set() if self._queue is None else set(self._queue.failed_permanently)
        # No shard is to blame where the worker reported the one that ended it, or a refusal of its own.
        blame = event.blame and event.refusal is None and event.worker not in self._accounted
        blame = blame and not self._stopping.wanted
        held = [] if self._queue is None else self._queue.lost(event.worker, event.why, blame)
        if self._queue is not None and set(self._queue.failed_permanently) - before:
            self._log_failure(held[0], self._attempts, event.why, event.worker)
        if self._stopping.wanted:
            return
        # A refusal holds for a replacement as well, so none is started. The job is over when no worker is left.
        worth = event.refusal is None and self._losses <= self._attempts + self._pool.workers
        if worth and (self._queue is None or self._queue.unfinished):
            self._start()
        if not self._started and not self._is_over():
            if self._refusal is not None:
                raise self._refusal
            raise WorkersLost(f"every worker is lost; the last error: {event.why.splitlines()[-1]}")

    def _log_loss(self, event: Gone) -> None:
        text = f"worker {event.worker} is lost: {event.why.splitlines()[-1]}"
        self._log.event("worker lost", text, worker=event.worker, error=event.why)

    def _retry_leased(self) -> None:
        queue = self._queue
        if queue is None or not queue.elsewhere or not self._wait_for_others:
            return
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if queue.waiting or any(queue.held(worker) for worker in self._started):
                self._idle_since = now
            elif now - self._idle_since > _LOG_SECONDS:
                self._idle_since = now + _LOG_AGAIN_SECONDS - _LOG_SECONDS
                count = len(queue.elsewhere)
                self._log.event(
                    "waiting for others",
                    f"waiting for {counted(count, 'shard')} that another job has leased",
                    shards=count,
                )
            queue.look_again()
