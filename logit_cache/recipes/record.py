"""The record of a recipe's run, recipe.json, which the run resumes by and the report reads."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from storage.config import Frozen

Role = Literal["teacher", "student", "control", "live"]


class ModelRecord(Frozen):
    """A model; `run` is its run's folder and `scores` the file of its scores, both relative to the recipe's folder."""

    role: Role
    name: str
    seed: int
    run: str
    scores: str | None = None


class SweepRecord(Frozen):
    """A sweep of a model's schedule; `folder` is relative to the recipe's. Its models have the seed of its runs."""

    role: Role
    name: str
    seed: int
    folder: str


class Caches(Frozen):
    """Paths of the recipe's caches, relative to its folder."""

    train: str | None = None
    held_out: str | None = None


class RecipeRecord(Frozen):
    """The run that was asked for.

    settings       of the recipe, for people
    text           files of training text, and eval_text of held-out text; those of the folder itself relative to it
    pairs          folder of minimal pairs, of which the first `pairs_limit` of each paradigm are scored
    micro_batches  in windows by model name, and under "live" that of the student with live teachers
    at_once        stages that run beside each other, on `threads` threads each; earlier versions ran one at a time
    entries        teacher entries of both caches
    sweeps         of its schedules, where they were asked for
    """

    kind: Literal["recipe"] = "recipe"
    format: Literal[1] = 1
    recipe: str
    scale: str
    title: str
    settings: dict[str, Any] = Field(default_factory=dict)
    text: tuple[str, ...] = ()
    eval_text: tuple[str, ...] = ()
    pairs: str | None = None
    pairs_limit: int | None = None
    micro_batches: dict[str, int] = Field(default_factory=dict)
    at_once: int = 1
    threads: int = 1
    caches: Caches = Caches()
    entries: tuple[str, ...] = ()
    models: tuple[ModelRecord, ...]
    sweeps: tuple[SweepRecord, ...] = ()
