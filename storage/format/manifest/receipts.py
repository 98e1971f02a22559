"""Receipts: which objects a shard, or a group of files, is made of, and the index of all receipts of an array group."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from storage.format.manifest.shared import ADDED, MAX_OBJECT_BYTES, Count, Positive, Sha256, Text
from storage.format.sealing import Record

MAX_INDEX_BYTES = 1 << 28


class ObjectDigest(Record):
    """One stored object: its length, its sha256, and its seal, which is checked without reading all of it:
    the sha256 of the shard index at its end followed by the last 4 bytes (crc32c) of every chunk."""

    bytes: Annotated[int, Field(ge=0, le=2 * MAX_OBJECT_BYTES)]
    sha256: Sha256
    seal_sha256: Sha256


class FileDigest(Record):
    """Length and sha256 of one file that is no Zarr array (the tokenizer's)."""

    bytes: Annotated[int, Field(ge=0, le=MAX_OBJECT_BYTES)]
    sha256: Sha256


class ShardStatistics(Record):
    """Sums over the positions of a shard, so that a summary needs no array. Nats, and counts of positions.

    `positions` are those with targets. `entropy_nats` is None where whoever wrote the shard did not know it; of entries
    without ids there is no head.
    """

    positions: Count
    labelled: Count
    label_nats: float
    entropy_nats: float | None
    head_mass: float | None = ADDED
    head_mass_below_half: Count | None = ADDED
    head_mass_below_90: Count | None = ADDED
    head_mass_below_99: Count | None = ADDED

    def __add__(self, other: ShardStatistics) -> ShardStatistics:
        sums: dict[str, Any] = {}
        for name in ShardStatistics.model_fields:
            one, two = getattr(self, name), getattr(other, name)
            sums[name] = None if one is None or two is None else one + two
        return ShardStatistics(**sums)


class ShardReceipt(Record):
    """Commits one shard of the arrays named in `objects`; `record_sha256` is the record it belongs to."""

    format_version: Literal[1] = 1
    kind: Literal["shard"] = "shard"
    record_sha256: Sha256
    shard: Count
    start: Count
    stop: Positive
    objects: Annotated[dict[str, ObjectDigest], Field(min_length=1, max_length=16)]
    statistics: ShardStatistics | None = None
    seconds: Annotated[float, Field(ge=0)] = 0.0
    written_at: Text
    host: Text


class FilesReceipt(Record):
    """Commits the tokenizer's files."""

    format_version: Literal[1] = 1
    kind: Literal["files"] = "files"
    files: Annotated[dict[str, FileDigest], Field(min_length=1, max_length=64)]


class ReceiptIndex(Record):
    """The sha256 of every receipt in order, and sums over them; written when the last shard is committed."""

    format_version: Literal[1] = 1
    kind: Literal["receipt_index"] = "receipt_index"
    record_sha256: Sha256
    receipts: tuple[Sha256, ...]
    object_bytes: Count
    statistics: ShardStatistics | None = None
    seconds: Annotated[float, Field(ge=0)] = 0.0
