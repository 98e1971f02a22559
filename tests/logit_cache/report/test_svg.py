"""Charts: round ticks, and any number as input."""

from __future__ import annotations

import math
import re

import pytest

from logit_cache.report.svg import Axis, Dot, Line, even_ticks, line_chart, log_ticks, scatter


def test_ticks_are_round() -> None:
    assert even_ticks(3.31, 3.69, 5) == [(pytest.approx(v), f"{v:.1f}") for v in (3.4, 3.5, 3.6)]
    assert [text for _, text in even_ticks(-0.25, 0.05, 4)] == ["−0.2", "−0.1", "0.0"]
    assert [text for _, text in even_ticks(0, 43_000, 5)] == ["0", "10k", "20k", "30k", "40k"]
    assert [text for _, text in log_ticks(2e-4, 0.009, 5)] == ["0.0002", "0.0005", "0.001", "0.002", "0.005"]
    assert [text for _, text in log_ticks(9e-5, 0.02, 5)] == ["0.0001", "0.001", "0.01"]
    assert [text for _, text in log_ticks(1, 1e6, 7)] == ["1", "10", "100", "1000", "10k", "100k", "1M"]
    assert [text for _, text in log_ticks(1, 1e6, 5)] == ["1", "100", "10k", "1M"]
    assert len(log_ticks(3.1, 3.9, 5)) > 1
    assert Axis(1, 100, 0, 10, log=True)(10) == pytest.approx(5)


@pytest.mark.parametrize("value", [0.0, 1e-300, -1e25, 3.3, 1e30, math.inf, math.nan])
def test_charts_survive_any_number(value: float) -> None:
    drawn = line_chart([Line("a", "student", ((1.0, 1.0), (2.0, value)))], "a", "x", y_log=True)
    drawn += scatter(
        [Dot(1.0, value, "a", "student"), Dot(value, 2.0, "b", "student"), Dot("c", 1.0, "c", "live")], "b", "x"
    )
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert line_chart([Line("a", "student", ((1.0, value),))], "a", "x").count("<svg") in (0, 2)


def test_parameters_over_more_than_a_decade_get_a_log_axis() -> None:
    def labels(*values: float) -> list[str]:
        dots = [Dot(value, i, "", "student") for i, value in enumerate(values)]
        return re.findall(r'text-anchor="middle">([^<]*)<', scatter(dots, "chart", "rate"))

    assert labels(1e-5, 1e-3, 1e-1) == ["1e-5", "0.0001", "0.001", "0.01", "0.1"]
    assert labels(1.0, 4.0, 9.0) == ["2", "4", "6", "8"]
