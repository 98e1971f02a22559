"""What the fused head and loss cost, against holding the logits: time and peak memory, as ratios within one run.

    python tests/benchmarks/bench_fused.py [--columns 50000 128000] [--positions 1024] [--rounds 3] [--threads 2]

Two tables for each number of columns: the output layer and the loss alone (forward and backward), and a whole step of
a small Llama student (with AdamW). Every measurement is a process of its own; ways take turns within a round, and the
shortest of all steps counts, since a machine that is busy with something else only ever makes them longer. (On a busy
one take --threads 1 and the CPU time: threads that wait for each other count as busy too.) Memory is the kernel's
count: how far the process's peak (VmHWM) rose above what it held before its first step (VmRSS). Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Table, flat_tail_targets, held

if TYPE_CHECKING:
    from torch import Tensor

    from student.loss.distillation import DistillationLoss
    from student.target_batch import TargetBatch

WAYS = {
    "plain cross-entropy": "torch's cross_entropy on the model's logits",
    "cross-entropy, fused": "alpha = 1",
    "distilled, plain autograd": "log_softmax, gather and a masked logsumexp of the logits",
    "distilled, logits held": "--fused-head off",
    "distilled, fused": "--fused-head on",
}
STORED_IDS = 64
STEPS = 3
# Of the page of `make bench`:
POSITIONS, HIDDEN, ROUNDS, THREADS = 512, 256, 2, 1
PARTS = (("head", 128_000), ("step", 50_000))
_TITLES = {"head": "output layer and loss alone", "step": "a whole step of a student of two layers, with AdamW"}


@dataclass(frozen=True)
class Measured:
    """The shortest step, in seconds passed and in seconds of CPU, and bytes of peak memory above the start."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def tables() -> Iterator[Table]:
    """Time and peak memory of each way, for an output layer and for a step."""
    for part, vocabulary in PARTS:
        options = ["--positions", str(POSITIONS), "--hidden", str(HIDDEN), "--threads", str(THREADS)]
        found = compare(part, vocabulary, ROUNDS, options)
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
            f"{POSITIONS} positions, H = {HIDDEN}, K = {STORED_IDS}, float32, {THREADS} thread; each figure is "
            f"the least of {ROUNDS} processes of {STEPS} steps, ratios to plain cross-entropy.",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[50_000, 128_000])
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    parser.add_argument("--child", nargs=3, metavar=("PART", "WAY", "COLUMNS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        part, way, columns = arguments.child
        print(json.dumps(vars(_measure(part, way, int(columns), arguments))))
        return
    for columns in arguments.columns:
        for part, title in (("head", "output layer and loss alone"), ("step", "a student's step")):
            print(
                f"\n{columns:,} columns, {arguments.positions:,} positions, H = {arguments.hidden}, K = {STORED_IDS}, "
                f"tau = {arguments.temperature:g}, {arguments.threads} threads: {title}\n"
            )
            print(table(compare(part, columns, arguments.rounds, sys.argv[1:])), flush=True)


def compare(
    part: str, columns: int, rounds: int, options: Sequence[str], ways: Iterable[str] = tuple(WAYS)
) -> dict[str, Measured]:
    """Every way's best over the rounds, each measurement in a process of its own, with these options."""
    best: dict[str, Measured] = {}
    for _ in range(rounds):
        for way in ways:
            line = [sys.executable, __file__, *options, "--child", part, way, str(columns)]
            done = subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            new = Measured(**json.loads(done.stdout))
            old = best.get(way, new)
            best[way] = Measured(
                min(old.seconds, new.seconds),
                min(old.cpu_seconds, new.cpu_seconds),
                min(old.peak_bytes, new.peak_bytes),
            )
    return best


def table(found: dict[str, Measured]) -> str:
    """Markdown; every ratio is to plain cross-entropy."""
    base = found["plain cross-entropy"]
    lines = ["| way | time, s | ratio | CPU time, s | ratio | peak, MiB | ratio |", "|---|---|---|---|---|---|---|"]
    for way, each in found.items():
        lines.append(
            f"| {way} | {each.seconds:.3f} | {each.seconds / base.seconds:.2f} "
            f"| {each.cpu_seconds:.3f} | {each.cpu_seconds / base.cpu_seconds:.2f} "
            f"| {each.peak_bytes / 2**20:,.0f} | {each.peak_bytes / base.peak_bytes:.2f} |"
        )
    return "\n".join(lines)


def _measure(part: str, way: str, columns: int, arguments: argparse.Namespace) -> Measured:
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    step = (_head_step if part == "head" else _student_step)(way, columns, arguments)
    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
        # What making the inputs took goes back to the system, and its peak is forgotten.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = held("VmRSS")
        seconds, cpu_seconds = [], []
        for _ in range(STEPS):
            started, started_cpu = time.perf_counter(), time.process_time()
            step()
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - started_cpu)
    return Measured(min(seconds), min(cpu_seconds), held("VmHWM") - before)


def _head_step(way: str, columns: int, arguments: argparse.Namespace) -> Callable[[], None]:
    """The output layer and the loss of given hidden states, forward and backward."""
    import torch
    import torch.nn.functional as F

    from student.loss.fused import fused_loss

    hidden = torch.randn(arguments.positions, arguments.hidden, requires_grad=True)
    weight = (torch.randn(columns, arguments.hidden) * arguments.hidden**-0.5).requires_grad_()
    labels, targets = _batch(columns, arguments.positions)
    loss = _loss(way, columns, arguments.temperature)

    def step() -> None:
        if way.endswith("fused"):
            sums = fused_loss(hidden, weight, None, loss.prepare(labels, {"t": targets})).loss_sum
        else:
            sums = _sum_of_logits(way, F.linear(hidden, weight), labels, targets, loss)
        (sums / len(labels)).backward()
        hidden.grad = weight.grad = None

    return step


def _student_step(way: str, columns: int, arguments: argparse.Namespace) -> Callable[[], None]:
    """A step of a Llama student of two layers: forward, backward, AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from student.training.bound_forward import bind_loss

    config = LlamaConfig(
        vocab_size=columns,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels, targets = _batch(columns, arguments.positions)
    windows = (8, arguments.positions // 8)
    tokens = labels.roll(1).reshape(windows)
    loss = _loss(way, columns, arguments.temperature)
    bound = way.endswith("fused") or way == "distilled, logits held"
    if bound:
        bind_loss(model, loss, "on" if way.endswith("fused") else "off")

    def step() -> None:
        if bound:
            value = model(input_ids=tokens, labels=labels.reshape(windows), targets={"t": targets}).loss
        else:
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
            value = _sum_of_logits(way, logits, labels, targets, loss) / len(labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sum_of_logits(way: str, logits: Tensor, labels: Tensor, targets: TargetBatch, loss: DistillationLoss) -> Tensor:
    import torch
    import torch.nn.functional as F

    if way == "plain cross-entropy":
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    if way == "distilled, logits held":
        return loss(logits, labels, {"t": targets}).loss_sum
    tau, ids = loss.temperature, targets.token_ids.long()
    log_p = targets.logprobs / tau
    tail = targets.log_tail if tau == 1 else targets.log_tail_half
    norm = torch.logsumexp(torch.cat([log_p, tail[:, None]], 1), 1)
    log_p, tail = log_p - norm[:, None], tail - norm
    log_q = torch.log_softmax(logits.float() / tau, 1)
    log_rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
    kl = (log_p.exp() * (log_p - log_q.gather(1, ids))).sum() + (tail.exp() * (tail - log_rest)).sum()
    return 0.5 * F.cross_entropy(logits.float(), labels, reduction="sum") + 0.5 * tau**2 * kl


def _loss(way: str, columns: int, temperature: float) -> DistillationLoss:
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member

    return DistillationLoss(
        columns, 1.0 if way.startswith("cross") else 0.5, temperature, [Member("t", 1.0, None, columns)]
    )


def _batch(columns: int, positions: int) -> tuple[Tensor, TargetBatch]:
    """Labels, and top-k targets of teachers whose other columns are flat."""
    import torch

    ids = torch.stack([torch.randperm(columns)[:STORED_IDS].clone() for _ in range(positions)]).to(torch.int32)
    heads = torch.log_softmax(torch.randn(positions, STORED_IDS).sort(1, descending=True).values, 1) - 0.3
    return torch.randint(0, columns, (positions,)), flat_tail_targets(ids, heads, columns)


if __name__ == "__main__":
    main()
