"""The object of one shard: encoding it, reading its shard index, and decoding one chunk of it.

The bytes are those that zarr writes and reads (`storage.format`: sharding_indexed with bytes, blosc and crc32c);
`tests/storage/test_other_readers.py` compares them with zarr itself, xarray and TensorStore. They are written and read
here without zarr, because zarr leaves out chunks that hold nothing but the fill value (as the label's log-probs of
one-token documents do), reads missing chunks as fill values, and spends more time in its event loop than decompressing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.layout import ArraySpec
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.receipts import ObjectDigest, ShardStatistics
from storage.format.stored import StoredTargets, joined
from storage.format.targets import SparseTargets

_BLOSC_HEADER = 16
_LEAST_CHUNK = _BLOSC_HEADER + 4
_ABSENT = (1 << 64) - 1
_MOST_ENCODERS = 4

Map = Callable[..., Iterable[Any]]
Reads = Callable[[Sequence[tuple[int, int]]], list[bytes]]  # the bytes start .. stop of an object, for each range


def encode_shard(spec: ArraySpec, shard: int, values: NDArray[Any], each: Map = map) -> bytes:
    """The object of one shard, the bytes that zarr writes for it. `values` are the entries `spec.shard_range(shard)`.
    `each` maps over its chunks, as a thread pool's map does. Raises ValueError for another shape or dtype.

    The chunks one after the other, each through the inner codecs (bytes, blosc, crc32c), then the shard index: offset
    and length of every chunk as uint64, all ones for those behind the end of the array, and its crc32c.
    """
    start, stop = spec.shard_range(shard)
    if values.shape != (stop - start, *spec.shape[1:]) or values.dtype != np.dtype(spec.dtype):
        raise ValueError(
            f"{spec.name}: shard {shard} takes {spec.dtype} {(stop - start, *spec.shape[1:])}, "
            f"not {values.dtype} {values.shape}"
        )
    size = spec.layout.chunk
    chunks = [values[first : first + size] for first in range(0, stop - start, size)]
    parts = list(each(partial(_encode_chunk, spec), chunks))
    index = np.full((spec.layout.shard // size, 2), _ABSENT, dtype="<u8")
    lengths = [len(part) for part in parts]
    index[: len(parts)] = np.stack([np.cumsum([0, *lengths[:-1]]), lengths], axis=1)
    return b"".join([*parts, _with_crc32c(index.tobytes())])


def _encode_chunk(spec: ArraySpec, chunk: NDArray[Any]) -> bytes:
    import numcodecs
    import numcodecs.blosc

    # One internal thread: with several, the order of blocks inside a chunk would depend on the machine.
    numcodecs.blosc.use_threads = False
    shuffles = {"shuffle": numcodecs.Blosc.SHUFFLE, "bitshuffle": numcodecs.Blosc.BITSHUFFLE}
    blosc = numcodecs.Blosc(**{**spec.blosc, "shuffle": shuffles[spec.blosc["shuffle"]]})
    if len(chunk) < spec.layout.chunk:
        whole = np.full((spec.layout.chunk, *spec.shape[1:]), spec.fill_value, dtype=spec.dtype)
        whole[: len(chunk)] = chunk
        chunk = whole
    chunk = np.ascontiguousarray(chunk, dtype=np.dtype(spec.dtype).newbyteorder("<"))
    return _with_crc32c(blosc.encode(chunk.view(np.uint8).reshape(-1)))


def decode_chunk(spec: ArraySpec, data: bytes) -> NDArray[Any]:
    """The entries of one chunk [chunk, ...] from its bytes in the object. Raises ValueError, RuntimeError for damage.

    The crc32c is checked before anything is decompressed, and the output buffer is exactly one chunk long.
    """
    import numcodecs

    body, stored = memoryview(data)[:-4], data[-4:]  # a view: bytes would be copied
    found = _crc32c(body)
    if found != stored:
        raise ValueError(f"its crc32c is {found.hex()}, stored is {stored.hex()}")
    values = np.empty((spec.layout.chunk, *spec.shape[1:]), dtype=np.dtype(spec.dtype).newbyteorder("<"))
    room = values.view(np.uint8).reshape(-1)
    decoded = numcodecs.Blosc().decode(body, out=room)
    if len(decoded) != spec.chunk_bytes:
        raise ValueError(f"it holds {len(decoded)} bytes decoded, where a chunk has {spec.chunk_bytes}")
    return values.astype(spec.dtype, copy=False)


def decode_shard(spec: ArraySpec, shard: int, data: bytes) -> Iterator[NDArray[Any]]:
    """The entries of each chunk of a shard, from the bytes of its whole object; the last one of the array is shorter.

    For an object whose sizes were checked (`ShardIndex.misfit`). Raises ValueError, RuntimeError for damage.
    """
    index = ShardIndex.of(spec, len(data), reads_of(data))
    start, stop = spec.shard_range(shard)
    for number, (offset, length) in enumerate(zip(index.offsets, index.lengths, strict=True)):
        yield decode_chunk(spec, data[offset : offset + length])[: stop - start - number * spec.layout.chunk]


def _crc32c(data: bytes | memoryview) -> bytes:
    import crc32c

    return crc32c.crc32c(data).to_bytes(4, "little")


def _with_crc32c(data: bytes) -> bytes:
    return data + _crc32c(data)


def object_digest(spec: ArraySpec, data: bytes) -> ObjectDigest:
    """Length, sha256 and seal of an object, as its receipt holds them."""
    return ObjectDigest(
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        seal_sha256=ShardIndex.of(spec, len(data), reads_of(data)).seal_sha256,
    )


def reads_of(data: bytes) -> Reads:
    """`Reads` of an object that is in memory."""
    return lambda ranges: [data[start:stop] for start, stop in ranges]


@dataclass(frozen=True)
class ShardIndex:
    """The index of a shard object, and each chunk's offset, length, Blosc header and crc32c, from a few small reads.

    Chunks that lie wholly behind the end of the array are not stored; the index marks them as absent.
    """

    index: bytes
    stored: list[bool]  # for each chunk of the shard; empty when the index points outside the object
    offsets: list[int]
    lengths: list[int]
    headers: list[bytes]  # 16 bytes each
    checksums: list[bytes]  # crc32c, 4 bytes each

    @classmethod
    def of(cls, spec: ArraySpec, size: int, read: Reads) -> ShardIndex:
        """Read the index of an object of `size` bytes, then the ends of its chunks: two calls of `read`."""
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
        offsets, lengths = [offset for offset, _ in chunks], [length for _, length in chunks]
        return cls(index, stored, offsets, lengths, parts[: len(chunks)], parts[len(chunks) :])

    @property
    def seals(self) -> tuple[str, ...]:
        """The seals that a receipt may hold for this object."""
        if all(self.stored):
            return (self.seal_sha256,)
        # The first writers of the format left the checksums out where chunks lie behind the end of the array.
        return self.seal_sha256, hashlib.sha256(self.index).hexdigest()

    @property
    def seal_sha256(self) -> str:
        """sha256 of the index followed by the crc32c at the end of each chunk.

        The index alone does not distinguish two shards whose chunks have equal lengths, as incompressible ones
        have. With the chunks' checksums in the seal, and each chunk checked against its own when it is decoded, an
        object that passes is the one that was committed.
        """
        return hashlib.sha256(b"".join([self.index, *self.checksums])).hexdigest()

    def misfit(self, spec: ArraySpec, shard: int) -> str | None:
        """The first error in the number of chunks and their announced sizes, or None; checked before a decompressor
        allocates memory for these sizes.

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


def shard_values(entry: TeacherEntry, targets: SparseTargets) -> StoredTargets:
    """A shard's targets as they are stored, encoded in parallel."""
    # Chunk by chunk: intermediate values stay small, and several threads take part.
    size = entry.layout.chunk
    chunks = [
        targets.rows(start, min(start + size, targets.stop)) for start in range(targets.start, targets.stop, size)
    ]
    with ThreadPoolExecutor(_encoders()) as pool:
        return joined(list(pool.map(partial(StoredTargets.of, entry), chunks)))


def encode_objects(specs: Mapping[str, ArraySpec], shard: int, values: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """The objects of one shard, by array, encoded in parallel."""
    with ThreadPoolExecutor(_encoders()) as pool:
        return {name: encode_shard(spec, shard, values[name], pool.map) for name, spec in specs.items()}


def shard_statistics(targets: SparseTargets) -> ShardStatistics:
    """The sums over a shard's positions with targets, for its receipt."""
    there = targets.there
    # Sampled ids whose log-probs are not stored count for nothing.
    mass = np.nansum(np.exp(targets.logprobs[there].astype(np.float64)), axis=1)
    label = np.empty(0, dtype=np.float32) if targets.label_logprob is None else targets.label_logprob
    known = label[~np.isnan(label)]
    entropy = None if targets.entropy is None else float(targets.entropy[there].sum(dtype=np.float64))
    return ShardStatistics(
        positions=int(there.sum()),
        labelled=len(known),
        label_nats=-float(known.sum(dtype=np.float64)),
        entropy_nats=entropy,
        **(_head_masses(mass) if targets.k else {}),
    )


def _head_masses(mass: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "head_mass": float(mass.sum()),
        "head_mass_below_half": int((mass < 0.5).sum()),
        "head_mass_below_90": int((mass < 0.9).sum()),
        "head_mass_below_99": int((mass < 0.99).sum()),
    }


def _encoders() -> int:
    """Number of threads that encode a shard: compressors and NumPy release the GIL."""
    return min(
        _MOST_ENCODERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
