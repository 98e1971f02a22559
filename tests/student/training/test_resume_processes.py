"""Several processes, killed and resumed with others, against one process that nothing stopped.

Legend: `G` windows of a step over all processes.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import ROOT
from support.runs import KILLED, NOTED, arguments, have_equal_weights, job_in, python, ranks, windows_read

from student.data.windows import DistillationWindows, reading_order
from student.job import StudentJob
from student.report import TrainingReport
from student.training.run import train

G = 8
STEPS = 2 * (93 // G)
COMMON = {"alpha_end": 0.1, "temperature_end": 1.0, "interpolate_tail": True, "min_entropy": 2.0}
TRAINING = {"num_train_epochs": 2, "save_steps": 4, "ddp_backend": "gloo"}


def job_of(world: Path, output: Path, at_once: int, **changes: Any) -> StudentJob:
    training = {**TRAINING, "per_device_train_batch_size": at_once, **changes.pop("training", {})}
    return job_in(world, output, **COMMON, training=training, **changes)


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingReport]:
    """One process, whole steps at once, not stopped."""
    output = tmp_path_factory.mktemp("alone") / "run"
    return output, train(job_of(world, output, G, eval_cache=str(world / "held")))


def expected_windows(world: Path) -> dict[int, list[int]]:
    """The windows that each step is to read, from the reading order alone."""
    windows = DistillationWindows(str(world / "train"), ["a", "b"], 16, "random", seed=5)
    order = reading_order(windows, G)
    epochs = [(order.permutation(epoch) + epoch * len(windows)).tolist() for epoch in range(2)]
    steps = [epoch[at : at + G] for epoch in epochs for at in range(0, len(windows) - G + 1, G)]
    return dict(enumerate(steps))


def same_run(ours: Path, theirs: Path) -> None:
    """Equal losses from the first to the last step, equal figures and equal weights, but for rounding."""
    one, two = (TrainingReport.model_validate_json((path / "report.json").read_bytes()) for path in (ours, theirs))
    assert (one.steps, one.tokens_seen, one.windows_per_step) == (two.steps, two.tokens_seen, G)
    for mine, other in zip(one.train_log, two.train_log, strict=True):
        assert mine["step"] == other["step"]
        for key in ("loss", "cross_entropy", "kl_a", "kl_b", "alpha", "temperature", "learning_rate"):
            assert mine[key] == pytest.approx(other[key], abs=1e-5), (key, mine["step"])
    assert one.held_out.tokens == two.held_out.tokens
    assert one.held_out.cross_entropy == pytest.approx(two.held_out.cross_entropy, abs=1e-5)
    assert one.held_out.ece == pytest.approx(two.held_out.ece, abs=1e-4)
    assert have_equal_weights(ours, theirs, atol=1e-4)


def test_two_processes_train_as_one_and_may_become_one(
    world: Path, alone: tuple[Path, TrainingReport], tmp_path: Path
) -> None:
    two = job_of(world, tmp_path / "two", G // 2, eval_cache=str(world / "held"))
    # Killed in the second epoch, so that a run of two processes is resumed.
    killed = ranks(2, KILLED.format(step=18), *arguments(two))
    assert 9 in [one.returncode for one in killed]
    assert (tmp_path / "two" / "checkpoint-16").is_dir(), killed[0].stderr
    shutil.copytree(tmp_path / "two", tmp_path / "one")

    done = ranks(2, None, "train-student", *arguments(two), "--json")
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    report = json.loads(done[0].stdout)
    assert (report["processes"], report["resumed_from_step"], report["windows_at_once"]) == (2, 16, G // 2)
    same_run(tmp_path / "two", alone[0])

    # The same job in one process: a step has as many windows as it had, in two micro-batches.
    lines: list[str] = []
    fewer = train(two.model_copy(update={"output_dir": str(tmp_path / "one")}), lines.append)
    assert (fewer.processes, fewer.resumed_from_step, fewer.windows_at_once) == (1, 16, G // 2)
    assert [line for line in lines if "steps of 8 windows, now over 1 process in 2 micro-batches" in line]
    same_run(tmp_path / "one", alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize(("first", "then"), [((2, 4), (2, 4)), ((2, 4), (1, 8)), ((1, 4), (2, 4)), ((1, 8), (2, 2))])
def test_every_step_reads_the_same_windows_whoever_computes_it(
    world: Path,
    alone: tuple[Path, TrainingReport],
    tmp_path: Path,
    first: tuple[int, int],
    then: tuple[int, int],
    fused: str,
) -> None:
    """(processes, windows at once): killed in the second epoch with the first, resumed by torchrun with the second."""
    common = {"windows_per_step": G, "fused_head": fused, "eval_cache": str(world / "held")}
    jobs = [job_of(world, tmp_path / "run", at_once, **common) for _, at_once in (first, then)]
    killed = ranks(first[0], NOTED, *arguments(jobs[0]), NOTES=str(tmp_path / "first"), STOP="17")
    assert 9 in [one.returncode for one in killed], killed[0].stderr
    (tmp_path / "noted.py").write_text(NOTED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(then[0])]
    line = [*launcher, str(tmp_path / "noted.py"), *arguments(jobs[1])]
    done = python(*line, NOTES=str(tmp_path / "then"), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^step \d+", done.stderr, flags=re.MULTILINE)
    assert len(shown) == len(set(shown)) > 0, "one process speaks"
    report = TrainingReport.model_validate_json((tmp_path / "run" / "report.json").read_bytes())
    assert (report.processes, report.windows_at_once, report.resumed_from_step) == (*then, 16)
    assert report.fused_head == (fused == "on")
    expected = expected_windows(world)
    assert len(expected) == STEPS
    assert windows_read(tmp_path / "first") == {step: expected[step] for step in range(17)}
    assert windows_read(tmp_path / "then") == {step: expected[step] for step in range(16, STEPS)}
    same_run(tmp_path / "run", alone[0])


@pytest.mark.slow
def test_processes_that_cannot_share_a_step_are_refused(world: Path, tmp_path: Path) -> None:
    job = job_of(world, tmp_path / "run", 4, windows_per_step=9)
    done = ranks(2, NOTED, *arguments(job), NOTES=str(tmp_path / "notes"))
    assert [one.returncode for one in done] == [2, 2]
    assert done[1].stderr == ""
    assert done[0].stderr.startswith("error: a step of 9 windows cannot be shared equally by 2 processes: 1, 3 process")
    assert len(done[0].stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
