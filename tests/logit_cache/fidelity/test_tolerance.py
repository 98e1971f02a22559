"""When a window of an audit differs: each of the two limits alone is enough; and the errors that encodings state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.caches.small import dense_targets, make_entry, stream_record

from logit_cache.caching.windows import Window
from logit_cache.fidelity.rescore import FIELDS, Sample, stored_values
from logit_cache.fidelity.tolerance import _report, encoding_error
from storage.format.manifest import Encoding, Targets, TeacherEntry
from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets

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


V, K, POSITIONS = 300, 40, 400


def sampled_rows(temperature: float) -> SparseTargets:
    """Rows of heads from sharp to flat, some of which have no certain id, and any ids in place of the sampled ones."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(POSITIONS, V)) * rng.uniform(0.1, 6, (POSITIONS, 1))
    whole = dense_targets(logits, K, rng.integers(0, V, POSITIONS))
    certain = rng.integers(0, K - 1, POSITIONS).astype(np.uint16)
    left = np.where(np.arange(K) >= certain[:, None], whole.logprobs, -np.inf)
    tail = np.logaddexp(whole.log_tail, np.logaddexp.reduce(left, axis=1))
    half = np.logaddexp(whole.log_tail_half, np.logaddexp.reduce(left / 2, axis=1))
    threshold = temperature * ((tail if temperature == 1 else half) - np.log(K - certain))
    below = threshold[:, None] - rng.exponential(3, (POSITIONS, K))
    sampled = np.arange(K) >= certain[:, None]
    return SparseTargets(
        0,
        **whole.arrays()
        | {
            "certain": certain,
            "log_tail": tail.astype(np.float32),
            "log_tail_half": half.astype(np.float32),
            "logprobs": np.where(sampled, below, whole.logprobs).astype(np.float32),
        },
    )


def entry_of(targets: Targets, encoding: Encoding) -> TeacherEntry:
    entry = make_entry(stream_record(POSITIONS, V), K)
    return TeacherEntry.model_validate(
        dict(entry) | {"format_version": 2, "made": "cached", "targets": targets, "encoding": encoding}
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("steps", [(1 / 32, 1 / 256, 1 / 2), (1 / 4, 1 / 64, 1.0), (1 / 128, 1 / 1024, 1 / 128), None])
def test_the_stated_error_bounds_what_codes_of_version_2_change(
    temperature: float, steps: tuple[float, float, float] | None
) -> None:
    names = ("step_nats", "value_step_nats", "sampled_step_nats")
    encoding = (
        Encoding(kind="float32", step_nats=None) if steps is None else Encoding(**dict(zip(names, steps, strict=True)))
    )
    targets = Targets(
        method="varopt", k=K, seed=1, temperature=temperature, positions="all", tail="exact", sampling="systematic",
        order="ids", fields=("entropy", "half-tail", "label", "sampled-logprobs"),
    )  # fmt: skip
    entry, exact = entry_of(targets, encoding), sampled_rows(temperature)
    found = stored_values(entry, StoredTargets.of(entry, exact).decoded())
    # The encoder sorts sampled ids, which have no order of their own: take its order.
    order = np.argsort(np.where(exact.is_certain, np.arange(K) - K, exact.token_ids), axis=1, kind="stable")
    per_id = {name: np.take_along_axis(getattr(exact, name), order, axis=1) for name in ("token_ids", "logprobs")}
    expected = stored_values(entry, SparseTargets(0, **exact.arrays() | per_id))
    for name in FIELDS:
        error, stated = np.abs(found[name] - expected[name]), encoding_error(entry, name, found[name])
        assert np.array_equal(np.isnan(found[name]), np.isnan(expected[name]))
        assert not (error > stated + 1e-4 * (steps is not None)).any(), name
        if steps is not None and name not in ("token_ids", "top_logprob"):
            assert np.nanmax(error) > 0.9 * np.nanmax(stated), f"{name} would hide an error"
