"""Numbers and settings as the page shows them. None is a number that was not measured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from logit_cache.report.statistics import Spread


def number(value: float | None, decimals: int, unit: str = "", scale: float = 1.0) -> str | None:
    """`value` times `scale`, with `decimals` digits and its unit."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "not finite"
    if abs(value) * scale >= 1e12:
        return f"{value * scale:.3g}{unit}"
    return f"{value * scale:,.{decimals}f}{unit}".replace("-", "−")


def over_seeds(
    found: Spread | None, decimals: int, unit: str = "", scale: float = 1.0, exact: bool = False
) -> tuple[str, str] | None:
    """The mean over seeds, and ± their standard deviation: empty for one seed, and if `exact` for a deviation of 0."""
    if found is None:
        return None
    mean = number(found.mean, decimals, unit, scale) or ""
    if found.deviation is None or not found.is_finite or (exact and not found.deviation):
        return mean, ""
    return mean, f"± {scale * found.deviation:,.{decimals}f}"


def distinct(values: Iterable[Any]) -> str:
    """The distinct values in order, at most eight; the runs of one recipe mostly agree."""
    texts = list(dict.fromkeys(str(value) for value in values if value))
    return "; ".join(texts[:8]) + ("; …" if len(texts) > 8 else "")


def scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(scalar(item) for item in value)
    return str(value)


def trial_value(value: Any) -> str:
    """A parameter of a trial; floats, which a search samples with all digits, have four significant ones."""
    return f"{value:.4g}" if isinstance(value, float) else scalar(value)
