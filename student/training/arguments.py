"""Which fields of transformers.TrainingArguments a run may set, our defaults for them, and which are reserved."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from storage.errors import InputError
from student.data.windows import DistillationWindows
from student.foreign_errors import closest
from student.job import StudentJob
from student.models.loading import adapter_of
from student.training.field_checks import NOTES, TYPES, one_line_refusals, rehearse
from student.training.fsdp import check_fsdp, fsdp_is_asked_for
from student.training.step import check_step, divide_step, steps_of

# From scratch, on small models: the recipes of BabyLlama-2 have this shape at 7e-4. A step always has the same number
# of windows (the rest of an epoch is dropped), so that the number of processes does not change what a step learns.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 1.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    # A NaN or infinite loss must be visible; the filter would log the mean of the others, and synchronise at each step.
    "logging_nan_inf_filter": False,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 1,
    "dataloader_drop_last": True,
    "ddp_find_unused_parameters": False,
    "report_to": "none",
}

# Fields that would contradict the run itself, with the reason or the remedy.
RESERVED: dict[str, str] = {
    "output_dir": "give --output-dir",
    "seed": "give --seed",
    "data_seed": "the reading order follows --seed",
    "train_sampling_strategy": "the reading order is part of the run, so that a student and its control share it",
    "length_column_name": "windows have one length",
    "remove_unused_columns": "targets are no argument of the model's own forward and must not be dropped",
    "label_names": "the labels come from the cache",
    "label_smoothing_factor": "it would replace the distillation loss",
    "use_liger_kernel": "it would replace the forward that holds the distillation loss",
    "average_tokens_across_devices": "the loss is divided by the trained tokens of all processes together",
    "resume_from_checkpoint": "a run with the same --output-dir resumes by itself",
    "ignore_data_skip": "a resumed run would read other windows than an uninterrupted one",
    "save_only_model": "an interrupted run could not resume without its optimizer",
    "disable_tqdm": "a bar is shown on a terminal, plain lines elsewhere",
    "auto_find_batch_size": "a step has a fixed number of windows: give --windows-per-step, and as "
    "per_device_train_batch_size the most that fit in memory",
    "parallelism_config": "launch with accelerate or torchrun instead",
    "do_train": "the command trains",
    "do_eval": "give --eval-cache",
    "do_predict": "there is no prediction step",
    "local_rank": "torchrun sets it",
    "enable_jit_checkpoint": "a run that is told to end would be published as finished; checkpoints are written anyway",
    "dataloader_in_order": "the reading order is part of the run",
    "liger_kernel_config": "use_liger_kernel would replace the forward that holds the distillation loss",
    "use_cache": "training reads no key-value cache; the saved model keeps the setting of its configuration",
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "the model is whole when the run has ended, and not in its checkpoints: upload --output-dir then (hf upload)",
    ),
    **dict.fromkeys(
        ("fp16_full_eval", "bf16_full_eval"), "held-out figures are computed in the precision of training (fp16, bf16)"
    ),
    **dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        "held-out figures are sums, for which no predictions are kept",
    ),
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics"), "held-out figures are the same for every run"),
}

# Fields of logging, checkpoint retention and data loading, which do not change what a run learns: they may differ
# when it resumes.
PRESENTATION = frozenset(
    {"report_to", "run_name", "project", "log_level", "log_level_replica", "logging_steps", "save_total_limit"}
    | {f"dataloader_{name}" for name in ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory")}
)

# Loggers that transformers supports and never lists as installed.
_NOT_LISTED = {"azure_ml", "flyte"}

# Variables that launchers, torchrun and those of MPI, set for the processes of one group.
_LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def training_values(job: StudentJob) -> dict[str, Any]:
    """The job's training fields over the defaults, checked. Raises InputError naming the field and the remedy."""
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    values = dict(DEFAULTS)
    for name, given in job.training.items():
        if name in RESERVED:
            raise InputError(f"training field {name!r} cannot be set: {RESERVED[name]}")
        if name not in fields:
            hint = closest(name, [n for n in fields if n not in RESERVED]) or "; see transformers.TrainingArguments"
            raise InputError(f"there is no training field {name!r}{hint}")
        values[name] = _checked(name, TYPES.get(name, fields[name].type), given)
    metric = str(values.get("metric_for_best_model") or "loss")
    # The base class takes every metric for better when larger unless its name ends in "loss".
    values.setdefault("greater_is_better", metric.removeprefix("eval_") == "accuracy")
    if not torch.accelerator.is_available():
        values.setdefault("use_cpu", True)
    if values.get("use_cpu"):
        values.setdefault("dataloader_pin_memory", False)
    elif "dataloader_num_workers" not in values:
        # One worker that prefetches for a GPU. More would each decode every chunk: a batch has windows of all lanes.
        values["dataloader_num_workers"] = 1
        values.setdefault("dataloader_prefetch_factor", 4)
        values.setdefault("dataloader_persistent_workers", True)
    _check_adapter(job, values)
    _check_evaluation(job, values)
    _check_reporting(values["report_to"])
    return values


def trains_adapter(job: StudentJob) -> bool:
    """Whether a job trains an adapter: a new one, or that in the directory of its model. Raises InputError."""
    return adapter_of(job.model, job.lora) is not None or job.lora is not None


def _check_adapter(job: StudentJob, values: Mapping[str, Any]) -> None:
    adapts = trains_adapter(job)
    if job.merge and not adapts:
        raise InputError(f"--merge merges a LoRA, and {job.model} is trained whole: leave it out, or give --lora")
    if adapts and values.get("deepspeed"):
        raise InputError("training field 'deepspeed' cannot be set for a LoRA: start several processes without it")


def training_arguments(job: StudentJob, values: Mapping[str, Any]) -> TrainingArguments:
    """Build the TrainingArguments, which joins the process group, if there is one. Raises InputError.

    Returns when every process has joined: the first keeps the addresses of all, and a refusal would end it while the
    others still ask for them.
    """
    if not any(os.environ.get(name) for name in _LAUNCHED):
        # A single process, which may resume a run of several, has no process group to choose a backend for.
        values = {name: value for name, value in values.items() if name != "ddp_backend"}
    with one_line_refusals():
        args = TrainingArguments(
            output_dir=job.output_dir,
            seed=job.seed,
            remove_unused_columns=False,
            # The base class's bar writes its log lines to stdout, where a report may be expected.
            disable_tqdm=True,
            **values,
        )
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()
    return args


def checked_arguments(
    job: StudentJob, values: Mapping[str, Any], windows: DistillationWindows, recorded: Mapping[str, Any] | None = None
) -> tuple[TrainingArguments, list[str]]:
    """The TrainingArguments of a job over its windows, and lines for the log; what they ask for has been tried out.

    recorded: as for `divide_step`. Raises InputError.
    """
    args = training_arguments(job, values)
    check_fsdp(args)
    if job.merge and fsdp_is_asked_for(args):
        raise InputError(
            "--merge needs the whole model in one process, and fsdp shards it: leave --merge out, and merge the saved "
            "adapter (merge_and_unload in peft)"
        )
    note = divide_step(job, args, recorded)
    check_step(windows, args)
    rehearse(args, steps_of(windows, args))
    return args, [note] if note else []


def _checked(name: str, hint: Any, given: Any) -> Any:
    config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=config)
        # True is no 1 for a field that takes numbers.
        value = adapter.validate_python(given, strict=isinstance(given, bool) or None)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        note = f"; {NOTES[name]}" if name in NOTES else ""
        raise InputError(f"training field {name!r}: {message} (found {given!r}{note})") from None
    return getattr(value, "value", value)


def _check_evaluation(job: StudentJob, values: Mapping[str, Any]) -> None:
    evaluates = str(values.get("eval_strategy", "no")) != "no" or values.get("eval_on_start")
    if (evaluates or values.get("load_best_model_at_end")) and job.eval_cache is None:
        raise InputError("evaluating during training needs a held-out cache: give --eval-cache")
    metric = values.get("metric_for_best_model")
    if metric is None and values["save_strategy"] == "best":
        raise InputError("save_strategy best judges checkpoints by a held-out figure: give metric_for_best_model")


def _check_reporting(asked: Any) -> None:
    """Raise InputError for a logger of metrics that transformers does not know, or whose package is not there."""
    names = {asked} if isinstance(asked, str) else set(asked or ())
    names -= {"none", "all"}
    unknown = sorted(names - INTEGRATION_TO_CALLBACK.keys())
    if unknown:
        raise InputError(
            f"report_to {unknown[0]!r} is not known; there is: none, all, {', '.join(INTEGRATION_TO_CALLBACK)}"
        )
    if names:
        installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
        for name in sorted(names - {*installed, *_NOT_LISTED}):
            raise InputError(f"report_to {name} needs a package that is not installed: pip install {name}")
