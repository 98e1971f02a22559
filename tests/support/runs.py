"""Training runs of seconds: two small caches, two small configurations, and command lines for them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.commands import ROOT
from support.processes import start, start_code
from transformers import AutoModelForCausalLM

from student.job import StudentJob
from student.loss.objective import Objective

V = 61
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


def fill(
    url: str, positions: int, seed: int, names: tuple[str, ...], corpus: dict[str, Any] | None = None, **entry: Any
) -> None:
    """A cache of random tokens with teachers a (top 9, codes) and b (all ids, float32), both bigram tables.

    corpus: further arguments of `make_corpus`; entry: changes of `make_entry`.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, positions).astype(np.uint16)
    record = make_corpus(url, tokens, V, **(corpus or {}))
    labels = np.append(tokens[1:], -1).astype(np.int64)
    for name in names:
        k, encoding = (9, "codes") if name == "a" else (V, "float32")
        made = make_entry(record, k, encoding=encoding, **entry)
        table = 2 * np.random.default_rng(len(name) + ord(name)).normal(size=(V, V))
        write_entry(url, name, made, dense_targets(table[tokens], k, labels))


def make_world(folder: Path) -> None:
    """Caches `train` and `held` and model configurations `llama.json` and `gpt2.json` in a folder."""
    fill(str(folder / "train"), 1500, 0, ("a", "b"))
    fill(str(folder / "held"), 300, 1, ("a", "b"))
    (folder / "llama.json").write_text(json.dumps(LLAMA))
    (folder / "gpt2.json").write_text(json.dumps(GPT2))


def job_in(world: Path, output: Path, **changes: Any) -> StudentJob:
    fields: dict[str, Any] = {
        "cache": str(world / "train"),
        "teachers": ["a:2", "b"],
        "model": str(world / "llama.json"),
        "temperature": 2,
        "window_tokens": 16,
        "offset": "random",
        "output_dir": str(output),
        "seed": 5,
    }
    training = {"per_device_train_batch_size": 8, "learning_rate": 0.01, "logging_steps": 2}
    training |= changes.pop("training", {})
    return StudentJob.model_validate({**fields, "training": training, **changes})


def arguments(job: StudentJob) -> list[str]:
    """The command line of a job."""
    line = ["--cache", job.cache, "--model", job.model, "--output-dir", job.output_dir, "--seed", str(job.seed)]
    line += ["--window-tokens", str(job.window_tokens), "--offset", job.offset]
    for teacher in job.teachers:
        line += ["--teacher", f"{teacher.name}:{teacher.weight}"]
    if job.teachers:
        line += [] if job.leaves_alpha_open else ["--alpha", str(job.alpha)]
        line += ["--temperature", str(job.temperature)]
        for name, field in Objective.model_fields.items():
            value = getattr(job, name)
            if name not in ("alpha", "temperature") and value != field.default:
                line += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    if job.windows_per_step:
        line += ["--windows-per-step", str(job.windows_per_step)]
    if job.fused_head != "auto":
        line += ["--fused-head", job.fused_head]
    if job.eval_cache:
        line += ["--eval-cache", job.eval_cache]
    for key, value in job.training.items():
        line += ["--set", f"{key}={value}"]
    return line


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def have_equal_weights(one: Path, other: Path, atol: float = 0.0) -> bool:
    """Whether two saved models have the same weights, to the last bit by default."""
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=atol, atol=atol) for name in first
    )


KILLED = """
import os, sys
from student.cli import train_student
from student.training.progress import TrainingProgress
def killed(self, args, state, control, **others):
    if state.global_step == {step}:
        os._exit(9)
TrainingProgress.on_step_end = killed
train_student(sys.argv[1:])
"""

# Notes which windows every step of a run reads, in the file NOTES followed by the rank; stops before step STOP.
NOTED = """
import json, os, sys
from student.cli import train_student
from student.training.trainer import DistillationTrainer
from student.data.windows import DistillationWindows
read, loss, waiting = DistillationWindows.__getitems__, DistillationTrainer.compute_loss, []
def noted_read(self, indices):
    if self.cache_url.endswith("train"):
        waiting.append([int(index) for index in indices])
    return read(self, indices)
def noted_loss(self, model, *others, **more):
    if model.training:
        if str(self.state.global_step) == os.environ.get("STOP"):
            os._exit(9)
        with open(os.environ["NOTES"] + os.environ.get("RANK", ""), "a") as notes:
            print(json.dumps([self.state.global_step, waiting.pop(0)]), file=notes)
    return loss(self, model, *others, **more)
train = DistillationTrainer.train
def noted_train(self, *others, **more):
    waiting.clear()  # what was read before, for a bound on tails
    return train(self, *others, **more)
DistillationWindows.__getitems__, DistillationTrainer.compute_loss = noted_read, noted_loss
DistillationTrainer.train = noted_train
train_student(sys.argv[1:])
"""


def ranks(number: int, code: str | None, *words: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Several processes of one group, as torchrun starts them; where one fails, the others are ended.

    Each runs `code` with these words as arguments or, without one, the console script that the words begin with.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
    if number > 1:
        common |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    started = []
    for rank in range(number):
        variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else common
        started.append(start(*words, **variables) if code is None else start_code(code, *words, **variables))
    deadline = time.monotonic() + 300
    while any(one.poll() is None for one in started):
        if any(one.poll() for one in started) or time.monotonic() > deadline:
            time.sleep(1)
            for one in started:
                one.kill()
        time.sleep(0.1)
    return [one.end() for one in started]


def windows_read(notes: Path) -> dict[int, list[int]]:
    """By step, the windows that `NOTED` processes read: one micro-batch after the other."""
    files = sorted(notes.parent.glob(f"{notes.name}*"))
    by_rank = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    read: dict[int, list[int]] = {}
    for together in zip(*by_rank, strict=True):
        assert len({step for step, _ in together}) == 1, "the processes are at the same step"
        read.setdefault(together[0][0], []).extend(window for _, windows in together for window in windows)
    return read
