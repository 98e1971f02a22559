"""The sentences on top of a report: the gain of distillation, and its uncertainty over seeds.

A difference counts as shown if its 95 % interval over seeds excludes zero. A single seed shows nothing, and the
sentence names it as one seed; a missing measurement is named as not measured.
"""

from __future__ import annotations

from logit_cache.report.findings import EQUAL_NATS, Difference, RecipeFindings
from logit_cache.report.minimal_pairs import comparisons
from logit_cache.report.statistics import Spread


def verdicts(findings: RecipeFindings) -> list[str]:
    """One sentence for each student of a recipe (most have one), on held-out loss."""
    by_student: dict[str, dict[str, Difference]] = {}
    for difference in findings.losses:
        by_student.setdefault(difference.student, {})[difference.against] = difference
    sentences = []
    for student, found in by_student.items():
        who = _who(student)
        parts = [_control(found["control"], who), _teacher(found["teacher"], who)]
        if findings.of("live"):
            parts.append(_live(found["live"], who))
        sentences.append("; ".join(parts) + ".")
    return sentences or ["No student is part of this recipe, so nothing was distilled."]


def pairs_sentences(findings: RecipeFindings) -> list[str]:
    """One sentence for each comparison on minimal pairs, in percentage points; empty if no two models were scored."""
    found = []
    over_pairs = {one.label: one.estimate() for one in comparisons(findings) if one.minus}
    for difference in findings.pairs:
        spread = difference.spread
        if spread is None or not spread.is_finite or difference.against == "live":
            continue
        points = Spread(tuple(100 * value for value in spread.values))
        other, evidence = f"its best teacher{_which(difference)}", _evidence(points, 1)
        if difference.against == "control":
            other, paired = "the control", over_pairs.get(difference.student)
            if paired is not None and paired.stderr is not None:
                evidence += f"; standard error over pairs {100 * paired.stderr:.1f}"
        found.append(
            f"On minimal pairs {_who(difference.student)} is {_size(points, 1)} percentage points {_side(points)} "
            f"{other} ({evidence})."
        )
    return found


def _control(difference: Difference, who: str) -> str:
    spread = difference.spread
    if spread is None:
        return f"The gain of distillation for {who} is not measured: no control of the same seed is finished"
    if not spread.is_finite:
        return f"The gain of distillation for {who} is not known: a run ended without a finite loss"
    size = f"{_size(spread)} nats per token ({_evidence(spread)})"
    if _shows_nothing(spread):
        side = "lower" if spread.mean < 0 else "higher"
        return (
            f"Distillation makes no difference that {spread.number} seeds can show: {who}'s held-out loss is {size} "
            f"{side} with it"
        )
    return f"Distillation {'lowers' if spread.mean < 0 else 'raises'} {who}'s held-out loss by {size}"


def _teacher(difference: Difference, who: str) -> str:
    spread = difference.spread
    if spread is None:
        return f"whether {who} beats its teachers is not measured"
    if not spread.is_finite:
        return f"{who} and its teachers do not all have a finite loss"
    below = sum(value < 0 for value in spread.values)
    teacher = "its best teacher" + _which(difference)
    size = f"{_size(spread)} nats"
    if spread.interval is None:
        return f"{who} {'beats' if below else 'does not beat'} {teacher}: it is {size} {_side(spread)} (one seed)"
    size += f" (95 % interval {_interval(spread)})"
    if below == spread.number:
        return f"{who} beats {teacher} in each of {spread.number} seeds, on average by {size}"
    times = "in none" if below == 0 else f"in {below}"
    return f"{who} beats {teacher} {times} of {spread.number} seeds, and is on average {size} {_side(spread)}"


def _live(difference: Difference, who: str) -> str:
    spread = difference.spread
    if spread is None:
        return "whether the cache equals live teachers is not measured"
    if not spread.is_finite:
        return f"{who} and the one of live teachers do not both have a finite loss"
    found = f"against the same training with live teachers the loss is {_size(spread)} nats {_side(spread)}"
    found += f" ({_evidence(spread)})"
    if spread.interval is None:
        return found
    low, high = spread.interval
    if max(-low, high) <= EQUAL_NATS:
        return f"{found}, which is equal within {EQUAL_NATS:g}"
    if _shows_nothing(spread):
        return f"{found}: no difference is shown, and neither is that they are equal within {EQUAL_NATS:g}"
    return f"{found}, which is {'better' if spread.mean < 0 else 'worse'}"


def _size(spread: Spread, decimals: int = 4) -> str:
    """The absolute mean of a difference, and its standard deviation if there are several seeds."""
    size = f"{abs(spread.mean):.{decimals}f}"
    return size if spread.deviation is None else f"{size} ± {spread.deviation:.{decimals}f}"


def _side(spread: Spread) -> str:
    return "below" if spread.mean < 0 else "above"


def _shows_nothing(spread: Spread) -> bool:
    """Whether the interval includes zero; False for a single seed, which is reported as it is."""
    interval = spread.interval
    return interval is not None and interval[0] <= 0 <= interval[1]


def _evidence(spread: Spread, decimals: int = 4) -> str:
    """Number of seeds and interval, for brackets: the interval of the size that `_size` gives."""
    if spread.interval is None:
        return "one seed, so no spread"
    return f"{spread.number} seeds, 95 % interval {_interval(spread, decimals)}"


def _interval(spread: Spread, decimals: int = 4) -> str:
    low, high = spread.interval or (spread.mean, spread.mean)
    if spread.mean < 0:
        low, high = -high, -low
    return f"{low:.{decimals}f} to {high:.{decimals}f}".replace("-", "−")


def _which(difference: Difference) -> str:
    """The best teacher's name in brackets, if it was the same one in every compared seed."""
    names = set(difference.teachers.values())
    return f" ({names.pop()})" if len(names) == 1 else ""


def _who(student: str) -> str:
    return "the student" if student == "student" else student
