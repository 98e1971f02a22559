"""Accuracies on minimal pairs by group, with their standard errors, and differences of models on the same pairs.

Of models of several seeds the outcomes of a pair are averaged first: the errors are those for the choice of pairs, and
the seeds' own spread is beside them (`logit_cache.report.statistics`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from logit_cache.report.findings import RecipeFindings
from logit_cache.report.folders import Model
from logit_cache.report.metrics import Metric, group_accuracy, pairs_mean
from student.evaluation import standard_errors


@dataclass(frozen=True)
class Estimate:
    """A fraction, or a difference of two, and its standard error over pairs: None where outcomes were not recorded."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Comparison:
    """A column of the table: models of some seeds, less the controls `minus` of the same seeds in a difference."""

    label: str
    models: tuple[Model, ...]
    minus: tuple[Model, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.label} − control, points" if self.minus else self.label

    @property
    def unit(self) -> str:
        return "" if self.minus else " %"

    def estimate(self, group: str | None = None) -> Estimate | None:
        """Of a group, or of the mean over groups; None where no model was scored on it."""
        metric = pairs_mean if group is None else group_accuracy(group)
        value, less = _mean(metric, self.models), _mean(metric, self.minus)
        if value is None or (self.minus and less is None):
            return None
        return Estimate(value - (less or 0.0), self._stderr(group))

    def _stderr(self, group: str | None) -> float | None:
        by_group = _outcomes(self.models, self.minus)
        if group is not None:
            return standard_errors.of_outcomes(by_group.get(group, ()))
        return standard_errors.of_mean([standard_errors.of_outcomes(found) for found in by_group.values()])


def comparisons(findings: RecipeFindings) -> list[Comparison]:
    """The scored models by series, then each student less its control, of the seeds that have both."""
    found = []
    for series in findings.series:
        scored = tuple(model for model in series.models if model.pairs is not None)
        if scored:
            found.append(Comparison(series.label, scored))
    for series in findings.of("student"):
        both = [
            (model, control)
            for model in series.models
            if model.pairs is not None
            and (control := findings.counterpart("control", series.name, model.seed)) is not None
            and control.pairs is not None
        ]
        if both:
            students, controls = zip(*both, strict=True)
            found.append(Comparison(series.label, students, controls))
    return found


def _mean(metric: Metric, models: Sequence[Model]) -> float | None:
    values = [metric(model) for model in models]
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _outcomes(models: Sequence[Model], minus: Sequence[Model]) -> dict[str, list[NDArray[np.float64]]]:
    """By group the outcomes of its paradigms: of each pair the models' mean, less that of `minus`.

    Empty where a model's were not recorded, or the models were scored on different pairs.
    """
    scores = [model.pairs for model in (*models, *minus) if model.pairs is not None]
    if len({one.sha256 for one in scores}) != 1 or scores[0].sha256 is None:
        return {}
    found: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for name, paradigm in scores[0].paradigms.items():
        rows = []
        for one in scores:
            right = one.paradigms[name].right if name in one.paradigms else None
            if right is None or len(right) != paradigm.pairs:
                return {}
            rows.append(np.frombuffer(right.encode(), dtype=np.uint8) - float(ord("0")))
        less = np.mean(rows[len(models) :], axis=0) if minus else 0.0
        found[paradigm.group].append(np.mean(rows[: len(models)], axis=0) - less)
    return found
