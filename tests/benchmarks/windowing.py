"""What it changes that a student with random offsets reads targets made with another left context than its own.

    python tests/benchmarks/windowing.py --text 'train/*.txt' --eval-text 'valid/*.txt' --out DIR [--seeds 2]

A teacher trained with random offsets is cached with several strides: with windows of 128 tokens and stride s, every
position has at least 128 - s tokens to its left there, while a student's window at a random offset may begin anywhere.

    targets    mean KL(teacher in the student's own window || teacher as cached), over random windows, and what the two
               score on the token that follows: no student involved
    students   held-out loss of students from each cache, of one with the teacher beside it (its own windows), and of
               one without a teacher; equal seeds have equal weights, windows and order

Everything by the public commands; what is done is not done again. Prints the tables as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

from logit_cache.recipes import find_recipe
from logit_cache.stages import Stage, run_stages
from storage import LogitCache
from student.windows import DistillationWindows
from teachers.huggingface import HuggingFaceTeacher

CONTEXT = 128
STRIDES = (128, 64, 32)
KEPT = "128"
TRAINING = (
    *("--set", "learning_rate=2e-3", "--set", "per_device_train_batch_size=16", "--set", "warmup_steps=50"),
    *("--set", "num_train_epochs=3", "--set", "save_strategy=no"),
)
OBJECTIVE = ("--alpha", "0.5", "--loss-scale", "babyllama")


def stages(folder: Path, text: list[str], eval_text: list[str], seeds: int) -> list[Stage]:
    train, valid = str(folder / "train"), str(folder / "valid")

    def files(paths: list[str]) -> tuple[str, ...]:
        return tuple(part for path in paths for part in ("--text", path))

    teacher = str(folder / "teacher")
    made = [
        Stage("train", ("logit-cache", "tokenize", *files(text), "--train-tokenizer", "4096", "--out", train)),
        Stage(
            "valid", ("logit-cache", "tokenize", *files(eval_text), "--tokenizer", f"{train}/tokenizer", "--out", valid)
        ),
    ]
    data = ("--cache", train, "--eval-cache", valid, "--offset", "random", *TRAINING)
    network = ("--model", str(folder / "teacher.json"))
    made.append(Stage("teacher", ("train-teacher", *data, *network, "--output-dir", teacher, "--seed", "100")))
    for stride in STRIDES:
        entry = ("--name", f"s{stride}", "-k", KEPT, "--stride-tokens", str(stride), "--fidelity-positions", "0")
        made.append(Stage(f"cache {stride}", ("cache-logits", "--cache", train, "--teacher", teacher, *entry)))
    network = ("--model", str(folder / "student.json"))
    for seed in range(seeds):
        for arm in (*(f"s{stride}" for stride in STRIDES), "live", "control"):
            command, own = "train-student", (*("--teacher", arm), *OBJECTIVE)
            if arm == "live":
                command, own = "train-teacher", (*("--live-teacher", teacher), *OBJECTIVE)
            elif arm == "control":
                own = ()
            out = ("--output-dir", str(folder / f"{arm}-{seed}"), "--seed", str(seed))
            made.append(Stage(f"{arm}, seed {seed}", (command, *data, *network, *own, *out)))
    return made


def log_probs(teacher: HuggingFaceTeacher, windows: torch.Tensor) -> torch.Tensor:
    """float32 [B, C, V]."""
    rows = torch.arange(windows.numel())
    return torch.cat(list(teacher.score(windows, rows))).log_softmax(1).view(*windows.shape, -1)


def compare_targets(folder: Path, windows: int = 256) -> list[tuple[str, float, float, float]]:
    """(stride, mean KL, nats of the next token as cached, in the student's own window) over random held-out windows."""
    cache = LogitCache.open(str(folder / "valid"))
    positions = cache.record.corpus.positions
    tokens = torch.from_numpy(cache.tokens.read(0, positions).astype(np.int64))
    teacher = HuggingFaceTeacher.load(str(folder / "teacher"), dtype="float32", device="cpu")
    chosen = DistillationWindows(str(folder / "valid"), (), CONTEXT, "random", seed=1)
    starts = [chosen.blocks.place(index)[0] for index in range(1, min(windows, len(chosen) - 2))]
    found = []
    for stride in STRIDES:
        kls, cached_nats, own_nats = [], [], []
        for start in starts:
            own = log_probs(teacher, tokens[None, start : start + CONTEXT])[0]
            # A position belongs to the window of the grid in whose last `stride` tokens it lies (the first: all of it).
            firsts = sorted({max(0, (p // stride + 1) * stride - CONTEXT) for p in range(start, start + CONTEXT)})
            grid = torch.stack([tokens[first : first + CONTEXT] for first in firsts if first + CONTEXT < positions])
            scored = dict(zip(firsts, log_probs(teacher, grid), strict=False))
            for offset in range(CONTEXT):
                p = start + offset
                first = max(0, (p // stride + 1) * stride - CONTEXT)
                if first not in scored:
                    continue
                there, here, label = scored[first][p - first], own[offset], tokens[p + 1]
                kls.append(float((here.exp() * (here - there)).sum()))
                cached_nats.append(-float(there[label]))
                own_nats.append(-float(here[label]))
        found.append((str(stride), *(statistics.fmean(values) for values in (kls, cached_nats, own_nats))))
    return found


def losses(folder: Path, arm: str, seeds: int) -> list[float]:
    reports = [json.loads((folder / f"{arm}-{seed}" / "report.json").read_text()) for seed in range(seeds)]
    return [report["held_out"]["cross_entropy"] for report in reports]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--eval-text", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "teacher.json").write_text(json.dumps(find_recipe("babyllama-2", "tiny").student.network.config))
    (given.out / "student.json").write_text(json.dumps(find_recipe("baby-llama", "tiny").student.network.config))
    run_stages(stages(given.out, given.text, given.eval_text, given.seeds), "run this again")
    print("| stride | least left context | KL(own window, as cached) | next token as cached | in its own window |")
    print("|---|---|---|---|---|")
    for stride, kl, cached, own in compare_targets(given.out):
        print(f"| {stride} | {CONTEXT - int(stride)} | {kl:.4f} | {cached:.4f} | {own:.4f} |")
    live = losses(given.out, "live", given.seeds)
    print("\n| student | held-out loss by seed | above live, mean (standard error) |\n|---|---|---|")
    for arm in ("live", *(f"s{stride}" for stride in STRIDES), "control"):
        found = losses(given.out, arm, given.seeds)
        above = [a - b for a, b in zip(found, live, strict=True)]
        error = statistics.stdev(above) / math.sqrt(len(above)) if len(above) > 1 else math.nan
        shown = ", ".join(f"{value:.4f}" for value in found)
        print(f"| {arm} | {shown} | {statistics.fmean(above):+.4f} ({error:.4f}) |")


if __name__ == "__main__":
    main()
