"""Training fields: every number has a range, and what the libraries would find out late is found out at once."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from support.runs import job_in
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from storage.errors import InputError
from student.training.arguments import RESERVED, training_arguments, training_values
from student.training.field_checks import TYPES, rehearse
from student.training.run import train

TYPED = {field.name: {field.type, *typing.get_args(field.type)} for field in dataclasses.fields(TrainingArguments)}
NUMBERS = sorted(name for name, types in TYPED.items() if types & {int, float})
WHOLE = {name for name, types in TYPED.items() if int in types}
# Where 0 has a meaning: none, or off.
ZEROS = {
    "adam_beta1": 0, "adam_beta2": 0, "weight_decay": 0, "warmup_steps": 0, "max_grad_norm": 0,
    "neftune_noise_alpha": 0, "eval_delay": 0, "dataloader_num_workers": 0, "learning_rate": 0,
}  # fmt: skip
NEVER = [math.nan, math.inf, -math.inf, -0.5, -2, -(10**30), "abc", "nan", "", [1], True]


def checked(name: str, value: Any) -> Any:
    return training_values(job_in(Path("none"), Path("out"), training={name: value}))[name]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_outside_of_its_range_is_one_line(name: str) -> None:
    """The property over all fields of this version of transformers: one that a later version adds fails here."""
    if name in RESERVED:
        with pytest.raises(InputError, match=f"training field '{name}' cannot be set: "):
            checked(name, 1)
        return
    outside = list(NEVER)
    outside += [] if name in ZEROS else [0]
    outside += [0.5, 10**30] if name in WHOLE else []
    outside += [1, 1.5] if name in ("adam_beta1", "adam_beta2") else []
    outside += [1.5] if name.endswith("_steps") and name not in WHOLE else []
    for value in outside:
        with pytest.raises(InputError) as caught:
            checked(name, value)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"training field '{name}': ")
        assert f"(found {value!r}" in line


def test_the_ends_of_the_ranges_make_sound_runs(world: Path, tmp_path: Path) -> None:
    """What is not refused: zeros, and numbers as large as they may be."""
    large = {
        "logging_steps": 1 << 53, "save_steps": 1 << 53, "save_total_limit": 1 << 53, "eval_delay": 1e300,
        "torch_empty_cache_steps": 1 << 53, "ddp_timeout": 1 << 31, "ddp_bucket_cap_mb": 1 << 20, "weight_decay": 1e3,
        "adam_epsilon": 1e30, "num_train_epochs": 1e9, "max_grad_norm": 1e300,
    }  # fmt: skip
    for name, fields in (("zeros", ZEROS), ("large", large), ("late", {"warmup_steps": 1 << 53})):
        report = train(job_in(world, tmp_path / name, training={"logging_steps": 1, **fields, "max_steps": 3}))
        assert report.steps == 3
        assert all(math.isfinite(entry["loss"]) and entry["loss"] < 5 for entry in report.train_log)


def test_what_only_the_layers_of_a_model_refuse_leaves_nothing(world: Path, tmp_path: Path) -> None:
    fields = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 0}}
    with pytest.raises(InputError, match="transformers refuses these training fields: integer modulo by zero"):
        train(job_in(world, tmp_path / "out", training=fields))
    assert not (tmp_path / "out").exists()


def test_a_field_takes_what_its_type_says_and_nothing_like_it() -> None:
    assert checked("max_steps", -1) == -1
    assert checked("max_steps", "12") == 12
    assert checked("warmup_steps", 0.05) == 0.05
    assert checked("fsdp", True) is True
    assert checked("eval_steps", None) is None
    assert set(TYPES) - {"warmup_ratio"} <= TYPED.keys(), "transformers 5.10 has that one, too"


def rehearsed(steps: int = 100, **training: Any) -> None:
    job = job_in(Path("none"), Path("out"), training={"use_cpu": True, **training})
    rehearse(training_arguments(job, training_values(job)), steps)


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_every_optimizer_is_there_or_named(optim: str) -> None:
    """As transformers itself asks for its package; those of torch are there."""
    if optim in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"):
        rehearsed(optim=optim)
    else:
        with pytest.raises(InputError, match=f"optim {optim}: .*(install|import)"):
            rehearsed(optim=optim)


KWARGS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 10},
}


@pytest.mark.parametrize("schedule", [name.value for name in SchedulerType])
def test_every_schedule_has_what_it_needs_and_nothing_else(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student.training.arguments._check_evaluation", lambda job, values: None)
    common = {"lr_scheduler_type": schedule, "eval_strategy": "steps"}
    rehearsed(**common, lr_scheduler_kwargs=KWARGS.get(schedule))
    if schedule in KWARGS:
        with pytest.raises(InputError, match=f"lr_scheduler_type {schedule}: "):
            rehearsed(**common)
    with pytest.raises(InputError, match=f"lr_scheduler_type {schedule}: .*(no_such|takes no lr_scheduler_kwargs)"):
        rehearsed(**common, lr_scheduler_kwargs={**KWARGS.get(schedule, {}), "no_such": 1})


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "does not read 'momentun'"),
        ({"optim_args": "momentum=0.9"}, "optim adamw_torch_fused: it does not read 'momentum'"),
        ({"optim": "sgd", "optim_args": "momentum"}, "key=value"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, "could not convert"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "Invalid momentum"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1, "power": 2}},
            "expected a learning rate of 0 or more at each of 100 steps, found -",
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "unsupported operand"),
        ({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": "x"}, "lr_scheduler_type warmup"),
        ({"optim_target_modules": ["q_proj"]}, "optim adamw_torch_fused has no target modules"),
        ({"dataloader_persistent_workers": True}, "needs num_workers > 0"),
        ({"dataloader_multiprocessing_context": "fork"}, "multi-process loading"),
        ({"accelerator_config": {"batches": 1}}, "transformers refuses these training fields"),
    ],
    ids=str,
)
def test_what_the_libraries_refuse_or_leave_aside_is_refused(training: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        rehearsed(**training)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_arguments_of_an_optimizer_that_are_read_are_taken() -> None:
    rehearsed(optim="sgd", optim_args="momentum=0.9, nesterov=false")
    rehearsed(optim="sgd", optim_args="momentum=0.9,nesterov=true")
    rehearsed(optim="rmsprop", optim_args="alpha=0.99")
