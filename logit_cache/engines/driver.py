"""Drives a job on workers in other processes: starts and replaces them, and counts how often shards fail.

Which shard a worker builds is up to the worker (`logit_cache.engines.worker`): the driver only asks it for its next
turn, and so learns which shard it has taken before it is computed, and is to blame should the worker be lost over it.
The store alone records progress, so a driver that is killed loses nothing. A worker that hangs is waited for as long as
its leases last; then others take its shards, and it is ended with the job.

A `Pool` is the interface of an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from logit_cache.caching.log import JobLog
from logit_cache.engines.attempts import LOOK_SECONDS, Attempts
from logit_cache.engines.options import ATTEMPTS
from logit_cache.engines.outcome import Outcome, WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import ShardOutcome, Turn
from storage.errors import LogitCacheError, StorageFull, StoreUnavailable

_POLL_SECONDS = 0.5
# The last outcomes may arrive after a worker has found that nothing is missing; those of one that hangs never do.
_LAST_OUTCOMES_SECONDS = 5.0


@dataclass(frozen=True)
class Ready:
    """A worker has opened the job. `location`: its host, process and device; `has_share`: whether it builds a share of
    the shards only."""

    worker: str
    location: dict[str, str | int]
    has_share: bool = False


@dataclass(frozen=True)
class Reported:
    """A worker has ended a turn."""

    worker: str
    turn: Turn


@dataclass(frozen=True)
class Gone:
    """A worker has ended. `refusal`: its error for the user, if any; `blame`: whether its shard may be the cause."""

    worker: str
    why: str
    refusal: LogitCacheError | None = None
    blame: bool = True


Event = Ready | Reported | Gone


class Pool(Protocol):
    """Workers of one engine, each of which has one of `workers` ranks."""

    workers: int

    def start(self, rank: int) -> str:
        """Start a worker and return its name. `Ready` or `Gone` follows."""

    def turn(self, worker: str, given_up: Collection[int]) -> None:
        """Have a worker take a turn (`Worker.turn`); `Reported` or `Gone` follows."""

    def events(self, timeout: float) -> Sequence[Event]:
        """The events since the last call; waits up to `timeout` seconds for one."""

    def stop(self) -> None:
        """Ask all workers to finish or drop their shards; the outcomes still arrive as events."""

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        """Have a worker write the index and the report of a complete entry; raises its error, or WorkersLost."""


@dataclass
class _State:
    """A worker, as the driver knows it. `busy`: it takes a turn; `idle`: it found no free shard in its last one."""

    rank: int
    ready: bool = False
    busy: bool = False
    idle: bool = False
    taken: int | None = None

    @property
    def has_work(self) -> bool:
        return (self.busy and not self.idle) or self.taken is not None


class Driver:
    """Runs a job on a pool; `advance` is called with the number of positions of each shard that is done."""

    def __init__(
        self,
        pool: Pool,
        log: JobLog,
        stopping: Stopping,
        attempts: int = ATTEMPTS,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        self._pool, self._log, self._stopping = pool, log, stopping
        self._advance = advance or (lambda positions: None)
        self._tally = Attempts(log, attempts, self._advance)
        self._workers: dict[str, _State] = {}
        self._most_losses = attempts + pool.workers  # since the last shard that was built
        self._losses = 0
        self._look_at = 0.0  # when one of the idle workers looks for a free shard again
        self._shares = False
        self._complete_since: float | None = None
        self._refusal: LogitCacheError | None = None
        self._share_refusal: LogitCacheError | None = None
        self._unlogged: list[Gone] = []
        self._opened = False  # by a worker

    @property
    def failed(self) -> dict[int, str]:
        return self._tally.failed

    def run(self) -> Outcome:
        """Build the missing shards. Raises WorkersLost; errors of `storage.errors` where the job cannot be done."""
        stop_sent = False
        for rank in range(self._pool.workers):
            self._start(rank)
        while not self._is_over():
            if self._stopping.wanted and not stop_sent:
                stop_sent = True
                self._log.event("stopping", f"stopping within {self._stopping.grace_seconds:g} seconds")
                self._pool.stop()
            self._ask()
            for event in self._pool.events(_POLL_SECONDS):
                self._receive(event)
        return self._tally.outcome(self._stopping.wanted)

    def free_worker(self) -> str:
        """A worker that waits for its next turn. Raises WorkersLost where there is none."""
        for name, worker in self._workers.items():
            if worker.ready and not worker.busy:
                return name
        raise WorkersLost("every worker was lost before one wrote the index and the fidelity report")

    def _start(self, rank: int) -> None:
        self._workers[self._pool.start(rank)] = _State(rank)

    def _is_over(self) -> bool:
        idle = not any(worker.has_work for worker in self._workers.values())
        if self._stopping.wanted:
            return idle
        since = self._complete_since
        return since is not None and (idle or time.monotonic() - since > _LAST_OUTCOMES_SECONDS)

    def _ask(self) -> None:
        """Ask each worker that waits for its next turn; of the idle ones, which would find the same, one at a time."""
        if self._complete_since is not None:
            return
        for name, worker in self._workers.items():
            if not worker.ready or worker.busy or (self._stopping.wanted and worker.taken is None):
                continue
            if worker.idle:
                now = time.monotonic()
                if now < self._look_at:
                    continue
                self._look_at = now + LOOK_SECONDS
            worker.busy = True
            self._pool.turn(name, frozenset(self.failed))

    def _receive(self, event: Event) -> None:
        if isinstance(event, Ready):
            self._workers[event.worker].ready = self._opened = True
            self._shares |= event.has_share
            self._log.event("worker", "", worker=event.worker, **event.location)
            while self._unlogged:
                self._log_loss(self._unlogged.pop(0))
        elif isinstance(event, Reported):
            self._end_turn(event.worker, event.turn)
        else:
            self._lose(event)

    def _end_turn(self, name: str, turn: Turn) -> None:
        worker = self._workers[name]
        worker.busy, worker.taken, worker.idle = False, turn.taken, turn.missing is not None
        for item in turn.outcomes:
            self._record(item, name)
        if turn.missing is None:
            self._tally.working()
            self._look_at = 0.0  # a shard that failed is free again, and where there was one, there may be more
            return
        left = self._tally.left(turn.missing)
        if not left:
            self._complete_since = self._complete_since or time.monotonic()
        elif not any(other.has_work or not other.ready for other in self._workers.values()):
            # Nobody builds the share of a worker that was not replaced.
            if self._shares and self._share_refusal is not None:
                raise self._share_refusal
            self._look_at = time.monotonic() + self._tally.waiting(left)

    def _record(self, item: ShardOutcome, worker: str) -> None:
        is_new = self._tally.record(item, worker)
        if item.state == "built":
            self._advance(item.positions if is_new else 0)
            self._losses, self._refusal = 0, None
        # A full or unreachable store is perhaps a fault of this worker's machine alone; its `Gone` follows.
        if item.cause is not None and not isinstance(item.cause, StorageFull | StoreUnavailable):
            raise item.cause

    def _lose(self, event: Gone) -> None:
        worker = self._workers.pop(event.worker)
        self._losses += 1
        self._refusal = event.refusal or self._refusal
        self._share_refusal = self._share_refusal or event.refusal
        if event.refusal is not None and not self._opened:
            # If no other worker can open the job either, this refusal is raised, and must reach the user only once.
            self._unlogged.append(event)
        else:
            self._log_loss(event)
        if self._stopping.wanted:
            return
        self._look_at = 0.0
        if worker.busy and worker.taken is not None and event.blame and event.refusal is None:
            self._tally.count(worker.taken, event.why, event.worker)
        # A refusal holds for a replacement as well, so none is started. The job is over when no worker is left.
        if event.refusal is None and self._losses <= self._most_losses and self._complete_since is None:
            self._start(worker.rank)
        if not self._workers and self._complete_since is None:
            if self._refusal is not None:
                raise self._refusal
            raise WorkersLost(f"every worker is lost; the last error: {event.why.splitlines()[-1]}")

    def _log_loss(self, event: Gone) -> None:
        text = f"worker {event.worker} is lost: {event.why.splitlines()[-1]}"
        self._log.event("worker lost", text, worker=event.worker, error=event.why)
