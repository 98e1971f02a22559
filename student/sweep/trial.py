"""The job of a trial, from the sweep's job and the trial's values; and checks of the search space beforehand.

Every trial is a `StudentJob` that `train-student` would run by itself. Parameters of the model become a JSON
configuration: the preset or configuration of the sweep's job with other fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, TrainingArguments

from storage.config import build_config
from storage.errors import InputError
from storage.files import local_path, replace_file
from storage.progress import Log
from student.foreign_errors import closest
from student.job import StudentJob
from student.loss.objective import Objective
from student.models.configuration import check_settings, read_settings
from student.models.presets import PRESETS, preset_settings
from student.sweep.search_space import Choices, Search
from student.training.arguments import PRESENTATION, RESERVED, checked_arguments, training_values
from student.training.inputs import Caches, job_inputs

MODEL = "model."
STEP = "windows_per_step"
OBJECTIVE = frozenset(Objective.model_fields) - {"interpolate_tail"}
WINDOWS = frozenset({"window_tokens", "offset"})
_OF_STEP = (STEP, "per_device_train_batch_size", "gradient_accumulation_steps")

# Prefixes of fields that decide how a run computes or is watched, and not what it learns: the same for all trials of a
# process.
_COMPUTING = (
    *("eval_", "save_", "logging_", "log_", "hub_", "push_", "fsdp", "deepspeed", "bf16", "fp16", "tf32", "debug"),
    *("dataloader_", "ddp_", "torch_compile", "accelerator_", "use_cpu", "full_determinism", "load_best", "include_"),
    *("metric_for", "greater_is", "auto_find", "jit_mode", "torch_empty"),
)
# Fields of a model's configuration that follow from the cache, or do not describe the architecture.
_MODEL_RESERVED = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "model_type", "dtype", "architectures"}
_MODEL_RESERVED |= {"transformers_version", "use_cache", "torch_dtype", "auto_map"}

# Combinations that are checked before a sweep starts; where there are more, the others fail when sampled.
_COMBINATIONS = 256


def check_names(job: StudentJob, search: Search) -> None:
    """Raise InputError for a parameter that does not exist, cannot be swept, or is also fixed elsewhere."""
    given = job.model_fields_set
    training = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in search.parameters:
        where = f"sweep.parameters.{name}"
        words = [value for value in search.parameters[name].probes() if isinstance(value, str)]
        if words and name in (STEP, "window_tokens"):
            raise InputError(f"{where}: {words[0]!r} is impossible: expected a number")
        if name.startswith(MODEL):
            _check_model_name(job, name.removeprefix(MODEL), where)
        elif name in OBJECTIVE | WINDOWS:
            if name in OBJECTIVE and not job.teachers:
                raise InputError(f"{where}: it belongs to the loss with teachers, and no teacher is named: name one")
            if name in given:
                raise InputError(f"{where}: {name} is also fixed as {getattr(job, name)!r}: leave one of the two out")
        elif name == STEP:
            if job.windows_per_step is not None:
                raise InputError(f"{where}: it is also fixed as {job.windows_per_step}: leave one of the two out")
            for other in _OF_STEP[1:]:
                if other in search.parameters or (other == "gradient_accumulation_steps" and other in job.training):
                    raise InputError(f"{where}: it decides {other}, which is also given: leave one of the two out")
        elif name == "gradient_accumulation_steps" and job.windows_per_step is not None:
            raise InputError(f"{where}: windows_per_step {job.windows_per_step} decides it: leave one of the two out")
        elif name in RESERVED:
            raise InputError(f"{where} cannot be swept: {RESERVED[name]}")
        elif name in PRESENTATION or name.startswith(_COMPUTING):
            raise InputError(
                f"{where} cannot be swept: it decides how a run computes or is watched; set it in training:"
            )
        elif name not in training:
            others = [*sorted(training - RESERVED.keys()), *OBJECTIVE, *WINDOWS, STEP]
            hint = closest(name, others) or "; fields of the model are written model.NAME"
            raise InputError(f"{where}: there is no such parameter{hint}")
        elif name in job.training:
            raise InputError(f"{where}: it is also fixed as training: {name}: leave one of the two out")


def _check_model_name(job: StudentJob, name: str, where: str) -> None:
    default = AutoConfig.for_model(base_settings(job)["model_type"])
    known = {*default.to_dict(), *default.attribute_map} - _MODEL_RESERVED
    if name in _MODEL_RESERVED:
        raise InputError(f"{where} cannot be swept: it follows from the cache or is no part of the architecture")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise InputError(
            f"{where}: a {default.model_type} configuration has no such field"
            + (f"; did you mean {MODEL + close[0]!r}?" if close else "")
        )


def base_settings(job: StudentJob) -> dict[str, Any]:
    """The configuration that a job's model starts from. Raises InputError for a model with weights."""
    if job.model in PRESETS:
        return preset_settings(job.model)
    path = local_path(job.model)
    if not path.is_file():
        raise InputError(
            f"{job.model}: fields of the model can be swept where it is a preset or a JSON configuration, not where "
            "weights are loaded"
        )
    return read_settings(path)


def trial_settings(job: StudentJob, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of a trial's model; None where it is the job's own."""
    wanted = {name.removeprefix(MODEL): value for name, value in values.items() if name.startswith(MODEL)}
    if not wanted:
        return None
    settings = base_settings(job)
    aliases = AutoConfig.for_model(settings["model_type"]).attribute_map
    settings = {aliases.get(name, name): value for name, value in settings.items()}
    wanted = {aliases.get(name, name): value for name, value in wanted.items()}
    heads, shared = "num_attention_heads", "num_key_value_heads"
    if heads in wanted and shared not in wanted and settings.get(shared) == settings.get(heads):
        # As many key-value heads as heads is no choice of its own: it stays so.
        settings.pop(shared, None)
    return settings | wanted


def trial_job(job: StudentJob, values: Mapping[str, Any], output_dir: str, model: str | None = None) -> StudentJob:
    """The job of a trial: the fields of the sweep's own, and its values. Raises InputError where they do not agree."""
    fields = job.model_dump(mode="json", include=job.model_fields_set)
    fields |= {name: value for name, value in values.items() if name in OBJECTIVE | WINDOWS}
    fields["training"] = dict(job.training)
    for name, value in values.items():
        if name == STEP:
            fields["training"] |= micro_batches(job, int(value))
        elif name not in OBJECTIVE | WINDOWS and not name.startswith(MODEL):
            fields["training"][name] = value
    fields["output_dir"] = output_dir
    return build_config(StudentJob, fields | ({"model": model} if model else {}), {}, "the trial's job")


def micro_batches(job: StudentJob, windows: int) -> dict[str, int]:
    """A step of about so many windows, in equal micro-batches no larger than the job's."""
    most = int(training_values(job)["per_device_train_batch_size"])
    count = max(1, math.ceil(windows / most))
    return {
        "per_device_train_batch_size": max(1, windows // count),
        "gradient_accumulation_steps": count,
    }


def write_settings(settings: Mapping[str, Any], output_dir: str) -> str:
    """Write a configuration into the sweep's folder, named by 12 digits of its sha256; returns the path."""
    text = json.dumps(dict(settings), indent=1, sort_keys=True) + "\n"
    path = Path(output_dir) / "models" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
    return str(path)


def shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())


def check_space(
    job: StudentJob, search: Search, caches: Caches, special_ids: Mapping[str, int | None], log: Log
) -> None:
    """Check the choices and the ends of the ranges.

    Parameters that depend on each other are checked together, in at most 256 combinations: those of the loss and the
    windows, those of the model. The others are checked one by one, in steps that the search allows. Raises InputError
    for a value that is impossible with every value of the others; combinations that are impossible only together are
    logged, and their trials will fail.
    """

    def objective(values: Mapping[str, Any]) -> None:
        temperature = search.parameters.get("temperature")
        if not isinstance(temperature, Choices | None) and not job.interpolate_tail:
            raise InputError("temperatures between 1 and 2 are not exact; give choices: [1, 2], or interpolate_tail")
        job_inputs(caches, trial_job(job, values, job.output_dir))

    def model(values: Mapping[str, Any]) -> None:
        settings = trial_settings(job, values) or base_settings(job)
        check_settings(
            settings,
            f"{job.model} with {shown(values)}",
            vocabulary_size=caches.windows.vocabulary_size,
            special_ids=special_ids,
            window_tokens=int(values.get("window_tokens", job.window_tokens)),
        )

    def training(values: Mapping[str, Any]) -> None:
        trial = trial_job(job, {**possible, **values}, job.output_dir)
        checked_arguments(trial, training_values(trial), job_inputs(caches, trial).windows)

    names = list(search.parameters)
    of_loss = [name for name in names if name in OBJECTIVE | WINDOWS]
    of_model = [name for name in names if name.startswith(MODEL)]
    possible = _try_out(search, of_loss, objective, log)
    if of_model:
        windows = [name for name in of_loss if name == "window_tokens"]
        possible |= _try_out(search, [*of_model, *windows], model, log)
    others = sorted((name for name in names if name not in of_loss + of_model), key=lambda name: name not in _OF_STEP)
    for name in others:
        found = _try_out(search, [name], training, log)
        possible |= found if name in _OF_STEP else {}
    if not others:
        _try_out(search, [], training, log)


def _try_out(
    search: Search, names: Sequence[str], check: Callable[[Mapping[str, Any]], None], log: Log
) -> dict[str, Any]:
    """Check the values of some parameters in all combinations; returns the first that is possible."""
    probes = [search.parameters[name].probes() for name in names]
    combinations = list(itertools.islice(itertools.product(*probes), _COMBINATIONS))
    whole = len(combinations) == math.prod(map(len, probes))
    wrong: dict[int, str] = {}
    for i, combination in enumerate(combinations):
        try:
            check(dict(zip(names, combination, strict=True)))
        except InputError as error:
            wrong[i] = " ".join(str(error).split())
    possible = [combination for i, combination in enumerate(combinations) if i not in wrong]
    if not wrong:
        return dict(zip(names, possible[0], strict=True))
    if not names:
        raise InputError(wrong[0])
    for column, name in enumerate(names):
        for value in probes[column]:
            having = [i for i, combination in enumerate(combinations) if combination[column] == value]
            if having and all(i in wrong for i in having) and (whole or len(wrong) == len(combinations)):
                raise InputError(f"sweep.parameters.{name}: {value!r} is impossible: {wrong[having[0]]}")
    log(
        f"{len(wrong)} of {len(combinations)} combinations of {', '.join(names)} are impossible, and will fail when "
        f"they are sampled; the first: {wrong[min(wrong)]}"
    )
    return dict(zip(names, possible[0], strict=True))
