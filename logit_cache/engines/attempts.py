"""What has become of a job's shards: of one process, or of all workers of a driver. It starts nothing.

A shard that fails is free again, and so tried after the others. After `attempts` failures it has failed permanently,
and the job continues without it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from logit_cache.caching.log import JobLog
from logit_cache.engines.options import ATTEMPTS
from logit_cache.engines.outcome import Outcome
from logit_cache.engines.worker import ShardOutcome
from storage.text import counted

LOOK_SECONDS = 2.0
"""Seconds to the next look for a free shard where there was none."""

_MOST_LOOK_SECONDS = 15.0
# A job that only waits for another one logs this after so many seconds, and then at this interval.
_LOG_SECONDS, _LOG_AGAIN_SECONDS = 30.0, 300.0


class Attempts:
    """Counts and logs the outcomes of shards.

    failed   shards that failed permanently, with their last error
    advance  is called with the positions of each shard that is found committed, and not built by this job
    """

    def __init__(self, log: JobLog, attempts: int = ATTEMPTS, advance: Callable[[int], None] | None = None) -> None:
        self.failed: dict[int, str] = {}
        self._log, self._attempts = log, attempts
        self._advance = advance or (lambda positions: None)
        self._failures: Counter[int] = Counter()
        self._done: set[int] = set()
        self._built = 0
        self._waiting_since: float | None = None
        self._log_at = 0.0

    def record(self, item: ShardOutcome, worker: str) -> bool:
        """Whether the shard was not known to be committed: another worker may find it before its builder says so."""
        is_new = item.shard not in self._done
        if item.state == "built":
            self._built += 1
            self._done.add(item.shard)
            self.failed.pop(item.shard, None)  # another worker had begun it before the last failure was known
            fields = {"worker": worker, "positions": item.positions, "seconds": item.seconds}
            self._log.event("shard", "", shard=item.shard, **fields)
        elif item.state == "there" and is_new:
            self._done.add(item.shard)
            self._advance(item.positions)
        elif item.state in ("failed", "ended") and item.cause is None:
            self.count(item.shard, item.error or "unknown", worker)
        return is_new

    def count(self, shard: int, error: str, worker: str) -> None:
        """Record a failure of a shard, of which `error` ends with the line for people."""
        if shard in self.failed or shard in self._done:
            return
        self._failures[shard] = attempt = self._failures[shard] + 1
        last = error.splitlines()[-1]
        if attempt >= self._attempts:
            self.failed[shard] = error
            event, text = "given up", f"shard {shard} failed permanently, after {attempt} attempts: {last}"
        else:
            event, text = "retry", f"shard {shard} failed, attempt {attempt} of {self._attempts}: {last}"
        self._log.event(event, text, shard=shard, attempt=attempt, worker=worker, error=error)

    def left(self, missing: Sequence[int]) -> list[int]:
        """Those of some missing shards that have not failed permanently, nor been built since they were looked for."""
        return [shard for shard in missing if shard not in self.failed and shard not in self._done]

    def waiting(self, shards: Sequence[int]) -> float:
        """Note that others hold all shards that are left, which is logged when it lasts; returns the seconds to the
        next look, which become more as it does."""
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since, self._log_at = now, now + _LOG_SECONDS
        if now > self._log_at:
            self._log_at = now + _LOG_AGAIN_SECONDS
            text = f"waiting for {counted(len(shards), 'shard')} that another worker has leased"
            self._log.event("waiting for others", text, shards=len(shards))
        return min(max(LOOK_SECONDS, (now - self._waiting_since) / 10), _MOST_LOOK_SECONDS)

    def working(self) -> None:
        self._waiting_since = None

    def outcome(self, stopped: bool) -> Outcome:
        return Outcome(self._built, dict(self.failed), stopped)
