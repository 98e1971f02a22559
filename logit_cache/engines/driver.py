"""A job from its first shard to its last, on workers of any kind.

A `Pool` is what an engine provides: workers that are started, told to build shards, and heard. The rest is the same for
all of them, and here: who gets which shard (`logit_cache.engines.shard_queue`), what becomes of failures and of workers
that are lost, and when the job is over. The store alone knows what is done; a driver that is killed has lost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from logit_cache.caching.log import JobLog
from logit_cache.engines.shard_queue import ATTEMPTS, ShardQueue
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import ShardOutcome
from storage.errors import LogitCacheError, StorageFull, StoreUnavailable

# How often shards that another job works at are looked at again.
_LOOK_SECONDS = 2.0
_POLL_SECONDS = 0.5
# When it is told that a job does nothing but wait for another one.
_TELL_SECONDS, _TELL_AGAIN_SECONDS = 30.0, 300.0


@dataclass(frozen=True)
class Ready:
    """A worker has opened the job: which shards were missing then, and where it is (host, process, device)."""

    worker: str
    pending: tuple[int, ...]
    place: dict[str, str | int]


@dataclass(frozen=True)
class Reported:
    """A worker tells what became of shards."""

    worker: str
    outcomes: tuple[ShardOutcome, ...]


@dataclass(frozen=True)
class Gone:
    """A worker has ended. `refusal`: what it had to say to the user; `blame`: its shard may have done it."""

    worker: str
    why: str
    refusal: LogitCacheError | None = None
    blame: bool = True


Event = Ready | Reported | Gone


class Pool(Protocol):
    """Workers of one engine."""

    workers: int

    def start(self) -> str:
        """Begin to make a worker; its name. `Ready` or `Gone` follows."""
        ...

    def build(self, worker: str, shard: int) -> None:
        """Have a worker build a shard; `Reported` or `Gone` follows. It is given several before."""
        ...

    def events(self, timeout: float) -> Sequence[Event]:
        """What happened since the last call; waits for it so many seconds."""
        ...

    def stop(self) -> None:
        """Ask all workers to finish or drop their shards; what became of them is still to be heard."""
        ...


@dataclass
class Outcome:
    """How a job ended: shards that it built, shards that it gave up (and the last error), whether it was stopped.

    submitted: it has not ended, and nobody waits for it. elsewhere: shards that were left to other jobs.
    """

    built: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    stopped: bool = False
    submitted: bool = False
    elsewhere: tuple[int, ...] = ()

    def then(self, later: Outcome) -> Outcome:
        """Both, one after the other."""
        return Outcome(
            self.built + later.built,
            self.failed | later.failed,
            self.stopped or later.stopped,
            self.submitted or later.submitted,
            (*self.elsewhere, *later.elsewhere),
        )


class WorkersLost(Exception):
    """The workers of a job are lost as fast as they are made."""


class Driver:
    """Runs a job on a pool.

    attempts         how often a shard is tried before it is given up
    wait_for_others  whether the job is over only when shards that other jobs work at are done, too
    advance          is given the positions of each shard that was built
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
        self._untold: list[Gone] = []
        self._accounted: set[str] = set()  # workers that said which shard ended them
        self._looked = self._idle_since = time.monotonic()
        self.outcome = Outcome()

    def run(self) -> Outcome:
        """Build what is missing. Raises the errors of `storage.errors` where the job cannot be done, WorkersLost."""
        told = False
        for _ in range(self._pool.workers):
            self._start()
        while not self._is_over():
            if self._stopping.wanted and not told:
                told = True
                self._log.event("stopping", f"stopping within {self._stopping.grace_seconds:g} seconds")
                self._pool.stop()
            if not self._stopping.wanted:
                self._hand_out()
            for event in self._pool.events(_POLL_SECONDS):
                self._receive(event)
            self._look_elsewhere()
        assert self._queue is not None or self._stopping.wanted
        self.outcome.failed = {} if self._queue is None else dict(self._queue.failed_permanently)
        self.outcome.stopped = self._stopping.wanted
        self.outcome.elsewhere = () if self._queue is None else tuple(self._queue.elsewhere)
        return self.outcome

    @property
    def workers(self) -> Sequence[str]:
        """Workers that have opened the job and are there."""
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
        # One for everyone before a second one for anyone.
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
            self._log.event("worker", "", worker=event.worker, **event.place)
            if self._queue is None:
                self._queue = ShardQueue(event.pending, self._attempts)
                for gone in self._untold:
                    self._tell_loss(gone)
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
        elif item.state == "claimed":
            queue.claimed(worker, item.shard)
        elif item.state == "dropped":
            queue.dropped(worker, item.shard)
        elif item.cause is None:
            error = item.error or "unknown"
            count = queue.failed(worker, item.shard, error)
            self._tell_failure(item.shard, count, error, worker)
        elif isinstance(item.cause, StorageFull | StoreUnavailable):
            # Of this worker's machine alone, it may be; it says `Gone` next.
            queue.dropped(worker, item.shard)
        else:
            raise item.cause

    def _tell_failure(self, shard: int, count: int, error: str, worker: str) -> None:
        last = error.splitlines()[-1]
        if self._queue is not None and shard in self._queue.failed_permanently:
            what, text = "given up", f"shard {shard} failed {count} times and is given up: {last}"
        else:
            what, text = "retry", f"shard {shard} failed, attempt {count} of {self._attempts}: {last}"
        self._log.event(what, text, shard=shard, attempt=count, worker=worker, error=error)

    def _lose(self, event: Gone) -> None:
        self._started.remove(event.worker)
        if event.worker in self._ready:
            self._ready.remove(event.worker)
        self._losses += 1
        self._refusal = event.refusal or self._refusal
        if event.refusal is not None and self._queue is None:
            # If no other worker can open the job either, it is the user's one line.
            self._untold.append(event)
        else:
            self._tell_loss(event)
        before = set() if self._queue is None else set(self._queue.failed_permanently)
        # What it had besides the shard that ended it, or besides what it has to say of itself, is not to blame.
        blame = event.blame and event.refusal is None and event.worker not in self._accounted
        blame = blame and not self._stopping.wanted
        held = [] if self._queue is None else self._queue.lost(event.worker, event.why, blame)
        if self._queue is not None and set(self._queue.failed_permanently) - before:
            self._tell_failure(held[0], self._attempts, event.why, event.worker)
        if self._stopping.wanted:
            return
        # What it said of itself holds for a worker made anew in its place. The job is over when none is left.
        worth = event.refusal is None and self._losses <= self._attempts + self._pool.workers
        if worth and (self._queue is None or self._queue.unfinished):
            self._start()
        if not self._started and not self._is_over():
            if self._refusal is not None:
                raise self._refusal
            raise WorkersLost(f"every worker is lost, the last one so: {event.why.splitlines()[-1]}")

    def _tell_loss(self, event: Gone) -> None:
        text = f"worker {event.worker} is lost: {event.why.splitlines()[-1]}"
        self._log.event("worker lost", text, worker=event.worker, error=event.why)

    def _look_elsewhere(self) -> None:
        queue = self._queue
        if queue is None or not queue.elsewhere or not self._wait_for_others:
            return
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self._looked = now
            if queue.waiting or any(queue.held(worker) for worker in self._started):
                self._idle_since = now
            elif now - self._idle_since > _TELL_SECONDS:
                self._idle_since = now + _TELL_AGAIN_SECONDS - _TELL_SECONDS
                count = len(queue.elsewhere)
                self._log.event(
                    "waiting for others", f"waiting for {count} shard(s) that another job has", shards=count
                )
            queue.look_again()


class ManyWorkers(Pool, Protocol):
    """A pool whose workers are elsewhere."""

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        """Have a worker write what belongs to a complete entry; raises what goes wrong there."""
        ...


class NotDone(Exception):
    """A job that ended before its work was done, and not for a user's error; the message is one line."""
