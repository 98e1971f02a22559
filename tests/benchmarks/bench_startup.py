"""How long it takes until something happens: help texts, imports, opening a cache, the first batch.

Each is a process of its own, and what a bare interpreter takes is measured beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_scaling import billion
from bench_sizes import workshop
from harness import Ran, Table, command, in_child, in_turn, ratios, spread

ROUNDS = 5
BATCH, WINDOW = 32, 128
_BARE = "bare interpreter"


def tables() -> Iterator[Table]:
    """Processes that end at once, then caches."""
    yield _processes()
    yield _caches()


def _processes() -> Table:
    lines: dict[str, list[str]] = {
        _BARE: [sys.executable, "-c", "pass"],
        "cache-logits --help": ["cache-logits", "--help"],
        "train-student --help": ["train-student", "--help"],
        "train-teacher --help": ["train-teacher", "--help"],
        "logit-cache --help": ["logit-cache", "--help"],
        "logit-cache tokenize --help": ["logit-cache", "tokenize", "--help"],
        "import storage": [sys.executable, "-c", "import storage"],
        "import numpy": [sys.executable, "-c", "import numpy"],
        "import student.data.windows": [sys.executable, "-c", "import student.data.windows"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    found: dict[str, list[Ran]] = {name: [] for name in lines}

    def run(name: str) -> float:
        found[name].append(command(lines[name], threads=1))
        return found[name][-1].seconds

    for line in lines.values():
        command(line, threads=1)  # what is read from the disk for the first time does not count
    taken = in_turn({name: lambda name=name: run(name) for name in lines}, ROUNDS)
    rows = [
        (
            name,
            spread(ratios(taken[name], taken[_BARE]), 1),
            spread(taken[name], 3),
            spread([ran.cpu_seconds for ran in found[name]], 3),
            spread([ran.peak_bytes / 2**20 for ran in found[name]], 0),
        )
        for name in lines
    ]
    return Table(
        "Processes that end at once",
        ("process", "time, ratio", "s", "s of processor time", "peak memory, MiB"),
        rows,
        f"""{ROUNDS} rounds after one that does not count, one thread, ratios to the bare interpreter. torch and numpy
are there to tell ours from theirs.""",
    )


def small() -> Path:
    """A cache of a few thousand positions with one entry."""
    from support.caches.small import dense_targets, make_corpus, make_entry, write_entry

    path, (n, v) = workshop() / "small", (4_096, 512)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, v, n).astype(np.uint16)
    record = make_corpus(str(path), tokens, v)
    labels = np.append(tokens[1:].astype(np.int64), -1)
    write_entry(path, "a", make_entry(record, 32), dense_targets(rng.normal(size=(n, v)) * 3, 32, labels))
    return path


def _caches() -> Table:
    places = {"4,096 positions": small(), "10^9 positions": billion()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
    for _ in range(ROUNDS):
        for name, path in places.items():
            found[name].append(in_child("bench_startup", "first_batch", threads=1, url=str(path))[0])
    base = next(iter(places))
    rows = []
    for what in ("LogitCache.open", "… and its entry, with all receipts looked at", "dataset", "first batch", "all"):
        for name in places:
            taken = [run["seconds"][what] for run in found[name]]
            of = [run["seconds"][what] for run in found[base]]
            grown = [run["bytes"][what] / 1e6 for run in found[name]]
            rows.append((what, name, spread(ratios(taken, of)), spread([1e3 * t for t in taken], 1), spread(grown, 1)))
    return Table(
        "From a cache to its first batch",
        ("step", "cache", "time, ratio", "ms", "MB held after it, beyond the imports"),
        rows,
        f"""{ROUNDS} rounds, a process of its own each, after `import student.data.windows`. The dataset is
`DistillationWindows` of {WINDOW} positions, which opens the cache again; the first batch has {BATCH} windows in the
order of `reading_order`, the making of that order included, and is collated into tensors. Every one of its windows
may lie in another chunk.""",
    )


def first_batch(url: str) -> dict[str, dict[str, float]]:
    """Seconds of each step, and bytes that are held after it beyond what was held before; a process of `_caches`."""
    import time

    from harness import held

    from storage import LogitCache
    from student.data.batches import collate
    from student.data.windows import DistillationWindows, reading_order

    before, clock = held("VmRSS"), [time.perf_counter()]
    seconds: dict[str, float] = {}
    grown: dict[str, float] = {}

    def lap(name: str) -> None:
        clock.append(time.perf_counter())
        seconds[name] = clock[-1] - clock[-2]
        grown[name] = held("VmRSS") - before
        clock[-1] = time.perf_counter()

    cache = LogitCache.open(url)
    lap("LogitCache.open")
    assert not cache.teacher("a").missing()
    lap("… and its entry, with all receipts looked at")
    windows = DistillationWindows(url, ["a"], WINDOW)
    lap("dataset")
    order = iter(reading_order(windows, BATCH))
    collate(windows.__getitems__([next(order) for _ in range(min(BATCH, len(windows)))]))
    lap("first batch")
    seconds["all"] = sum(seconds.values())
    grown["all"] = held("VmHWM") - before
    return {"seconds": seconds, "bytes": grown}
