"""Shards that failed permanently: a small note beside the receipts, so that the store alone shows which.

`receipts/<shard>.failed.json` states how often a shard failed, on which host, and with which error. No receipt lists
the note, no reader looks at it, and it blocks nothing: the next run retries the shard, and removes the note when the
shard is committed.
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
    """The note on a shard that failed permanently. `error` is text for people, `failed_at` UTC in ISO 8601."""

    shard: int
    attempts: int
    error: str
    host: str
    failed_at: str


class Failures:
    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder

    def record(self, shard: int, attempts: int, error: str) -> None:
        """Write the note on a shard, replacing an older one. An error keeps its last 4,000 characters, which name it.

        If the store refuses it, nothing is raised: the job logs the same failure itself.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        note = FailedShard(shard, attempts, error[-_MOST_CHARACTERS:], socket.gethostname(), now)
        with contextlib.suppress(LogitCacheError, OSError):
            self._store.replace(self._key(shard), json.dumps(asdict(note), indent=1).encode())

    def record_all(self, errors: Mapping[int, str], attempts: int) -> None:
        """Write a note on each shard in `errors`, which maps a shard that failed permanently to its error."""
        for shard, error in errors.items():
            self.record(shard, attempts, error)

    def read(self, shard: int) -> FailedShard | None:
        """The note on a shard; None if there is none, or none that can be read."""
        try:
            data: Any = self._store.read_json(self._key(shard), _MOST_BYTES)
            note = FailedShard(**{name: data[name] for name in FailedShard.__dataclass_fields__})
        except (LogitCacheError, OSError, KeyError, TypeError):
            return None
        whole = isinstance(note.attempts, int) and all(isinstance(t, str) for t in (note.error, note.host))
        return note if whole and note.shard == shard else None

    def all(self) -> dict[int, FailedShard]:
        """All readable notes, by shard."""
        shards = [shard for shard in map(failed_shard, self._store.names(self._folder)) if shard is not None]
        notes = {shard: self.read(shard) for shard in shards}
        return {shard: note for shard, note in notes.items() if note is not None}

    def forget(self, shard: int) -> None:
        """Remove the note on a shard, if there is one; errors of the store are ignored."""
        with contextlib.suppress(LogitCacheError, OSError):
            if self._store.size(self._key(shard)) is not None:
                self._store.remove(self._key(shard))

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{shard:08d}.failed.json"


def failures_of(url: str, name: str) -> Failures:
    return Failures(open_store(url), f"{teacher_folder(name)}receipts")


def failed_shard(name: str) -> int | None:
    """The shard of a note, from its file name; None for any other file name."""
    match = _NAME.match(name)
    return int(match[1]) if match else None
