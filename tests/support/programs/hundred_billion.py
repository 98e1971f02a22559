"""Asks for the status of a simulated entry of 10^11 positions, and prints what that cost beyond the imports.

    python tests/support/programs/hundred_billion.py incomplete|complete

A process of `test_status`. Names and receipts are made when they are asked for, so what is held is held by the command.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import resource
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from support.caches.small import SHA, make_entry, stream_record
from support.programs.billion import resident_bytes

import storage.cache.reader
from logit_cache.caching.status import status_of
from storage.format.layout import group_metadata, metadata_bytes, teacher_arrays
from storage.format.manifest.entry import Windowing
from storage.format.manifest.receipts import ObjectDigest, ShardReceipt
from storage.format.manifest.shared import ATTRIBUTE
from storage.format.sealing import Record, digest, sealed, sealed_bytes
from storage.stores.base import MOST_BYTES, Store

N, V, K = 100_000_000_000, 16_000, 64
NOW = 1_750_000_000.0
MISSING = 1_000  # of the incomplete entry's shards, the last ones
SHARD_SECONDS, WORKERS = 20.0, 8


class Simulated(Store):
    """Answers as a store would; counts what is read, listed and looked at."""

    url = "simulated://cache"

    def __init__(self, complete: bool) -> None:
        self.complete = complete
        self.read_keys: list[str] = []
        self.listings: list[str] = []
        record = stream_record(N, V)
        entry = make_entry(record, K, windowing=Windowing(context_tokens=128, stride_tokens=128))
        self.entry, self.entry_sha256 = entry, digest(entry)
        self.arrays = list(teacher_arrays(entry))
        self.shards = -(-N // entry.layout.shard)
        self.records = {"zarr.json": self.group(record), "teachers/a/zarr.json": self.group(entry)}
        # As long as the index of so many receipts is.
        self.index_bytes = 69 * self.shards

    @staticmethod
    def group(record: Record) -> bytes:
        return metadata_bytes(group_metadata({ATTRIBUTE: sealed(record)}))

    def committed(self) -> int:
        return self.shards - (0 if self.complete else MISSING)

    def time_of(self, shard: int) -> float:
        """Workers take turns: the newest shard was committed 3 seconds ago."""
        return NOW - 3 - (self.committed() - 1 - shard) * SHARD_SECONDS / WORKERS

    def read(self, key: str, at_most: int = MOST_BYTES) -> bytes:
        self.read_keys.append(key)
        if key in self.records:
            return self.records[key]
        name = key.rsplit("/", 1)[-1].removesuffix(".json")
        if not name.isdecimal() or int(name) >= self.committed():
            raise FileNotFoundError(key)
        shard, size = int(name), self.entry.layout.shard
        receipt = ShardReceipt(
            record_sha256=self.entry_sha256,
            shard=shard,
            start=shard * size,
            stop=min((shard + 1) * size, N),
            objects={array: ObjectDigest(bytes=1, sha256=SHA, seal_sha256=SHA) for array in self.arrays},
            seconds=SHARD_SECONDS,
            written_at=iso(self.time_of(shard)),
            host=f"node-{shard % WORKERS}",
        )
        return sealed_bytes(receipt)

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.read_keys.append(key)
        assert all(stop - start <= 4_096 for start, stop in ranges), "a large index is not read whole"
        return [b'],\n "record_sha256": "' + self.entry_sha256.encode() + b'",\n "seconds": 1.0\n}\n' for _ in ranges]

    def size(self, key: str) -> int | None:
        return self.index_bytes if self.complete and key.endswith("index.json") else None

    def names(self, prefix: str) -> list[str]:
        raise AssertionError(f"{prefix}: the names of a folder at once")

    def folders(self, folder: str) -> list[str]:
        raise AssertionError(folder)

    def listing(self, folder: str) -> Iterator[tuple[str, float | None]]:
        self.listings.append(folder)
        for shard in range(self.committed()):
            yield f"{shard:08d}.json", self.time_of(shard)

    def walk(self, prefix: str = "") -> dict[str, int]:
        raise AssertionError("a walk over everything")

    def remove(self, key: str) -> None:
        raise AssertionError("nothing is written")

    def publish(self, key: str, data: bytes) -> bool:
        raise AssertionError("nothing is written")

    def replace(self, key: str, data: bytes) -> None:
        raise AssertionError("nothing is written")


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def main(which: str) -> None:
    place = Simulated(which == "complete")
    storage.cache.reader.open_store = lambda url: place  # type: ignore[attr-defined]
    gc.collect()
    before, peak_before = resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (found,) = status_of(place.url, ["a"], NOW)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "status": dataclasses.asdict(found),
                "bytes": (peak - before) if peak > peak_before else resident_bytes() - before,
                "reads": len(place.read_keys),
                "listings": place.listings,
                "shards": place.shards,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
