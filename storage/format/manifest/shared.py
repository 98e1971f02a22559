"""What the records of a cache share: their types, limits, the layout of arrays, and the versions that made them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from storage.format.sealing import Record

ATTRIBUTE = "logit_cache"
MAX_OBJECT_BYTES = 64 << 20
MAX_SHARDS = 1 << 21  # limit of an index of receipts: 137 billion positions at 65,536 to a shard
MAX_CHUNKS = 1 << 16  # of a shard: its index is read whole
TEACHER_NAME = r"[a-z0-9][a-z0-9_-]{0,63}"

_LIBRARIES = ("logit-cache", "torch", "transformers", "tokenizers", "zarr", "numcodecs", "numpy")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Positive = Annotated[int, Field(ge=1, le=1 << 48)]


def _is_none(value: object) -> bool:
    return value is None


# The default of a field that a record gained: JSON leaves it out where it is None, so that records from before it keep
# their digests. A version that does not know the field refuses the record that has it.
ADDED: Any = Field(default=None, exclude_if=_is_none)


class ArrayLayout(Record):
    """How an array is cut: `shard` entries per object, `chunk` entries per compressed unit of it.

    At 8 bytes per entry no object exceeds `MAX_OBJECT_BYTES`; entries with more are bounded by their own record.
    """

    shard: Annotated[int, Field(ge=1, le=MAX_OBJECT_BYTES // 8)]
    chunk: Annotated[int, Field(ge=1, le=MAX_OBJECT_BYTES // 8)]
    compression: Literal["zstd", "lz4"]

    def shard_range(self, shard: int, entries: int) -> tuple[int, int]:
        """First entry of a shard and the first after it, in an array of `entries` entries."""
        start = shard * self.shard
        return start, min(start + self.shard, entries)

    def check_length(self, entries: int) -> None:
        """Raises ValueError for an array with more than `MAX_SHARDS` shards."""
        if -(-entries // self.shard) > MAX_SHARDS:
            raise ValueError(f"{entries} entries in shards of {self.shard} are more than {MAX_SHARDS} shards")

    @model_validator(mode="after")
    def _divides(self) -> ArrayLayout:
        if self.shard % self.chunk:
            raise ValueError(f"shard {self.shard} is not a multiple of chunk {self.chunk}")
        if self.shard // self.chunk > MAX_CHUNKS:
            raise ValueError(f"a shard of {self.shard} has more than {MAX_CHUNKS} chunks of {self.chunk}")
        return self


class Versions(Record):
    """Library versions, for the reader's information; never compared."""

    libraries: dict[str, Text]

    @classmethod
    def of_this_process(cls) -> Versions:
        """The installed versions of Python and of the libraries that a result depends on."""
        found = {"python": platform.python_version()}
        for name in _LIBRARIES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return cls(libraries=found)
