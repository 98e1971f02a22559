"""push and pull of a large local cache against a plain copy followed by sha256 of the same bytes.

    python tests/benchmarks/transfer.py --gigabytes 1 --rounds 3 --folder /some/disk

Interleaved rounds in one run; prints a Markdown table of seconds and ratios. The plain copy is `cp -r`, then one pass
of sha256 over the copy, one file after the other, then `sync` of the copy, which ours has done before it ends.
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
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from fakes import dense_targets, make_corpus, make_entry, write_entry

from logit_cache.share import pull, push

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
    fields = ("token_ids", "kept", "certain", "top_logprob", "log_tail", "log_tail_half", "entropy", "exact_logprobs")
    values = {name: getattr(rows, name)[order] for name in fields}
    targets = type(rows)(start=0, label_logprob=label, **values)
    write_entry(url, "a", make_entry(record, K, shard_tokens=SHARD, chunk_tokens=8_192), targets)


def plain(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in sorted(target.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
    subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source, target = Path(name) / "source", Path(name) / "target"
        make(str(source), options.gigabytes)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        ways = {
            "cp, then sha256": lambda: plain(source, target),
            "push": lambda: push(str(source), str(target)),
            "pull": lambda: pull(str(source), str(target)),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, run in ways.items():
                began = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - began)
                shutil.rmtree(target)
        base = statistics.median(seconds["cp, then sha256"])
        print(f"{size / 1e9:.2f} GB, {options.rounds} interleaved rounds, medians (lowest, highest)\n")
        print("| way | seconds | throughput against the first |\n|---|---|---|")
        for way, taken in seconds.items():
            median = statistics.median(taken)
            print(f"| {way} | {median:.1f} ({min(taken):.1f}, {max(taken):.1f}) | {base / median:.2f} |")


if __name__ == "__main__":
    main()
