"""The optimizer step: how many windows it has, and how processes and micro-batches share them.

Legend: `G` windows of a step over all processes, `W` processes, `B` windows of a micro-batch, `A` micro-batches
(gradient accumulation): ``G = B * W * A``.

G decides what a run learns; B, W and A only how it is computed, and follow from G where that is given. So a run can
resume with another number of processes, and reads the same windows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from storage.errors import InputError
from storage.text import counted
from student.data.windows import DistillationWindows, reading_order
from student.job import StudentJob

# Fields that change how a step is computed and not what it learns: no part of a run's identity.
COMPUTE_ONLY = frozenset(
    {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
    | {f"ddp_{name}" for name in ("backend", "timeout", "bucket_cap_mb", "broadcast_buffers", "static_graph")}
    | {"ddp_find_unused_parameters"}
)

# Process counts that the error message suggests, at most.
_SUGGESTED = 8


def windows_per_step(args: TrainingArguments) -> int:
    """Windows of an optimizer step, over all processes and micro-batches."""
    return int(args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


def take_one_device(args: TrainingArguments) -> None:
    """Make a process use one of several visible GPUs, so that nn.DataParallel does not multiply its batch.

    DataParallel's replicas keep the bound forward of the first module; torchrun starts a process per GPU instead.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


def cut_step(windows: int, processes: int, most: int) -> tuple[int, int]:
    """Split a step: (windows of a micro-batch, micro-batches) per process.

    The micro-batch is the largest divisor of the process's share that is at most `most`. Raises InputError where
    `windows` is no multiple of `processes`.
    """
    share, rest = divmod(windows, processes)
    if rest:
        fitting = [n for n in range(1, min(windows, 2 * processes) + 1) if windows % n == 0][-_SUGGESTED:]
        steps = " or ".join(f"{n * processes:,}" for n in (share, share + 1) if n)
        raise InputError(
            f"a step of {windows:,} windows cannot be shared equally by {processes} processes: "
            f"{', '.join(map(str, fitting))} processes would do, or --windows-per-step {steps} in a new --output-dir"
        )
    at_once = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    return at_once, share // at_once


def divide_step(job: StudentJob, args: TrainingArguments, recorded: Mapping[str, Any] | None = None) -> str | None:
    """Set micro-batch and gradient accumulation in `args`; returns a line to log where a recorded step decides.

    recorded: `windows_per_step` and `processes` of the run that the output directory holds, if any. A job that names
    no step asks for that of its first launch: with another number of processes the recorded step is kept, with the
    same number the job's own is taken, and is another run where it differs.

    Raises InputError where the step cannot be split.
    """
    take_one_device(args)
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name, False):
            raise InputError(
                f"accelerator_config {name} would divide batches that each process reads for itself: leave it out, and "
                "give --windows-per-step"
            )
    if "num_steps" in (getattr(args.accelerator_config, "gradient_accumulation_kwargs", None) or {}):
        raise InputError(
            "accelerator_config gradient_accumulation_kwargs num_steps would change the step behind the run's back: "
            "give gradient_accumulation_steps or --windows-per-step"
        )
    asked = job.windows_per_step
    own, most, processes = windows_per_step(args), args.train_batch_size, args.world_size
    if asked is None:
        recorded = recorded or {}
        kept = recorded.get("windows_per_step")
        if not isinstance(kept, int) or kept == own or recorded.get("processes") == processes:
            return None
        asked = kept
    at_once, micro_batches = cut_step(asked, processes, most)
    if (at_once, micro_batches) != (most, args.gradient_accumulation_steps) and args.deepspeed:
        raise InputError(
            f"a step of {asked:,} windows over {counted(processes, 'process')} has "
            f"{counted(micro_batches, 'micro-batch')} of "
            f"{at_once}, and deepspeed is configured otherwise: set per_device_train_batch_size {at_once} and "
            f"gradient_accumulation_steps {micro_batches}, and leave --windows-per-step out"
        )
    args.per_device_train_batch_size, args.gradient_accumulation_steps = at_once, micro_batches
    if job.windows_per_step is not None:
        return None
    return (
        f"{job.output_dir}: this run has steps of {asked:,} windows, now over {counted(processes, 'process')} in "
        f"{counted(micro_batches, 'micro-batch')} of {at_once}"
    )


def check_step(windows: DistillationWindows, args: TrainingArguments) -> None:
    """Raise InputError where the windows of an epoch are too few for a single step."""
    step = windows_per_step(args)
    if args.dataloader_drop_last and len(windows) < step:
        raise InputError(
            f"{windows.cache_url}: {counted(len(windows), 'window')} of {windows.window_tokens} tokens, fewer "
            f"than the {step} of one step over {counted(args.world_size, 'process')}: take a smaller "
            "--windows-per-step, per_device_train_batch_size or window"
        )


def steps_of(windows: DistillationWindows, args: TrainingArguments) -> int:
    """Optimizer steps of a whole run."""
    if args.max_steps > 0:
        return args.max_steps
    step = windows_per_step(args)
    per_epoch = -(-len(reading_order(windows, step, whole_steps=args.dataloader_drop_last)) // step)
    return math.ceil(args.num_train_epochs * per_epoch)


def positions_seen(
    windows: DistillationWindows, args: TrainingArguments, steps: int
) -> tuple[int, int, dict[str, int]]:
    """Positions read in the first `steps` steps, those of them that are trained on, and, by teacher, those that it
    teaches: their numbers follow from the order, also for a resumed run.

    A teacher whose record does not say where it has targets is not among them.
    """
    step = windows_per_step(args)
    order = reading_order(windows, step, whole_steps=args.dataloader_drop_last)
    steps_per_epoch = -(-len(order) // step)
    total = trained = 0
    taught = {name: 0 for name, entry in windows.entries.items() if entry.targets.positions != "some"}
    for epoch in range(-(-steps // steps_per_epoch)):
        done = min(steps_per_epoch, steps - epoch * steps_per_epoch)
        read = min(done * step, len(order))
        numbers = order.permutation(epoch)[:read]
        indices = (numbers + epoch * len(windows)).tolist()
        total += windows.positions_read(indices)
        of_epoch = windows.trained_positions(indices)
        trained += of_epoch
        for name in taught:
            everywhere = windows.entries[name].targets.long_documents is None and windows.taught_sources(name) is None
            taught[name] += of_epoch if everywhere else windows.taught_positions(indices, name)
    return total, trained, taught
