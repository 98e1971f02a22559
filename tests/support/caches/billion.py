"""A cache of a billion positions: a few real shards, linked many times."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from support.caches.small import make_entry, stream_record

from storage import LogitCache
from storage.cache.receipts import Receipts
from storage.format.layout import (
    ArraySpec,
    corpus_arrays,
    metadata_bytes,
    record_bytes,
    stream_layout,
    teacher_arrays,
)
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import Windowing
from storage.format.manifest.receipts import ObjectDigest, ShardReceipt, ShardStatistics
from storage.format.sealing import Record, digest, sealed_bytes
from storage.format.shard import encode_shard, object_digest

N, V, K = 1_000_000_000, 16_000, 64


SHARD = 65_536


# File systems allow 65,000 names of one file at least; and two objects of each array show that shards are told apart.
COPIES = 2


def head(shard: int) -> np.ndarray:
    """The token ids of a shard, uint16 [65,536, 64]."""
    rows = np.arange(SHARD)[:, None] * 7 + shard % COPIES * 3
    return ((rows + np.arange(K) * 101) % V).astype(np.uint16)


def token_of(position: int) -> int:
    return position % stream_layout(N).shard % V


def values(name: str, shard: int) -> np.ndarray:
    """An array's entries in one shard."""
    if name == "token_ids":
        return head(shard)
    if name == "logprob_codes":
        return np.tile(np.r_[0, np.full(K - 1, 3)].astype(np.uint16), (SHARD, 1))
    if name in ("kept", "certain"):
        return np.full(SHARD, K, dtype=np.uint16)
    return np.full(SHARD, {"top_logprob": -0.5, "entropy": 2.0}.get(name, -1.5 - shard % COPIES), dtype=np.float32)


class Linked:
    """Objects of one array: encoded once for each copy, linked to every further name."""

    def __init__(self, folder: Path, spec: ArraySpec) -> None:
        self.folder, self.spec = folder, spec
        self.made: dict[int, tuple[Path, ObjectDigest]] = {}

    def put(self, shard: int, kind: int, entries: np.ndarray) -> ObjectDigest:
        path = self.folder / self.spec.shard_key(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind not in self.made:
            data = encode_shard(self.spec, shard, entries)
            path.write_bytes(data)
            self.made[kind] = path, object_digest(self.spec, data)
        else:
            os.link(self.made[kind][0], path)
        return self.made[kind][1]


def make_cache(path: Path) -> CacheRecord:
    record = stream_record(N, V)
    path.mkdir()
    write_group(path, record)
    entry = make_entry(record, K, windowing=Windowing(context_tokens=128, stride_tokens=128))
    folder = path / "teachers/a"
    folder.mkdir(parents=True)
    write_group(folder, entry)
    assert (entry.layout.shard, entry.layout.chunk) == (SHARD, 8_192)

    tokens = corpus_arrays(record)["tokens"]
    stream = np.arange(tokens.layout.shard, dtype=np.uint64) % V
    linked = Linked(path, tokens)
    write_array(path, tokens)
    receipts = Receipts(LogitCache.open(str(path))._store, "receipts/tokens", {"tokens": tokens}, digest(record))
    for shard in range(tokens.shards):
        start, stop = tokens.shard_range(shard)
        found = linked.put(shard, stop - start, stream[: stop - start].astype(np.uint16))
        write_receipt(receipts, path, shard, {"tokens": found}, None)
    receipts.write_index()

    specs = teacher_arrays(entry)
    arrays = {name: Linked(folder, spec) for name, spec in specs.items()}
    for spec in specs.values():
        write_array(folder, spec)
    receipts = LogitCache.open(str(path)).teacher("a").receipts
    for shard in range(receipts.shards):
        start, stop = specs["kept"].shard_range(shard)
        objects = {}
        for name, array in arrays.items():
            kind = shard % COPIES if stop < N else COPIES
            entries = values(name, shard)[: stop - start] if kind not in array.made else np.empty(0)
            if name == "label_logprob" and stop == N:
                entries[-1] = np.nan
            objects[name] = array.put(shard, kind, entries)
        write_receipt(receipts, path, shard, objects, statistics(stop - start))
    receipts.write_index()
    return record


def write_group(folder: Path, record: Record) -> None:
    (folder / "zarr.json").write_bytes(record_bytes(record))


def write_array(folder: Path, spec: ArraySpec) -> None:
    (folder / spec.name).mkdir()
    (folder / spec.name / "zarr.json").write_bytes(metadata_bytes(spec.metadata()))


def write_receipt(
    receipts: Receipts, path: Path, shard: int, objects: dict[str, ObjectDigest], found: ShardStatistics | None
) -> None:
    start, stop = receipts.first_array.shard_range(shard)
    receipt = ShardReceipt(
        record_sha256=receipts.record_sha256, shard=shard, start=start, stop=stop, objects=objects, statistics=found,
        seconds=1.0, written_at="2026-01-01T00:00:00+00:00", host="made-up",
    )  # fmt: skip
    file = path / receipts.key(shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(sealed_bytes(receipt))


def statistics(positions: int) -> ShardStatistics:
    return ShardStatistics(
        positions=positions, labelled=positions, label_nats=1.5 * positions, entropy_nats=2.0 * positions,
        head_mass=0.7 * positions, head_mass_below_half=0, head_mass_below_90=positions, head_mass_below_99=positions,
    )  # fmt: skip
