"""Shards that were given up: a small note beside the receipts, so that the store alone tells what a job left undone.

`receipts/<shard>.failed.json` says of a shard that it failed so many times, where, and how. No receipt lists it, no
reader looks at it, and it forbids nothing: the next run tries the shard again, and removes the note when it is
committed.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from storage.cache.records import teacher_folder
from storage.errors import LogitCacheError
from storage.stores import open_store
from storage.stores.base import Store

_NAME = re.compile(r"^(\d{8,})\.failed\.json$")
_MOST_BYTES = 1 << 16
_MOST_CHARACTERS = 4_000


@dataclass(frozen=True)
class FailedShard:
    """What is known of a shard that was given up. `error` is text for people."""

    shard: int
    attempts: int
    error: str
    host: str
    failed_at: str


class Failures:
    """The notes on shards whose receipts lie in a folder."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder

    def record(self, shard: int, attempts: int, error: str) -> None:
        """Leave a note on a shard, in place of an older one. Of a long error its end, which says what it is.

        Where the store does not take it there is none: the job says the same itself.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = FailedShard(shard, attempts, error[-_MOST_CHARACTERS:], socket.gethostname(), now)
        with contextlib.suppress(LogitCacheError, OSError):
            self._store.replace(self._key(shard), json.dumps(asdict(note), indent=1).encode())

    def record_all(self, given_up: Mapping[int, str], attempts: int) -> None:
        """Leave a note on each shard that was given up, by its error."""
        for shard, error in given_up.items():
            self.record(shard, attempts, error)

    def read(self, shard: int) -> FailedShard | None:
        """The note on a shard; None where there is none that can be read."""
        try:
            data: Any = self._store.read_json(self._key(shard), _MOST_BYTES)
            note = FailedShard(**{name: data[name] for name in FailedShard.__dataclass_fields__})
        except (LogitCacheError, OSError, KeyError, TypeError):
            return None
        whole = isinstance(note.attempts, int) and all(isinstance(t, str) for t in (note.error, note.host))
        return note if whole and note.shard == shard else None

    def all(self) -> dict[int, FailedShard]:
        """Every note that there is, by its shard."""
        shards = [shard for shard in map(failed_shard, self._store.names(self._folder)) if shard is not None]
        notes = {shard: self.read(shard) for shard in shards}
        return {shard: note for shard, note in notes.items() if note is not None}

    def forget(self, shard: int) -> None:
        """Remove the note on a shard, if there is one."""
        with contextlib.suppress(LogitCacheError, OSError):
            if self._store.size(self._key(shard)) is not None:
                self._store.remove(self._key(shard))

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{shard:08d}.failed.json"


def failures_of(url: str, name: str) -> Failures:
    """The notes of a teacher entry of a cache."""
    return Failures(open_store(url), f"{teacher_folder(name)}receipts")


def failed_shard(name: str) -> int | None:
    """The shard that a file beside the receipts is a note on; None for anything else."""
    match = _NAME.match(name)
    return int(match[1]) if match else None
