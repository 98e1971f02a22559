"""Metrics for people's own tools, by transformers' loggers: what a run writes, and who writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.runs import NOTED, arguments, job_in, ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import student.training.arguments
from storage.errors import InputError
from student.job import StudentJob
from student.report import TrainingReport
from student.training.run import train


def job_with(world: Path, output: Path, report_to: str) -> StudentJob:
    training = {"report_to": report_to, "eval_strategy": "steps", "eval_steps": 5, "per_device_train_batch_size": 4}
    return job_in(world, output, windows_per_step=8, eval_cache=str(world / "held"), training=training)


def written(output: Path) -> dict[str, list[tuple[int, float]]]:
    """By tag, (step, value) of the one event file of a run."""
    files = list((output / "runs").rglob("events.*"))
    assert len({file.parent for file in files}) == 1
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_written(output: Path, report: TrainingReport) -> None:
    found = written(output)
    for name in ("loss", "cross_entropy", "kl_a", "kl_b", "learning_rate", "grad_norm"):
        logged = [(entry["step"], pytest.approx(entry[name], rel=1e-5)) for entry in report.train_log]
        assert found[f"train/{name}"][: len(logged)] == logged, name
    final = report.held_out.logged()
    assert {"eval_kl_a", "eval_distillation_loss"} <= final.keys()
    for name, value in final.items():
        values = found[name.replace("eval_", "eval/")]
        assert [step for step, _ in values] == [5, 10, 11, 11], "in training, and of the finished model"
        assert values[-1][1] == pytest.approx(value, rel=1e-5)


def test_tensorboard_has_the_figures_of_the_report(world: Path, tmp_path: Path) -> None:
    report = train(job_with(world, tmp_path / "run", "tensorboard"))
    check_written(tmp_path / "run", report)
    assert [entry["step"] for entry in report.eval_log] == [5, 10, 11]


@pytest.mark.slow
def test_of_two_processes_one_writes(world: Path, tmp_path: Path) -> None:
    job = job_with(world, tmp_path / "run", "tensorboard")
    done = ranks(2, NOTED, *arguments(job), "--json", NOTES=str(tmp_path / "notes"))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    # The figures of the finished model come in a file of their own, as training has closed its own.
    files = [name for _, _, names in os.walk(tmp_path / "run" / "runs") for name in names]
    assert len(files) == 2
    check_written(tmp_path / "run", TrainingReport.model_validate_json(done[0].stdout))


def test_loggers_that_are_not_there_are_one_line(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student.training.arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(InputError, match="report_to wandb needs a package that is not installed: pip install wandb"):
        train(job_with(world, tmp_path / "run", "wandb"))
    assert not (tmp_path / "run").exists()
