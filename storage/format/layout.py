"""The arrays of a cache: names, shapes, data types, chunks, shards, codecs, and their Zarr metadata as bytes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from storage.format.encoding import token_id_dtype
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.shared import ATTRIBUTE, MAX_OBJECT_BYTES, ArrayLayout
from storage.format.sealing import Record, sealed

KEY = re.compile(r"^[a-z0-9_./-]+$")
PER_DOCUMENT = ("document_starts", "document_sources")
# The numbers per position by their field, as `SparseTargets` calls them, and so the arrays that hold them as float32.
VALUES = {"tail": "log_tail", "half-tail": "log_tail_half", "label": "label_logprob", "entropy": "entropy"}
_FLOATS = {"certain": "certain_logprobs", "sampled-logprobs": "sampled_logprobs", **VALUES}
_CODES = {
    "certain": "certain_codes",
    "sampled-logprobs": "sampled_codes",
    "tail": "mass_code",
    "half-tail": "half_tail_code",
    "label": "label_code",
    "entropy": "entropy_code",
}
# Small differences, of which zstd makes less in bytes than in bits: 5 % and 28 % (docs/decisions/0034).
_SHUFFLED_BY_BYTES = ("ids", "certain_codes")
SAMPLING_ORDER = "sampling_order"

_TARGET_CHUNK_TOKENS = 8_192
_TARGET_CHUNK_BYTES = 4 << 20
_TARGET_SHARD_TOKENS = 65_536
_FEWEST_SHARDS = 32
_STREAM_CHUNK = 65_536
_STREAM_SHARD = 4_194_304


@dataclass(frozen=True)
class ArraySpec:
    """One array of the format: the content of its zarr.json, and the keys of its objects."""

    name: str
    dtype: Literal["int16", "uint16", "uint32", "uint64", "float32", "bool"]
    shape: tuple[int, ...]
    layout: ArrayLayout

    @property
    def fill_value(self) -> Any:
        """The fill value as a number: the largest integer, or NaN; False for bool, which has none to spare."""
        if self.dtype == "bool":
            return False
        return math.nan if self.dtype == "float32" else int(np.iinfo(self.dtype).max)

    @property
    def blosc(self) -> dict[str, Any]:
        """The configuration of the chunks' Blosc codec, as it is in zarr.json."""
        zstd = self.layout.compression == "zstd"
        by_bytes = zstd and self.name in _SHUFFLED_BY_BYTES
        return {
            "typesize": self.itemsize,
            "cname": self.layout.compression,
            "clevel": 3 if zstd and not by_bytes else 5,
            "shuffle": "shuffle" if by_bytes else "bitshuffle",
            "blocksize": 0,
        }

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.dtype).itemsize)

    @property
    def shards(self) -> int:
        return -(-self.shape[0] // self.layout.shard)

    @property
    def index_bytes(self) -> int:
        """Length in bytes of the shard index at the end of an object: offset and length per chunk, and its crc32c."""
        return 16 * (self.layout.shard // self.layout.chunk) + 4

    @property
    def chunk_bytes(self) -> int:
        """Length of a chunk in bytes before compression; the last one of an array is padded to it."""
        return self.itemsize * self.layout.chunk * math.prod(self.shape[1:])

    @property
    def most_object_bytes(self) -> int:
        """Upper bound of an object's length: Blosc adds at most a header of 16 bytes to a chunk, and the crc32c 4."""
        return (self.chunk_bytes + 16 + 4) * (self.layout.shard // self.layout.chunk) + self.index_bytes

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First entry of a shard and the first after it."""
        return self.layout.shard_range(shard, self.shape[0])

    def shard_key(self, shard: int) -> str:
        """Key of a shard's object, relative to the array's group."""
        return f"{self.name}/c/{shard}" + "/0" * (len(self.shape) - 1)

    def metadata(self) -> dict[str, Any]:
        """The content of the array's zarr.json. A reader refuses any other."""
        rest = list(self.shape[1:])
        first = "document" if self.name in PER_DOCUMENT else "place" if self.name == SAMPLING_ORDER else "position"
        dimensions = [first, "rank"][: len(self.shape)]
        serializer: dict[str, Any] = {"name": "bytes"}
        if self.itemsize > 1:
            serializer["configuration"] = {"endian": "little"}
        blosc = {"name": "blosc", "configuration": self.blosc}
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.layout.shard, *rest]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if self.dtype == "float32" else self.fill_value,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.layout.chunk, *rest],
                        "codecs": [serializer, blosc, {"name": "crc32c"}],
                        "index_codecs": [little_endian, {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": dimensions,
            "attributes": {},
        }


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def teacher_arrays(entry: TeacherEntry) -> dict[str, ArraySpec]:
    n, k, codes, first = entry.positions, entry.targets.k, entry.encoding.kind == "codes", entry.format_version == 1
    arrays: list[tuple[str, Any, tuple[int, ...]]] = []
    if k:
        arrays += [
            ("token_ids" if first else "ids", token_id_dtype(entry.vocabulary_size), (n, k)),
            ("kept", "uint16", (n,)),
            ("certain", "uint16", (n,)),
        ]
    for field, name in _field_arrays(entry).items():
        if (field == "certain" and k) or (field == "sampled-logprobs" and entry.targets.has(field)):
            arrays.append((name, "uint16" if codes else "float32", (n, k)))
        elif entry.targets.has(field):
            arrays.append((name, "int16" if codes and not first else "float32", (n,)))
    return {name: ArraySpec(name, dtype, shape, entry.layout) for name, dtype, shape in arrays}


def _field_arrays(entry: TeacherEntry) -> dict[str, str]:
    """The array of every field that an entry of this version and encoding may have."""
    codes = entry.encoding.kind == "codes"
    if entry.format_version == 1:
        return {"certain": "logprob_codes" if codes else "logprobs", "top": "top_logprob", **VALUES}
    return _CODES if codes else _FLOATS


def order_array(entry: TeacherEntry) -> ArraySpec | None:
    """The array of the order in which ids are sampled, where it is not that of the ids: one shard, a single commit."""
    if entry.targets.order != "embeddings":
        return None
    layout = stream_layout(entry.vocabulary_size)
    return ArraySpec(SAMPLING_ORDER, "uint32", (entry.vocabulary_size,), layout)


def field_array(entry: TeacherEntry, field: str) -> str:
    return _field_arrays(entry)[field]


def corpus_arrays(record: CacheRecord) -> dict[str, ArraySpec]:
    """The arrays of the token stream, by name; none when the cache was shared without its tokens."""
    corpus = record.corpus
    if not corpus.tokens_included:
        return {}
    tokens = token_id_dtype(record.tokenizer.vocabulary_size)
    specs = [
        ArraySpec("tokens", tokens, (corpus.positions,), record.tokens_layout),  # type: ignore[arg-type]
        ArraySpec("document_starts", "uint64", (corpus.documents,), record.documents_layout),
    ]
    if corpus.document_sources:
        specs.append(ArraySpec("document_sources", "uint16", (corpus.documents,), record.documents_layout))
    if corpus.has_loss_mask:
        specs.append(ArraySpec("loss_mask", "bool", (corpus.positions,), record.tokens_layout))
    return {spec.name: spec for spec in specs}


def stream_layout(entries: int) -> ArrayLayout:
    """Layout of an array of the token stream: shards of 64 chunks of 65,536 entries, or one shard of fewer chunks."""
    chunks = -(-entries // _STREAM_CHUNK)
    return ArrayLayout(shard=min(_STREAM_SHARD, chunks * _STREAM_CHUNK), chunk=_STREAM_CHUNK, compression="zstd")


# The purpose of a codec, and the codec (docs/decisions/0014).
Profile = Literal["small", "fast"]
COMPRESSION: dict[Profile, Literal["zstd", "lz4"]] = {"small": "zstd", "fast": "lz4"}


def entry_layout(
    positions: int,
    k: int,
    stride_tokens: int,
    compression: Literal["zstd", "lz4"] = "zstd",
    shard_tokens: int | None = None,
    chunk_tokens: int | None = None,
) -> ArrayLayout:
    """Layout of a teacher entry; shard and chunk size are chosen where they are None.

    Both are multiples of the stride. By default a chunk has about 8,192 positions or 4 MiB, and a shard about 65,536
    positions, but less where that makes fewer than 32 shards: a killed job loses the one that it computes. No object
    can exceed 64 MiB before compression (4 bytes per id). Raises ValueError for sizes that break these rules.
    """
    row_bytes = 4 * max(k, 1)  # without ids, of the label's log-prob
    if chunk_tokens is None:
        wanted = min(_TARGET_CHUNK_TOKENS, max(1, _TARGET_CHUNK_BYTES // row_bytes))
        if shard_tokens is not None:
            wanted = min(wanted, shard_tokens)
            divisors = [d for d in range(stride_tokens, wanted + 1, stride_tokens) if shard_tokens % d == 0]
            chunk_tokens = max(divisors, default=stride_tokens)
        else:
            chunk_tokens = max(1, wanted // stride_tokens) * stride_tokens
    if shard_tokens is None:
        most = max(1, min(_TARGET_SHARD_TOKENS, MAX_OBJECT_BYTES // row_bytes) // chunk_tokens)
        shard_tokens = chunk_tokens * min(most, math.ceil(positions / chunk_tokens / _FEWEST_SHARDS))
    if chunk_tokens % stride_tokens or shard_tokens % chunk_tokens:
        raise ValueError(
            f"a shard of {shard_tokens} positions must be a multiple of the chunk ({chunk_tokens}), "
            f"and the chunk a multiple of the stride ({stride_tokens})"
        )
    if shard_tokens * row_bytes > MAX_OBJECT_BYTES:
        raise ValueError(
            f"a shard of {shard_tokens} positions with k = {k} can take {shard_tokens * row_bytes >> 20} MiB, "
            f"more than the {MAX_OBJECT_BYTES >> 20} MiB of one object: take a smaller shard, stride or k"
        )
    return ArrayLayout(shard=shard_tokens, chunk=chunk_tokens, compression=compression)


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """The bytes of a zarr.json; the same metadata always gives the same bytes."""
    return json.dumps(metadata, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def record_bytes(record: Record) -> bytes:
    """The bytes of the zarr.json of a group that holds a record."""
    return metadata_bytes(group_metadata({ATTRIBUTE: sealed(record)}))
