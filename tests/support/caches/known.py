"""A small cache whose every value is known, and the one question the tests of damage ask: is what a reader hands out
the truth?

It has all that a cache can have: several shards and chunks of tokens, a loss mask, documents, tokenizer files, one
entry with codes in three shards, one with exact log-probs in one, and one of version 2 in two, with sampled ids, rows
without targets and a sampling order. Each shard comes in two variants, as two workers of different machines would write
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from support.caches.small import (
    dense_targets,
    make_corpus,
    make_entry,
    make_entry_2,
    varopt_targets,
    without_rows,
)

from storage import LogitCache
from storage.cache.writer import EntryWriter
from storage.errors import LogitCacheError
from storage.format.layout import ArraySpec, teacher_arrays
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.receipts import ObjectDigest
from storage.format.manifest.shared import ArrayLayout
from storage.format.shard import encode_shard, object_digest
from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets

V, N, K = 53, 80, 3
SHARD, CHUNK = 32, 16
TOKENIZER_FILES = {
    "tokenizer.json": b'{"model": {"type": "WordLevel"}}',
    "Special_Tokens-map.json": b'{"eos_token": "t1"}\n',
}
STARTS = np.array([0, 7, 31, 32, 61], dtype=np.uint64)

_encoded: dict[tuple[ArraySpec, int, bytes], bytes] = {}


def encode_once(spec: ArraySpec, shard: int, values: np.ndarray, each: Any = map) -> bytes:
    """`encode_shard`, remembered: these tests write the same few shards thousands of times."""
    key = (spec, shard, values.tobytes())
    if key not in _encoded:
        _encoded[key] = encode_shard(spec, shard, values, each)
    return _encoded[key]


@cache
def stream() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss mask."""
    rng = np.random.default_rng(5)
    return rng.integers(0, V, N).astype(np.uint16), rng.random(N) < 0.5


@cache
def targets(variant: int = 0, sampled: bool = False) -> SparseTargets:
    """What the teacher says of the whole stream; `sampled`: of two thirds of it, with sampled ids."""
    tokens, _ = stream()
    logits = np.random.default_rng(6 + variant).normal(size=(N, V)) * 3
    labels = np.append(tokens[1:], -1).astype(np.int64)
    if not sampled:
        return dense_targets(logits, K, labels)
    return without_rows(varopt_targets(logits, K, labels), np.arange(N) % 3 == 1)


@cache
def order() -> np.ndarray:
    """The order in which ids lie when some are sampled."""
    return np.random.default_rng(8).permutation(V).astype(np.uint32)


def write_stream(url: str | Path) -> CacheRecord:
    """Tokens, documents, mask, tokenizer; resumes where an interrupted call stopped."""
    tokens, mask = stream()
    layout = ArrayLayout(shard=SHARD, chunk=CHUNK, compression="zstd")
    return make_corpus(str(url), tokens, V, STARTS, mask, TOKENIZER_FILES, layout)


def entries(record: CacheRecord) -> dict[str, TeacherEntry]:
    """The teachers' entries."""
    return {
        "a": make_entry(record, K, shard_tokens=SHARD, chunk_tokens=CHUNK),
        "b": make_entry(record, K, encoding="float32", shard_tokens=96, chunk_tokens=48),
        "v2": make_entry_2(
            record,
            K,
            ("label", "sampled-logprobs"),
            method="varopt",
            order="embeddings",
            positions="some",
            shard_tokens=48,
            chunk_tokens=16,
        ),
    }


def rows(entry: TeacherEntry, shard: int, variant: int = 0) -> SparseTargets:
    """A shard's targets."""
    start = shard * entry.layout.shard
    return targets(variant, entry.format_version == 2).rows(start, min(start + entry.layout.shard, N))


def write_shards(url: str | Path, shards: Iterable[int], variant: int = 0) -> EntryWriter:
    """The stream and some shards of the entry `a`, whose writer is returned."""
    writer = EntryWriter.open(str(url), "a", entries(write_stream(url))["a"])
    for shard in shards:
        writer.commit(shard, rows(writer.entry, shard, variant))
    return writer


def complete(writer: EntryWriter) -> None:
    """All that is missing in an entry, and its index."""
    writer.sampling_order(order)
    for shard in writer.pending():
        writer.commit(shard, rows(writer.entry, shard))
    writer.finish()


def write_whole(url: str | Path) -> CacheRecord:
    """The stream and all entries, complete."""
    record = write_stream(url)
    for name, entry in entries(record).items():
        complete(EntryWriter.open(str(url), name, entry))
    return record


def digests(entry: TeacherEntry, shard: int, variant: int) -> dict[str, ObjectDigest]:
    """What the receipt of a shard's variant lists."""
    specs, values = teacher_arrays(entry), StoredTargets.of(entry, rows(entry, shard, variant)).arrays
    return {name: object_digest(spec, encode_once(spec, shard, values[name])) for name, spec in specs.items()}


@dataclass(frozen=True)
class Part:
    """One thing that a reader hands out.

    expected   the values, by name
    keys       the objects that they depend on; an index of receipts counts where there is one
    index      key of that index, or "" where there is none
    """

    name: str
    read: Callable[[LogitCache], Mapping[str, Any]]
    expected: Mapping[str, Any]
    keys: frozenset[str]
    index: str = ""

    def outcome(self, opened: LogitCache) -> LogitCacheError | None:
        """None when the truth was read, or the error that says why not; AssertionError for anything else."""
        try:
            found = self.read(opened)
        except LogitCacheError as error:
            return error
        assert same(found, self.expected), f"{self.name}: wrong values and no error"
        return None


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether names, dtypes, shapes and values are equal; NaN equals NaN."""
    if found.keys() != expected.keys():
        return False
    for name, value in expected.items():
        other = found[name]
        if isinstance(value, np.ndarray):
            if other.dtype != value.dtype or other.shape != value.shape or other.tobytes() != value.tobytes():
                return False
        elif other != value:
            return False
    return True


def corpus_parts() -> list[Part]:
    """Tokens and mask by shard, documents, tokenizer."""
    tokens, mask = stream()
    parts = [
        Part(
            "document_starts",
            lambda opened: {"values": opened.document_starts},
            {"values": STARTS},
            _array_keys("document_starts", 0) | {"zarr.json"},
            "receipts/document_starts/index.json",
        ),
        Part(
            "tokenizer",
            lambda opened: opened.tokenizer_files(),
            TOKENIZER_FILES,
            frozenset({"zarr.json", "receipts/tokenizer.json", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)}),
        ),
    ]
    for name, values in (("tokens", tokens), ("loss_mask", mask)):
        for shard in range(-(-N // SHARD)):
            start, stop = shard * SHARD, min((shard + 1) * SHARD, N)
            parts.append(
                Part(
                    f"{name}/{shard}",
                    _stream_reader(name, start, stop),
                    {"values": values[start:stop]},
                    _array_keys(name, shard) | {"zarr.json"},
                    f"receipts/{name}/index.json",
                )
            )
    return parts


def _array_keys(name: str, shard: int) -> frozenset[str]:
    return frozenset({f"{name}/zarr.json", f"{name}/c/{shard}", f"receipts/{name}/{shard:08d}.json"})


def _stream_reader(name: str, start: int, stop: int) -> Callable[[LogitCache], Mapping[str, Any]]:
    return lambda opened: {"values": getattr(opened, name).read(start, stop)}


def shard_part(name: str, entry: TeacherEntry, shard: int, variant: int = 0) -> Part:
    """One shard of an entry."""
    expected = rows(entry, shard, variant)
    folder, specs = f"teachers/{name}/", teacher_arrays(entry)
    keys = {
        "zarr.json",
        f"{folder}zarr.json",
        f"{folder}receipts/{shard:08d}.json",
        *(f"{folder}{spec.name}/zarr.json" for spec in specs.values()),
        *(folder + spec.shard_key(shard) for spec in specs.values()),
    }
    return Part(
        f"{name}/{shard}",
        lambda opened: opened.teacher(name).stored(expected.start, expected.stop).arrays,
        StoredTargets.of(entry, expected).arrays,
        frozenset(keys),
        f"{folder}receipts/index.json",
    )


def order_part() -> Part:
    """The sampling order of `v2`."""
    folder, name = "teachers/v2/", "sampling_order"
    keys = {"zarr.json", f"{folder}zarr.json", *(folder + key for key in _array_keys(name, 0))}
    return Part(
        f"v2/{name}",
        lambda opened: {"values": opened.teacher("v2").sampling_order()},
        {"values": order()},
        frozenset(keys),
        f"{folder}receipts/{name}/index.json",
    )


def all_parts(record: CacheRecord) -> list[Part]:
    """Everything a reader hands out of the complete cache."""
    found = corpus_parts()
    for name, entry in entries(record).items():
        found += [shard_part(name, entry, shard) for shard in range(-(-N // entry.layout.shard))]
    return [*found, order_part()]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a cache, by key."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_receipts(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What is the same in every run: receipts hold times and hosts."""
    return {key: data for key, data in files.items() if not key.endswith(".json") or "receipts/" not in key}
