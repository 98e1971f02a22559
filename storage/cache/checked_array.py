"""Checked reads of one array of a cache: chunk by chunk (`CheckedArray`), or by position (`Stream`).

Before the first chunk of a shard is read, the object's length and seal (shard index and chunk checksums) are compared
with the receipt. The chunk's own crc32c is checked on every read, and afterwards the object must still be the file that
was checked. Objects of a remote cache are fetched whole (`storage.stores.mirror`) and read as local files by the same
code.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.cache.receipts import Receipts
from storage.cache.records import check_metadata
from storage.errors import CorruptCache, IncompleteCache, LogitCacheError
from storage.format.layout import ArraySpec, metadata_bytes
from storage.format.manifest.receipts import ShardReceipt
from storage.format.shard import Reads, ShardIndex, decode_chunk, reads_of
from storage.stores.base import Result, Store
from storage.stores.mirror import Mirror

_READ_ATTEMPTS = 3
_STREAM_CHUNKS = 64  # of an array of the token stream, held in memory

_Identity = tuple[int, int, int]  # of a file: inode, length, time of modification in ns


@dataclass(frozen=True)
class _Opened:
    """A shard object that matches its receipt: the file's identity, and the byte range of each chunk in it."""

    identity: _Identity
    chunks: list[tuple[int, int]]


class CheckedArray:
    """Read access to one array; a shard exists only if its receipt does."""

    def __init__(self, name: str, receipts: Receipts) -> None:
        self.spec = receipts.specs[name]
        self.receipts = receipts
        self._store = store = receipts.store
        self._mirror = Mirror(store) if store.local_path is None else None
        # The store that is read: the cache itself, or the local copies of a remote one.
        self._local = store if self._mirror is None else self._mirror.local
        self._metadata_checked = False
        self._checked: dict[int, _Opened] = {}

    @property
    def where(self) -> str:
        return self._store.where(self.receipts.prefix + self.spec.name)

    def read_chunk(self, chunk: int) -> NDArray[Any]:
        """The entries of one chunk (the last one shorter). Raises IncompleteCache, CorruptCache and FormatError."""
        start = chunk * self.spec.layout.chunk
        shard, number = divmod(chunk, self.spec.layout.shard // self.spec.layout.chunk)

        def decode(checked: _Opened) -> NDArray[Any]:
            (data,) = self._local.read_ranges(self._key(shard), [checked.chunks[number]])
            return decode_chunk(self.spec, data)[: self.spec.shape[0] - start]

        return self._of_checked(shard, decode, f"chunk {chunk} cannot be decoded")

    def read_bytes(self, shard: int, start: int, stop: int) -> bytes:
        """The bytes `start .. stop` of a shard's object, after `check_shard`; raises as `read_chunk` does.

        A chunk's own checksum is for the caller to check.
        """

        def read(checked: _Opened) -> bytes:
            (data,) = self._local.read_ranges(self._key(shard), [(start, stop)])
            return data

        return self._of_checked(shard, read, "it cannot be read")

    def _of_checked(self, shard: int, request: Callable[[_Opened], Result], failure: str) -> Result:
        """The result of a request to a shard's object, which is the same file before and after."""
        self._check_metadata()
        for _ in range(_READ_ATTEMPTS):
            checked = self.check_shard(shard)
            try:
                result = request(checked)
            except LogitCacheError:
                raise
            except Exception as error:
                # Codecs have no common error class: any exception here means damaged bytes.
                failed: Exception | None = error
            else:
                failed = None
            if self._identity(shard) != checked.identity:
                # Removed, replaced or evicted since it was checked: these may be another object's values.
                self._checked.pop(shard, None)
            elif failed is None:
                return result
            elif self._mirror is not None:
                self._mirror.drop(self._key(shard))
                self._checked.pop(shard, None)
            else:
                break
        where = self._store.where(self._key(shard))
        if failed is None:
            raise CorruptCache(f"{where}: it keeps changing while it is read; a committed object never does")
        raise CorruptCache(
            f"{where}: {failure} ({type(failed).__name__}: {failed}); the object changed after it was committed"
        ) from failed

    def receipt(self, shard: int) -> ShardReceipt:
        """The receipt that covers a shard. Raises IncompleteCache, which lists the missing ranges, if there is none."""
        receipt = self.receipts.recent(shard)
        if receipt is None:
            start, stop = self.spec.shard_range(shard)
            command = "cache-logits" if self.receipts.prefix else "logit-cache tokenize"
            raise IncompleteCache(
                f"{self.where}: positions {start}..{stop} were asked for, "
                f"but no receipt covers them; missing: {_ranges(self.receipts.missing_ranges())}. "
                f"Run the same {command} command again to complete it"
            )
        return receipt

    def check_shard(self, shard: int) -> _Opened:
        """Compare a shard's object with its receipt, once; fetch it if remote. Raises IncompleteCache, CorruptCache."""
        if shard in self._checked:
            return self._checked[shard]
        receipt = self.receipt(shard)
        key = self._key(shard)
        # A local copy that fails the check is fetched again, and another process can evict it before the next check.
        fetches = 0 if self._mirror is None else _READ_ATTEMPTS
        for attempt in range(1 + fetches):
            if self._mirror is not None:
                self._mirror.opened(key)
            # Taken before the check, so that a replacement during the check is detected afterwards.
            found = self._identity(shard)
            try:
                index = check_object(self._local, key, self.spec, receipt)
            except CorruptCache:
                if attempt == fetches:
                    raise
                assert self._mirror is not None
                self._mirror.fetch(key, receipt.objects[self.spec.name])
            else:
                if found is not None:
                    ends = zip(index.offsets, index.lengths, strict=True)
                    self._checked[shard] = _Opened(found, [(start, start + length) for start, length in ends])
                    return self._checked[shard]
        raise CorruptCache(f"{self._store.where(key)}: it appeared while it was opened; read it again")

    def _identity(self, shard: int) -> _Identity | None:
        """Distinguishes a file from another one under the same name; None where there is no file."""
        folder = self._local.local_path
        assert folder is not None
        try:
            found = os.stat(f"{folder}/{self._key(shard)}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _key(self, shard: int) -> str:
        return self.receipts.object_key(self.spec.name, shard)

    def _check_metadata(self) -> None:
        if not self._metadata_checked:
            key = f"{self.receipts.prefix}{self.spec.name}/zarr.json"
            check_metadata(self._store, key, metadata_bytes(self.spec.metadata()))
            self._metadata_checked = True


def check_shards(arrays: Iterable[CheckedArray], shard: int) -> None:
    """Check one shard of several arrays; remote objects are fetched concurrently. Raises as `check_shard` does."""
    todo = [array for array in arrays if shard not in array._checked]
    if not todo:
        return
    if any(array._mirror is not None for array in todo):
        todo[0].receipt(shard)  # a missing receipt is reported once, not once for each array
        with ThreadPoolExecutor(len(todo)) as pool:
            list(pool.map(lambda array: array.check_shard(shard), todo))
    else:
        for array in todo:
            array.check_shard(shard)


def check_object(store: Store, key: str, spec: ArraySpec, receipt: ShardReceipt) -> ShardIndex:
    """The shard index of an object, after checks of its existence, length, seal and chunk sizes against its receipt.

    Raises CorruptCache, which names the object.
    """
    where = store.where(key)
    size = store.size(key)
    if size is None:
        raise CorruptCache(f"{where}: missing, though its receipt exists")
    return _check_index(where, size, lambda ranges: store.read_ranges(key, ranges), spec, receipt)


def fetch_object(store: Store, key: str, spec: ArraySpec, receipt: ShardReceipt) -> bytes:
    """The bytes of an object, checked as `check_object` does, and their sha256. Raises CorruptCache."""
    expected, where = receipt.objects[spec.name], store.where(key)

    def request() -> bytes:
        data = store.read(key, expected.bytes)
        _check_index(where, len(data), reads_of(data), spec, receipt)
        found = hashlib.sha256(data).hexdigest()
        if found != expected.sha256:
            raise CorruptCache(f"{where}: expected sha256 {expected.sha256}, found {found}")
        return data

    return store.insist(key, "its receipt exists", request)


def _check_index(where: str, size: int, read: Reads, spec: ArraySpec, receipt: ShardReceipt) -> ShardIndex:
    expected = receipt.objects[spec.name]
    if size != expected.bytes:
        raise CorruptCache(f"{where}: expected {expected.bytes} bytes, found {size}")
    index = ShardIndex.of(spec, size, read)
    if expected.seal_sha256 not in index.seals:
        raise CorruptCache(
            f"{where}: its shard index and checksums have sha256 {index.seal_sha256}, the receipt states "
            f"{expected.seal_sha256}: this is another object, or a damaged one"
        )
    misfit = index.misfit(spec, receipt.shard)
    if misfit is not None:
        raise CorruptCache(f"{where}: {misfit}; nothing of it was decompressed")
    return index


def _ranges(ranges: list[tuple[int, int]], most: int = 4) -> str:
    shown = ", ".join(f"{start}..{stop}" for start, stop in ranges[:most])
    return shown + (f" and {len(ranges) - most} more" if len(ranges) > most else "")


class Stream:
    """A one-dimensional array of the token stream, read by absolute position."""

    def __init__(self, array: CheckedArray, check: Callable[[NDArray[Any], int], None] | None = None) -> None:
        self._array = array
        self._check = check
        self._chunk = lru_cache(_STREAM_CHUNKS)(self._read_chunk)

    def __len__(self) -> int:
        return self._array.spec.shape[0]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The entries `start .. stop` (exclusive).

        Raises IndexError outside the stream, and what `CheckedArray.read_chunk` raises.
        """
        check_range(start, stop, len(self))
        size = self._array.spec.layout.chunk
        parts = []
        for chunk in range(start // size, -(-stop // size)):
            values = self._chunk(chunk)
            parts.append(values[max(0, start - chunk * size) : stop - chunk * size])
        if not parts:
            return np.empty(0, dtype=self._array.spec.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """The slicing of an array, with a start and a stop."""
        return self.read(rows.start, min(rows.stop, len(self)))

    def first(self, wanted: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> tuple[int, int] | None:
        """(position, value) of the first entry that `wanted` selects, read block by block; None where there is none."""
        block = self._array.spec.layout.chunk
        for start in range(0, len(self), block):
            values = self.read(start, min(start + block, len(self)))
            found = np.flatnonzero(wanted(values))
            if len(found):
                return start + int(found[0]), int(values[found[0]])
        return None

    def _read_chunk(self, chunk: int) -> NDArray[Any]:
        values = self._array.read_chunk(chunk)
        if self._check is not None:
            self._check(values, chunk)
        return values


def check_range(start: int, stop: int, length: int) -> None:
    """Raise IndexError for positions outside `0 .. length`."""
    if not 0 <= start <= stop <= length:
        raise IndexError(f"positions {start}..{stop} are not inside 0..{length}")
