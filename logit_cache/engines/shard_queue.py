"""Which worker gets which shard next, which are retried, and which failed permanently. Book-keeping: it starts nothing.

A shard that fails is retried after the others; after `attempts` tries in all it has failed permanently, and the job
continues without it. When a worker is lost with several shards, the one at fault is unknown: from then on all are
*suspects*, which a worker gets alone, and the loss of a worker counts as a failure only of a shard that it had alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

ATTEMPTS = 3
# One is being committed, one is being computed, and the next is ready when that is done.
_MOST_HELD = 3


class ShardQueue:
    """The shards of a job and the workers that hold them. Workers have any names.

    failed_permanently   shard → its last error
    """

    def __init__(self, shards: Iterable[int], attempts: int = ATTEMPTS) -> None:
        self.failed_permanently: dict[int, str] = {}
        self._attempts = attempts
        self._waiting = deque(shards)
        self._elsewhere: list[int] = []
        self._held: dict[str, list[int]] = {}
        self._failures: dict[int, int] = {}
        self._suspects: set[int] = set()

    @property
    def unfinished(self) -> bool:
        """Whether a shard waits, is held by a worker, or is leased by another job."""
        return bool(self._waiting or self._elsewhere or any(self._held.values()))

    @property
    def waiting(self) -> int:
        """Number of shards that no worker holds."""
        return len(self._waiting)

    @property
    def elsewhere(self) -> list[int]:
        """Unfinished shards that other jobs have leased."""
        return list(self._elsewhere)

    def held(self, worker: str) -> int:
        """Number of shards that a worker holds."""
        return len(self._held.get(worker, ()))

    def take(self, worker: str, workers: int = 1) -> int | None:
        """The next shard for one of `workers` workers; None where it holds enough, or no shard is left for it.

        When fewer shards wait than there are workers, only workers that hold none get one.
        """
        held = self._held.setdefault(worker, [])
        if len(held) >= _MOST_HELD or not self._suspects.isdisjoint(held):
            return None
        if held and len(self._waiting) < workers:
            return None
        for index, shard in enumerate(self._waiting):
            if not (held and shard in self._suspects):
                del self._waiting[index]
                held.append(shard)
                return shard
        return None

    def done(self, worker: str, shard: int) -> None:
        """Record that a shard is committed."""
        self._held[worker].remove(shard)
        self._suspects.discard(shard)

    def dropped(self, worker: str, shard: int) -> None:
        """Requeue a shard that a worker dropped, before all others; it counts as no failure."""
        self._held[worker].remove(shard)
        self._waiting.appendleft(shard)

    def leased(self, worker: str, shard: int) -> None:
        """Record that a worker of another job has leased a shard."""
        self._held[worker].remove(shard)
        self._elsewhere.append(shard)

    def look_again(self) -> None:
        """Requeue the shards that other jobs have leased."""
        self._waiting.extend(self._elsewhere)
        self._elsewhere.clear()

    def failed(self, worker: str, shard: int, error: str) -> int:
        """Record a failure; returns the number so far. After the last attempt the shard has failed permanently."""
        self._held[worker].remove(shard)
        return self._count(shard, error)

    def lost(self, worker: str, error: str, blame: bool = True) -> list[int]:
        """Record a lost worker; returns the shards that it held. `blame`: whether one of them may be the cause."""
        held = self._held.pop(worker, [])
        if blame and len(held) == 1:
            self._suspects.add(held[0])
            self._count(held[0], error)
        else:
            self._suspects.update(held if blame else ())
            self._waiting.extendleft(reversed(held))
        return held

    def _count(self, shard: int, error: str) -> int:
        self._failures[shard] = failures = self._failures.get(shard, 0) + 1
        if failures >= self._attempts:
            self.failed_permanently[shard] = error
        else:
            self._waiting.append(shard)
        return failures
