"""A loss that is not finite ends a run at the step where it began, with what was good kept."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.runs import arguments, job_in, ranks
from transformers import TrainerCallback

from storage.errors import Diverged
from student.cli import train_student
from student.evaluation.held_out import HeldOutSums
from student.training.divergence import BadStep, FiniteSteps
from student.training.run import train

NAN, INF = math.nan, math.inf


class Group:
    """Stands for the accelerator of a process among others, whose notes it has."""

    def __init__(self, *others: FiniteSteps) -> None:
        self.others = others

    def gather(self, note: torch.Tensor) -> torch.Tensor:
        return torch.cat([note, *(other._note[None] for other in self.others if other._note is not None)])


def noted(figures: list[tuple[float, float]], skips_steps: bool = False) -> FiniteSteps:
    steps = FiniteSteps(skips_steps)
    for step, (loss, norm) in enumerate(figures, 1):
        steps.add(step, torch.tensor(loss), torch.tensor(norm))
    return steps


@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (2.0, NAN), (2.0, INF), (NAN, NAN)])
@pytest.mark.parametrize("after", [[], [(3.0, 1.0)] * 4, [(NAN, NAN)] * 4])
def test_the_first_bad_step_is_found_whatever_comes_after_it(
    bad: tuple[float, float], after: list[tuple[float, float]]
) -> None:
    found = noted([(3.0, 1.0)] * 6 + [bad] + after).first_bad(Group())
    assert found.step == 7
    assert repr((found.loss, found.gradient_norm)) == repr(bad)


def test_finite_figures_are_no_finding_however_large() -> None:
    assert FiniteSteps(False).first_bad(Group()) is None
    assert noted([(1e38, 1e38), (0.0, 0.0), (-1e38, 0.0)]).first_bad(Group()) is None
    steps = FiniteSteps(False)
    for norm in (None, 1.0):
        steps.add(1, torch.tensor(1.0), norm)
    assert steps.first_bad(Group()) is None


def test_steps_that_a_gradient_scaler_skips_are_forgiven_until_no_scale_is_left() -> None:
    good, skipped = (3.0, 1.0), (3.0, INF)
    begins = [skipped] * 16 + [good] * 3
    assert noted(begins + ([skipped] * 32 + [good]) * 3, skips_steps=True).first_bad(Group()) is None
    found = noted(begins + [skipped] * 33 + [good], skips_steps=True).first_bad(Group())
    assert found == BadStep(20, 3.0, INF)


def test_processes_find_the_same_step_and_the_loss_of_all() -> None:
    """One has the first bad loss; the gradients are those of all."""
    one = noted([(3.0, 1.0), (3.0, NAN), (3.0, NAN)])
    two = noted([(5.0, 1.0), (NAN, NAN), (5.0, NAN)])
    late = noted([(5.0, 1.0), (5.0, 1.0), (NAN, 1.0)])
    for found in (one.first_bad(Group(two)), two.first_bad(Group(one)), late.first_bad(Group(two))):
        assert found.step == 2
        assert math.isnan(found.loss)
    only_norm = noted([(5.0, 1.0), (5.0, INF)]).first_bad(Group(noted([(3.0, 1.0), (3.0, INF)])))
    assert only_norm == BadStep(2, 4.0, INF)


class Spoil(TrainerCallback):
    """Sets a row of the output layer before a step, or after its update."""

    def __init__(self, step: int, value: float = NAN, after: bool = False) -> None:
        self.step, self.value, self.after = step, value, after

    def spoil(self, model: Any, step: int) -> None:
        if step == self.step:
            with torch.no_grad():
                model.lm_head.weight[3] = self.value

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self.after:
            self.spoil(others["model"], state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.after:
            self.spoil(others["model"], state.global_step + 1)


@pytest.mark.parametrize(
    "training",
    [
        {"logging_steps": 1},
        {"logging_steps": 7},
        {"logging_strategy": "no", "save_steps": 3},
        {"logging_strategy": "epoch", "save_strategy": "epoch", "per_device_train_batch_size": 4,
         "gradient_accumulation_steps": 2},
        {"logging_nan_inf_filter": True, "max_grad_norm": 0},
        {"save_strategy": "no", "logging_strategy": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_ends_with_the_step_whose_loss_is_not_finite(
    world: Path, tmp_path: Path, training: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Diverged) as caught:
        train(job_in(world, out, training={"save_steps": 2, **training}), callbacks=[Spoil(5)])
    assert str(caught.value).startswith(
        f"{out}: the loss is nan and the norm of its gradient nan at step 5 of 11, so training ends there: "
    )
    kept = {2: "checkpoint-4", 3: "checkpoint-3"}
    expected = kept[training.get("save_steps", 2)] if training.get("save_strategy") is None else None
    assert (f"the last checkpoint is {out / str(expected)};" if expected else "no checkpoint") in str(caught.value)
    assert [path.name for path in out.glob("checkpoint-*")] == ([expected] if expected else [])
    assert not (out / "config.json").exists()
    assert not (out / "report.json").exists()
    if expected:
        again = train(job_in(world, out, training={"save_steps": 2, **training}))
        assert (again.resumed_from_step, again.steps) == (int(expected.removeprefix("checkpoint-")), 11)


def test_nothing_is_read_from_the_device_but_where_the_trainer_reads_too(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, original = [], FiniteSteps.first_bad
    monkeypatch.setattr(FiniteSteps, "first_bad", lambda self, group: read.append(1) or original(self, group))
    train(job_in(world, tmp_path / "out", training={"logging_steps": 5, "save_strategy": "no"}))
    assert len(read) == 2 + 2, "steps 5 and 10, the last step and the end of its epoch"


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_weights_that_a_last_step_spoiled_are_not_saved(world: Path, tmp_path: Path, save_strategy: str) -> None:
    """Its own loss was finite."""
    out = tmp_path / "out"
    job = job_in(world, out, training={"max_steps": 4, "save_steps": 3, "save_strategy": save_strategy})
    with pytest.raises(Diverged, match="weights are not finite after step 4 of 4, so training ends there"):
        train(job, callbacks=[Spoil(4, INF, after=True)])
    assert [path.name for path in out.glob("checkpoint-*")] == (["checkpoint-3"] if save_strategy == "steps" else [])
    assert not (out / "config.json").exists()


def test_logits_that_are_no_numbers_end_an_evaluation_in_one_line(world: Path, tmp_path: Path) -> None:
    """Finite weights can have such logits."""
    fields = {"max_steps": 2, "save_strategy": "no"}
    job = job_in(world, tmp_path / "out", eval_cache=str(world / "held"), training=fields)
    with pytest.raises(Diverged, match=r"held-out cross-entropy is nan: .* after step 2 of 2"):
        train(job, callbacks=[Spoil(2, 3e38, after=True)])
    assert not (tmp_path / "out" / "config.json").exists()
    sums = HeldOutSums(5)
    sums.add(torch.full((2, 5), NAN), torch.tensor([1, 2]))
    with pytest.raises(Diverged, match="held-out cross-entropy is nan"):
        sums.result()


def test_a_learning_rate_that_is_far_too_large_ends_with_status_1(world: Path, tmp_path: Path) -> None:
    fields = {"learning_rate": 1e30, "optim": "sgd", "max_grad_norm": 0, "warmup_steps": 0}
    done = CliRunner().invoke(train_student, arguments(job_in(world, tmp_path / "out", training=fields)))
    assert done.exit_code == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "at step 2 of 11" in errors[0]
    assert "take a smaller learning_rate" in errors[0]


SPOILED = """
import os, sys, torch
from student.cli import train_student
from student.training import trainer
from student.training.trainer import DistillationTrainer
if os.environ["RANK"] == "1":
    trainer.CHECKPOINT_SECONDS = 0
loss = DistillationTrainer.compute_loss
def spoiled(self, model, *others, **more):
    found = loss(self, model, *others, **more)
    bad = model.training and self.state.global_step == 4 and os.environ["RANK"] == "1"
    return found * float("nan") if bad else found
DistillationTrainer.compute_loss = spoiled
train_student(sys.argv[1:])
"""


def test_all_processes_save_and_end_together(world: Path, tmp_path: Path) -> None:
    """Though the clock of one says that it is time to save, and only the loss of one is no number."""
    fields = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "logging_steps": 3}
    done = ranks(2, SPOILED, *arguments(job_in(world, tmp_path / "out", training=fields)))
    assert [one.returncode for one in done] == [1, 1], done[0].stderr
    errors = [line for one in done for line in one.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert "at step 5 of 11" in errors[0]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(os.listdir(tmp_path / "out" / "checkpoint-3"))
