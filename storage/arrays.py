"""One array of a cache, encoded to shard objects and read back checked.

Reading goes through zarr itself, on a plain local store, and never on trust: before zarr touches a shard,
its object's length and seal (shard index and chunk checksums) are compared with the receipt, because zarr
takes a missing object for fill values and an empty one for zeros. Chunks carry a crc32c of their own, and
the fill values are poison.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptCache, FormatError, IncompleteCache
from storage.format import ArraySpec
from storage.location import Location
from storage.manifest import ObjectDigest, ShardReceipt, parse_json
from storage.receipts import Receipts

if TYPE_CHECKING:
    import zarr

_REMOTE_SHARDS_HELD = 4


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """A zarr.json as it is written; the same metadata always gives the same bytes."""
    return json.dumps(metadata, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def encode_shard(spec: ArraySpec, shard: int, values: NDArray[Any]) -> bytes:
    """The object of one shard, as zarr writes it. `values` are the entries `spec.shard_range(shard)`."""
    import numcodecs.blosc
    import zarr
    from zarr.buffer import cpu

    start, stop = spec.shard_range(shard)
    if values.shape != (stop - start, *spec.shape[1:]) or values.dtype != np.dtype(spec.dtype):
        raise ValueError(
            f"{spec.name}: shard {shard} takes {spec.dtype} {(stop - start, *spec.shape[1:])}, "
            f"not {values.dtype} {values.shape}"
        )
    # One internal thread: with several, the order of blocks inside a chunk would depend on the machine.
    numcodecs.blosc.use_threads = False
    held: dict[str, Any] = {"zarr.json": cpu.Buffer.from_bytes(metadata_bytes(spec.metadata()))}
    array = zarr.open_array(zarr.storage.MemoryStore(held), mode="r+", config={"write_empty_chunks": True})
    array[start:stop] = values
    return bytes(held[spec.shard_key(shard)[len(spec.name) + 1 :]].to_bytes())


def object_digest(spec: ArraySpec, data: bytes) -> ObjectDigest:
    """What a receipt says of an object."""

    def read(ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [data[start:stop] for start, stop in ranges]

    return ObjectDigest(
        bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), seal_sha256=_seal(spec, len(data), read)
    )


def _seal(spec: ArraySpec, size: int, read: Callable[[Sequence[tuple[int, int]]], list[bytes]]) -> str:
    """sha256 of a shard's index and of the crc32c at the end of each of its chunks.

    The index alone would not tell two shards apart whose chunks have equal lengths, as incompressible ones
    do. With the chunks' checksums in the seal, and each chunk checked against its own when it is decoded, an
    object that passes is the one that was committed, at the price of a few small reads.
    """
    (index,) = read([(size - spec.index_bytes, size)])
    table = np.frombuffer(index[:-4], dtype="<u8").reshape(-1, 2).tolist() if len(index) == spec.index_bytes else []
    inside = all(4 <= length <= size and offset <= size - length for offset, length in table)
    ends = read([(offset + length - 4, offset + length) for offset, length in table]) if inside else []
    return hashlib.sha256(b"".join([index, *ends])).hexdigest()


class CheckedArray:
    """Read access to one array; the receipts decide what exists."""

    def __init__(self, location: Location, group: str, spec: ArraySpec, receipts: Receipts) -> None:
        self.spec = spec
        self._location = location
        self._folder = group  # "" or "teachers/<name>/"
        self._receipts = receipts
        self._zarr: zarr.Array[Any] | None = None
        self._checked: OrderedDict[int, None] = OrderedDict()
        self._held: dict[str, Any] = {}  # objects of a remote cache, by key

    def read_chunk(self, chunk: int) -> NDArray[Any]:
        """All entries of one chunk (the last one shorter). Raises IncompleteCache and CorruptCache."""
        start = chunk * self.spec.layout.chunk
        stop = min(start + self.spec.layout.chunk, self.spec.shape[0])
        self._check_shard(start // self.spec.layout.shard)
        try:
            values = np.asarray(self._array()[start:stop])
        except Exception as error:
            # Whatever a codec raises on damaged bytes (zarr has no common class for it) means the same to a user.
            key = self._key(start // self.spec.layout.shard)
            raise CorruptCache(
                f"{self._location.where(key)}: chunk {chunk} cannot be decoded ({type(error).__name__}: {error}); "
                f"the object changed after it was committed"
            ) from error
        return values

    def _key(self, shard: int) -> str:
        return self._folder + self.spec.shard_key(shard)

    def _array(self) -> zarr.Array[Any]:
        if self._zarr is None:
            import zarr
            from zarr.buffer import cpu

            key = f"{self._folder}{self.spec.name}/zarr.json"
            where = self._location.where(key)
            try:
                data = self._location.read(key)
            except FileNotFoundError:
                raise CorruptCache(f"{where}: missing, though receipts commit shards of this array") from None
            if parse_json(data, where) != self.spec.metadata():
                raise FormatError(f"{where}: not the metadata that this cache's record implies; it was changed")
            folder = self._location.local_path
            store: Any
            if folder is not None:
                # A plain LocalStore: any wrapper would switch the fast codec pipeline off without a word.
                store = zarr.storage.LocalStore(folder / self._folder / self.spec.name, read_only=True)
            else:
                self._held["zarr.json"] = cpu.Buffer.from_bytes(data)
                store = zarr.storage.MemoryStore(self._held)
            self._zarr = zarr.open_array(store, mode="r", zarr_format=3)
        return self._zarr

    def _check_shard(self, shard: int) -> None:
        """Compare the shard's object with its receipt, once; fetch it whole where the cache is remote."""
        if shard in self._checked:
            return
        receipt = self._receipts.read(shard)
        if receipt is None:
            start, stop = self.spec.shard_range(shard)
            command = "cache-logits" if self._folder else "logit-cache tokenize"
            raise IncompleteCache(
                f"{self._location.where(self._folder + self.spec.name)}: positions {start}..{stop} were asked for, "
                f"but no receipt covers them; missing: {_ranges(self._receipts.missing_ranges())}. "
                f"Run the same {command} command again to complete it"
            )
        if self._location.local_path is not None:
            check_object(self._location, self._key(shard), self.spec, receipt)
        else:
            self._fetch(shard, receipt)
        self._checked[shard] = None

    def _fetch(self, shard: int, receipt: ShardReceipt) -> None:
        from zarr.buffer import cpu

        key = self._key(shard)
        where = self._location.where(key)
        try:
            data = self._location.read(key)
        except FileNotFoundError:
            raise CorruptCache(f"{where}: missing, though its receipt exists") from None
        found, expected = object_digest(self.spec, data), receipt.objects[self.spec.name]
        if found != expected:
            raise CorruptCache(
                f"{where}: expected {expected.bytes} bytes with sha256 {expected.sha256}, "
                f"found {found.bytes} with {found.sha256}"
            )
        while len(self._checked) >= _REMOTE_SHARDS_HELD:
            oldest, _ = self._checked.popitem(last=False)
            self._held.pop(self._key(oldest)[len(self._folder) + len(self.spec.name) + 1 :], None)
        self._held[self.spec.shard_key(shard)[len(self.spec.name) + 1 :]] = cpu.Buffer.from_bytes(data)


def check_object(location: Location, key: str, spec: ArraySpec, receipt: ShardReceipt) -> None:
    """Existence, length and seal of one object against its receipt; CorruptCache names the object."""
    where = location.where(key)
    expected = receipt.objects[spec.name]
    size = location.size(key)
    if size is None:
        raise CorruptCache(f"{where}: missing, though its receipt exists")
    if size != expected.bytes or size < spec.index_bytes:
        raise CorruptCache(f"{where}: expected {max(expected.bytes, spec.index_bytes)} bytes, found {size}")
    found = _seal(spec, size, lambda ranges: location.read_ranges(key, ranges))
    if found != expected.seal_sha256:
        raise CorruptCache(
            f"{where}: its shard index and checksums have sha256 {found}, the receipt says {expected.seal_sha256}: "
            f"this is another object, or a damaged one"
        )


def _ranges(ranges: list[tuple[int, int]], most: int = 4) -> str:
    shown = ", ".join(f"{start}..{stop}" for start, stop in ranges[:most])
    return shown + (f" and {len(ranges) - most} more" if len(ranges) > most else "")
