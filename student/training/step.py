"""How many windows an optimizer step has, and how a step is cut up over processes and micro-batches.

Legend: `G` windows of a step over all processes, `W` processes, `B` windows that a process has at once, `A`
micro-batches: ``G = B * W * A``.

G is part of what a run learns; B, W and A are how it is computed, and follow from G where that is given. So a run can
go on with another number of processes, and reads what it would have read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from storage.errors import InputError
from student.job import StudentJob

# What changes how a step is computed and not what is learned from it: no part of a run's identity.
CUTTING = frozenset(
    {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
    | {f"ddp_{name}" for name in ("backend", "timeout", "bucket_cap_mb", "broadcast_buffers", "static_graph")}
    | {"ddp_find_unused_parameters"}
)

# Processes that a refusal names as those that would do.
_NAMED = 8


def windows_per_step(args: TrainingArguments) -> int:
    """Windows of an optimizer step, over all processes and micro-batches."""
    return int(args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


def take_one_device(args: TrainingArguments) -> None:
    """Have a process use one of several GPUs, so that its batch is not multiplied.

    nn.DataParallel copies modules with the bound forward still pointing at the first; torchrun does not.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1


def cut_step(windows: int, processes: int, most: int) -> tuple[int, int]:
    """(windows at once, micro-batches) of a process, the first at most `most` and as large as divides its share.

    Raises InputError where the processes cannot have equal shares of the windows.
    """
    share, rest = divmod(windows, processes)
    if rest:
        fitting = [n for n in range(1, min(windows, 2 * processes) + 1) if windows % n == 0][-_NAMED:]
        steps = " or ".join(f"{n * processes:,}" for n in (share, share + 1) if n)
        raise InputError(
            f"a step of {windows:,} windows cannot be shared equally by {processes} processes: "
            f"{', '.join(map(str, fitting))} processes would do, or --windows-per-step {steps} in a new --output-dir"
        )
    at_once = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
    return at_once, share // at_once


def divide_step(job: StudentJob, args: TrainingArguments, recorded: Mapping[str, Any] | None = None) -> str | None:
    """Cut the step of a job for the processes that there are, in `args`; a line to say where a recorded step decides.

    recorded: `windows_per_step` and `processes` of the run that the output directory holds, if any. A job that names
    no step asks for that of its first launch: with another number of processes the recorded step is kept, with the
    same number the job's own is taken, and is another run where it differs.

    Raises InputError where the step cannot be cut.
    """
    take_one_device(args)
    if getattr(args.accelerator_config, "split_batches", False):
        raise InputError(
            "accelerator_config split_batches would make a batch that of all processes together: leave it out, and "
            "give --windows-per-step"
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
            f"a step of {asked:,} windows over {processes} process(es) has {micro_batches} micro-batch(es) of "
            f"{at_once}, and deepspeed has been told otherwise: set per_device_train_batch_size {at_once} and "
            f"gradient_accumulation_steps {micro_batches}, and leave --windows-per-step out"
        )
    args.per_device_train_batch_size, args.gradient_accumulation_steps = at_once, micro_batches
    if job.windows_per_step is not None:
        return None
    return (
        f"{job.output_dir}: this run has steps of {asked:,} windows, which {processes} process(es) now compute in "
        f"{micro_batches} micro-batch(es) of {at_once}"
    )
