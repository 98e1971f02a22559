"""What grows with the corpus, and what must not: from 10^5 positions to 10^7, and opening 10^9.

A tiny random teacher scores corpora of random tokens by `cache-logits`; what is looked at is how the costs of a
position, and the memory, change with the length. Of the longest, `cache-logits` does its share as one of many workers;
its other shards are then hard links to a real one, each with a receipt of its own, so that whoever reads meets as many
files and receipts as there would be.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from bench_sizes import workshop
from harness import ROOT, Ran, Table, command, in_child, ratios, spread

V, K = 512, 32
SIZES = {"10^5": 100_000, "10^6": 1_000_000, "10^7": 10_000_000}
# The share of the longest: its last shard, which is shorter than the others, is among them.
WORKERS = 38
WINDOW, BATCH = 128, 16
READ_POSITIONS = 1_000_000
STEPS = 40
ROUNDS = 2
OPENINGS = 3
_STUDENT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": WINDOW,
}


def tables() -> Iterator[Table]:
    """Caching, reading, training, opening, following and planning."""
    runs = {name: _corpus(name, positions) for name, positions in SIZES.items()}
    yield _caching(runs)
    yield _reading(runs)
    yield _training(runs)
    yield _opening(runs)
    yield _planning(runs)


@functools.cache
def billion() -> Path:
    """A cache of 10^9 positions with real receipts, as `support.caches.billion` makes it."""
    from support.caches.billion import make_cache

    path = workshop() / "billion"
    make_cache(path)
    return path


def _corpus(name: str, positions: int) -> Path:
    from support.caches.small import make_corpus

    path = workshop() / f"scaling-{positions}"
    make_corpus(str(path), np.random.default_rng(0).integers(0, V, positions).astype(np.uint16), V)
    return path


@functools.cache
def _teacher(columns: int = V) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": WINDOW, "initializer_range": 0.3}
    path = workshop() / f"scaling-teacher-{columns}"
    GPT2LMHeadModel(GPT2Config(vocab_size=columns, bos_token_id=1, eos_token_id=1, **sizes)).save_pretrained(path)
    return path


def _caching(runs: dict[str, Path]) -> Table:
    def cache(name: str, entry: str) -> Ran:
        line = ["cache-logits", "--cache", runs[name], "--teacher", _teacher(), "--name", entry, "-k", str(K)]
        share = ["--worker", f"0/{WORKERS}", "--no-help-others"] if name == list(runs)[-1] else []
        return command([*line, "--fidelity-positions", "0", *share], threads=1)

    scored, first, again = {}, {name: [] for name in runs}, {name: [] for name in runs}
    for number in range(ROUNDS):
        for name, path in runs.items():
            entry = "abcdefgh"[number]
            first[name].append(cache(name, entry))
            scored[name] = _complete(path, entry)
            again[name].append(cache(name, entry))
    per_position = {
        name: [(a.cpu_seconds - b.cpu_seconds) / scored[name] for a, b in zip(first[name], again[name], strict=True)]
        for name in runs
    }
    peaks = {name: [float(run.peak_bytes) for run in first[name]] for name in runs}
    base = next(iter(runs))
    rows = [
        (
            name,
            f"{scored[name]:,}",
            spread(ratios(peaks[name], peaks[base])),
            spread([peak / 2**20 for peak in peaks[name]], 0),
            spread(ratios(per_position[name], per_position[base])),
            spread([1e6 * t for t in per_position[name]], 1),
            spread([run.seconds for run in again[name]], 1),
        )
        for name in runs
    ]
    return Table(
        "`cache-logits`",
        (
            "positions",
            "scored",
            "peak memory, ratio",
            "MiB",
            "processor time per position, ratio",
            "µs",
            "the same command again, s",
        ),
        rows,
        f"""A random GPT-2 of one layer and 32 dimensions, V = {V}, VarOpt, K = {K}, one thread, {ROUNDS} rounds,
ratios to the shortest corpus. Processor time is that beyond the same command on the finished entry, which loads the
teacher and looks at every shard. Of 10^7 positions one of {WORKERS} workers' share was scored. Peak memory is the
process's, with torch and transformers in it.""",
    )


def _complete(path: Path, entry: str) -> int:
    """Give a worker's missing shards to an entry, as links to its first one; returns how many positions it had."""
    from support.caches.billion import write_receipt

    from storage import LogitCache

    targets = LogitCache.open(str(path)).teacher(entry)
    receipts, folder = targets.receipts, path / "teachers" / entry
    first = receipts.read(0)
    assert first is not None
    missing = np.flatnonzero(~receipts.committed()).tolist()
    for shard in missing:
        for spec in targets.specs.values():
            link = folder / spec.shard_key(shard)
            link.parent.mkdir(exist_ok=True)
            os.link(folder / spec.shard_key(0), link)
        write_receipt(receipts, path, shard, first.objects, first.statistics)
    return len(targets) - len(missing) * targets.entry.layout.shard


def _reading(runs: dict[str, Path]) -> Table:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, path in runs.items():
            found, ran = in_child("bench_scaling", "read", threads=1, url=str(path), positions=READ_POSITIONS)
            seconds[name].append(found)
            peaks[name].append(float(ran.peak_bytes))
    base = next(iter(runs))
    rows = [
        (
            name,
            spread(ratios(seconds[base], seconds[name])),
            spread([1e-6 / t for t in seconds[name]]),
            spread(ratios(peaks[name], peaks[base])),
            spread([peak / 2**20 for peak in peaks[name]], 0),
        )
        for name in runs
    ]
    return Table(
        "Reading in training order",
        ("positions", "positions/s, ratio", "M positions/s of a core", "peak memory, ratio", "MiB"),
        rows,
        f"""{READ_POSITIONS:,} positions, or all that there are, once, in a process of its own; {ROUNDS + 1} rounds;
processor time of the reading alone. A reader holds up to 192 MiB of decoded chunks, which the shortest corpus does
not have: memory grows up to there and no further.""",
    )


def read(url: str, positions: int) -> float:
    """Processor seconds per position of reading so many in the student's order; a process of `_reading`."""
    from storage import LogitCache
    from student.data.windows import DistillationWindows, reading_order

    LogitCache.open(url).teacher("a").read(0, 1)  # imports what is needed
    windows = DistillationWindows(url, ["a"], WINDOW)
    order, done = iter(reading_order(windows, BATCH)), 0
    began = time.process_time()
    while done < positions and (batch := [index for index, _ in zip(order, range(BATCH), strict=False)]):
        windows.__getitems__(batch)
        done += len(batch) * WINDOW
    return (time.process_time() - began) / done


def _training(runs: dict[str, Path]) -> Table:
    model = workshop() / "scaling-student.json"
    model.write_text(json.dumps(_STUDENT))
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    found: dict[str, list[Ran]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name, path in runs.items():
            out = workshop() / f"scaling-run-{name}-{number}"
            line = ["train-student", "--cache", path, "--teacher", "a", "--model", model, "--output-dir", out]
            found[name].append(command([*line, *given], threads=1))
    peaks = {name: [float(run.peak_bytes) for run in found[name]] for name in runs}
    used = {name: [run.cpu_seconds for run in found[name]] for name in runs}
    base = next(iter(runs))
    rows = [
        (
            name,
            spread(ratios(peaks[name], peaks[base])),
            spread([peak / 2**20 for peak in peaks[name]], 0),
            spread(ratios(used[name], used[base])),
            spread(used[name], 1),
        )
        for name in runs
    ]
    return Table(
        "`train-student`",
        ("positions", "peak memory, ratio", "MiB", "processor time, ratio", "s"),
        rows,
        f"""{STEPS} steps of {BATCH} windows of {WINDOW} positions, a Llama of one layer and 32 dimensions, one
thread, {ROUNDS} rounds, imports included: {STEPS * BATCH * WINDOW:,} positions are read of every corpus.""",
    )


def _opening(runs: dict[str, Path]) -> Table:
    places = {**runs, "10^9": billion()}
    seconds: dict[str, list[float]] = {name: [] for name in places}
    grown: dict[str, list[float]] = {name: [] for name in places}
    for number in range(OPENINGS):
        for name, path in places.items():
            position = [0, 12_345, 99_998][number % 3]
            ran = command(
                [sys.executable, str(ROOT / "tests/support/programs/billion.py"), path, str(position)], threads=1
            )
            found = json.loads(ran.output.splitlines()[-1])
            seconds[name].append(found["seconds"])
            grown[name].append(found["bytes"] / 1e6)
    base = next(iter(runs))
    rows = [
        (
            name,
            spread(ratios(seconds[name], seconds[base])),
            spread(seconds[name], 3),
            spread(grown[name], 1),
        )
        for name in places
    ]
    shards = -(-1_000_000_000 // 65_536)
    middle = statistics.median(grown["10^9"])
    return Table(
        "Opening a cache",
        ("positions", "time, ratio", "s beyond the imports", "MB beyond the imports"),
        rows,
        f"""A cache and an entry are opened, all receipts looked at, the statistics shown, and one position and one
token read; a process of its own each time, {OPENINGS} rounds. 10^9 positions are {shards:,} shards of K = 64, V =
16,000, with receipts of their own and hard links to a few objects: {middle:.1f} MB hold one decoded chunk and which
shards there are.""",
    )


def _planning(runs: dict[str, Path]) -> Table:
    """`status` and `plan`, each as a process."""
    shortest, *_, longest = {**runs, "10^9": billion()}.items()
    # Wide enough for the vocabulary of the longest; the probe is of the same size on both.
    probed = ["--teacher", _teacher(16_000), "-k", str(K), "--probe-windows", str(BATCH), "--name", "planned"]
    ways = {
        "`status`, complete": lambda path: ["logit-cache", "status", path],
        "`status`, without the index": lambda path: ["logit-cache", "status", path, "--teacher", "a"],
        "`plan`": lambda path: ["logit-cache", "plan", "--cache", path, *probed],
    }
    found: dict[tuple[str, str], list[Ran]] = {}
    for _ in range(OPENINGS):
        for way, line in ways.items():
            for name, path in (shortest, longest):
                index = path / "teachers/a/receipts/index.json"
                aside = index.with_name("aside")
                if "without" in way:
                    index.rename(aside)
                found.setdefault((way, name), []).append(command(line(path), threads=1))
                if "without" in way:
                    aside.rename(index)
    rows = []
    for (way, name), taken in found.items():
        base = found[way, shortest[0]]
        peaks = [float(ran.peak_bytes) for ran in taken]
        rows.append(
            (
                way,
                name,
                spread(ratios([ran.cpu_seconds for ran in taken], [ran.cpu_seconds for ran in base])),
                spread([ran.cpu_seconds for ran in taken], 2),
                spread(ratios(peaks, [float(ran.peak_bytes) for ran in base])),
                spread([peak / 2**20 for peak in peaks], 0),
            )
        )
    return Table(
        "Following and planning",
        ("command", "positions", "processor time, ratio", "s", "peak memory, ratio", "MiB"),
        rows,
        f"""{OPENINGS} rounds, one thread, imports included. A complete entry is known by its index; without one, the
15,259 names in the folder of receipts are listed, and 64 receipts read. `plan` probes {BATCH} windows of a GPT-2 with
16,000 columns on either; its time is that of importing torch and transformers and of loading the teacher.""",
    )
