"""One worker: a replica of the teacher that builds the shards it is given and reports an outcome for each.

Failures are reported as data, so that every engine treats them alike::

    built     committed                        there    committed before, by another worker or run
    leased    another worker has its lease     dropped  the job was asked to stop
    failed    an error that may be transient, or this shard's alone: a device out of memory, a library's bug
    ended     this worker cannot continue: the message of a `LogitCacheError`, or a device that is broken

A shard is committed while the next one is computed, so its outcome is known one shard later, or after `finish`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from logit_cache.caching.log import JobLog
from logit_cache.caching.pipeline import Committer
from logit_cache.caching.prepare import OpenJob
from logit_cache.caching.score_shard import score_shard
from logit_cache.engines.shutdown import Stopped, Stopping
from logit_cache.fidelity.measure import is_wanted, measure
from storage.errors import LogitCacheError

ShardState = Literal["built", "there", "leased", "dropped", "failed", "ended"]

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


class Worker:
    """Builds shards of an open job, one after the other; a context manager, which waits for the last commit.

    `advance` is called with the number of positions done since the last call, negative where work is discarded.
    """

    def __init__(
        self, opened: OpenJob, stopping: Stopping | None = None, advance: Callable[[int], None] | None = None
    ) -> None:
        self.opened = opened
        self._stopping = stopping or Stopping()
        self._advance = advance or (lambda count: None)
        self._committer = Committer(opened.writer)
        self._committing: int | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()
        self._committer.close()

    def pending(self) -> list[int]:
        """Shards that are not committed, in order. Raises CorruptCache for a damaged one."""
        return self.opened.writer.pending()

    def build(self, shard: int) -> list[ShardOutcome]:
        """Compute a shard and start its commit; returns the outcomes known by now, of it and of the shard before."""
        writer = self.opened.writer
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self._advance(count)
            writer.leases.keep()
            self._stopping.check(done / self._positions(shard))

        leased = False
        outcomes: list[ShardOutcome] = []
        try:
            self._stopping.check(0.0)
            if writer.is_committed(shard):
                return [self._there(shard)]
            leased = writer.leases.take(shard)
            if not leased:
                return [ShardOutcome(shard, "leased")]
            # The previous holder of the lease may have committed the shard.
            if writer.is_committed(shard):
                writer.leases.release(shard)
                return [self._there(shard)]
            began = self._stopping.begin()
            targets = score_shard(self.opened, shard, progress)
            outcomes = self.finish()
            if any(item.state == "ended" for item in outcomes):
                writer.leases.release(shard)
                return [*outcomes, ShardOutcome(shard, "dropped")]
            self._committer.put(shard, targets, began)
            self._committing = shard
        except BaseException as error:
            self._advance(-done)
            if leased:
                writer.leases.release(shard)
            return [*outcomes, *self.finish(), _failure(shard, error)]
        return outcomes

    def _there(self, shard: int) -> ShardOutcome:
        self._advance(self._positions(shard))
        return ShardOutcome(shard, "there", self._positions(shard))

    def finish(self) -> list[ShardOutcome]:
        """Wait for the commit that is under way, if any, and return its outcome."""
        shard, self._committing = self._committing, None
        if shard is None:
            return []
        writer = self.opened.writer
        try:
            receipt = self._committer.wait()
        except BaseException as error:
            self._advance(-self._positions(shard))
            return [_failure(shard, error)]
        finally:
            writer.leases.release(shard)
        writer.failures.forget(shard)
        return [ShardOutcome(shard, "built", self._positions(shard), receipt.seconds if receipt else 0.0)]

    def conclude(self, fidelity_positions: int, log: JobLog | None = None) -> None:
        """Write the index of receipts and the fidelity report, if the entry is complete.

        Raises LogitCacheError where the cache cannot be read or the teacher cannot score.
        """
        self.opened.writer.finish()
        publish_report(self.opened, fidelity_positions, log or JobLog())

    def _positions(self, shard: int) -> int:
        return positions_of(self.opened, [shard])


def publish_report(opened: OpenJob, fidelity_positions: int, log: JobLog) -> None:
    """Publish the fidelity report of a complete entry, if wanted and missing; raises as `Worker.conclude` does."""
    if is_wanted(opened, fidelity_positions):
        with log.progress(f"fidelity of {opened.writer.name}", None, "positions") as advance:
            opened.writer.publish_fidelity(measure(opened, fidelity_positions, advance))


def positions_of(opened: OpenJob, shards: Iterable[int]) -> int:
    """Total number of positions of some shards."""
    entry = opened.writer.entry
    ranges = (entry.layout.shard_range(shard, entry.positions) for shard in shards)
    return sum(stop - start for start, stop in ranges)


def _failure(shard: int, error: BaseException) -> ShardOutcome:
    """The outcome that an error means for a shard; any but an `Exception`, such as KeyboardInterrupt, is re-raised."""
    if isinstance(error, Stopped):
        return ShardOutcome(shard, "dropped")
    if isinstance(error, LogitCacheError):
        return ShardOutcome(shard, "ended", error=str(error), cause=error)
    if not isinstance(error, Exception):
        raise error
    broken = isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN)
    return ShardOutcome(shard, "ended" if broken else "failed", error=traceback_of(error))


def traceback_of(error: BaseException) -> str:
    """The traceback as text, its last line the whole message: CUDA's have several, the last of which is advice."""
    text = "".join(traceback.format_exception(error)).strip()
    line = " ".join("".join(traceback.format_exception_only(error)).split())
    return text if text.endswith(line) else f"{text}\n{line}"
