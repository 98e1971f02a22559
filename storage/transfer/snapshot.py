"""The small files of a source as they were when a copy started: every later read returns the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from storage.stores.base import MOST_BYTES, Result, Store


class Snapshot(Store):
    """A source whose small files are fetched once into `folder`: later reads return the bytes of the first."""

    def __init__(self, source: Store, folder: Path) -> None:
        self.source = source
        self.url = source.url
        self.folder = folder
        self._kept: set[str] = set()

    @property
    def local_path(self) -> Path | None:
        return self.source.local_path

    @property
    def kept(self) -> list[str]:
        """Keys of the fetched files, sorted; each is in the folder under its key."""
        return sorted(self._kept)

    def read(self, key: str, at_most: int = MOST_BYTES) -> bytes:
        path = self.folder / key
        if key in self._kept:
            return path.read_bytes()
        data = self.source.read(key, at_most)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._kept.add(key)
        return data

    def insist(self, key: str, promise: str, request: Callable[[], Result]) -> Result:
        return self.source.insist(key, promise, request)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self.source.read_ranges(key, ranges)

    def size(self, key: str) -> int | None:
        return self.source.size(key)

    def names(self, prefix: str) -> list[str]:
        return self.source.names(prefix)

    def walk(self, prefix: str = "") -> dict[str, int]:
        return self.source.walk(prefix)

    def remove(self, key: str) -> None:
        raise NotImplementedError("a source is not written to")

    def publish(self, key: str, data: bytes) -> bool:
        raise NotImplementedError("a source is not written to")

    def create(self, key: str, data: bytes) -> bool:
        raise NotImplementedError("a source is not written to")

    def replace(self, key: str, data: bytes) -> None:
        raise NotImplementedError("a source is not written to")
