"""When a window of an audit differs: each of the two limits alone is enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from logit_cache.caching.windows import Window
from logit_cache.fidelity.rescore import Sample
from logit_cache.fidelity.tolerance import _report

ROWS = 10
NOTHING: Any = None


def window(number: int) -> Sample:
    first = ROWS * number
    window = Window(first, first + ROWS, first, first + ROWS, first + ROWS)
    return Sample(window, np.arange(ROWS), np.arange(ROWS), NOTHING)


@pytest.mark.parametrize(
    ("beyond", "differs"),
    [
        ([3.1] * ROWS, True),  # a little everywhere: the mean noise is 1, and its limit 3
        ([2.9] * ROWS, False),
        ([8.1] + [0.0] * (ROWS - 1), True),  # much at one position: the limit of every value is 8
        ([7.9] + [0.0] * (ROWS - 1), False),
    ],
)
def test_a_window_differs_by_its_mean_or_by_one_value(beyond: list[float], differs: bool) -> None:
    nothing, noise = np.zeros(ROWS), np.ones(ROWS)
    report, differing = _report([window(0), window(1)], [nothing, nothing], [nothing, np.array(beyond)], [noise, noise])
    assert differing == ({1} if differs else set())
    assert report.windows_differing == differs
    assert (report.largest_beyond, report.position) == (max(beyond), ROWS)
