"""Standard errors over pairs, of models of several seeds and of differences, against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from logit_cache.report.folders import Model
from logit_cache.report.minimal_pairs import Comparison
from student.evaluation.job import EvaluationJob
from student.evaluation.minimal_pairs import Pair, tally
from student.evaluation.report import EvaluationReport, PairScores

SIZES = {"wh_island": 40, "adjunct_island": 30, "drop_argument": 50}
PAIRS = [
    Pair(f"good {i}", f"bad {i}", name, "islands" if name.endswith("island") else "other")
    for name, number in SIZES.items()
    for i in range(number)
]


def model_of(scores: PairScores, seed: int = 0) -> Model:
    report = EvaluationReport(
        job=EvaluationJob(model="m", pairs="p"), architecture="Llama", parameters=1, device="cpu", libraries={},
        prefix_token="<s>", held_out=None, minimal_pairs=scores,
    )  # fmt: skip
    return Model("student", "student", seed, None, EvaluationReport.model_validate_json(report.model_dump_json()))


def scored(outcomes: np.ndarray, seed: int = 0) -> Model:
    margins = torch.from_numpy(np.where(outcomes, 1.0, -1.0))
    return model_of(tally(PAIRS, torch.stack([margins, torch.zeros_like(margins)], 1)), seed)


def reference(outcomes: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of the islands: paradigms of 40 and 30 pairs, their pooled variance."""
    one, two = outcomes[:40], outcomes[40:70]
    pooled = (39 * one.var(ddof=1) + 29 * two.var(ddof=1)) / 68
    return float(outcomes[:70].mean()), float(np.sqrt(pooled / 70))


def test_errors_of_seeds_and_of_differences() -> None:
    rng = np.random.default_rng(0)
    control = rng.random((2, 120)) < 0.5
    student = control | (rng.random((2, 120)) < 0.1)
    students, controls = (
        tuple(scored(outcomes, seed) for seed, outcomes in enumerate(of)) for of in (student, control)
    )
    found = Comparison("student", students).estimate("islands")
    paired = Comparison("student", students, controls).estimate("islands")
    assert found is not None
    assert paired is not None
    assert (found.value, found.stderr) == pytest.approx(reference(student.mean(0)))
    assert (paired.value, paired.stderr) == pytest.approx(reference(student.mean(0) - control.mean(0)))
    assert paired.stderr is not None
    assert found.stderr is not None
    assert paired.stderr < found.stderr / 2, "what the models have in common is no uncertainty"
    whole, other = (Comparison("student", students, controls).estimate(group) for group in (None, "other"))
    assert whole is not None
    assert other is not None
    assert whole.stderr == pytest.approx(np.hypot(paired.stderr, other.stderr) / 2)


def test_without_outcomes_of_the_same_pairs_there_is_no_error() -> None:
    student, control = (scored(np.arange(120) % n == 0) for n in (2, 3))
    assert student.pairs is not None
    others = student.pairs.model_copy(update={"sha256": "0" * 64})
    paradigms = {name: score.model_copy(update={"right": None}) for name, score in student.pairs.paradigms.items()}
    earlier = student.pairs.model_copy(update={"sha256": None, "paradigms": paradigms})
    for scores in (others, earlier):
        found = Comparison("student", (model_of(scores),), (control,)).estimate()
        assert found is not None
        assert found.value == pytest.approx(1 / 6, abs=0.02)
        assert found.stderr is None
    unscored = Model("student", "student", 0, None, None)
    assert Comparison("student", (unscored,)).estimate("islands") is None
    assert Comparison("student", (student,), (unscored,)).estimate() is None
