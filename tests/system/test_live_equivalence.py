"""A student from the cache and a student with its teachers in memory, step for step.

The live run is written here in plain torch: the teachers' own logits, dense KL, AdamW; it shares with the cached run
the starting weights and the order of the windows, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.references.dense_targets import quantisation_bound
from support.references.live_runs import STEPS, cached_losses, live_losses, world

__all__ = ["world"]  # a fixture, found by its name


@pytest.mark.parametrize(
    ("teachers", "temperature"),
    [({"a": 1.0}, 1.0), ({"a": 1.0}, 2.0), ({"a": 0.25, "b": 0.75}, 1.0), ({"a": 0.5, "b": 0.5}, 2.0)],
    ids=["one, τ=1", "one, τ=2", "mixture, τ=1", "mixture, τ=2"],
)
def test_cached_equals_live_step_for_step(
    world: Path, tmp_path: Path, teachers: dict[str, float], temperature: float
) -> None:
    cached = cached_losses(world, tmp_path / "run", teachers, temperature)
    live = live_losses(world, teachers, temperature)
    assert len(cached) == len(live) == STEPS
    assert live[-1] < live[0] - 0.05, "the run must learn something for the comparison to mean anything"
    assert np.abs(np.array(cached) - live).max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_codes_the_first_loss_is_within_the_bound(world: Path, tmp_path: Path, temperature: float) -> None:
    """Each stored probability is within a factor exp(±step/τ); so is the loss within that share of its terms."""
    exact = cached_losses(world, tmp_path / "exact", {"a": 1.0}, temperature)
    codes = cached_losses(world, tmp_path / "codes", {"a-codes": 1.0}, temperature)
    # Both students start from the same weights, so the first losses differ by the targets alone:
    # |Δ KL| <= Σ|Δp|·max|log(p/q)| + step; log(p/q) stays under 20 nats for these teachers.
    bound = 0.5 * temperature**2 * (quantisation_bound(1 / 32) * 20 + 1 / 32)
    assert abs(codes[0] - exact[0]) <= bound
    # What is really seen is far less than the bound, as rounding errors have no sign.
    assert np.abs(np.array(codes) - exact).max() < 2e-3
