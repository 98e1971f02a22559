"""One worker: a replica of the teacher that takes one free shard after the other, and reports an outcome for each.

Every engine builds shards with this class and with nothing else. Workers know nothing of each other: a worker takes the
next shard that is not committed and that nobody has a lease on (`storage.cache.leases`). Where a store can hold no
leases, worker i of n takes the shards with number % n = i.

Failures are reported as data, so that every engine treats them alike::

    built     committed                        there    committed by another worker, or another job
    failed    an error that may be transient, or this shard's alone: a device out of memory, a library's bug
    dropped   the job was asked to stop
    ended     this worker cannot continue: the message of a `LogitCacheError`, or a device that is broken

A shard is committed while the next one is computed, so its outcome is known one shard later.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.pipeline import Committer
from logit_cache.caching.prepare import OpenJob, open_job
from logit_cache.caching.score_shard import score_shard
from logit_cache.engines.shutdown import Stopped, Stopping
from logit_cache.engines.worker_index import Rank
from logit_cache.fidelity.measure import is_wanted, measure
from storage.errors import LogitCacheError
from storage.format.targets import SparseTargets

Result = TypeVar("Result")
ShardState = Literal["built", "there", "dropped", "failed", "ended"]
ScoreShard = Callable[[OpenJob, int, Callable[[int], None]], SparseTargets]

# Parts of the errors of a GPU that has lost its context, or is lost itself: every later call fails as well.
_BROKEN = ("CUDA error", "CUDA driver error", "device-side assert", "uncorrectable ECC", "NCCL error", "HIP error")


@dataclass(frozen=True)
class ShardOutcome:
    """The outcome of a shard. `positions`: of one that is committed; `seconds`: of one that was built here; `error`:
    text for people; `cause`: the exception to raise for it, where the message is for the user."""

    shard: int
    state: ShardState
    positions: int = 0
    seconds: float = 0.0
    error: str | None = None
    cause: LogitCacheError | None = None


@dataclass(frozen=True)
class Turn:
    """What a worker reports after a turn.

    outcomes  those known since the last turn
    taken     the shard that the next turn builds, if there is one
    missing   where no shard is free: those that are not committed and have not failed permanently, which others hold;
              None where the worker has not looked for one
    """

    outcomes: tuple[ShardOutcome, ...]
    taken: int | None = None
    missing: tuple[int, ...] | None = None


class Worker:
    """Builds the missing shards of an open job; a context manager, which waits for the last commit.

    advance      is called with the number of positions done here since the last call, negative where work is discarded
    rank         this worker among those that were started together
    help_others  whether it takes shards of the others' shares as well, where the store can hold leases
    missing      the shards that are not committed, in order, where they have been listed; None: to list them, and to
                 compare every committed one with its receipt, for which the first worker of a job takes the time
    score        computes the targets of a shard; `score_shard` unless given
    try_again    whether a shard that failed, and the next ones, can be tried by this worker

    Raises LogitCacheError where the entry cannot be read.
    """

    def __init__(
        self,
        opened: OpenJob,
        stopping: Stopping | None = None,
        advance: Callable[[int], None] | None = None,
        *,
        rank: Rank | None = None,
        help_others: bool = True,
        missing: list[int] | None = None,
        score: ScoreShard | None = None,
        try_again: bool = True,
    ) -> None:
        self.opened = opened
        self._writer = opened.writer
        self._stopping = stopping or Stopping()
        self._advance = advance or (lambda count: None)
        self._rank = rank or Rank()
        self._score, self._try_again = score or score_shard, try_again
        self.has_share = self._rank.count > 1 and not (help_others and self._writer.leases.exclusive)
        """Whether it leaves the shards of the other ranks to them."""
        self._committer = Committer(self._writer)
        self._taken: int | None = None
        self._committing: int | None = None
        self._missing: set[int] = set()
        self._free: deque[int] = deque()
        self._there: list[ShardOutcome] = []
        self._look(self._writer.pending() if missing is None else missing)

    @classmethod
    def of_pool(
        cls, job: CacheJob, rank: Rank, checked: bool, stopping: Stopping, advance: Callable[[int], None] | None = None
    ) -> Worker:
        """A worker in a process of its own. checked: whether another has compared all shards with their receipts."""
        opened = open_job(job)
        missing = opened.writer.missing() if checked else None
        return cls(opened, stopping, advance, rank=rank, missing=missing)

    @property
    def location(self) -> dict[str, str | int]:
        """Where it runs, for the log."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "device": str(self.opened.teacher.device)}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._taken is not None:
            self._writer.leases.release(self._taken)
        self._finish()
        self._committer.close()

    def builds(self, shard: int) -> bool:
        """Whether it is up to this worker to build a shard that nobody else has built."""
        return not self.has_share or self._rank.owns(shard)

    def turn(self, given_up: Collection[int] = ()) -> Turn:
        """Build the shard that was taken, then take the next one that is free.

        given_up: shards that failed permanently, which are not taken. Raises LogitCacheError where the entry cannot be
        read.
        """
        shard, self._taken = self._taken, None
        if shard is not None and shard in given_up:  # another worker had it in the meantime
            self._writer.leases.release(shard)
            shard = None
        outcomes = [] if shard is None else self._build(shard)
        if self._stopping.wanted or any(item.state != "built" for item in outcomes):
            return Turn((*outcomes, *self._finish()))
        self._take(given_up)
        there, self._there = self._there, []
        if self._taken is None and self._committing is not None:
            return Turn((*outcomes, *there, *self._finish()))
        missing = None if self._taken is not None else tuple(sorted(self._missing - set(given_up)))
        return Turn((*outcomes, *there), self._taken, missing)

    def conclude(self, fidelity_positions: int, log: JobLog | None = None) -> None:
        """Write the index of receipts and the fidelity report, if the entry is complete and has none.

        Raises LogitCacheError where the cache cannot be read or the teacher cannot score.
        """
        self._writer.finish()
        if is_wanted(self.opened, fidelity_positions):
            with (log or JobLog()).progress(f"fidelity of {self._writer.name}", None, "positions") as advance:
                self._writer.publish_fidelity(measure(self.opened, fidelity_positions, advance))

    def _look(self, missing: list[int]) -> None:
        """Note which shards are missing, and which others have committed since the last look."""
        for shard in sorted(self._missing.difference(missing, [self._committing])):
            self._there.append(ShardOutcome(shard, "there", positions_of(self.opened, [shard])))
        self._missing = set(missing)
        free = [shard for shard in missing if self.builds(shard)]
        # Workers that start together start at different places, and so rarely ask for one lease.
        first = len(free) * self._rank.index // self._rank.count
        self._free = deque(free[first:] + free[:first])

    def _take(self, given_up: Collection[int]) -> None:
        """Take the first free shard, by the last listing or by a new one; none where all are held or done."""
        for listed in (True, False):
            if not listed:
                self._look(self._writer.missing())
            while self._free:
                shard = self._free.popleft()
                if shard not in given_up and shard != self._committing and self._lease(shard):
                    self._taken = shard
                    return

    def _lease(self, shard: int) -> bool:
        """Take the lease on a shard; False where another worker has it, or had it and has committed the shard."""
        leases = self._writer.leases
        if not leases.take(shard):
            return False
        try:
            done = self._writer.is_committed(shard)
        except BaseException:
            leases.release(shard)
            raise
        if done:
            leases.release(shard)
            self._missing.discard(shard)
            self._there.append(ShardOutcome(shard, "there", positions_of(self.opened, [shard])))
        return not done

    def _build(self, shard: int) -> list[ShardOutcome]:
        """Compute a shard and start its commit; returns the outcomes known by now, of it and of the shard before."""
        positions, done = positions_of(self.opened, [shard]), 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self._advance(count)
            self._writer.leases.keep()
            self._stopping.check(done / positions)

        outcomes: list[ShardOutcome] = []
        try:
            self._stopping.check(0.0)
            began = self._stopping.begin()
            targets = self._score(self.opened, shard, progress)
            outcomes = self._finish()
            if any(item.state == "ended" for item in outcomes):
                raise Stopped
            self._committer.put(shard, targets, began)
            self._committing = shard
        except BaseException as error:
            self._advance(-done)
            self._writer.leases.release(shard)
            return [*outcomes, *self._finish(), self._failure(shard, error)]
        return outcomes

    def _finish(self) -> list[ShardOutcome]:
        """Wait for the commit that is under way, if any, and return its outcome."""
        shard, self._committing = self._committing, None
        if shard is None:
            return []
        positions = positions_of(self.opened, [shard])
        try:
            receipt = self._committer.wait()
        except BaseException as error:
            self._advance(-positions)
            return [self._failure(shard, error)]
        finally:
            self._writer.leases.release(shard)
        self._missing.discard(shard)
        self._writer.failures.forget(shard)
        return [ShardOutcome(shard, "built", positions, receipt.seconds if receipt else 0.0)]

    def _failure(self, shard: int, error: BaseException) -> ShardOutcome:
        """The outcome that an error means for a shard; any but an `Exception`, as KeyboardInterrupt, is re-raised."""
        if isinstance(error, Stopped):
            return ShardOutcome(shard, "dropped")
        if isinstance(error, LogitCacheError):
            return ShardOutcome(shard, "ended", error=str(error), cause=error)
        if not isinstance(error, Exception):
            raise error
        broken = isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)
        return ShardOutcome(shard, "ended" if broken or not self._try_again else "failed", error=traceback_of(error))


def positions_of(opened: OpenJob, shards: Iterable[int]) -> int:
    entry = opened.writer.entry
    ranges = (entry.layout.shard_range(shard, entry.positions) for shard in shards)
    return sum(stop - start for start, stop in ranges)


def or_error(call: Callable[..., Result], *arguments: Any) -> Result | LogitCacheError:
    """What a call returns, or the error for the user that it raises: a process sends either to another."""
    try:
        return call(*arguments)
    except LogitCacheError as error:
        return error


def traceback_of(error: BaseException) -> str:
    """The traceback as text, its last line the whole message: CUDA's have several, the last of which is advice."""
    text = "".join(traceback.format_exception(error)).strip()
    line = " ".join("".join(traceback.format_exception_only(error)).split())
    return text if text.endswith(line) else f"{text}\n{line}"
