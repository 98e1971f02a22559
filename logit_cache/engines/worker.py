"""One worker: a replica of the teacher that builds the shards it is told to, and says of each what became of it.

What goes wrong with a shard is told as data, so that every engine treats it alike::

    built     committed                    there    somebody had committed it before
    claimed   somebody is working at it    dropped  the job was asked to stop
    failed    an error that may pass, or may be this shard's alone: a device out of memory, a library's bug
    ended     this worker cannot go on: the message of a `LogitCacheError`, or a device that is broken

A shard is committed while the next one is computed, so what becomes of it is known one shard later, or when the worker
is asked to `finish`.
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

ShardState = Literal["built", "there", "claimed", "dropped", "failed", "ended"]

# What CUDA says once its context is lost, or the device: everything after it fails as well.
_BROKEN = ("CUDA error", "CUDA driver error", "device-side assert", "uncorrectable ECC", "NCCL error", "HIP error")


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a shard. `positions` count for one that is there, `seconds` for one that was built here; `error`
    is text for people, and `cause` what to raise for it, where the message is a user's."""

    shard: int
    state: ShardState
    positions: int = 0
    seconds: float = 0.0
    error: str | None = None
    cause: LogitCacheError | None = None


class Worker:
    """Builds shards of an open job, one after the other; a context manager, which waits for the last commit.

    `advance` is given positions done since the last call, negative ones where work is thrown away.
    """

    def __init__(
        self, opened: OpenJob, stopping: Stopping | None = None, advance: Callable[[int], None] | None = None
    ) -> None:
        self.opened = opened
        self._stopping = stopping or Stopping()
        self._advance = advance or (lambda count: None)
        self._committer = Committer(opened.writer)
        self._on_its_way: int | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()
        self._committer.close()

    def pending(self) -> list[int]:
        """Shards that nobody has committed, in order. Raises CorruptCache for a damaged one."""
        return self.opened.writer.pending()

    def build(self, shard: int) -> list[ShardOutcome]:
        """Compute a shard and have it committed; what became of it, if that is known by now, and of the one before."""
        writer = self.opened.writer
        done = 0

        def progress(count: int) -> None:
            nonlocal done
            done += count
            self._advance(count)
            writer.leases.keep()
            self._stopping.check(done / self._positions(shard))

        claimed = False
        outcomes: list[ShardOutcome] = []
        try:
            self._stopping.check(0.0)
            if writer.is_committed(shard):
                return [self._there(shard)]
            claimed = writer.leases.take(shard)
            if not claimed:
                return [ShardOutcome(shard, "claimed")]
            # Whoever held the claim until now may have committed it.
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
            self._on_its_way = shard
        except BaseException as error:
            self._advance(-done)
            if claimed:
                writer.leases.release(shard)
            return [*outcomes, *self.finish(), _failure(shard, error)]
        return outcomes

    def _there(self, shard: int) -> ShardOutcome:
        self._advance(self._positions(shard))
        return ShardOutcome(shard, "there", self._positions(shard))

    def finish(self) -> list[ShardOutcome]:
        """Wait until the shard that is being committed is, and say what became of it."""
        shard, self._on_its_way = self._on_its_way, None
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
        """Write what belongs to a complete entry, if it is complete: the index of receipts, and the fidelity report.

        Raises what reading and scoring raise.
        """
        self.opened.writer.finish()
        publish_report(self.opened, fidelity_positions, log or JobLog())

    def _positions(self, shard: int) -> int:
        return positions_of(self.opened, [shard])


def publish_report(opened: OpenJob, fidelity_positions: int, log: JobLog) -> None:
    """Make the fidelity report of a complete entry, where one is wanted. Raises what reading and scoring raise."""
    if is_wanted(opened, fidelity_positions):
        with log.progress(f"fidelity of {opened.writer.name}", None, "positions") as advance:
            opened.writer.publish_fidelity(measure(opened, fidelity_positions, advance))


def positions_of(opened: OpenJob, shards: Iterable[int]) -> int:
    """How many positions some shards have together."""
    entry = opened.writer.entry
    ranges = (entry.layout.shard_range(shard, entry.positions) for shard in shards)
    return sum(stop - start for start, stop in ranges)


def _failure(shard: int, error: BaseException) -> ShardOutcome:
    """What an error means for a shard; what is nobody's error, such as a pressed key, is raised again."""
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
