"""The figures of a report: titled charts, from the findings of recipes, sweeps and runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from logit_cache.report.findings import Difference, RecipeFindings, Series
from logit_cache.report.metrics import group_accuracy, logged, peak_memory
from logit_cache.report.statistics import Spread
from logit_cache.report.svg import Dot, Line, Mark, Row, limits, line_chart, rows_chart, scatter
from student.report import TrainingReport
from student.sweep.record import SweepReport

_MOST_POINTS = 200
_FIRST_PART = 0.2
_MOST_GROUPS = 6
_FARTHEST = 4.0
# Within so many standard errors are 95 % of a normal distribution.
_NORMAL_95 = 1.96

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Figure:
    """A chart; `title` names the plotted quantity with its unit."""

    title: str
    chart: Markup
    note: str = ""


def curve(log: Sequence[dict[str, int | float]], name: str, by: str = "step") -> Points:
    """A figure of a run's log, by step or epoch."""
    found = {}
    for entry in log:
        x, y = logged(entry, by), logged(entry, name)
        if x is not None and y is not None:
            found[x] = y
    return tuple(sorted(found.items()))


def thinned(points: Points, most: int = _MOST_POINTS) -> Points:
    """At most `most` points: means of neighbouring points, in x and y."""
    if len(points) <= most:
        return points
    found = []
    for i in range(most):
        part = points[i * len(points) // most : (i + 1) * len(points) // most]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return tuple(found)


def mean_points(curves: Sequence[Points]) -> Points:
    """The mean curve over seeds, at the steps that all seeds have."""
    common = set.intersection(*({x for x, _ in points} for points in curves))
    tables = [dict(points) for points in curves]
    return tuple((x, sum(table[x] for table in tables) / len(tables)) for x in sorted(common))


# Label, style and runs by seed.
_Groups = Sequence[tuple[str, str, Sequence[tuple[int, TrainingReport]]]]


def training_figure(groups: _Groups) -> Figure:
    """Training loss against optimizer steps: a line for each group, and thin lines for its seeds."""
    title = "Training loss (cross-entropy), nats per token"
    return _curves(groups, title, lambda run: curve(run.train_log, "cross_entropy"), "optimizer steps", "step")


def held_out_figure(groups: _Groups) -> Figure:
    """Held-out loss against epochs, in which runs of other batches and schedules can be compared."""
    title = "Held-out loss, nats per token"
    return _curves(groups, title, lambda run: curve(run.eval_log, "eval_loss", "epoch"), "epochs", "epoch", dots=True)


def _curves(
    groups: _Groups, title: str, of: Callable[[TrainingReport], Points], unit: str, x_name: str, dots: bool = False
) -> Figure:
    lines: list[Line] = []
    for label, style, runs in groups:
        by_seed = [(seed, points) for seed, run in runs if (points := of(run))]
        if not by_seed:
            continue
        if len(by_seed) > 1:
            lines += [Line(f"{label}, seed {seed}", style, thinned(points), thin=True) for seed, points in by_seed]
            label = f"{label}, mean of {len(by_seed)} seeds"
        lines.append(Line(label, style, thinned(mean_points([points for _, points in by_seed])), dots=dots))
    y_range, note = _without_the_first(lines)
    chart = line_chart(lines, f"{title}, against {unit}", unit, y_range=y_range, x_name=x_name)
    if any(line.thin for line in lines):
        note = f"Thin lines are single seeds. {note}".rstrip()
    return Figure(title, chart, note)


def _without_the_first(lines: Sequence[Line]) -> tuple[tuple[float, float] | None, str]:
    """A y range and its note that leave out the steep start of training where it would take most of the chart."""
    everything = [y for line in lines for _, y in line.points]
    late = [y for line in lines for x, y in line.points if x >= _FIRST_PART * line.points[-1][0]]
    if not late or max(everything) - min(everything) <= 1.4 * (max(late) - min(late)):
        return None, ""
    return limits(late), "The steep start is above the chart."


def difference_figures(findings: RecipeFindings) -> list[Figure]:
    """Paired differences with their intervals: of held-out loss, and of minimal pairs if they were scored."""
    found = []
    for title, unit, differences, scale, side in (
        ("Difference of held-out loss", "nats per token", findings.losses, 1.0, "Left"),
        ("Difference on minimal pairs", "percentage points", findings.pairs, 100.0, "Right"),
    ):
        rows = [row for difference in differences if (row := _difference_row(difference, scale)) is not None]
        chart = rows_chart(rows, title, unit, reference=0.0)
        if chart:
            note = f"{side} of zero, the student is better."
            if any(len(difference.by_seed) > 1 for difference in differences):
                note += " Bars are 95 % intervals, small dots the seeds."
            found.append(Figure(title, chart, note))
    return found


def _difference_row(difference: Difference, scale: float) -> Row | None:
    spread = difference.spread
    if spread is None:
        return None
    spread = Spread(tuple(scale * value for value in spread.values))
    low, high = spread.interval or (spread.mean, spread.mean)
    name = {"control": "control", "teacher": "best teacher", "live": "live teachers"}[difference.against]
    label = f"{difference.student} − {name}"
    seeds = ", ".join(f"seed {seed}: {scale * value:+.4g}" for seed, value in difference.by_seed.items())
    title = f"{difference.student} less {name}: {spread.mean:+.4g} ({seeds})"
    values = spread.values if spread.number > 1 else ()
    return Row(label, (Mark("student", title, spread.mean, low, high, values),))


def pairs_figures(findings: RecipeFindings) -> list[Figure]:
    """Accuracy on minimal pairs by group: a mark for each series with the range of its seeds."""
    rows = []
    for group in findings.groups:
        marks = [_group_mark(series, group) for series in findings.series]
        rows.append(Row(readable(group), tuple(mark for mark in marks if mark is not None)))
    if not rows:
        return []
    # Many groups are split into two charts side by side, with one x range.
    half = len(rows) if len(rows) <= _MOST_GROUPS else -(-len(rows) // 2)
    x_range = limits([50.0, *(value for row in rows for mark in row.marks for value in (mark.low, mark.high))])
    letters = max(len(row.label) for row in rows)
    title, x_label = "Accuracy on minimal pairs, by group", "% of pairs; the dotted line is chance"
    note = ""
    if any(len(series.runs) > 1 for series in findings.series):
        note = "Marks are means over seeds, bars the range of the seeds."
    elif any(mark.low < mark.high for row in rows for mark in row.marks):
        note = "Bars are 95 % intervals over the choice of pairs."
    found: list[Figure] = []
    for part in (rows[:half], rows[half:]):
        if part:
            chart = rows_chart(part, title, x_label, reference=50.0, x_range=x_range, letters=letters)
            found.append(Figure(f"{title}, continued" if found else title, chart, "" if found else note))
    return found


def _group_mark(series: Series, group: str) -> Mark | None:
    """The mean over seeds with their range; of a single model, with the interval over pairs."""
    spread = series.spread(group_accuracy(group))
    if spread is None:
        return None
    values = [100 * value for value in spread.values]
    title = f"{series.label}, {readable(group)}: {100 * spread.mean:.1f} %"
    if len(values) > 1:
        title += f" (seeds {', '.join(f'{value:.1f}' for value in values)})"
        return Mark(series.style, title, 100 * spread.mean, min(values), max(values))
    (score,) = (model.pairs.groups[group] for model in series.models if model.pairs and group in model.pairs.groups)
    reach = 100 * _NORMAL_95 * (score.stderr or 0.0)
    return Mark(series.style, title, values[0], values[0] - reach, values[0] + reach)


def fidelity_figures(findings: RecipeFindings) -> list[Figure]:
    """KL and residual mass by k, if the k most probable ids were stored exactly and the rest as an even bucket."""
    found = []
    note = "Values for storing the k most probable ids, on the same sample of positions."
    for title, name in (
        ("KL of top-k targets with an even tail, nats", "forward"),
        ("Mass outside the k ids", "residual_mass"),
    ):
        lines = []
        for number, entry in enumerate(findings.entries):
            if entry.fidelity is not None:
                points = tuple((float(point["k"]), float(point[name])) for point in entry.fidelity["curve"])
                lines.append(Line(entry.name, f"teacher-{number % 4}", points, dots=True))
        chart = line_chart(lines, title + ", by k", "ids stored per position (k)", x_log=True, y_log=True, x_name="k")
        found.append(Figure(title, chart, note))
        note = ""
    return found


def break_even_figures(findings: RecipeFindings) -> list[Figure]:
    """Time of n students, from the cache and with live teachers, in the unit that fits."""
    found = findings.break_even
    if found is None:
        return []
    longest = max(max(cached, live) for _, cached, live in found.rows())
    unit, size = next(
        (u, s) for u, s in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0)) if longest > s or s == 1
    )
    cached = tuple((float(n), seconds / size) for n, seconds, _ in found.rows())
    live = tuple((float(n), seconds / size) for n, _, seconds in found.rows())
    title = f"Cost of n students, {unit}"
    lines = [Line("from the cache", "student", cached, dots=True), Line("with live teachers", "live", live, dots=True)]
    chart = line_chart(lines, title, "students", from_zero=True, x_name="students")
    return [Figure(title, chart)]


def memory_figures(findings: RecipeFindings) -> list[Figure]:
    """Peak memory of student, control and live runs: of the device if two or more measured it, else of the process."""
    series = [one for one in findings.series if one.role != "teacher"]
    for name, of in (("device", peak_memory("device_bytes")), ("process", peak_memory("process_bytes"))):
        found = [(one, spread) for one in series if (spread := one.spread(of)) is not None]
        if len(found) > 1:
            rows = []
            for one, spread in found:
                values = [value / 1e6 for value in spread.values]
                title = f"{one.label}: {spread.mean / 1e6:,.1f} MB"
                mark = Mark(one.style, title, spread.mean / 1e6, min(values), max(values))
                rows.append(Row(one.label, (mark,)))
            title = f"Peak memory of the {name}"
            return [Figure(title, rows_chart(rows, title, "MB", reference=0.0))]
    return []


def sweep_figures(sweep: SweepReport) -> list[Figure]:
    """The best value so far by trial, then the value against each parameter."""
    best = min if sweep.direction == "minimize" else max
    complete = [
        (trial, trial.value)
        for trial in sorted(sweep.trials, key=lambda trial: trial.number)
        if trial.state == "complete" and trial.value is not None and math.isfinite(trial.value)
    ]
    so_far: list[tuple[float, float]] = []
    for trial, value in complete:
        so_far.append((float(trial.number), best(value, so_far[-1][1]) if so_far else value))
    if not complete:
        return []
    title = f"Best {sweep.metric} so far"
    chart = line_chart(
        [Line("best so far", "student", tuple(so_far), dots=True, stairs=True)], title, "trial", x_name="trial"
    )
    found = [Figure(title, chart)]
    winner = so_far[-1][1]
    low, high = _without_outliers([value for _, value in complete], winner)
    for name in dict.fromkeys(name for trial in sweep.trials for name in trial.parameters):
        dots = []
        for trial in sweep.trials:
            parameter = trial.parameters.get(name)
            if trial.value is None or parameter is None or trial.state not in ("complete", "pruned"):
                continue
            x = str(parameter) if isinstance(parameter, (bool, str)) else float(parameter)
            pruned = trial.state == "pruned"
            style = "student" if trial.value == winner and not pruned else "control"
            words = f"trial {trial.number}{', pruned' if pruned else ''}, {name} = {parameter}: {trial.value:.6g}"
            if math.isfinite(trial.value):
                dots.append(Dot(x, min(max(trial.value, low), high), words, style, hollow=pruned))
        chart = scatter(dots, f"{sweep.metric} against {name}", name)
        if chart:
            outside = any(trial.value is not None and not low <= trial.value <= high for trial in sweep.trials)
            note = "Trials outside the range are shown at the edge of the chart." if outside else ""
            found.append(Figure(f"{sweep.metric} against {name}", chart, note))
    return found


def _without_outliers(values: Sequence[float], best: float) -> tuple[float, float]:
    """The y range of a scatter plot: without it, diverged trials would flatten all others into one line."""
    middle = sorted(values)[len(values) // 2]
    reach = _FARTHEST * abs(middle - best) or math.inf
    return min(best, middle - reach), max(best, middle + reach)


def readable(name: str) -> str:
    return name.replace("_", " ")
