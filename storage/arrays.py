"""One array of a cache, encoded to shard objects and read back checked.

Reading goes through zarr itself, on a plain local store, and never on trust: before zarr touches a shard,
its object's length and seal (shard index and chunk checksums) are compared with the receipt, because zarr
takes a missing object for fill values and an empty one for zeros; afterwards the object must still be the file
that was checked. Chunks carry a crc32c of their own, and the fill values are poison. Objects of a remote cache are
fetched whole (`storage.mirror`) and read as local files by the same code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptCache, FormatError, IncompleteCache, LogitCacheError
from storage.format import ArraySpec
from storage.location import Location
from storage.manifest import ObjectDigest, ShardReceipt
from storage.mirror import Mirror
from storage.receipts import Receipts

if TYPE_CHECKING:
    import zarr

_BLOSC_HEADER = 16
_LEAST_CHUNK = _BLOSC_HEADER + 4
_ABSENT = (1 << 64) - 1
_READ_ATTEMPTS = 3

Reads = Callable[[Sequence[tuple[int, int]]], list[bytes]]  # the bytes start .. stop of an object, for each range
_Identity = tuple[int, int, int]  # of a file: inode, length, time of modification in ns


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """A zarr.json as it is written; the same metadata always gives the same bytes."""
    return json.dumps(metadata, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def encode_shard(spec: ArraySpec, shard: int, values: NDArray[Any]) -> bytes:
    """The object of one shard, the bytes that zarr writes for it. `values` are the entries `spec.shard_range(shard)`.

    The chunks one after the other, each through the inner codecs (bytes, blosc, crc32c), then the shard index: offset
    and length of every chunk as uint64, all ones for those behind the end of the array, and its crc32c. zarr itself
    would leave out chunks that hold nothing but the fill value, as the label's log-probs of one-token documents do.
    """
    import numcodecs
    import numcodecs.blosc

    start, stop = spec.shard_range(shard)
    if values.shape != (stop - start, *spec.shape[1:]) or values.dtype != np.dtype(spec.dtype):
        raise ValueError(
            f"{spec.name}: shard {shard} takes {spec.dtype} {(stop - start, *spec.shape[1:])}, "
            f"not {values.dtype} {values.shape}"
        )
    # One internal thread: with several, the order of blocks inside a chunk would depend on the machine.
    numcodecs.blosc.use_threads = False
    blosc = numcodecs.Blosc(
        cname=spec.blosc["cname"],
        clevel=spec.blosc["clevel"],
        shuffle=numcodecs.Blosc.BITSHUFFLE,
        blocksize=spec.blosc["blocksize"],
        typesize=spec.blosc["typesize"],
    )
    size = spec.layout.chunk
    index = np.full((spec.layout.shard // size, 2), _ABSENT, dtype="<u8")
    parts: list[bytes] = []
    offset = 0
    for number, first in enumerate(range(0, stop - start, size)):
        chunk = values[first : first + size]
        if len(chunk) < size:
            whole = np.full((size, *spec.shape[1:]), spec.poison, dtype=spec.dtype)
            whole[: len(chunk)] = chunk
            chunk = whole
        chunk = np.ascontiguousarray(chunk, dtype=np.dtype(spec.dtype).newbyteorder("<"))
        part = _with_crc32c(blosc.encode(chunk.view(np.uint8).reshape(-1)))
        index[number] = offset, len(part)
        parts.append(part)
        offset += len(part)
    return b"".join([*parts, _with_crc32c(index.tobytes())])


def _with_crc32c(data: bytes) -> bytes:
    import crc32c

    return data + crc32c.crc32c(data).to_bytes(4, "little")


def object_digest(spec: ArraySpec, data: bytes) -> ObjectDigest:
    """What a receipt says of an object."""

    return ObjectDigest(
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seal_sha256=_Anatomy.of(spec, len(data), _reads(data)).seal_sha256,
    )


def _reads(data: bytes) -> Reads:
    return lambda ranges: [data[start:stop] for start, stop in ranges]


@dataclass(frozen=True)
class _Anatomy:
    """What a few small reads tell of a shard object: its index, and each chunk's length, first and last bytes.

    Chunks that lie wholly behind the end of the array are not stored, and marked so in the index.
    """

    index: bytes
    stored: list[bool]  # of all chunks; of none, when the index points outside the object
    lengths: list[int]
    headers: list[bytes]  # 16 bytes each
    checksums: list[bytes]  # crc32c, 4 bytes each

    @classmethod
    def of(cls, spec: ArraySpec, size: int, read: Reads) -> _Anatomy:
        """Read it."""
        (index,) = read([(size - spec.index_bytes, size)])
        table = np.frombuffer(index[:-4], dtype="<u8").reshape(-1, 2).tolist() if len(index) == spec.index_bytes else []
        stored = [entry != [_ABSENT, _ABSENT] for entry in table]
        chunks = [entry for entry in table if entry != [_ABSENT, _ABSENT]]
        if not all(_LEAST_CHUNK <= length <= size and offset <= size - length for offset, length in chunks):
            stored, chunks = [], []
        parts = read(
            [(offset, offset + _BLOSC_HEADER) for offset, _ in chunks]
            + [(offset + length - 4, offset + length) for offset, length in chunks]
        )
        return cls(index, stored, [length for _, length in chunks], parts[: len(chunks)], parts[len(chunks) :])

    @property
    def seals(self) -> tuple[str, ...]:
        """The seals that a receipt may hold for this object."""
        if all(self.stored):
            return (self.seal_sha256,)
        # The first writers of the format left the checksums out where chunks lie behind the end of the array.
        return self.seal_sha256, hashlib.sha256(self.index).hexdigest()

    @property
    def seal_sha256(self) -> str:
        """sha256 of the index and of the crc32c at the end of each chunk.

        The index alone would not tell two shards apart whose chunks have equal lengths, as incompressible ones
        do. With the chunks' checksums in the seal, and each chunk checked against its own when it is decoded, an
        object that passes is the one that was committed.
        """
        return hashlib.sha256(b"".join([self.index, *self.checksums])).hexdigest()

    def misfit(self, spec: ArraySpec, shard: int) -> str | None:
        """What is wrong with the chunks' number and announced sizes, before a decompressor allocates on their word.

        A Blosc chunk begins with its typesize (byte 3), decoded size, block size and own size (uint32 at 4, 8, 12).
        """
        start, stop = spec.shard_range(shard)
        used = -(-(stop - start) // spec.layout.chunk)
        if self.stored != [number < used for number in range(spec.layout.shard // spec.layout.chunk)]:
            return f"its shard index points outside it, or does not hold exactly its first {used} chunks"
        for number, (length, header) in enumerate(zip(self.lengths, self.headers, strict=True)):
            decoded, block, own = np.frombuffer(header, dtype="<u4")[1:].tolist()
            if decoded != spec.chunk_bytes or block > decoded or own != length - 4:
                return (
                    f"chunk {number} announces {decoded} bytes decoded in blocks of {block} and {own} stored, where "
                    f"{spec.chunk_bytes} and {length - 4} are right"
                )
        return None


class CheckedArray:
    """Read access to one array; the receipts decide what exists."""

    def __init__(self, location: Location, group: str, spec: ArraySpec, receipts: Receipts) -> None:
        self.spec = spec
        self._location = location
        self._folder = group  # "" or "teachers/<name>/"
        self._receipts = receipts
        self._mirror = Mirror(location) if location.local_path is None else None
        # Where the bytes lie that are read: the cache itself, or the local copies of a remote one.
        self._local = location if self._mirror is None else self._mirror.local
        self._zarr: zarr.Array[Any] | None = None
        self._checked: dict[int, _Identity] = {}

    @property
    def is_remote(self) -> bool:
        """Whether objects have to be fetched first."""
        return self._mirror is not None

    def read_chunk(self, chunk: int) -> NDArray[Any]:
        """All entries of one chunk (the last one shorter). Raises IncompleteCache and CorruptCache."""
        start = chunk * self.spec.layout.chunk
        stop = min(start + self.spec.layout.chunk, self.spec.shape[0])
        shard = start // self.spec.layout.shard
        for _ in range(_READ_ATTEMPTS):
            checked = self.check_shard(shard)
            try:
                values = np.asarray(self._array()[start:stop])
            except LogitCacheError:
                raise
            except Exception as error:
                # Whatever a codec raises on damaged bytes (zarr has no common class for it) means the same to a user.
                failed: Exception | None = error
            else:
                failed = None
            if self._identity(shard) != checked:
                # Removed, replaced or evicted since it was checked: what zarr made of it may be fill values.
                self._checked.pop(shard, None)
            elif failed is None:
                return values
            elif self._mirror is not None:
                self._mirror.drop(self._key(shard))
                self._checked.pop(shard, None)
            else:
                break
        where = self._location.where(self._key(shard))
        if failed is None:
            raise CorruptCache(f"{where}: it keeps changing while it is read; a committed object never does")
        raise CorruptCache(
            f"{where}: chunk {chunk} cannot be decoded ({type(failed).__name__}: {failed}); "
            f"the object changed after it was committed"
        ) from failed

    def receipt(self, shard: int) -> ShardReceipt:
        """The receipt that covers a shard. Raises IncompleteCache."""
        receipt = self._receipts.recent(shard)
        if receipt is None:
            start, stop = self.spec.shard_range(shard)
            command = "cache-logits" if self._folder else "logit-cache tokenize"
            raise IncompleteCache(
                f"{self._location.where(self._folder + self.spec.name)}: positions {start}..{stop} were asked for, "
                f"but no receipt covers them; missing: {_ranges(self._receipts.missing_ranges())}. "
                f"Run the same {command} command again to complete it"
            )
        return receipt

    def check_shard(self, shard: int) -> _Identity:
        """Compare the shard's object with its receipt, once; fetch it whole where the cache is remote."""
        if shard in self._checked:
            return self._checked[shard]
        receipt = self.receipt(shard)
        key = self._key(shard)
        # A local copy is fetched when it does not pass, and another process can evict it before it is checked again.
        fetches = 0 if self._mirror is None else _READ_ATTEMPTS
        for attempt in range(1 + fetches):
            if self._mirror is not None:
                self._mirror.opened(key)
            # Taken before the check: a replacement in between then shows afterwards.
            found = self._identity(shard)
            try:
                check_object(self._local, key, self.spec, receipt)
            except CorruptCache:
                if attempt == fetches:
                    raise
                self._fetch(key, receipt)
            else:
                if found is not None:
                    self._checked[shard] = found
                    return found
        raise CorruptCache(f"{self._location.where(key)}: it appeared while it was opened; read it again")

    def _fetch(self, key: str, receipt: ShardReceipt) -> None:
        assert self._mirror is not None
        expected = receipt.objects[self.spec.name]
        if expected.bytes > self.spec.most_object_bytes:
            raise CorruptCache(
                f"{self._location.where(key)}: its receipt states {expected.bytes} bytes, more than such an object has"
            )
        self._mirror.fetch(key, expected)

    def _identity(self, shard: int) -> _Identity | None:
        """What tells a file from another under the same name; None where there is none."""
        folder = self._local.local_path
        assert folder is not None
        try:
            found = os.stat(folder / self._key(shard))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _key(self, shard: int) -> str:
        return self._folder + self.spec.shard_key(shard)

    def _array(self) -> zarr.Array[Any]:
        if self._zarr is None:
            import zarr

            key = f"{self._folder}{self.spec.name}/zarr.json"
            promise = "receipts commit shards of this array"
            found = self._location.insist(key, promise, lambda: self._location.read_json(key))
            if found != self.spec.metadata():
                raise FormatError(
                    f"{self._location.where(key)}: not the metadata that this cache's record implies; it was changed"
                )
            if self._mirror is not None:
                self._mirror.keep(key, metadata_bytes(self.spec.metadata()))
            folder = self._local.local_path
            assert folder is not None
            # A plain LocalStore: any wrapper would switch the fast codec pipeline off without a word.
            store = zarr.storage.LocalStore(folder / self._folder / self.spec.name, read_only=True)
            self._zarr = zarr.open_array(store, mode="r", zarr_format=3)
        return self._zarr


def check_shards(arrays: Iterable[CheckedArray], shard: int) -> None:
    """Check one shard of several arrays; what is remote is fetched at the same time, not one after the other."""
    todo = list(arrays)
    if any(array.is_remote for array in todo):
        todo[0].receipt(shard)  # where it fails, it need not fail once more for each array
        with ThreadPoolExecutor(len(todo)) as pool:
            list(pool.map(lambda array: array.check_shard(shard), todo))
    else:
        for array in todo:
            array.check_shard(shard)


def check_object(location: Location, key: str, spec: ArraySpec, receipt: ShardReceipt) -> None:
    """Existence, length, seal and chunk sizes of one object against its receipt; CorruptCache names the object."""
    where = location.where(key)
    size = location.size(key)
    if size is None:
        raise CorruptCache(f"{where}: missing, though its receipt exists")
    _check_anatomy(where, size, lambda ranges: location.read_ranges(key, ranges), spec, receipt)


def check_bytes(where: str, data: bytes, spec: ArraySpec, receipt: ShardReceipt) -> None:
    """`check_object` for an object that is in memory, and its sha256 besides. `where` is for the message."""
    _check_anatomy(where, len(data), _reads(data), spec, receipt)
    found = hashlib.sha256(data).hexdigest()
    if found != receipt.objects[spec.name].sha256:
        raise CorruptCache(f"{where}: expected sha256 {receipt.objects[spec.name].sha256}, found {found}")


def fetch_object(location: Location, key: str, spec: ArraySpec, receipt: ShardReceipt) -> bytes:
    """An object whole, checked against its receipt in every byte. Raises CorruptCache."""

    def request() -> bytes:
        data = location.read(key, receipt.objects[spec.name].bytes)
        check_bytes(location.where(key), data, spec, receipt)
        return data

    return location.insist(key, "its receipt exists", request)


def _check_anatomy(where: str, size: int, read: Reads, spec: ArraySpec, receipt: ShardReceipt) -> None:
    expected = receipt.objects[spec.name]
    if size != expected.bytes or not spec.index_bytes <= size <= spec.most_object_bytes:
        raise CorruptCache(
            f"{where}: expected {expected.bytes} bytes (of {spec.index_bytes} to {spec.most_object_bytes} that such an "
            f"object can have), found {size}"
        )
    anatomy = _Anatomy.of(spec, size, read)
    if expected.seal_sha256 not in anatomy.seals:
        raise CorruptCache(
            f"{where}: its shard index and checksums have sha256 {anatomy.seal_sha256}, the receipt says "
            f"{expected.seal_sha256}: this is another object, or a damaged one"
        )
    misfit = anatomy.misfit(spec, receipt.shard)
    if misfit is not None:
        raise CorruptCache(f"{where}: {misfit}; nothing of it was decompressed")


def _ranges(ranges: list[tuple[int, int]], most: int = 4) -> str:
    shown = ", ".join(f"{start}..{stop}" for start, stop in ranges[:most])
    return shown + (f" and {len(ranges) - most} more" if len(ranges) > most else "")
