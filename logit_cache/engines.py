"""Where workers run. Every engine calls `build_shard`, so all of them give the same cache.

`local`: this process, one shard after another. Several processes share an entry with `--worker i/n`:
worker i does the shards whose number leaves rest i by n. The receipts in the cache are the only state.
"""

from __future__ import annotations

from collections.abc import Callable

from logit_cache.build import build_shard
from logit_cache.job import OpenJob
from logit_cache.pipeline import Committer
from storage.errors import InputError


def parse_worker(text: str) -> tuple[int, int]:
    """`i/n` as (i, n), 0 <= i < n. Raises InputError."""
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise InputError(f"--worker {text!r}: expected i/n with 0 <= i < n, such as 0/4")


def run_local(
    opened: OpenJob, pending: list[int], worker: tuple[int, int] = (0, 1), progress: Callable[[int], None] | None = None
) -> int:
    """Build those of the pending shards that are this worker's; returns how many it built.

    One shard is encoded and committed while the next is computed.
    """
    rank, world_size = worker
    built = 0
    with Committer(opened.writer) as committer:
        for shard in pending:
            if shard % world_size == rank:
                built += build_shard(opened, shard, progress, committer)
    opened.writer.finish()
    return built
