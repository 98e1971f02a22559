"""push and pull of a large local cache against a plain copy followed by sha256 of the same bytes.

    python tests/benchmarks/studies/transfer.py --gigabytes 1 --rounds 3 --folder /some/disk
    python tests/benchmarks/studies/transfer.py --gigabytes 1 --rounds 3 --bucket s3://bucket

Interleaved rounds in one run; prints a Markdown table of seconds and ratios. Between folders the plain copy is `cp -r`,
then one pass of sha256 over the copy, one file after the other, then `sync` of the copy, which ours has done before it
ends. To and from a bucket it is s3fs's own recursive `put` or `get`, then sha256 of the local side of the same bytes
(and `sync` of what was fetched).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # the tests' own helpers
sys.path.insert(0, str(Path(__file__).parents[3]))  # before them: tests/storage must not hide `storage`
from support.caches.copies import pull, push
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry

V, K, SHARD = 16_000, 64, 65_536


def make(url: str, gigabytes: float) -> None:
    """A cache of about that size: real shards of one block of made-up targets, shifted from row to row."""
    rng = np.random.default_rng(0)
    shards = max(1, round(gigabytes * 1e9 / (SHARD * 135)))
    tokens = rng.integers(0, V, shards * SHARD).astype(np.uint16)
    block = dense_targets(rng.normal(size=(2_048, V)).astype(np.float32) * 3, K, rng.integers(0, V, 2_048))
    record = make_corpus(url, tokens, V)
    rows = block.rows(0, 2_048)
    order = rng.integers(0, 2_048, len(tokens))
    label = rows.label_logprob[order]
    label[-1] = np.nan
    fields = ("token_ids", "kept", "certain", "log_tail", "log_tail_half", "entropy", "logprobs")
    values = {name: getattr(rows, name)[order] for name in fields}
    targets = type(rows)(start=0, label_logprob=label, **values)
    write_entry(url, "a", make_entry(record, K, shard_tokens=SHARD, chunk_tokens=8_192), targets)


def hash_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")


def sync(folder: Path) -> None:
    subprocess.run(["sync", *(path for path in folder.rglob("*") if path.is_file())], check=True)


def plain(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    hash_all(target)
    sync(target)


def put(source: Path, url: str) -> None:
    fsspec.url_to_fs(url)[0].put(str(source), url, recursive=True)
    hash_all(source)


def get(url: str, target: Path) -> None:
    fsspec.url_to_fs(url)[0].get(url, str(target), recursive=True)
    hash_all(target)
    sync(target)


def clear(place: Path | str) -> None:
    if isinstance(place, Path):
        shutil.rmtree(place)
    else:
        fsspec.url_to_fs(place)[0].rm(place, recursive=True)


# A way: its name, what is measured, and what it leaves, which is removed before the next.
Way = tuple[str, Callable[[], object], Path | str]


def between_folders(source: Path, target: Path) -> list[list[Way]]:
    return [
        [
            ("cp, then sha256", lambda: plain(source, target), target),
            ("push", lambda: push(str(source), str(target)), target),
            ("pull", lambda: pull(str(source), str(target)), target),
        ]
    ]


def to_a_bucket(source: Path, target: Path, bucket: str) -> list[list[Way]]:
    there, kept = f"{bucket}/benchmark", f"{bucket}/kept"
    push(str(source), kept)
    return [
        [
            ("s3fs put, then sha256", lambda: put(source, there), there),
            ("push", lambda: push(str(source), there), there),
        ],
        [
            ("s3fs get, then sha256", lambda: get(kept, target), target),
            ("pull", lambda: pull(kept, str(target)), target),
        ],
    ]


def measure(ways: list[Way], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for _ in range(rounds):
        for name, run, left in ways:
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
            clear(left)
    base = statistics.median(next(iter(seconds.values())))
    print("| way | seconds | throughput against the first |\n|---|---|---|")
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"| {name} | {median:.1f} ({min(taken):.1f}, {max(taken):.1f}) | {base / median:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    parser.add_argument("--bucket")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        make(str(source), options.gigabytes)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        print(f"{size / 1e9:.2f} GB, {options.rounds} interleaved rounds, medians (lowest, highest)\n")
        tables = to_a_bucket(source, target, options.bucket) if options.bucket else between_folders(source, target)
        for ways in tables:
            measure(ways, options.rounds)
            print()
        if options.bucket:
            clear(f"{options.bucket}/kept")


if __name__ == "__main__":
    main()
