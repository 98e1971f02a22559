"""Sweeps of a recipe's schedules: is its student only better than models that are badly tuned?

The figures of BabyLlama-2 (Tastet and Timiryasov 2024): the best of the trials so far against the recipe's student, and
the accuracy on minimal pairs against held-out loss, a point for each model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from logit_cache.report.figures import Figure
from logit_cache.report.findings import RecipeFindings, Series
from logit_cache.report.folders import Model, ScheduleSweep
from logit_cache.report.metrics import Metric, pairs_mean
from logit_cache.report.minimal_pairs import Estimate
from logit_cache.report.numbers import trial_value
from logit_cache.report.svg import Dot, Line, line_chart, scatter
from student.sweep.record import TrialRecord

_LOSS = "eval_loss"
_NOTE = "Steps are the best trial so far, each by this figure; thin lines are the recipe's own models of that seed."


@dataclass(frozen=True)
class Schedule:
    """A swept schedule and its trials that ended with a finite held-out loss, in their order.

    student_loss   of the recipe's student of the sweep's seed, in nats per token; None until it is finished
    """

    label: str
    style: str
    trials: tuple[TrialRecord, ...]
    student_loss: float | None

    @property
    def best(self) -> TrialRecord | None:
        """The trial of least held-out loss."""
        return min(self.trials, key=lambda trial: trial.metrics[_LOSS], default=None)

    @property
    def best_loss(self) -> float | None:
        return None if self.best is None else self.best.metrics[_LOSS]

    @property
    def behind(self) -> float | None:
        """The best trial's held-out loss less that of the recipe's student, in nats per token."""
        return None if self.best_loss is None or self.student_loss is None else self.best_loss - self.student_loss

    @property
    def pairs(self) -> Estimate | None:
        """The best trial's mean over groups of minimal pairs."""
        return (
            None if self.best is None or self.best.pairs is None else Estimate(self.best.pairs, self.best.pairs_stderr)
        )

    @property
    def settings(self) -> str:
        """The best trial's parameters, in words."""
        found = {} if self.best is None else self.best.parameters
        return ", ".join(f"{name} {trial_value(value)}" for name, value in found.items())


def schedules(findings: RecipeFindings) -> list[Schedule]:
    return [_schedule(findings, sweep) for sweep in findings.sweeps]


def _schedule(findings: RecipeFindings, sweep: ScheduleSweep) -> Schedule:
    series = [one for one in findings.of(sweep.role) if sweep.role != "teacher" or one.name == sweep.name]
    students = [one for one in findings.models if one.role == "student" and one.seed == sweep.seed]
    return Schedule(
        label=series[0].label if series else sweep.name,
        style=series[0].style if series else sweep.role,
        trials=tuple(
            trial
            for trial in sorted(sweep.report.trials, key=lambda trial: trial.number)
            if trial.state == "complete" and math.isfinite(trial.metrics.get(_LOSS, math.nan))
        ),
        student_loss=findings.loss(students[0]) if len(students) == 1 else None,
    )


def schedule_figures(findings: RecipeFindings) -> list[Figure]:
    """The best trial so far by held-out loss, the same by minimal pairs, and both of every model against each other."""
    found = schedules(findings)
    if not any(one.trials for one in found):
        return []
    seeds = {sweep.seed for sweep in findings.sweeps}
    own = [(series, model) for series in findings.series for model in series.models if model.seed in seeds]
    loss, pairs = "Held-out loss by trial, best so far, nats per token", "Minimal pairs by trial, best so far, %"
    both = "Minimal pairs against held-out loss, a point for each model"
    return [
        Figure(loss, _by_trial(found, own, lambda trial: trial.metrics[_LOSS], findings.loss, min, loss), _NOTE),
        Figure(
            pairs,
            _by_trial(
                found, own, lambda trial: _percent(trial.pairs), lambda one: _percent(pairs_mean(one)), max, pairs
            ),
        ),
        Figure(both, _pairs_against_loss(found, own, findings.loss, both), "Rings are trials."),
    ]


def _by_trial(
    found: Sequence[Schedule],
    own: Sequence[tuple[Series, Model]],
    of_trial: Callable[[TrialRecord], float | None],
    of_model: Metric,
    best: Callable[[float, float], float],
    title: str,
) -> Markup:
    lines = []
    last = max(trial.number for one in found for trial in one.trials)
    for series, model in own:
        value = of_model(model)
        if value is not None:
            lines.append(Line(series.label, series.style, ((0.0, value), (max(float(last), 1.0), value)), thin=True))
    for one in found:
        points: list[tuple[float, float]] = []
        for trial in one.trials:
            value = of_trial(trial)
            if value is not None:
                points.append((float(trial.number), best(value, points[-1][1]) if points else value))
        lines.append(Line(f"{one.label}, best trial so far", one.style, tuple(points), dots=True, stairs=True))
    # The recipe's own models alone are no figure.
    if not any(line.points for line in lines if not line.thin):
        return Markup("")
    return line_chart(lines, title, "trial", x_name="trial")


def _pairs_against_loss(
    found: Sequence[Schedule], own: Sequence[tuple[Series, Model]], loss: Metric, title: str
) -> Markup:
    points = [(series.style, series.label, loss(model), pairs_mean(model), False) for series, model in own]
    points += [
        (one.style, f"{one.label}, trial {trial.number}", trial.metrics[_LOSS], trial.pairs, True)
        for one in found
        for trial in one.trials
    ]
    dots = [
        Dot(x, 100 * y, f"{label}: {x:.4f} nats, {100 * y:.1f} %", style, hollow)
        for style, label, x, y, hollow in points
        if x is not None and y is not None
    ]
    return scatter(dots, title, "held-out loss, nats per token")


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
