"""Which stored targets, and which loss on them, make the best student at equal bytes: what decides the default.

    python tests/benchmarks/studies/which_targets.py RUN prepare --text train/*.txt --eval-text valid/*.txt
    python tests/benchmarks/studies/which_targets.py RUN screen
    python tests/benchmarks/studies/which_targets.py RUN finals --arm varopt --arm rskd --arm lean
    python tests/benchmarks/studies/which_targets.py RUN report [--figure docs/images/which-targets.svg]

One teacher, one student, one order of data; what differs is the *arm*: what is stored of the teacher, and the loss on
it. `prepare` makes streams, teacher and pilots with the public commands, and chooses for every way of storing the
largest K that fits each budget of bytes per token. `screen` trains every arm once at the first budget, one pass.
`finals` trains some of them and the controls with several paired seeds, several passes, at every budget; a seed sets
weights, order of data and draws, the same for all arms. Every result is a file; what is there is not done again, so
all of it can be stopped at any time and goes on. `report` prints Markdown from what there is, and draws the finals:
loss above the dense arm by bytes per token.

The `dense` arms learn from the teacher's whole distribution, which is computed once, in float32, in the windows that
the cached ones were computed in, so the only difference is what was stored. RS-KD (draws with replacement, weights =
counts) is made here: no cache of ours holds such targets. Its bytes are those of its ids and counts alone.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steps import command, excerpt, interval, optimizer_of, positions, results, run_all, study_parser, write_json

VOCABULARY = 4_096
WINDOW = 128
BATCH_WINDOWS = 8
LEARNING_RATE = 2e-3  # of steps of `BATCH_WINDOWS`; of larger ones by the square root of their size
TEACHER_MODEL, TEACHER_STEPS, TEACHER_BATCH = "llama-mini", 1_500, 16
STUDENT_MODEL = "llama-tiny"
STUDENT_TOKENS, EVAL_TOKENS, PILOT_TOKENS = 250_000, 64_000, 16_000
ONCE_TOKENS = 2_900_000  # of the stream that is read once: as many as 12 passes over the students'
BUDGETS = (48, 96)
FINAL_EPOCHS = 3
PILOT_K = (12, 24, 40, 56)
PILOT_K_LEAN = (16, 32, 48, 80, 112)
# Draws of RS-KD; the bytes of other numbers are interpolated.
PILOT_DRAWS = (8, 16, 32, 64, 128)
EVAL_K = 256


_FIXED: tuple[object, ...] = ("--targets", "varopt", "--sample-size", "fixed", "--fields")
_THRESHOLD: tuple[object, ...] = ("--targets", "varopt", "--sample-size", "threshold", "--fields")
_BY_EMBEDDINGS: tuple[object, ...] = ("--order", "embeddings")
_SAMPLED: tuple[object, ...] = ("sampled-logprobs", "--sampled-step-nats")
# The ways of storing: options of cache-logits.
STORED: dict[str, tuple[object, ...]] = {
    "topk": ("--targets", "topk", "--format-version", 1),
    "varopt": ("--targets", "varopt", "--format-version", 1),
    "head": ("--targets", "varopt", "--format-version", 1),
    "lean": (*_FIXED, "lean"),
    "ordered": (*_FIXED, "lean", *_BY_EMBEDDINGS),
    "pivotal": (*_FIXED, "lean", *_BY_EMBEDDINGS, "--sampling", "pivotal"),
    "logprobs": (*_FIXED, *_SAMPLED, 0.5),
    "logprobs-fine": (*_FIXED, *_SAMPLED, 0.125),
    "logprobs-ordered": (*_FIXED, *_SAMPLED, 0.5, *_BY_EMBEDDINGS),
    "threshold": (*_THRESHOLD, "lean"),
    "threshold-ordered": (*_THRESHOLD, "lean", *_BY_EMBEDDINGS),
    "threshold-pivotal": (*_THRESHOLD, "lean", *_BY_EMBEDDINGS, "--sampling", "pivotal"),
    "threshold-logprobs": (*_THRESHOLD, *_SAMPLED, 0.5, *_BY_EMBEDDINGS),
}


@dataclass(frozen=True)
class Arm:
    """What a student learns from. `alpha`: share of the cross-entropy; `fresh`: other draws in every pass."""

    stored: str  # none, live, rskd, or one of `STORED`
    tail: str = "auto"
    alpha: float = 0.0
    blend: float | None = None
    fresh: bool = False


ARMS = {
    "control": Arm("none", alpha=1.0),
    "dense": Arm("live"),
    "dense+ce": Arm("live", alpha=0.5),
    "renormalise": Arm("topk", "renormalise"),
    "renormalise+ce": Arm("topk", "renormalise", alpha=0.5),
    "bucket": Arm("topk", "bucket"),
    "bucket+ce": Arm("topk", "bucket", alpha=0.5),
    "varopt": Arm("varopt", "sampled"),
    "varopt+ce": Arm("varopt", "sampled", alpha=0.5),
    "varopt+0.1ce": Arm("varopt", "sampled", alpha=0.1),
    "head": Arm("head", "sampled"),
    "rskd": Arm("rskd"),
    "rskd+ce": Arm("rskd", alpha=0.5),
    "blend-0.5": Arm("varopt", "blend", blend=0.5),
    "blend-0.75": Arm("varopt", "blend", blend=0.75),
    "blend-0.9": Arm("varopt", "blend", blend=0.9),
    "blend-0.75+ce": Arm("varopt", "blend", alpha=0.5, blend=0.75),
    "head-blend-0.75": Arm("head", "blend", blend=0.75),
    "lean": Arm("lean", "sampled"),
    "ordered": Arm("ordered", "sampled"),
    "pivotal": Arm("pivotal", "sampled"),
    "controlled": Arm("logprobs", "controlled"),
    "controlled-fine": Arm("logprobs-fine", "controlled"),
    "controlled-ordered": Arm("logprobs-ordered", "controlled"),
    "threshold": Arm("threshold", "sampled"),
    "threshold-ordered": Arm("threshold-ordered", "sampled"),
    "threshold-pivotal": Arm("threshold-pivotal", "sampled"),
    "threshold-controlled": Arm("threshold-logprobs", "controlled"),
    "varopt-fresh": Arm("varopt", "sampled", fresh=True),
    "blend-0.75-fresh": Arm("varopt", "blend", blend=0.75, fresh=True),
}
CONTROLS = ("control", "dense", "bucket", "bucket+ce")
# In the screening, fresh draws in every pass are the same as fixed ones: it has one pass.
SCREENED = [name for name, arm in ARMS.items() if not arm.fresh]


@dataclass(frozen=True)
class Job:
    """One student. `budget` is None where nothing is stored."""

    arm: str
    seed: int
    epochs: int
    budget: int | None
    batch_windows: int = BATCH_WINDOWS
    rate: float | None = None  # by default as `LEARNING_RATE` says
    stream: str = "student"

    @property
    def learning_rate(self) -> float:
        return self.rate or LEARNING_RATE * math.sqrt(self.batch_windows / BATCH_WINDOWS)

    @property
    def name(self) -> str:
        at = "" if self.budget is None else f"-{self.budget}B"
        batch = "" if self.batch_windows == BATCH_WINDOWS else f"-batch{self.batch_windows}"
        batch += "" if self.rate is None else f"-rate{self.rate:g}"
        batch += "" if self.stream == "student" else f"-{self.stream}"
        return f"{self.arm}{at}-{self.epochs}x{batch}-seed{self.seed}"


def make_stream(run: Path, name: str, files: Sequence[str], tokens: int, of: int) -> None:
    """A stream of about `tokens` of the `of` tokens of the files, with the run's tokenizer."""
    if (run / name / "zarr.json").exists():
        return
    excerpt(files, run / f"{name}-text", min(1.0, tokens / of))
    command("logit-cache", "tokenize", "--text", f"{run / name}-text/*.txt", "--tokenizer", run / "all/tokenizer",
            "--out", run / name)  # fmt: skip


def cache(run: Path, stream: str, name: str, k: int, *options: object, threads: int = 2) -> None:
    command("cache-logits", "--cache", run / stream, "--teacher", run / "teacher", "--name", name, "-k", k,
            *options, threads=threads)  # fmt: skip


def entry_options(stored: str, k: int, seed: int) -> tuple[object, ...]:
    options = STORED[stored] if stored == "topk" else (*STORED[stored], "--seed", seed)
    return (*options, "--head-ids", k // 2) if stored == "head" else options


def entry_name(stored: str, k: int, seed: int) -> str:
    return f"{stored}-{k}" if stored == "topk" else f"{stored}-{k}-seed{seed}"


def ensure_entry(run: Path, stream: str, stored: str, k: int, seed: int, threads: int) -> str:
    name = entry_name(stored, k, seed)
    with (run / f"{stream}-{name}.lock").open("w") as lock:
        # Two workers on one entry would do no harm, and the work twice.
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache(run, stream, name, k, *entry_options(stored, k, seed), threads=threads)
    return name


def bytes_per_token(run: Path, stream: str, name: str) -> float:
    from storage import LogitCache

    entry = LogitCache.open(str(run / stream)).teacher(name)
    return entry.stored_bytes() / entry.entry.positions


def prepare(run: Path, text: Sequence[str], eval_text: Sequence[str]) -> None:
    if not (run / "all" / "zarr.json").exists():
        texts = [part for name in text for part in ("--text", name)]
        command("logit-cache", "tokenize", *texts, "--train-tokenizer", VOCABULARY, "--out", run / "all")
    total = positions(run / "all")
    make_stream(run, "student", text, STUDENT_TOKENS, total)
    make_stream(run, "pilot", text, PILOT_TOKENS, total)
    make_stream(run, "once", text, ONCE_TOKENS, total)
    # The held-out files are split off by line, so that their share of bytes is their share of tokens.
    size = sum(Path(name).stat().st_size for name in text), sum(Path(name).stat().st_size for name in eval_text)
    make_stream(run, "valid", eval_text, EVAL_TOKENS, total * size[1] // size[0])
    command("train-teacher", "--cache", run / "all", "--eval-cache", run / "valid", "--model", TEACHER_MODEL,
            "--output-dir", run / "teacher", "--set", f"max_steps={TEACHER_STEPS}",
            "--set", f"per_device_train_batch_size={TEACHER_BATCH}", "--set", f"learning_rate={LEARNING_RATE}",
            "--set", "logging_steps=50", "--set", "save_steps=250")  # fmt: skip
    # Held-out targets by which every student's KL to the teacher is measured: a sample of the tail, so without bias.
    cache(run, "valid", "teacher", EVAL_K, "--targets", "varopt")
    choose_sizes(run)


def choose_sizes(run: Path) -> None:
    """For every budget and way of storing: the largest K (for RS-KD: number of draws) that fits, from a pilot."""
    path = run / "sizes.json"
    measured: dict[str, list[tuple[int, float]]] = json.loads(path.read_text())["pilot"] if path.exists() else {}
    for stored in STORED:
        if stored in measured:
            continue
        measured[stored] = []
        for k in PILOT_K if stored in ("topk", "varopt", "head") else PILOT_K_LEAN:
            name = entry_name(stored, k, 0)
            cache(run, "pilot", name, k, *entry_options(stored, k, 0))
            measured[stored].append((k, bytes_per_token(run, "pilot", name)))
    if "rskd" not in measured:
        measured["rskd"] = [(n, rskd_bytes(*rskd_targets(run, "pilot", n, 0))) for n in PILOT_DRAWS]
    chosen = {
        str(budget): {stored: _largest(points, budget) for stored, points in measured.items()} for budget in BUDGETS
    }
    write_json(path, {"pilot": measured, "chosen": chosen})


def _largest(points: list[tuple[int, float]], budget: float) -> int:
    import numpy as np

    numbers, sizes = zip(*points, strict=True)
    return int(np.interp(budget, sizes, numbers))


def load_teacher(run: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(run / "teacher").eval().requires_grad_(False)


def teacher_logits(run: Path, stream: str) -> Iterator[tuple[int, int, Any]]:
    """(start, end, logits [end - start, V]) of a stream's positions in order, in windows one behind the other."""
    import numpy as np
    import torch

    from storage import LogitCache

    tokens, teacher = LogitCache.open(str(run / stream)).tokens, load_teacher(run)
    for start in range(0, len(tokens), WINDOW * 32):
        end = min(start + WINDOW * 32, len(tokens))
        read = np.zeros(WINDOW * 32, dtype=np.int64)
        read[: end - start] = tokens.read(start, end)
        with torch.no_grad():
            logits = teacher(torch.from_numpy(read).view(32, WINDOW), use_cache=False).logits.flatten(0, 1)
        yield start, end, logits[: end - start, :VOCABULARY]


def dense_targets(run: Path) -> Any:
    """float32 [N, V]: the teacher's log-probs at every position of the student's stream, on the disk."""
    import numpy as np

    path = run / "dense.npy"
    with (run / "dense.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            shape = positions(run / "student"), VOCABULARY
            table = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
            for start, end, logits in teacher_logits(run, "student"):
                table[start:end] = logits.log_softmax(1).numpy()
            table.flush()
            os.replace(partial, path)
    return np.load(path, mmap_mode="r")


def rskd_targets(run: Path, stream: str, draws: int, seed: int) -> tuple[Any, Any]:
    """Ids uint16 and counts uint8, [N, draws]; counts of 0 fill rows up. Draws keyed by seed and position."""
    import numpy as np
    import torch

    path = run / "rskd" / f"{stream}-{draws}-seed{seed}.npz"
    if path.exists():
        found = np.load(path)
        return found["ids"], found["counts"]
    stop = positions(run / stream)
    ids = np.zeros((stop, draws), dtype=np.uint16)
    counts = np.zeros((stop, draws), dtype=np.uint8)
    for start, end, logits in teacher_logits(run, stream):
        ends = logits.double().softmax(1).cumsum(1)
        uniform = np.random.Generator(np.random.Philox(key=[seed, start])).random((end - start, draws))
        drawn = torch.searchsorted(ends, torch.from_numpy(uniform)).clamp_max_(VOCABULARY - 1).numpy()
        for row, some in enumerate(drawn):
            unique, number = np.unique(some, return_counts=True)
            ids[start + row, : len(unique)], counts[start + row, : len(unique)] = unique, number
    path.parent.mkdir(exist_ok=True)
    with path.with_suffix(".partial").open("wb") as file:
        np.savez(file, ids=ids, counts=counts)
    os.replace(path.with_suffix(".partial"), path)
    return ids, counts


def rskd_bytes(ids: Any, counts: Any) -> float:
    """Bytes per token of ids, counts and row lengths, compressed as our arrays are, in chunks of 8,192 rows."""
    import numpy as np
    from numcodecs import Blosc

    codec = Blosc("zstd", clevel=3, shuffle=Blosc.BITSHUFFLE)
    total = 0
    for start in range(0, len(ids), 8_192):
        rows = slice(start, start + 8_192)
        there = counts[rows] > 0
        parts = (ids[rows][there], counts[rows][there], there.sum(1).astype(np.uint8))
        total += sum(len(codec.encode(np.ascontiguousarray(part))) for part in parts)
    return total / len(ids)


def train(run: Path, job: Job) -> dict[str, Any]:
    """Train and evaluate one student; what its result file holds."""
    import torch

    from student.data.batches import collate
    from student.data.windows import DistillationWindows, reading_order
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member
    from student.models.loading import load_student
    from student.training.bound_forward import bind_loss, unbind_loss

    arm = ARMS[job.arm]
    sizes = None if job.budget is None else json.loads((run / "sizes.json").read_text())["chosen"][str(job.budget)]
    k = None if sizes is None else sizes[arm.stored]
    names, stored_bytes, rskd = [], None, None
    if arm.stored in STORED:
        for number in range(job.epochs if arm.fresh else 1):
            # Other seeds of draws are those of other students, so that no entry is made for one arm alone.
            seed = 1 + (job.seed + number - 1) % 4 if job.seed else 0
            names.append(ensure_entry(run, job.stream, arm.stored, k, seed, threads=1))
        stored_bytes = bytes_per_token(run, job.stream, names[0])
    elif arm.stored == "rskd":
        rskd = rskd_targets(run, job.stream, k, job.seed)
        stored_bytes = rskd_bytes(*rskd)
    # Of a long stream there is no room for whole distributions: the teacher reads each batch, in the same windows.
    teacher = load_teacher(run) if arm.stored == "live" and job.stream != "student" else None
    dense = dense_targets(run) if arm.stored == "live" and teacher is None else None

    url = str(run / job.stream)
    per_epoch = [
        DistillationWindows(url, names[n : n + 1], WINDOW, "fixed", job.seed) for n in range(max(1, len(names)))
    ]
    windows = per_epoch[0]
    losses = []
    for some in per_epoch:
        members = [Member.of(name, entry) for name, entry in some.entries.items()]
        options = {} if arm.blend is None else {"blend": arm.blend}
        alpha = arm.alpha if members else 1.0
        losses.append(DistillationLoss(VOCABULARY, alpha, 1.0, members, tail=arm.tail, **options))
    student = load_student(
        STUDENT_MODEL,
        vocabulary_size=windows.vocabulary_size,
        special_ids={},
        window_tokens=WINDOW,
        seed=job.seed,
    ).train()
    order = reading_order(windows, job.batch_windows)
    steps_per_epoch = len(windows) // job.batch_windows
    steps = steps_per_epoch * job.epochs
    optimizer, schedule = optimizer_of(student, job.learning_rate, steps)
    began = time.monotonic()
    curve = []
    for epoch in range(job.epochs):
        some = per_epoch[epoch % len(per_epoch)]
        unbind_loss(student)
        bind_loss(student, losses[epoch % len(per_epoch)])
        order.set_epoch(epoch)
        indices = list(order)
        for step in range(steps_per_epoch):
            chosen = indices[step * job.batch_windows : (step + 1) * job.batch_windows]
            batch = collate(some.__getitems__(chosen))
            control = None
            if arm.stored not in ("live", "rskd"):
                found = student(batch["input_ids"], labels=batch["labels"], targets=batch["targets"])
                value, control = found.loss, found.control
            else:
                labels = batch["labels"].flatten()
                logits = student(batch["input_ids"], use_cache=False).logits.flatten(0, 1)
                rows = rows_of(
                    [some.blocks.span(index % len(some), epoch) for index in chosen], some.record.corpus.positions
                )
                if teacher is not None:
                    with torch.no_grad():
                        theirs = teacher(batch["input_ids"], use_cache=False).logits[..., :VOCABULARY].flatten(0, 1)
                    value = dense_loss(logits, labels, theirs.log_softmax(1), arm.alpha)
                elif dense is not None:
                    value = dense_loss(logits, labels, torch.from_numpy(dense[rows]), arm.alpha)
                else:
                    value = rskd_loss(logits, labels, rows, rskd, arm.alpha)
            value.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if control is not None:
                losses[epoch % len(losses)].end_step(control)
        # Of many passes the last: evaluating all would take as long as training.
        if epoch == job.epochs - 1 or job.epochs <= FINAL_EPOCHS:
            curve.append(evaluate(run, student))
    return {
        "arm": job.arm,
        "seed": job.seed,
        "epochs": job.epochs,
        "budget": job.budget,
        "batch_windows": job.batch_windows,
        "rate": job.rate,
        "stream": job.stream,
        "k": k,
        "bytes_per_token": stored_bytes,
        "steps": steps,
        "seconds": time.monotonic() - began,
        "after_each_pass": curve,
        **curve[-1],
    }


def rows_of(places: list[tuple[int, int]], positions: int) -> Any:
    """The positions of some windows, int64 [B * T], as many of each; those behind the end are the last one."""
    import numpy as np

    return np.concatenate([np.minimum(start + np.arange(WINDOW), positions - 1) for start, _ in places])


def dense_loss(logits: Any, labels: Any, log_p: Any, alpha: float) -> Any:
    """alpha * CE + (1 - alpha) * KL(p || q) with the teacher's whole distribution log_p [B * T, V]."""
    import torch.nn.functional as F

    log_q = logits.log_softmax(1)
    trained = labels >= 0
    kl = F.kl_div(log_q[trained], log_p[trained], reduction="sum", log_target=True) / trained.sum()
    return (1 - alpha) * kl + (alpha * F.nll_loss(log_q, labels) if alpha else 0.0)


def rskd_loss(logits: Any, labels: Any, rows: Any, rskd: tuple[Any, Any], alpha: float) -> Any:
    """alpha * CE - (1 - alpha) * sum_i w_i log q_i with w the counts over the number of draws."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    ids = torch.from_numpy(rskd[0][rows].astype(np.int64))
    counts = torch.from_numpy(rskd[1][rows].astype(np.float32))
    log_q = logits.log_softmax(1)
    trained = labels >= 0
    w = counts / counts.sum(1, keepdim=True)
    per_position = -(w * log_q.gather(1, ids)).sum(1)
    mean = per_position[trained].sum() / trained.sum()
    return (1 - alpha) * mean + (alpha * F.nll_loss(log_q, labels) if alpha else 0.0)


def evaluate(run: Path, student: Any) -> dict[str, float]:
    """Held-out loss, ECE, and KL(teacher || student), which a large sample of the teacher estimates without bias."""
    import torch

    from student.data.batches import collate
    from student.data.windows import DistillationWindows
    from student.evaluation.held_out import HeldOutSums
    from student.loss.teacher_targets import Member

    windows = DistillationWindows(str(run / "valid"), ["teacher"], WINDOW)
    sums = HeldOutSums(VOCABULARY, [Member.of("teacher", windows.entries["teacher"])])
    student.eval()
    with torch.no_grad():
        for start in range(0, len(windows), 16):
            batch = collate(windows.__getitems__(list(range(start, min(start + 16, len(windows))))))
            logits = student(batch["input_ids"], use_cache=False).logits
            sums.add(logits.flatten(0, 1), batch["labels"].flatten(), batch["targets"])
    student.train()
    result = sums.result()
    return {"loss": result.cross_entropy, "ece": result.ece, "kl": result.kl["teacher"].nats}


def budgeted(arm: str, budget: int) -> int | None:
    return None if ARMS[arm].stored in ("none", "live") else budget


def run_jobs(run: Path, jobs: Sequence[Job], workers: int) -> None:
    arguments = {
        job.name: [
            *map(str, (job.arm, job.seed, job.epochs, job.budget or 0, job.batch_windows, job.rate or 0)),
            job.stream,
        ]
        for job in jobs
    }
    run_all(run, Path(__file__), arguments, workers)


def screen_jobs() -> list[Job]:
    return [Job(arm, 0, 1, budgeted(arm, BUDGETS[0])) for arm in SCREENED]


def final_jobs(
    arms: Sequence[str],
    seeds: int,
    budgets: Sequence[int],
    batch_windows: int,
    passes: int = FINAL_EPOCHS,
    rate: float | None = None,
    stream: str = "student",
) -> list[Job]:
    """Seed by seed, so that whatever is finished is paired."""
    return [
        Job(arm, seed, passes, budgeted(arm, budget), batch_windows, rate, stream)
        for budget in budgets
        for seed in range(1, seeds + 1)
        for arm in arms
    ]


def report(run: Path) -> str:
    found = list(results(run))
    sizes = json.loads((run / "sizes.json").read_text())
    lines = ["Largest K within a budget, from a pilot (RS-KD: draws):", ""]
    ways = list(sizes["pilot"])
    lines += [f"| budget, bytes per token | {' | '.join(ways)} |", "|---|" + "---|" * len(ways)]
    for budget, chosen in sizes["chosen"].items():
        lines.append(f"| {budget} | " + " | ".join(str(chosen[way]) for way in ways) + " |")
    screened = [result for result in found if result["epochs"] == 1 and result["seed"] == 0]
    if screened:
        dense = next((r["loss"] for r in screened if r["arm"] == "dense"), math.nan)
        lines += ["", "Screening: one seed, one pass.", ""]
        lines += ["| arm | K | bytes per token | held-out loss | above dense | KL to the teacher | ECE, % |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for result in sorted(screened, key=lambda r: r["loss"]):
            lines.append(
                f"| {result['arm']} | {result['k'] or '–'} | {_number(result['bytes_per_token'], 1)} | "
                f"{result['loss']:.4f} | {result['loss'] - dense:+.4f} | {result['kl']:.4f} | "
                f"{100 * result['ece']:.2f} |"
            )
    finals = [result for result in found if result["seed"] > 0]
    kind: Callable[[dict[str, Any]], tuple[int, int, float, str]] = lambda r: (  # noqa: E731
        r["batch_windows"], r["epochs"], r.get("rate") or 0, r.get("stream", "student")
    )  # fmt: skip
    for one in sorted({kind(result) for result in finals}):
        of_these = [r for r in finals if kind(r) == one]
        for budget in BUDGETS:
            lines += _final_lines([r for r in of_these if r["budget"] in (None, budget)], budget, one[0])
    return "\n".join(lines)


# In the figure: the arms, their names and their colours.
DRAWN = {
    "varopt": ("VarOpt, K ids, version 1", "#8c8c8c"),
    "rskd": ("RS-KD (draws with replacement)", "#c44e52"),
    "lean": ("VarOpt, K ids, lean", "#dd8452"),
    "ordered": ("the same, in the order of embeddings", "#937860"),
    "controlled": ("the same, with a control variate", "#8172b3"),
    "threshold": ("VarOpt, threshold, lean (default)", "#4c72b0"),
    "threshold-ordered": ("the same, in the order of embeddings", "#55a868"),
}
_STYLE = """text { font: 12px system-ui, sans-serif; fill: #333 } .grid { stroke: #ddd } .axis { stroke: #888 }
.line { fill: none; stroke: var(--c); stroke-width: 2 } .dot { fill: var(--c) } .target { fill: none }"""


def figure(run: Path) -> str:
    """An SVG: mean held-out loss above dense of each drawn arm, with the same seeds, by bytes per token."""
    from logit_cache.report.svg import Line, line_chart

    finals = [
        r
        for r in results(run)
        if (r["epochs"], r["batch_windows"], r.get("rate")) == (FINAL_EPOCHS, BATCH_WINDOWS, None)
    ]
    dense = {r["seed"]: r["loss"] for r in finals if r["arm"] == "dense"}
    lines = []
    for arm, (name, _) in DRAWN.items():
        points = []
        for budget in BUDGETS:
            found = [r for r in finals if (r["arm"], r["budget"]) == (arm, budget) and r["seed"] in dense]
            if found:
                above = statistics.mean(r["loss"] - dense[r["seed"]] for r in found)
                points.append((statistics.mean(r["bytes_per_token"] for r in found), above))
        lines.append(Line(f"{name}, nats above the live teacher's student", arm, tuple(points), dots=True))
    chart = line_chart(
        lines, "Loss above the live teacher's student", "bytes per token", x_name="bytes", from_zero=True
    )
    return framed(chart, "Loss above the live teacher's student by bytes per token", DRAWN)


def framed(chart: str, label: str, drawn: Mapping[str, tuple[str, str]], style: str = "") -> str:
    """A chart as an SVG file that stands alone, with the names and colours of those series that are in it below."""
    from markupsafe import escape

    from logit_cache.report.svg import HEIGHT, WIDTH

    present = {name: series for name, series in drawn.items() if f'class="s-{name}"' in chart}
    colours = "".join(f".s-{name} {{ --c: {colour} }}" for name, (_, colour) in present.items())
    legend = "".join(
        f'<g class="s-{name}"><circle cx="12" cy="{HEIGHT + 16 + 18 * row}" r="4" style="fill: var(--c)"/>'
        f'<text x="24" y="{HEIGHT + 20 + 18 * row}">{escape(said)}</text></g>'
        for row, (name, (said, _)) in enumerate(present.items())
    )
    height = HEIGHT + 24 + 18 * len(present)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
    body = chart.partition(">")[2].rpartition("</svg>")[0]
    return (
        f'{head} aria-label="{escape(label)}"><style>{_STYLE}\n{colours}{style}'
        f'</style><rect width="{WIDTH}" height="{height}" fill="#fff"/>{body}{legend}</svg>\n'
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _final_lines(finals: list[dict[str, Any]], budget: int, batch: int) -> list[str]:
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for result in finals:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result
    if not any(result["budget"] == budget for result in finals):
        return []

    def paired(arm: str, other: str, field: str) -> str:
        seeds = sorted(by_arm[arm].keys() & by_arm.get(other, {}).keys())
        if arm == other or not seeds:
            return "–"
        return interval([by_arm[arm][s][field] - by_arm[other][s][field] for s in seeds])

    epochs = finals[0]["epochs"]
    title = f"{budget} bytes per token, {epochs} passes, {batch * WINDOW:,} tokens to a step"
    title += f", learning rate {finals[0]['rate']:g}" if finals[0].get("rate") else ""
    title += f", of the stream {finals[0]['stream']}" if finals[0].get("stream", "student") != "student" else ""
    lines = ["", f"Finals at {title}; paired differences with their 95 % interval:", ""]
    lines += ["| arm | seeds | K | bytes per token | held-out loss | − dense | − bucket | KL to the teacher | ECE, % |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    mean: Callable[[str, str], float] = lambda arm, field: statistics.mean(r[field] for r in by_arm[arm].values())  # noqa: E731
    for arm in sorted(by_arm, key=lambda arm: mean(arm, "loss")):
        one = next(iter(by_arm[arm].values()))
        lines.append(
            f"| {arm} | {len(by_arm[arm])} | {one['k'] or '–'} | {_number(one['bytes_per_token'], 1)} | "
            f"{mean(arm, 'loss'):.4f} | {paired(arm, 'dense', 'loss')} | {paired(arm, 'bucket', 'loss')} | "
            f"{mean(arm, 'kl'):.4f} | {100 * mean(arm, 'ece'):.2f} |"
        )
    return lines


def main() -> None:
    parser, stages = study_parser(__doc__)
    stages.add_parser("screen")
    reported = stages.add_parser("report")
    reported.add_argument("--figure", type=Path)
    finals = stages.add_parser("finals")
    finals.add_argument("--arm", action="append", required=True, choices=list(ARMS))
    finals.add_argument("--without-controls", action="store_true")
    finals.add_argument("--batch-windows", type=int, default=BATCH_WINDOWS)
    finals.add_argument("--passes", type=int, default=FINAL_EPOCHS)
    finals.add_argument("--learning-rate", type=float, help="by default larger by the root of the batch's size")
    finals.add_argument("--stream", choices=("student", "once"), default="student")
    finals.add_argument("--seeds", type=int, default=4)
    finals.add_argument("--budget", type=int, action="append", choices=BUDGETS)
    one = stages.add_parser("one")
    one.add_argument("job", nargs=7)
    given = parser.parse_args()
    (given.run / "results").mkdir(parents=True, exist_ok=True)
    if given.stage == "prepare":
        prepare(given.run, given.text, given.eval_text)
    elif given.stage == "screen":
        run_jobs(given.run, screen_jobs(), given.workers)
    elif given.stage == "finals":
        arms = given.arm if given.without_controls else [*CONTROLS, *given.arm]
        jobs = final_jobs(
            arms, given.seeds, given.budget or BUDGETS, given.batch_windows, given.passes, given.learning_rate,
            given.stream,
        )  # fmt: skip
        run_jobs(given.run, jobs, given.workers)
    elif given.stage == "report":
        print(report(given.run))
        if given.figure is not None:
            given.figure.parent.mkdir(parents=True, exist_ok=True)
            given.figure.write_text(figure(given.run), encoding="utf-8")
    else:
        arm, seed, epochs, budget, batch, rate, stream = given.job
        job = Job(arm, int(seed), int(epochs), int(budget) or None, int(batch), float(rate) or None, stream)
        write_json(given.run / "results" / f"{job.name}.json", train(given.run, job))


if __name__ == "__main__":
    main()
