"""Sweeps of a recipe's schedules: whether its student is only better than teachers and control that are badly tuned.

BabyLlama-2 (Tastet and Timiryasov 2024) asks it of its own recipe. Each schedule is searched by `train-student --sweep`
around the recipe's values, on the recipe's text: those of the models without distillation, and that of the student,
all of whose trials learn from the one cache that the recipe made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from logit_cache.recipes.published import Model, Recipe
from logit_cache.recipes.record import Role

# The searched range around a recipe's value: a quarter of its learning rate to four times it.
_LEARNING_RATES = 4.0
_WEIGHT_DECAYS = (0.01, 10.0)

SWEPT = ("learning_rate", "weight_decay", "num_train_epochs", "gradient_accumulation_steps")
"""The training fields of a recipe that a search decides; the last by windows per step."""


@dataclass(frozen=True)
class Schedule:
    """One to search. It stands for all models without distillation that have its network and its schedule."""

    role: Role
    name: str
    model: Model

    @property
    def title(self) -> str:
        return f"teacher {self.name}" if self.role == "teacher" else self.name


def schedules(recipe: Recipe) -> list[Schedule]:
    """Those without distillation, each once (control first, which equal teachers are too), then the student's."""
    plain = [Schedule("control", "control", recipe.student)]
    for teacher in recipe.teachers:
        if all((one.model.network, one.model.training) != (teacher.network, teacher.training) for one in plain):
            plain.append(Schedule("teacher", teacher.name, teacher))
    return [*plain, Schedule("student", recipe.student.name, recipe.student)]


def search_space(model: Model) -> dict[str, Any]:
    """The parameters of a search around a model's schedule, as a sweep's file has them."""
    training = model.training
    return {
        "learning_rate": {
            "distribution": "log_uniform",
            "low": training.learning_rate / _LEARNING_RATES,
            "high": training.learning_rate * _LEARNING_RATES,
        },
        "weight_decay": {"distribution": "log_uniform", "low": _WEIGHT_DECAYS[0], "high": _WEIGHT_DECAYS[1]},
        "num_train_epochs": {
            "distribution": "int",
            "low": max(1, training.epochs // 2),
            "high": training.epochs + training.epochs // 2,
        },
        "windows_per_step": {"choices": [training.batch // 2, training.batch, 2 * training.batch]},
    }


def sweep_file(schedule: Schedule, job: Mapping[str, Any], trials: int, pairs: str | None, limit: int | None) -> bytes:
    """The file of `train-student --sweep`; `job`: the fields that all trials share."""
    search: dict[str, Any] = {
        "title": f"Schedules of the {schedule.title}",
        "trials": trials,
        "metric": "loss",
        "sampler": "tpe",
        "keep_checkpoints": False,
        "parameters": search_space(schedule.model),
    }
    search |= {} if pairs is None else {"pairs": pairs}
    search |= {} if limit is None else {"pairs_limit": limit}
    return yaml.safe_dump({**job, "sweep": search}, sort_keys=False, allow_unicode=True).encode()


def sweep_folder(seed: int, schedule: Schedule) -> str:
    """Of a schedule's sweep, relative to the recipe's folder; its file has this name with the suffix .yaml."""
    return f"seed-{seed}/sweeps/{schedule.name}"
