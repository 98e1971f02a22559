"""Defaults of fine-tuning: what a job leaves open is chosen otherwise where its student starts from weights.

Learning rates from scratch would undo what the weights hold, and short windows would hide the contexts that they know.
Warm-up, schedule and number of epochs are those of a new student: 5 % and a cosine suit both.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from storage import LogitCache
from student.data.available import Available, available_now
from student.data.blocks import Blocks
from student.data.packing import Packing
from student.job import StudentJob
from student.models.configuration import has_weights, positions_of, read_config
from student.training.arguments import DEFAULTS, training_values, trains_adapter
from student.training.inputs import packs_documents

_FINE_TUNING = {"learning_rate": 2e-5, "weight_decay": 0.0}
# The best rate of a LoRA is about ten times that of all weights, at every rank (Schulman et al. 2025, "LoRA Without
# Regret").
_ADAPTER = {**_FINE_TUNING, "learning_rate": 2e-4}
_WINDOW = "window_tokens"
_PACK = "pack_documents"
_AVAILABLE = "available"
# Tokens of a window where no cached teacher has a context.
_WINDOW_TOKENS = 1024


def open_fields(job: StudentJob, record: Mapping[str, Any], swept: Collection[str] = ()) -> dict[str, Any]:
    """Values of the fields that a job leaves open: whether documents share windows; what is committed of its teachers,
    where it trains on that; and, of one from weights, learning rate, weight decay, positions of a window.

    record: of the run or sweep that the output directory holds (empty: none); what it was started with holds, as what
    earlier versions started has the defaults of a new student.
    swept: parameters of a sweep, which are not open.
    Raises the errors of opening the job's caches and of reading its model's configuration.
    """
    given = {*job.training, *job.model_fields_set, *swept}
    of_weights = (*_FINE_TUNING, _WINDOW) if has_weights(job.model) else ()
    names = [name for name in (_PACK, *of_weights) if name not in given]
    available = {_AVAILABLE: _available(job, record)} if job.available is True else {}
    if record:
        return {name: _recorded(record, name) for name in names} | available
    # Each trial of a sweep follows its own fields: a scale of the loss may need windows of one document.
    packs = None if swept else packs_documents(job)
    chosen: dict[str, Any] = {_PACK: packs, **(_ADAPTER if trains_adapter(job) else _FINE_TUNING)}
    there = available.get(_AVAILABLE) or (job.available if isinstance(job.available, dict) else {})
    return {name: chosen[name] if name in chosen else _window_tokens(job, there) for name in names} | available


def filled(job: StudentJob, values: Mapping[str, Any]) -> StudentJob:
    """The job with the values of `open_fields`."""
    if not values:
        return job
    own = {name: value for name, value in values.items() if name in StudentJob.model_fields}
    training = {name: value for name, value in values.items() if name not in own}
    return job.model_copy(update={**own, "training": {**job.training, **training}})


def described(job: StudentJob, values: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """The line for the log about the values of `open_fields` of a job from weights; [] where none was open."""
    values = {name: value for name, value in values.items() if name not in (_PACK, _AVAILABLE)}
    if not values:
        return []
    words = {
        "learning_rate": "learning rate {:g}",
        "weight_decay": "weight decay {:g}" if values.get("weight_decay") else "no weight decay",
        _WINDOW: "windows of {:,} tokens",
    }
    shown = ", ".join(words[name].format(value) for name, value in values.items())
    source = "as this folder was started" if record else "defaults of fine-tuning"
    return [f"{job.model} starts from weights: {shown} ({source})"]


def _available(job: StudentJob, record: Mapping[str, Any]) -> Available:
    """What was committed when the run or the sweep was started; now, for a new one."""
    found = (record.get("identity", {}) | record.get("launch", {})).get(_AVAILABLE)
    if found is None:
        return available_now(LogitCache.open(job.cache), [teacher.name for teacher in job.teachers])
    return {name: tuple((start, stop) for start, stop in ranges) for name, ranges in found.items()}


def _recorded(record: Mapping[str, Any], name: str) -> Any:
    """A run's identity has every field; a sweep's launch has those that were open, if this version started it."""
    found = record["identity"] | record.get("launch", {})
    if name in record.get("launch", {}):
        return record["launch"][name]
    earlier = {_PACK: False, _WINDOW: StudentJob.model_fields[_WINDOW].default, **DEFAULTS}[name]
    value = found.get(f"training.{name}", found.get(name))
    return earlier if value is None else value


def _window_tokens(job: StudentJob, available: Available) -> int:
    """The longest context of the job's cached teachers, within what its models and its texts have, and no longer than
    leaves an epoch the windows of a step."""
    cache = LogitCache.open(job.cache)
    seen = [cache.teacher(teacher.name).entry.windowing for teacher in job.teachers]
    contexts = [windowing.context_tokens for windowing in seen]
    begun = bool(job.bos_each_window) or any(windowing.begin_id is not None for windowing in seen)
    limits = [positions_of(read_config(model)) for model in (job.model, *job.live_teachers)]
    positions = [limit - begun for limit in limits if limit]
    texts = [LogitCache.open(url).record.corpus.positions - 1 for url in (job.cache, job.eval_cache) if url]
    window = max(1, min([max(contexts, default=_WINDOW_TOKENS), *positions, *texts]))
    isolated = job.isolate_documents or any(windowing.isolate_documents for windowing in seen)
    starts = cache.document_starts if isolated else None
    total, step = cache.record.corpus.positions, _step_windows(job)
    window = min(window, max(1, (total - 1) // step))
    # Windows at a random offset, and documents shorter than a window, leave fewer, or share some.
    # And so does what is not committed yet.
    committed = available.values()
    while window > 1 and _windows(Blocks.of(total, starts, window, job.offset, job.seed, committed), job) < step:
        window = window * 15 // 16
    return window


def _windows(blocks: Blocks, job: StudentJob) -> int:
    if len(blocks.starts) == 1 or not packs_documents(job):
        return len(blocks)
    sizes = blocks.lengths(np.arange(len(blocks)))
    return len(Packing.of(sizes, blocks.window_tokens, group_tokens=int(sizes.sum()) + 1))


def _step_windows(job: StudentJob) -> int:
    """Windows that an epoch must have for a step, over all processes; 1 where a last, smaller step is taken too."""
    values = training_values(job)
    if not values["dataloader_drop_last"]:
        return 1
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    of_process: int = values["per_device_train_batch_size"] * values.get("gradient_accumulation_steps", 1)
    return job.windows_per_step or of_process * processes
