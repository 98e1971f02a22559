"""One flipped bit, anywhere: a reader gives the truth or an error, and a deep look reports it.

Every file of a small complete cache is a victim, in each of its byte classes: chunks, their checksums, the shard index,
its checksum, zarr.json of groups and arrays, receipts, the index of receipts, the tokenizer's files. Each flip is read
back through a freshly opened cache. `verify(deep=True)` looks at every flip that readers did not refuse, and at a
sample of the others.

Only one kind of flip may pass unnoticed: one after which the JSON says the same, as `1e-05` and `1E-05` do. It is
counted apart, and there is nothing to notice: no digest is taken of anything but what the JSON says.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.caches.known import Part, all_parts, contents, entries, write_whole

from storage import LogitCache
from storage.cache.verify import verify
from storage.errors import LogitCacheError
from storage.format.layout import corpus_arrays, order_array, teacher_arrays
from storage.format.manifest.cache import CacheRecord
from storage.format.sealing import parse_json


@dataclass(frozen=True)
class Victim:
    """A complete cache, the pristine bytes of its files, and who reads what."""

    path: Path
    files: dict[str, bytes]
    parts: list[Part]
    indexes: dict[str, int]  # length of the shard index of every object


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    path = tmp_path_factory.mktemp("flips") / "cache"
    record = write_whole(path)
    # Receipts have to hold without an index that repeats their digests, as those of an entry that is being made.
    (path / "teachers/a/receipts/index.json").unlink()
    return Victim(path, contents(path), all_parts(record) + summaries(path, record), index_lengths(record))


def summaries(path: Path, record: CacheRecord) -> list[Part]:
    """What readers say of whole entries, without a look at the arrays."""
    found = []
    for name in entries(record):

        def read(opened: LogitCache, name: str = name) -> dict[str, object]:
            targets = opened.teacher(name)
            return {
                "entries": opened.teachers,
                "missing": targets.missing(),
                "statistics": targets.statistics(),
                "bytes": targets.stored_bytes(),
            }

        folder = f"teachers/{name}/"
        receipts = {p.relative_to(path).as_posix() for p in (path / folder / "receipts").rglob("*.json")}
        keys = frozenset({"zarr.json", "teachers/zarr.json", f"{folder}zarr.json", *receipts})
        found.append(Part(f"{name}/summary", read, read(LogitCache.open(str(path))), keys))
    return found


def index_lengths(record: CacheRecord) -> dict[str, int]:
    specs = [("", spec) for spec in corpus_arrays(record).values()]
    for name, entry in entries(record).items():
        order = order_array(entry)
        arrays = [*teacher_arrays(entry).values(), *([] if order is None else [order])]
        specs += [(f"teachers/{name}/", spec) for spec in arrays]
    return {folder + spec.shard_key(s): spec.index_bytes for folder, spec in specs for s in range(spec.shards)}


def byte_class(victim: Victim, key: str, at: int) -> str:
    if key in victim.indexes:
        data, index = victim.files[key], victim.indexes[key]
        if at >= len(data) - 4:
            return "checksum of a shard index"
        if at >= len(data) - index:
            return "shard index"
        table = np.frombuffer(data[-index:-4], dtype="<u8").reshape(-1, 2).tolist()
        inside = any(offset <= at < offset + length - 4 for offset, length in table)
        return "chunk" if inside else "checksum of a chunk"
    name = key.rsplit("/", 1)[-1]
    if "receipts/" in key:
        return "index of receipts" if name == "index.json" else "receipt"
    if key.startswith("tokenizer/"):
        return "tokenizer file"
    return "group's zarr.json" if key in GROUPS else "array's zarr.json"


GROUPS = {"zarr.json", "teachers/zarr.json", *(f"teachers/{name}/zarr.json" for name in ("a", "b", "v2"))}
CLASSES = {
    "chunk", "checksum of a chunk", "shard index", "checksum of a shard index", "group's zarr.json",
    "array's zarr.json", "receipt", "index of receipts", "tokenizer file",
}  # fmt: skip


def flips(victim: Victim, per_object: int, per_file: int) -> Iterator[tuple[str, int, int]]:
    """Key, byte and bit; always the same ones, spread over each file and over the end of each object."""
    for key, data in victim.files.items():
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        index = victim.indexes.get(key)
        bits = rng.choice(8 * len(data), min(per_file if index is None else per_object, 8 * len(data)), replace=False)
        if index is not None:
            # Half of an object's flips into its last bytes: index and checksums are small, and decide.
            half = len(bits) // 2
            bits[:half] = 8 * (len(data) - index) + rng.choice(8 * index, half, replace=half > 8 * index)
        for bit in np.unique(bits).tolist():
            yield key, bit // 8, bit % 8


def refusals(victim: Victim, key: str) -> int:
    """How many of the parts that depend on an object a reader refuses; AssertionError where one is wrong."""
    try:
        opened = LogitCache.open(str(victim.path))
    except LogitCacheError:
        return 1
    touched = [part for part in victim.parts if key in part.keys or key == part.index]
    return sum(part.outcome(opened) is not None for part in touched)


def check_flips(victim: Victim, per_object: int, per_file: int, verified_every: int) -> Counter[str]:
    url = str(victim.path)
    assert verify(url, deep=True).sound
    assert refusals(victim, "zarr.json") == 0
    seen: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    for number, (key, at, bit) in enumerate(flips(victim, per_object, per_file)):
        pristine = victim.files[key]
        damaged = bytearray(pristine)
        damaged[at] ^= 1 << bit
        descriptor = os.open(victim.path / key, os.O_WRONLY)
        try:
            os.pwrite(descriptor, damaged[at : at + 1], at)
            refused = refusals(victim, key) > 0
            says_the_same = not refused and key.endswith(".json") and same_json(pristine, bytes(damaged), key)
            if says_the_same:
                outcomes["says the same"] += 1
            elif not refused or number % verified_every == 0:
                found = verify(url, deep=True, workers=1)
                assert not found.sound, f"{key}: bit {bit} of byte {at} is flipped, and verify finds nothing"
                outcomes["verified"] += 1
            outcomes["refused by a reader" if refused else "true to a reader"] += 1
            seen[byte_class(victim, key, at)] += 1
        finally:
            os.pwrite(descriptor, pristine[at : at + 1], at)
            os.close(descriptor)
    assert contents(victim.path) == victim.files
    assert verify(url, deep=True).sound
    assert seen.keys() == CLASSES
    print(f"\n{seen.total()} flips: {dict(seen)}; {dict(outcomes)}")
    return seen


def same_json(before: bytes, after: bytes, key: str) -> bool:
    if key.startswith("tokenizer/"):
        return False
    try:
        return bool(parse_json(before, key) == parse_json(after, key))
    except LogitCacheError:
        return False


def test_no_flip_is_silent(victim: Victim) -> None:
    assert check_flips(victim, 16, 8, verified_every=20).total() >= 900


@pytest.mark.soak
def test_no_flip_of_ten_thousand_is_silent(victim: Victim) -> None:
    assert check_flips(victim, 180, 80, verified_every=10).total() >= 10_000
