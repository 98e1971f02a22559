"""The fused head and loss against the same with the logits held (`fused.py` has the ways, and more options)."""

from __future__ import annotations

from collections.abc import Iterator

import fused
from harness import Table

POSITIONS, HIDDEN, ROUNDS, THREADS = 512, 256, 2, 1
PARTS = (("head", 128_000), ("step", 50_000))
_TITLES = {"head": "output layer and loss alone", "step": "a whole step of a student of two layers, with AdamW"}


def tables() -> Iterator[Table]:
    """Time and peak memory of each way, for an output layer and for a step."""
    for part, vocabulary in PARTS:
        options = ["--positions", str(POSITIONS), "--hidden", str(HIDDEN), "--threads", str(THREADS)]
        found = fused.compare(part, vocabulary, ROUNDS, options)
        base = found["plain cross-entropy"]
        rows = [
            (
                way, f"{each.cpu_seconds:.2f}", f"{each.cpu_seconds / base.cpu_seconds:.2f}",
                f"{each.peak_bytes / 2**20:,.0f}", f"{each.peak_bytes / base.peak_bytes:.2f}",
            )
            for way, each in found.items()
        ]  # fmt: skip
        yield Table(
            f"V = {vocabulary:,}: {_TITLES[part]}",
            ("way", "processor time, s", "ratio", "peak, MiB", "ratio"),
            rows,
            f"{POSITIONS} positions, H = {HIDDEN}, K = {fused.STORED_IDS}, float32, {THREADS} thread; each figure is "
            f"the least of {ROUNDS} processes of {fused.STEPS} steps, ratios to plain cross-entropy.",
        )
