"""The worker that is the process itself: one shard after another, for its own share and then for others'."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from logit_cache.driver import Driver, Event, Gone, Heard, Outcome, Ready
from logit_cache.job import OpenJob
from logit_cache.job_log import JobLog
from logit_cache.ranks import Rank
from logit_cache.shard_queue import ATTEMPTS
from logit_cache.stopping import Stopping
from logit_cache.worker import Worker


class ThisProcess:
    """A pool of one worker, which is the process that asks."""

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
        self._told: list[Event] = []
        self._started = 0

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.__exit__()

    def start(self) -> str:
        """The worker is there already; it cannot be made anew."""
        name = str(self._started)
        self._started += 1
        if self._started == 1:
            self._told.append(Ready(name, tuple(self._shards), {}))
        else:
            self._told.append(Gone(name, "the device of this process is broken: start it again"))
        return name

    def build(self, worker: str, shard: int) -> None:
        """Put down a shard to be built when the driver listens."""
        self._todo.append(shard)

    def events(self, timeout: float) -> Sequence[Event]:
        """Builds one shard."""
        if not self._told and not self._todo:
            time.sleep(timeout)
        if self._todo:
            self._told.append(self._build(self._todo.popleft()))
        told, self._told = self._told, []
        ended = [item for event in told if isinstance(event, Heard) for item in event.settled if item.fate == "ended"]
        if ended:
            self._todo.clear()
            told.append(Gone("0", ended[0].error or "", ended[0].cause))
        return told

    def _build(self, shard: int) -> Heard:
        settled = self._worker.build(shard)
        if not self._todo:
            settled += self._worker.settle()
        return Heard("0", tuple(settled))

    def stop(self) -> None:
        """Nothing to do: the worker looks at `stopping` itself."""


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
    """Build the pending shards in this process: its own, or all where it is the only one; then help the others.

    So when it ends, nothing is missing but what was given up; or, where the place keeps no claims, and without
    `help_others`, others' shares.
    `advance` is given positions of its own share done since the last call. Raises a LogitCacheError that a shard
    raises, and WorkersLost where the device is broken.
    """
    rank, stopping, log = rank or Rank(), stopping or Stopping(), log or JobLog()
    writer = opened.writer
    mine = [shard for shard in pending if rank.owns(shard)]
    # From the last one on, as their own workers begin with the first.
    theirs = [shard for shard in reversed(pending) if not rank.owns(shard)]
    outcome = Outcome()

    def build(shards: Sequence[int], advance: Callable[[int], None] | None, wait: bool) -> Outcome:
        with ThisProcess(opened, shards, stopping, advance) as pool:
            outcome = Driver(pool, log, stopping, attempts=attempts, wait_for_others=wait).run()
        writer.failures.record_all(outcome.given_up, attempts)
        return outcome

    with stopping.on_sigterm():
        if mine:
            outcome = build(mine, advance, wait=not theirs)
        if theirs and help_others and not outcome.stopped and writer.claims.exclusive:
            # What others had of its own share comes last: its holder may have been killed.
            outcome = outcome.then(build([*theirs, *outcome.elsewhere], None, wait=True))
    writer.finish()
    return outcome
