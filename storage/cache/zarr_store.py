"""zarr over a cache: a read-only store that checks what it hands out, and zarr's own codecs as a second decoder.

`LogitCache.zarr` and `LogitCache.xarray` read through `CheckedStore`: metadata is what the records imply, an object is
compared with its receipt before zarr sees a byte of it, and a shard that no receipt covers raises, where zarr would
give the fill value. Batches are read faster by `LogitCache.teacher` (docs/decisions/0013).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import cpu
from zarr.storage import MemoryStore

from storage.cache.checked_array import CheckedArray
from storage.errors import IncompleteCache, InputError, MissingObject
from storage.format.layout import ArraySpec, group_metadata, metadata_bytes

if TYPE_CHECKING:
    import xarray
    from zarr.core.buffer import Buffer, BufferPrototype

_SHARD_KEY = re.compile(r"(.+)/c/(0|[1-9]\d*)(?:/0)?")


class CheckedStore(Store):
    """A cache as zarr sees it: `groups` are attributes by path ("" is the root), `arrays` checked arrays by path."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, url: str, groups: Mapping[str, dict[str, Any]], arrays: Mapping[str, CheckedArray]) -> None:
        super().__init__(read_only=True)
        self._url, self._arrays = url, arrays
        nodes = {path: group_metadata(attributes) for path, attributes in groups.items()}
        nodes |= {path: array.spec.metadata() for path, array in arrays.items()}
        self._metadata = {f"{path}/zarr.json".lstrip("/"): metadata_bytes(node) for path, node in nodes.items()}

    def __eq__(self, other: object) -> bool:
        return self is other

    def __str__(self) -> str:
        return self._url

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """An object or a part of it, in a thread: several are fetched at once. Raises as `CheckedArray.check_shard`."""
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, wanted) for key, wanted in key_ranges)))

    def _read(self, key: str, wanted: ByteRequest | None) -> bytes | None:
        if key in self._metadata:
            data = self._metadata[key]
            return data[slice(*_bounds(wanted, len(data)))]
        found = self._shard_of(key)
        if found is None:
            return None
        array, shard = found
        return array.read_bytes(shard, *_bounds(wanted, array.receipt(shard).objects[array.spec.name].bytes))

    def _shard_of(self, key: str) -> tuple[CheckedArray, int] | None:
        match = _SHARD_KEY.fullmatch(key)
        array = self._arrays.get(match[1]) if match else None
        return (array, int(match[2])) if match and array and int(match[2]) < array.spec.shards else None

    async def exists(self, key: str) -> bool:
        found = self._shard_of(key)
        try:
            return key in self._metadata or (found is not None and bool(found[0].receipt(found[1])))
        except IncompleteCache:
            return False

    async def list(self) -> AsyncIterator[str]:
        for key in self._metadata:
            yield key
        for path, array in self._arrays.items():
            for shard in array.receipts.committed().nonzero()[0].tolist():
                yield path.removesuffix(array.spec.name) + array.spec.shard_key(shard)

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = f"{prefix.rstrip('/')}/".lstrip("/")
        for name in {key[len(folder) :].partition("/")[0]: None async for key in self.list_prefix(folder)}:
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()

    async def delete(self, key: str) -> None:
        self._check_writable()


def _bounds(wanted: ByteRequest | None, size: int) -> tuple[int, int]:
    """The range `start, stop` that zarr asks for, of an object of `size` bytes."""
    if isinstance(wanted, RangeByteRequest):
        return wanted.start, min(wanted.end, size)
    if isinstance(wanted, OffsetByteRequest):
        return wanted.offset, size
    if isinstance(wanted, SuffixByteRequest):
        return max(0, size - wanted.suffix), size
    return 0, size


def open_dataset(store: CheckedStore, path: str) -> xarray.Dataset:
    """The arrays of a group and of the root as one Dataset, read when they are used. Raises InputError without xarray.

    Stored values as they are: the fill value stands for nothing, and masking it would make floats of the integers.
    """
    try:
        import xarray
    except ImportError:
        raise InputError(
            f"{store}: a Dataset needs xarray, which is not installed: pip install 'logit-cache[xarray]'"
        ) from None
    entry, stream = (
        xarray.open_dataset(
            store,  # type: ignore[arg-type]
            engine="zarr",
            group=group,
            consolidated=False,
            zarr_format=3,
            decode_cf=False,
        )
        for group in (path, "")
    )
    return entry.assign(stream.variables)


class _Objects(dict[str, Any]):
    """Objects in memory: zarr takes a KeyError for a chunk of fill values, and gets another error."""

    def __missing__(self, key: str) -> Any:
        raise MissingObject(f"zarr looks for {key}, which the cache's keys do not have")


def decode_with_zarr(spec: ArraySpec, shard: int, data: bytes) -> NDArray[Any]:
    """The entries `spec.shard_range(shard)` by zarr's codecs, from the bytes of the shard's object, checked before.

    Raises what zarr raises for damage.
    """
    contents = {"zarr.json": metadata_bytes(spec.metadata()), spec.shard_key(shard).removeprefix(spec.name + "/"): data}
    objects = _Objects({key: cpu.Buffer.from_bytes(value) for key, value in contents.items()})
    array = zarr.open_array(MemoryStore(objects, read_only=True), mode="r", zarr_format=3)
    start, stop = spec.shard_range(shard)
    values: NDArray[Any] = array[start:stop]  # type: ignore[assignment]
    return values
