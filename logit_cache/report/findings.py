"""The findings of a recipe: its models by role and seed, their paired differences, and the cost of each part.

Every statistic of the page is computed here, from the records in the folders; a missing metric is None. Differences are
paired by seed: models of one seed saw the same data order, and their difference varies less than they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from logit_cache.describe import describe_entry
from logit_cache.recipes.record import Role
from logit_cache.report.folders import Model, RecipeFolder
from logit_cache.report.metrics import Metric, kl_of, pairs_mean, run_seconds
from logit_cache.report.statistics import Spread, spread
from storage.cache.reader import LogitCache
from storage.errors import CacheNotFound
from storage.format.manifest.cache import CacheRecord
from student.report import HeldOutKL, TrainingReport

EQUAL_NATS = 0.01
"""Cached and live are called equal if the interval of their difference is within ± this many nats."""

_ORDER: tuple[Role, ...] = ("teacher", "student", "control", "live")
_LABELS = {"student": "student", "control": "control", "live": "live teachers"}
_LARGEST_BREAK_EVEN = 16


@dataclass(frozen=True)
class Series:
    """The models of one role and name, in the order of their seeds. `style` is the CSS class of its colours."""

    role: Role
    name: str
    label: str
    style: str
    models: tuple[Model, ...]

    @property
    def runs(self) -> list[tuple[int, TrainingReport]]:
        return [(model.seed, model.run) for model in self.models if model.run is not None]

    @property
    def parameters(self) -> int | None:
        return max((run.parameters for _, run in self.runs), default=None)

    def spread(self, metric: Metric) -> Spread | None:
        return spread(map(metric, self.models))

    @property
    def pairs(self) -> Spread | None:
        """Accuracy on minimal pairs: the mean over groups."""
        return self.spread(pairs_mean)

    @property
    def kl_mark(self) -> str:
        """What stands before the KL to the teachers: whether it is a lower bound, or a cross-entropy to them."""
        found = [kl for model in self.models for kl in kl_of(model).values()]
        if any(kl.cross_entropy for kl in found):
            return "CE "
        return "≥ " if any(kl.lower_bound for kl in found) else ""


@dataclass(frozen=True)
class Difference:
    """A metric of a student minus that of the model it is compared with, by seed.

    against    the control, the best teacher of the seed, or the student of live teachers
    teachers   name of the best teacher, by seed
    """

    student: str
    against: Literal["control", "teacher", "live"]
    by_seed: dict[int, float]
    teachers: dict[int, str]

    @property
    def spread(self) -> Spread | None:
        """The spread over seeds; None if no seed has both models."""
        return spread(self.by_seed.values())


@dataclass(frozen=True)
class Entry:
    """A teacher entry as returned by `describe_entry`, and the seconds of its receipts; None if it does not exist."""

    name: str
    found: dict[str, Any] | None
    seconds: float | None
    held_out_seconds: float | None

    @property
    def fidelity(self) -> dict[str, Any] | None:
        return None if self.found is None else self.found["fidelity"]


@dataclass(frozen=True)
class Stage:
    """Time of a stage, by run; None where it was not measured. `style` is that of the stage's series."""

    name: str
    activity: str
    style: str
    seconds: Spread | None


@dataclass(frozen=True)
class HeldOutDistance:
    """KL(teacher || model) of a series to one entry, over its seeds, in nats per token; `kind` says how it is meant."""

    series: Series
    entry: str
    nats: Spread
    kind: Literal["lower bound", "unbiased estimate", "cross-entropy to it"]


@dataclass(frozen=True)
class BreakEven:
    """Seconds of n students: the cache, made once, plus n runs from it; or n runs with live teachers."""

    caching: float
    cached: float
    live: float

    @property
    def students(self) -> float | None:
        """The break-even number of students, not rounded; None if the cache never saves time."""
        return self.caching / (self.live - self.cached) if self.live > self.cached else None

    def rows(self, most: int = _LARGEST_BREAK_EVEN) -> list[tuple[int, float, float]]:
        """(n, from the cache, live), in seconds, for n = 1 to `most`."""
        return [(n, self.caching + n * self.cached, n * self.live) for n in range(1, most + 1)]


@dataclass(frozen=True)
class RecipeFindings(RecipeFolder):
    series: tuple[Series, ...]
    cache: CacheRecord | None
    entries: tuple[Entry, ...]

    @cached_property
    def scored_by_evaluate(self) -> bool:
        """Whether held-out metrics come from `logit-cache evaluate`: if it scored more models than the runs did.

        All models use one source, as the two may read the text in different windows.
        """
        own = sum(model.run is not None and model.run.held_out is not None for model in self.models)
        scored = sum(model.scores is not None and model.scores.held_out is not None for model in self.models)
        return scored > own

    def held_out(self, model: Model) -> dict[str, float | None]:
        """cross_entropy, perplexity, bits_per_byte and ece of a model; empty if it was not measured."""
        scored = model.scores.held_out if model.scores is not None else None
        own = model.run.held_out if model.run is not None else None
        if self.scored_by_evaluate:
            if scored is None:
                return {}
            return {
                "cross_entropy": scored.cross_entropy_per_token,
                "perplexity": scored.perplexity_per_token,
                "bits_per_byte": scored.bits_per_byte,
                "ece": scored.ece,
            }
        return {} if own is None else own.model_dump(include={"cross_entropy", "perplexity", "bits_per_byte", "ece"})

    def metric(self, name: str) -> Metric:
        return lambda model: self.held_out(model).get(name)

    @property
    def loss(self) -> Metric:
        """Held-out cross-entropy in nats per token."""
        return self.metric("cross_entropy")

    @cached_property
    def losses(self) -> tuple[Difference, ...]:
        """Differences of held-out loss in nats per token; below 0, the student is better."""
        return self._differences(self.loss, best=min)

    @cached_property
    def pairs(self) -> tuple[Difference, ...]:
        """Differences of the minimal pairs' mean over groups, as fractions; above 0, the student is better."""
        return self._differences(pairs_mean, best=max)

    def _differences(self, metric: Metric, best: Callable[..., Any]) -> tuple[Difference, ...]:
        found: list[Difference] = []
        for series in self.of("student"):
            own = {model.seed: metric(model) for model in series.models}
            for against in ("control", "teacher", "live"):
                by_seed, teachers = {}, {}
                for seed, value in own.items():
                    if against == "teacher":
                        name, other = self._best_teacher(seed, metric, best)
                    else:
                        counterpart = self.counterpart(against, series.name, seed)
                        name, other = series.name, None if counterpart is None else metric(counterpart)
                    if value is not None and other is not None:
                        by_seed[seed], teachers[seed] = value - other, name
                found.append(Difference(series.label, against, by_seed, teachers if against == "teacher" else {}))
        return tuple(found)

    def of(self, role: str) -> list[Series]:
        return [series for series in self.series if series.role == role]

    def counterpart(self, role: str, name: str, seed: int) -> Model | None:
        """The model to compare a student with: the one of its name, or the only one of that role."""
        found = [model for model in self.models if model.role == role and model.seed == seed]
        chosen = [model for model in found if model.name == name] or found
        return chosen[0] if len(chosen) == 1 else None

    def _best_teacher(self, seed: int, metric: Metric, best: Callable[..., Any]) -> tuple[str, float | None]:
        """Name and metric of a seed's best teacher; teachers of a single seed serve all students. None unless all are
        measured: a missing one might be the best."""
        teachers = [model for model in self.models if model.role == "teacher"]
        if len({model.seed for model in teachers}) > 1:
            teachers = [model for model in teachers if model.seed == seed]
        values = [(metric(model), model.name) for model in teachers]
        if not values or any(value is None for value, _ in values):
            return "", None
        # A diverged teacher is not the best, unless all diverged.
        value, name = best([item for item in values if item[0] is not None and math.isfinite(item[0])] or values[:1])
        return name, value

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Limits of the comparisons: unequal text, tokens, steps or devices, unfinished and resumed runs."""
        found = []
        if len({run.provenance.get("eval_cache") for run in self.runs if run.held_out is not None}) > 1:
            found.append("The models were not all scored on the same held-out text: their losses are not comparable.")
        students = {
            (run.tokens_seen, run.steps) for series in self.series if series.role != "teacher" for _, run in series.runs
        }
        if len(students) > 1:
            found.append("Student, control and live runs did not all see the same number of tokens in the same steps.")
        missing = [m for m in self.models if m.run is None]
        if missing:
            names = ", ".join(f"{m.role} {m.name}, seed {m.seed}" for m in missing[:6])
            more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
            found.append(f"Not finished, and missing from all numbers: {names}{more}.")
        devices = {run.device for series in self.series if series.role in ("student", "live") for _, run in series.runs}
        if len(devices) > 1:
            found.append("Student and live runs were on different devices: their seconds are not comparable.")
        if any(run.resumed_from_step for run in self.runs):
            found.append(
                "Runs that were stopped and resumed did not record their total time: it is left out of the costs."
            )
        return tuple(found)

    @property
    def runs(self) -> list[TrainingReport]:
        return [model.run for model in self.models if model.run is not None]

    @cached_property
    def break_even(self) -> BreakEven | None:
        """Costs of n students, if caching, cached and live runs were all measured.

        Caching is that of the entries that one student reads, over the training text, summed over workers.
        """
        seconds = {entry.name: entry.seconds for entry in self.entries}
        students = [model.run for model in self.models if model.role == "student" and model.run is not None]
        caching = spread(
            sum(value for value in parts if value is not None)
            for parts in ([seconds.get(teacher.name) for teacher in run.job.teachers] for run in students)
            if parts and None not in parts
        )
        cached = spread(run_seconds(m) for m in self.models if m.role == "student")
        live = spread(run_seconds(m) for m in self.models if m.role == "live")
        if caching is None or cached is None or live is None:
            return None
        return BreakEven(caching.mean, cached.mean, live.mean)

    @property
    def stages(self) -> list[Stage]:
        found = [Stage(one.label, "training", one.style, one.spread(run_seconds)) for one in self.of("teacher")]
        for entry in self.entries:
            found.append(Stage(entry.name, "caching of the training text", "", spread([entry.seconds])))
            found.append(Stage(entry.name, "caching of the held-out text", "", spread([entry.held_out_seconds])))
        for one in self.series:
            if one.role != "teacher":
                activity = "training from the cache" if one.role == "student" else "training"
                found.append(Stage(one.label, activity, one.style, one.spread(run_seconds)))
        return found

    @property
    def distances(self) -> list[HeldOutDistance]:
        """Held-out KL to each teacher entry; entries that serve one seed each count as one."""
        found = []
        for series in self.series:
            by_seed = [kl for model in series.models if (kl := kl_of(model))]
            names = list(dict.fromkeys(name for kl in by_seed for name in kl))
            columns = {name: [kl[name] for kl in by_seed if name in kl] for name in names}
            if len(names) > 1 and all(len(kl) == 1 for kl in by_seed):
                columns = {"its seed's entry": [item for kl in by_seed for item in kl.values()]}
            for name, items in columns.items():
                for ours in ([item for item in items if item.cross_entropy == each] for each in (False, True)):
                    if ours:
                        found.append(
                            HeldOutDistance(series, name, Spread(tuple(item.nats for item in ours)), _kind(ours))
                        )
        return found

    @property
    def groups(self) -> list[str]:
        return sorted({name for model in self.models if model.pairs is not None for name in model.pairs.groups})

    @property
    def is_blimp(self) -> bool:
        pairs = [model.pairs for model in self.models if model.pairs is not None]
        return bool(pairs) and all(one.is_blimp for one in pairs)


def _kind(items: list[HeldOutKL]) -> Literal["lower bound", "unbiased estimate", "cross-entropy to it"]:
    if items[0].cross_entropy:
        return "cross-entropy to it"
    return "lower bound" if any(item.lower_bound for item in items) else "unbiased estimate"


def gather_recipe(folder: RecipeFolder) -> RecipeFindings:
    """Read a recipe's caches (records and receipts, no array) and order its models.

    A cache or an entry that does not exist yet becomes None; a damaged one raises CorruptCache or FormatError.
    """
    train, held_out = open_cache(folder.train_cache), open_cache(folder.held_out_cache)
    return RecipeFindings(
        **vars(folder),
        series=series_of(folder.models),
        cache=None if train is None else train.record,
        entries=tuple(_entry(name, train, held_out) for name in folder.recipe.entries),
    )


def series_of(models: tuple[Model, ...]) -> tuple[Series, ...]:
    """Models by role and name: teachers first, then the student, the control and the student of live teachers."""
    found = []
    for role in _ORDER:
        names = list(dict.fromkeys(model.name for model in models if model.role == role))
        for number, name in enumerate(names):
            own = tuple(sorted((m for m in models if (m.role, m.name) == (role, name)), key=lambda m: m.seed))
            label = f"teacher {name}" if role == "teacher" else _LABELS[role]
            if role != "teacher" and len(names) > 1:
                label += f" {name}"
            style = f"teacher-{number % 4}" if role == "teacher" else role
            found.append(Series(role, name, label, style, own))
    return tuple(found)


def open_cache(path: Path | None) -> LogitCache | None:
    """The cache of a recipe; None where it does not exist yet."""
    if path is None:
        return None
    try:
        return LogitCache.open(str(path))
    except CacheNotFound:
        return None


def _entry(name: str, train: LogitCache | None, held_out: LogitCache | None) -> Entry:
    if train is None or name not in train.teachers:
        return Entry(name, None, None, None)
    seconds = (_caching_seconds(name, cache) for cache in (train, held_out))
    return Entry(name, describe_entry(train.teacher(name)), *seconds)


def _caching_seconds(name: str, cache: LogitCache | None) -> float | None:
    if cache is None or name not in cache.teachers:
        return None
    targets = cache.teacher(name)
    # A derived entry's receipts count the seconds of its derivation, not the teacher's; receipts of 0 seconds come from
    # writers that did not measure them.
    return None if targets.missing() or targets.entry.derived_from else targets.statistics()[1] or None
