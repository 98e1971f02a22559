"""Tables as data: cells of text, and the formatting of numbers. A missing number is the cell `NOT_MEASURED`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from logit_cache.report.folders import TrainingRun
from logit_cache.report.statistics import Spread


@dataclass(frozen=True)
class Cell:
    """A table cell: `text`, with `below` in smaller type under it; `style` puts the mark of a series before it."""

    text: str
    below: str = ""
    style: str = ""
    missing: bool = False


NOT_MEASURED = Cell("not measured", missing=True)


@dataclass(frozen=True)
class Table:
    """A table: `names` columns of words on the left, numbers in the others. `folded` tables open on a click, `wide`
    tables have the page's whole width."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    note: str = ""
    folded: bool = False
    wide: bool = False


def number(value: float | None, decimals: int, unit: str = "", scale: float = 1.0) -> Cell:
    """A number times `scale`, with `decimals` digits and its unit; None becomes `NOT_MEASURED`."""
    return NOT_MEASURED if value is None else Cell(_text(value, decimals, unit, scale))


def over_seeds(found: Spread | None, decimals: int, unit: str = "", scale: float = 1.0, *, exact: bool = False) -> Cell:
    """The mean over seeds, with the standard deviation below it if there are several; omitted if `exact` and 0."""
    if found is None:
        return NOT_MEASURED
    text = _text(found.mean, decimals, unit, scale)
    if found.deviation is None or not found.is_finite or (exact and not found.deviation):
        return Cell(text)
    return Cell(text, f"± {scale * found.deviation:,.{decimals}f}")


def _text(value: float, decimals: int, unit: str, scale: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if abs(value) * scale >= 1e12:
        return f"{value * scale:.3g}{unit}"
    return f"{value * scale:,.{decimals}f}{unit}".replace("-", "−")


def words(rows: Iterable[tuple[str, str]]) -> tuple[tuple[Cell, ...], ...]:
    """Rows of two cells: a name and its value."""
    return tuple((Cell(name), Cell(text)) for name, text in rows)


def distinct(values: Iterable[Any]) -> str:
    """The distinct values in order, at most eight; the runs of one recipe mostly agree."""
    texts = list(dict.fromkeys(str(value) for value in values if value))
    return "; ".join(texts[:8]) + ("; …" if len(texts) > 8 else "")


def scalar(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(scalar(item) for item in value)
    return str(value)


def software(made: Sequence[tuple[str, dict[str, str]]], runs: Sequence[TrainingRun]) -> Table:
    """Library versions of all that was made, devices and process counts of the runs."""
    names = sorted({name for _, libraries in made for name in libraries})
    rows = [(name, distinct(libraries.get(name) for _, libraries in made)) for name in names]
    rows.append(("devices of the runs", distinct(run.device for run in runs) or "not recorded"))
    rows.append(("processes per run", distinct(run.processes for run in runs)))
    return Table("Software and devices", ("", ""), words(rows), names=2)
