"""Mean, standard deviation and t-interval of a metric over seeds.

``mean ± t(0.975, n - 1) · s / sqrt(n)``, with ``s`` the sample standard deviation (n - 1 in the denominator). With few
seeds the normal distribution is no substitute: for two seeds its interval is six times too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The values of a metric, one per seed, in the order of the seeds; at least one."""

    values: tuple[float, ...]

    @property
    def number(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        """The mean; not finite if a value is not."""
        return sum(self.values) / self.number

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for a single value, which has none."""
        if self.number < 2:
            return None
        mean = self.mean
        return math.sqrt(sum((value - mean) ** 2 for value in self.values) / (self.number - 1))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t-interval of the mean; None for a single value."""
        deviation = self.deviation
        if deviation is None:
            return None
        half = t_quantile(self.number - 1) * deviation / math.sqrt(self.number)
        return self.mean - half, self.mean + half

    @property
    def is_finite(self) -> bool:
        """Whether every value is finite; those of a diverged run may not be."""
        return all(map(math.isfinite, self.values))


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are not None; None if there are none."""
    measured = tuple(float(value) for value in values if value is not None)
    return Spread(measured) if measured else None


def t_quantile(degrees: int, inside: float = 0.95) -> float:
    """The t for which a Student-t variable with `degrees` degrees of freedom is in ±t with probability `inside`.

    By bisection of the closed form for integer degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    assert degrees >= 1
    low, high = 0.0, 1.0
    while _within(high, degrees) < inside:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < inside else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    if degrees == 1:
        total = 0.0
    for step in range(2 + odd, degrees, 2):
        term *= square * (step - 1) / step
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
