"""What of a job is missing in the store, as an engine asks before it starts workers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from logit_cache.caching.job import CacheJob
from storage.cache.reader import LogitCache
from storage.errors import CacheNotFound


@dataclass(frozen=True)
class Survey:
    """Positions and shards of an entry. The shards of one that does not exist yet are not known: None."""

    positions: int
    missing: int
    shards: int | None
    missing_shards: int | None

    @property
    def complete(self) -> bool:
        return not self.missing

    def workers(self, asked: int) -> int:
        """Workers to start, of those asked for: at most one per missing shard, and at least one."""
        return asked if self.missing_shards is None else max(1, min(asked, self.missing_shards))

    def __str__(self) -> str:
        if self.missing_shards is None:
            return "nothing done"
        return f"{self.missing_shards:,} of {self.shards:,} shards missing"


def survey(job: CacheJob) -> Survey:
    """Positions and shards of a job, and how many are missing in the store, before any teacher is loaded.

    Raises CacheNotFound without a cache.
    """
    cache = LogitCache.open(job.cache)
    positions = cache.record.corpus.positions
    try:
        receipts = cache.teacher(job.name).receipts
    except CacheNotFound:
        return Survey(positions, positions, None, None)
    missing = ~receipts.committed()
    ranges = [receipts.first_array.shard_range(int(shard)) for shard in np.flatnonzero(missing)]
    return Survey(positions, sum(stop - start for start, stop in ranges), receipts.shards, len(ranges))
