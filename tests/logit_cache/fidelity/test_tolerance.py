"""When a window of an audit differs: each of the two limits alone is enough; and the errors that encodings state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.caches.small import entry_2, make_entry, random_sample, stream_record

from logit_cache.caching.windows import Window
from logit_cache.fidelity.rescore import FIELDS, stored_values
from logit_cache.fidelity.samples import Sample
from logit_cache.fidelity.stated_errors import decoded_error, stated_error
from logit_cache.fidelity.tolerance import _report
from storage.format.manifest.entry import Encoding
from storage.format.stored import StoredTargets

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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("steps", [(1 / 32, 1 / 256, 1 / 2), (1 / 4, 1 / 64, 1.0), (1 / 128, 1 / 1024, 1 / 128), None])
def test_the_stated_error_bounds_what_codes_of_version_2_change(
    temperature: float, steps: tuple[float, float, float] | None
) -> None:
    names = ("step_nats", "value_step_nats", "sampled_step_nats")
    encoding = (
        Encoding(kind="float32", step_nats=None) if steps is None else Encoding(**dict(zip(names, steps, strict=True)))
    )
    fields = ("entropy", "half-tail", "label", "sampled-logprobs")
    entry = entry_2(make_entry(stream_record(400, 300), 40), *fields, method="varopt", temperature=temperature)
    entry = entry.model_copy(update={"encoding": encoding})
    exact = random_sample(400, 300, 40, temperature)
    decoded = StoredTargets.of(entry, exact).decoded()
    found = stored_values(entry, decoded)
    expected = stored_values(entry, exact)
    for name in FIELDS:
        error, stated = np.abs(found[name] - expected[name]), stated_error(entry, name, found[name])
        assert np.array_equal(np.isnan(found[name]), np.isnan(expected[name]))
        assert not (error > stated + 1e-4 * (steps is not None)).any(), name
        if steps is not None and name not in ("token_ids", "top_logprob"):
            assert np.nanmax(error) > 0.9 * np.nanmax(stated), f"{name} would hide an error"
    off = np.abs(decoded.logprobs - exact.logprobs, where=exact.is_certain, out=np.zeros(exact.logprobs.shape))
    assert off.max() <= decoded_error(entry) <= (3 * off.max() if steps is not None else 1e-3)
