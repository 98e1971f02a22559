"""Which worker gets which shard next, what is tried again, and what is given up. Book-keeping: it starts nothing.

A shard that fails is tried again after the others, `attempts` times in all, and then given up; the job goes on without
it. When a worker is lost with several shards, it is not known which of them did it: from then on all are *suspects*,
which a worker gets alone, and only what happens to one alone is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

ATTEMPTS = 3
# One is committed, one is computed, and the next is there when that is done.
_MOST_HELD = 3


class ShardQueue:
    """Shards of a job and who has them. Workers go by any names.

    failed_permanently   shard → what went wrong the last time
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
        """Whether there is something to be done, being done here, or being done elsewhere."""
        return bool(self._waiting or self._elsewhere or any(self._held.values()))

    @property
    def waiting(self) -> int:
        """How many shards nobody has."""
        return len(self._waiting)

    @property
    def elsewhere(self) -> list[int]:
        """Shards that are left, and that other jobs work at."""
        return list(self._elsewhere)

    def held(self, worker: str) -> int:
        """How many shards a worker has."""
        return len(self._held.get(worker, ()))

    def take(self, worker: str, workers: int = 1) -> int | None:
        """A shard for one of so many workers; None where it has enough, or nothing is left for it.

        When fewer shards are left than there are workers, they are for those who have none.
        """
        held = self._held.setdefault(worker, [])
        if len(held) >= _MOST_HELD or not self._suspects.isdisjoint(held):
            return None
        if held and len(self._waiting) < workers:
            return None
        for place, shard in enumerate(self._waiting):
            if not (held and shard in self._suspects):
                del self._waiting[place]
                held.append(shard)
                return shard
        return None

    def done(self, worker: str, shard: int) -> None:
        """A shard is committed."""
        self._held[worker].remove(shard)
        self._suspects.discard(shard)

    def dropped(self, worker: str, shard: int) -> None:
        """A worker gave a shard back as it was."""
        self._held[worker].remove(shard)
        self._waiting.appendleft(shard)

    def claimed(self, worker: str, shard: int) -> None:
        """Somebody outside this job is working at a shard."""
        self._held[worker].remove(shard)
        self._elsewhere.append(shard)

    def look_again(self) -> None:
        """Have what was done elsewhere asked for again."""
        self._waiting.extend(self._elsewhere)
        self._elsewhere.clear()

    def failed(self, worker: str, shard: int, error: str) -> int:
        """A shard went wrong; how many times it has by now. After the last attempt it is given up."""
        self._held[worker].remove(shard)
        return self._count(shard, error)

    def lost(self, worker: str, error: str, blame: bool = True) -> list[int]:
        """A worker is gone; the shards that it had. `blame`: it may be one of them that did it."""
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
