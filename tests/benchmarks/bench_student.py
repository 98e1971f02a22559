"""A student's step from the cache, against plain cross-entropy, targets that lie in memory, and a live teacher.

Two settings. With the demo's student the whole trainer runs, loader and all, to see whether reading is hidden. With a
larger one, plain loops of the same steps compare the cache with a live teacher, where the theory is the ratio of the
products that each has to make: forward and backward of the student, and the forward of the teacher.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness import Table, in_child, in_turn, peak_above, ratios, spread

WINDOW = 128
# The demo's: 64 sampled ids of the mean of two teachers, batches of 8 windows.
DEMO_STEPS, DEMO_WARM, DEMO_BATCH, DEMO_ROUNDS = 40, 8, 8, 4
# V = 16,000 as in the seeds' recipes; one teacher of 64 ids.
V, BATCH, STEPS, ROUNDS = 16_000, 8, 3, 4
STUDENT = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHER = {"hidden_size": 512, "intermediate_size": 1_536, "num_hidden_layers": 8, "num_attention_heads": 8}


def tables() -> Iterator[Table]:
    """The demo's step, then the larger one's time and memory."""
    with tempfile.TemporaryDirectory() as folder:
        found, _ = in_child("bench_student", "demo_steps", folder=folder)
        base = found["targets in memory"]
        yield Table(
            "A step of the demo's student, by the trainer",
            ("way", "ms per step", "against targets in memory"),
            [
                (way, spread([1e3 * value for value in taken], 1), spread(ratios(taken, base)))
                for way, taken in found.items()
            ],
            f"{DEMO_BATCH} windows of {WINDOW}, the mean of two teachers, 64 sampled ids, alpha 0, two threads; each "
            f"round trains {DEMO_STEPS} steps and times all but the first {DEMO_WARM}. Plain cross-entropy reads no "
            "targets and has another loss to compute. To reach: from the cache at most 1.05 of targets in memory.",
        )
    with tempfile.TemporaryDirectory() as folder:
        in_child("bench_student", "prepare", folder=folder)
        found, _ = in_child("bench_student", "large_steps", folder=folder)
        peaks = {way: in_child("bench_student", "large_peak", folder=folder, way=way)[0] for way in found["seconds"]}
        base, first = found["seconds"]["plain cross-entropy"], peaks["plain cross-entropy"]
        yield Table(
            "A step of a student at V = 16,000, time and peak memory",
            ("way", "s per step", "time / plain", "peak above the start, MiB", "peak / plain"),
            [
                (
                    way,
                    spread(taken),
                    spread(ratios(taken, base)),
                    f"{peaks[way] / 2**20:,.0f}",
                    f"{peaks[way] / first:.2f}",
                )
                for way, taken in found["seconds"].items()
            ],
            f"{BATCH} windows of {WINDOW}, H = {STUDENT['hidden_size']}, {STUDENT['num_hidden_layers']} layers, AdamW; "
            f"{found['student_parameters'] / 1e6:.0f}M parameters, the live teacher "
            f"{found['teacher_parameters'] / 1e6:.0f}M; reading and collating are part of every step. The peak counts "
            "from before the student (and the live teacher) was made.",
        )
        live, cached = found["seconds"]["live teacher, dense KL"], found["seconds"]["from the cache, fused"]
        theory = (found["student_flops"] + found["teacher_flops"]) / found["student_flops"]
        measured = ratios(live, cached)
        yield Table(
            "The live teacher's step against the cached one",
            ("products, live / cached", "time, live / cached", "measured / theory"),
            [(f"{theory:.2f}", spread(measured), spread([value / theory for value in measured]))],
            "Products: floating-point operations of forward and backward of the student with or without the forward of "
            "the teacher, counted by torch. Above 1 in the last column: the cached step saves more than the teacher's "
            "products, as the dense loss over V falls away too.",
        )


# ---- the demo's student, by the trainer


def demo_steps(folder: str) -> dict[str, list[float]]:
    """Median seconds of a step, by way and round."""
    windows = _demo_cache(folder)
    ways: dict[str, Callable[[], float]] = {
        "targets in memory": lambda: _trained(folder, _in_memory(windows)),
        "from the cache": lambda: _trained(folder, windows),
        "plain cross-entropy": lambda: _trained(folder, windows.without_targets()),
    }
    return in_turn(ways, DEMO_ROUNDS)


def _demo_cache(folder: str) -> Any:
    import logging

    import numpy as np
    import torch
    from support.caches.small import make_corpus
    from transformers import AutoConfig, AutoModelForCausalLM

    from logit_cache.caching.job import CacheJob
    from logit_cache.caching.prepare import open_job
    from logit_cache.engines.this_machine import build_missing
    from logit_cache.recipes.demo import demo_recipe
    from student.data.windows import DistillationWindows

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    positions = DEMO_STEPS * DEMO_BATCH * WINDOW + 1
    url, recipe = f"{folder}/cache", demo_recipe()
    vocabulary = recipe.vocabulary_size
    make_corpus(url, np.random.default_rng(0).integers(0, vocabulary, positions).astype(np.uint16), vocabulary)
    teachers = [f"{folder}/{teacher.name}" for teacher in recipe.teachers]
    for teacher, path in zip(recipe.teachers, teachers, strict=True):
        config = AutoConfig.for_model(**teacher.network.config, vocab_size=vocabulary)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    job = CacheJob(
        cache=url, teacher=tuple(teachers), combine="logit-mean", name="ensemble", k=recipe.kept_ids, device="cpu"
    )
    opened = open_job(job)
    build_missing(opened)
    return DistillationWindows(url, ("ensemble",), WINDOW)


def _in_memory(windows: Any) -> Any:
    """The same windows, read before the first step."""
    from student.data.windows import DistillationWindows, reading_order

    class InMemory(DistillationWindows):
        def __init__(self) -> None:
            self.__dict__.update(windows.__dict__)
            order = list(reading_order(self, DEMO_BATCH))
            self._items = dict(zip(order, windows.__getitems__(order), strict=True))

        def __getitems__(self, indices: Any) -> Any:
            return [self._items[index] for index in indices]

    return InMemory()


def _trained(folder: str, windows: Any) -> float:
    """Median seconds from one step's end to the next one's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback, TrainingArguments

    from logit_cache.recipes.demo import demo_recipe
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member
    from student.training.trainer import DistillationTrainer

    torch.manual_seed(0)
    recipe = demo_recipe()
    vocabulary = recipe.vocabulary_size
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**recipe.student.network.config, vocab_size=vocabulary)
    )
    members = [Member.of(name, entry) for name, entry in windows.entries.items()]
    loss = DistillationLoss(vocabulary, 0.0 if members else 1.0, 1.0, members)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    args = TrainingArguments(
        output_dir=f"{folder}/out", max_steps=DEMO_STEPS, per_device_train_batch_size=DEMO_BATCH, report_to=[],
        learning_rate=2e-3, logging_steps=10_000, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = DistillationTrainer(model, args, windows, loss=loss, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    taken = [after - before for before, after in zip(ends[DEMO_WARM:-1], ends[DEMO_WARM + 1 :], strict=True)]
    return statistics.median(taken)


# ---- a larger student, in plain loops


def prepare(folder: str) -> None:
    """A cache of made-up targets, and a teacher to run live."""
    import torch
    from studies import transfer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    transfer.make(f"{folder}/cache", 0.001)
    LlamaForCausalLM(LlamaConfig(vocab_size=V, **TEACHER)).save_pretrained(f"{folder}/teacher")


def large_steps(folder: str) -> dict[str, Any]:
    """Seconds of a step by way and round, parameters, and floating-point operations of a batch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    steps = {way: _step(folder, way) for way in WAYS}
    for step in steps.values():
        step()
    taken = in_turn({way: lambda step=step: _timed(step) for way, step in steps.items()}, ROUNDS)
    student, teacher = _student(), _teacher(folder)
    ids = torch.randint(V, (BATCH, WINDOW))
    with FlopCounterMode(display=False) as of_student:
        student(input_ids=ids).logits.sum().backward()
    with FlopCounterMode(display=False) as of_teacher, torch.no_grad():
        teacher(input_ids=ids)
    return {
        "seconds": taken,
        "student_parameters": sum(parameter.numel() for parameter in student.parameters()),
        "teacher_parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "student_flops": of_student.get_total_flops(),
        "teacher_flops": of_teacher.get_total_flops(),
    }


def large_peak(folder: str, way: str) -> int:
    """Bytes by which making the models of a way and a few of its steps raise the process's peak."""
    _student()  # what is imported on the way is no part of the peak

    def run() -> None:
        step = _step(folder, way)
        for _ in range(STEPS):
            step()

    return peak_above(run)


WAYS = ("plain cross-entropy", "from the cache, logits held", "from the cache, fused", "live teacher, dense KL")


def _timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - began) / STEPS


def _student() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **STUDENT)).train()


def _teacher(folder: str) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(f"{folder}/teacher").eval().requires_grad_(False)


def _step(folder: str, way: str) -> Callable[[], None]:
    """One optimizer step, reading its batch from the cache."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    from student.data.batches import collate
    from student.data.windows import DistillationWindows, reading_order
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member
    from student.training.bound_forward import bind_loss

    cached = way.startswith("from the cache")
    windows = DistillationWindows(f"{folder}/cache", ["a"] if cached else [], WINDOW)
    model = _student()
    teacher = _teacher(folder) if way.startswith("live") else None
    if cached:
        members = [Member.of(name, entry) for name, entry in windows.entries.items()]
        bind_loss(model, DistillationLoss(V, 0.5, 1.0, members), "on" if way.endswith("fused") else "off")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = DataLoader(windows, BATCH, sampler=reading_order(windows, BATCH), collate_fn=collate, drop_last=True)

    def batches() -> Iterator[Any]:
        while True:
            yield from loader

    stream = batches()

    def step() -> None:
        batch = next(stream)
        labels = batch["labels"].flatten()
        if cached:
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"], targets=batch["targets"]).loss
        else:
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    of_teacher = teacher(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)
                    of_teacher = torch.log_softmax(of_teacher, 1)
                kl = F.kl_div(torch.log_softmax(logits, 1), of_teacher, reduction="batchmean", log_target=True)
                loss = 0.5 * loss + 0.5 * kl
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    print(json.dumps([table.markdown() for table in tables()], indent=1))
