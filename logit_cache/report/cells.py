"""Tables as data: cells of text, and how numbers become text. A figure that is not there is a cell that says so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from logit_cache.report.folders import TrainingRun
from logit_cache.report.statistics import Spread


@dataclass(frozen=True)
class Cell:
    """`text`, with something smaller `below` it; `style` puts a series' mark before it."""

    text: str
    below: str = ""
    style: str = ""
    missing: bool = False


NOT_MEASURED = Cell("not measured", missing=True)


@dataclass(frozen=True)
class Table:
    """`names` columns of words, on the left; numbers in the others. `folded` ones are opened by a click, `wide` ones
    have the page's whole width."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 1
    note: str = ""
    folded: bool = False
    wide: bool = False


def number(value: float | None, decimals: int, unit: str = "", scale: float = 1.0) -> Cell:
    """One number."""
    return NOT_MEASURED if value is None else Cell(_text(value, decimals, unit, scale))


def over_seeds(found: Spread | None, decimals: int, unit: str = "", scale: float = 1.0, *, exact: bool = False) -> Cell:
    """A mean, and the standard deviation below it where there are several seeds; not if `exact` ones agree."""
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
    """Rows of a name and what it is."""
    return tuple((Cell(name), Cell(text)) for name, text in rows)


def distinct(values: Iterable[Any]) -> str:
    """Different values once each, in their order; two runs of one recipe mostly agree."""
    texts = list(dict.fromkeys(str(value) for value in values if value))
    return "; ".join(texts[:8]) + ("; …" if len(texts) > 8 else "")


def scalar(value: Any) -> str:
    """A setting as a person writes it."""
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
    """Library versions, devices and processes of what was made."""
    names = sorted({name for _, libraries in made for name in libraries})
    rows = [(name, distinct(libraries.get(name) for _, libraries in made)) for name in names]
    rows.append(("devices of the runs", distinct(run.device for run in runs) or "not recorded"))
    rows.append(("processes per run", distinct(run.processes for run in runs)))
    return Table("Software and devices", ("", ""), words(rows), names=2)
