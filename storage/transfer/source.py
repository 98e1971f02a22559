"""The source of a copy: its small files are fetched once, and every later read returns the bytes of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from storage.cache.inventory import ROOT_KEY
from storage.cache.reader import LogitCache
from storage.cache.records import read_record
from storage.errors import FormatError, InputError
from storage.format.layout import group_metadata
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.shared import ATTRIBUTE
from storage.stores.base import MOST_BYTES, Result, Store
from storage.stores.local import LocalStore

# Zarr v2 metadata names codecs in JSON, and these may run code when they are read; a Zarr v3 cache has none of it.
V2_NAMES = (".zarray", ".zgroup", ".zattrs", ".zmetadata")


@dataclass(frozen=True)
class Source:
    """A cache that is copied from; `cache` reads through `snapshot`, objects are read from `snapshot.source`."""

    snapshot: Snapshot
    cache: LogitCache


def open_source(store: Store, folder: Path) -> Source:
    """Open a cache, with `folder` for its small files. Raises CacheNotFound, FormatError, CorruptCache."""
    snapshot = Snapshot(store, folder)
    record = read_record(snapshot, ROOT_KEY, CacheRecord)
    check_record_alone(snapshot, ROOT_KEY)
    try:
        listed: Iterable[str] = store.walk()
    except InputError:
        listed = ()  # a store without listings cannot be searched; such files are not copied either
    for key in listed:
        if key.rpartition("/")[2] in V2_NAMES:
            raise FormatError(
                f"{store.where(key)}: metadata of Zarr v2, whose codecs can run code; a cache is Zarr v3 and has "
                f"none: do not use this one, or remove the file if you know where it came from"
            )
    return Source(snapshot, LogitCache(snapshot, record))


def check_record_alone(snapshot: Snapshot, key: str) -> None:
    """Refuse a group whose zarr.json has more than the record: other Zarr readers would act on it."""
    found = snapshot.read_json(key)
    if found != group_metadata({ATTRIBUTE: found["attributes"][ATTRIBUTE]}):
        where = snapshot.where(key)
        raise FormatError(f"{where}: holds more than the record of logit-cache, which nothing accounts for")


def write_file(folder: Path, key: str, data: bytes) -> None:
    """Write a file below a folder that only this copy uses."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


class Snapshot(LocalStore):
    """A folder with the address of another store, whose files are fetched from there when they are first read."""

    def __init__(self, source: Store, folder: Path) -> None:
        super().__init__(folder)
        self.source = source
        self.url = source.url
        self._fetched: set[str] = set()

    def read(self, key: str, at_most: int = MOST_BYTES) -> bytes:
        if key in self._fetched:
            return (self.local_path / key).read_bytes()
        data = self.source.read(key, at_most)
        write_file(self.local_path, key, data)
        self._fetched.add(key)
        return data

    def insist(self, key: str, promise: str, request: Callable[[], Result]) -> Result:
        return self.source.insist(key, promise, request)

    def size(self, key: str) -> int | None:
        return self.source.size(key)

    def names(self, prefix: str) -> list[str]:
        return self.source.names(prefix)
