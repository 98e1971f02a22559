"""The choices of the loss as a user of `train-student` meets them: what runs, what it is called, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import in_process, refused
from support.references.dense_targets import write_varopt
from support.runs import KILLED, V, arguments, have_equal_weights, job_in, make_world, ranks

from storage import LogitCache
from storage.errors import InputError
from storage.format.manifest.entry import TARGET_FIELDS
from student.data.windows import DistillationWindows
from student.report import TrainingReport
from student.training.run import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches of `runs`, and in both VarOpt entries of one teacher: `sampled` (temperature 1), `sampled2`, and of
    version 2 `lean` and `all`, by what they store, and `some`, without targets in two rows of three."""
    folder = tmp_path_factory.mktemp("objectives")
    make_world(folder)
    table = torch.from_numpy(2 * np.random.default_rng(99).normal(size=(V, V)))
    for name in ("train", "held"):
        url = str(folder / name)
        cache = LogitCache.open(url)
        tokens = torch.from_numpy(cache.tokens.read(0, cache.record.corpus.positions).astype(np.int64))
        logp = torch.log_softmax(table[tokens], 1)
        for entry, tau in (("sampled", 1.0), ("sampled2", 2.0)):
            write_varopt(url, entry, logp, 12, tau)
        for entry, fields in (("lean", ()), ("all", TARGET_FIELDS)):
            write_varopt(url, entry, logp, 12, fields=fields)
        write_varopt(url, "some", logp, 12, fields=("entropy",), there=np.arange(len(tokens)) % 3 == 0)
    return folder


def invoke(world: Path, out: Path, *more: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    changes = {"training": {"max_steps": 2}, "temperature": 1, **changes}
    return in_process("train-student", *arguments(job_in(world, out, **changes)), *more)


RUNS: dict[str, tuple[dict[str, Any], str, str]] = {
    "reverse KL": ({"teachers": ["a"], "loss": "reverse-kl", "temperature": 2}, "reverse_kl_a", "a lower bound"),
    "JSD": ({"teachers": ["sampled"], "loss": "jsd", "mix": 0.2}, "jsd_sampled", "a lower bound"),
    "skewed": ({"teachers": ["b"], "loss": "skew-forward-kl"}, "skew_forward_kl_b", "a lower bound"),
    "skewed reverse": ({"teachers": ["b"], "loss": "skew-reverse-kl"}, "skew_reverse_kl_b", "a lower bound"),
    "sampled ids": ({"teachers": ["sampled"]}, "kl_sampled", "an estimate from drawn ids"),
    "a lean entry": ({"teachers": ["lean"]}, "teacher_ce_lean", "a cross-entropy to the teacher, whose entropy is not"),
    "every field": ({"teachers": ["all"], "tail": "controlled"}, "kl_all", "an estimate from drawn ids"),
    "rows without targets": ({"teachers": ["some", "all"], "alpha": 0.5}, "kl_some", "an estimate from drawn ids"),
    "sampled for 2": ({"teachers": ["sampled2"], "temperature": 2}, "kl_sampled2", "an estimate from drawn ids"),
    "sampled and not": ({"teachers": ["sampled:3", "a"]}, "kl_a", "a lower bound"),
    "controlled": ({"teachers": ["sampled2"], "tail": "controlled", "temperature": 2}, "kl_sampled2", "an estimate"),
    "blend": ({"teachers": ["sampled"], "tail": "blend", "blend": 0.5}, "kl_sampled", "blended"),
    "bucket of sampled ids": ({"teachers": ["sampled"], "tail": "bucket"}, "kl_sampled", "a lower bound"),
    "renormalised": ({"teachers": ["a"], "tail": "renormalise"}, "kl_a", "of the stored ids alone"),
    "heads alone": ({"teachers": ["a"], "tail": "none"}, "kl_a", "of the stored ids alone"),
    "BabyLlama's": ({"loss_scale": "babyllama"}, "kl_b", "a lower bound"),
    "unsure positions": ({"min_entropy": 2.5}, "kl_a", "a lower bound"),
}


@pytest.mark.parametrize("case", RUNS)
def test_runs_name_their_divergence_and_what_it_is(world: Path, tmp_path: Path, case: str) -> None:
    changes, name, meaning = RUNS[case]
    done = invoke(world, tmp_path / "out", **changes)
    assert done.returncode == 0, done.stderr
    teacher = name.rpartition("_")[2]
    (line,) = [line for line in done.stdout.splitlines() if f" to {teacher}  " in line]
    assert meaning in line
    report = train(job_in(world, tmp_path / "out", training={"max_steps": 2}, **{"temperature": 1, **changes}))
    assert name in report.train_log[0]
    assert report.divergence[teacher] in line
    assert report.tail_bounds == {}


def test_a_controlled_run_is_the_same_however_it_is_cut_killed_and_resumed(world: Path, tmp_path: Path) -> None:
    """One process in whole steps, and two with two micro-batches each that were killed after a checkpoint."""
    common = {"teachers": ["sampled"], "temperature": 1, "tail": "controlled", "alpha": 0.1, "windows_per_step": 8,
              "eval_cache": str(world / "held")}  # fmt: skip
    training = {"max_steps": 14, "save_steps": 4, "logging_steps": 1, "ddp_backend": "gloo"}
    alone = train(job_in(world, tmp_path / "alone", training=training, **common))
    two = job_in(world, tmp_path / "two", training={**training, "per_device_train_batch_size": 2}, **common)
    killed = ranks(2, KILLED.format(step=10), *arguments(two))
    assert 9 in [one.returncode for one in killed], killed[0].stderr
    # A checkpoint from before there were control variates has nothing of them.
    shutil.copytree(tmp_path / "two", tmp_path / "before")
    state = tmp_path / "before" / "checkpoint-8" / "trainer_state.json"
    read = json.loads(state.read_text())
    del read["stateful_callbacks"]["control_variates"]
    state.write_text(json.dumps(read))

    done = ranks(2, None, "train-student", *arguments(two))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    again = TrainingReport.model_validate_json((tmp_path / "two" / "report.json").read_bytes())
    assert (again.resumed_from_step, again.processes, again.windows_at_once) == (8, 2, 2)
    figures = ("loss", "kl_sampled", "control_sampled", "cross_entropy")
    for one, other in zip(alone.train_log, again.train_log, strict=True):
        assert [one[name] for name in figures] == pytest.approx([other[name] for name in figures], abs=1e-5)
        assert 0.0 < one["control_sampled"] < 1.0
    assert again.held_out.distillation_loss == pytest.approx(alone.held_out.distillation_loss, abs=1e-5)
    assert have_equal_weights(tmp_path / "alone", tmp_path / "two", atol=1e-4)

    before = train(two.model_copy(update={"output_dir": str(tmp_path / "before")}))
    assert before.resumed_from_step == 8
    assert before.train_log[7] == again.train_log[7]
    assert abs(before.train_log[8]["control_sampled"] - alone.train_log[8]["control_sampled"]) > 1e-4


@pytest.mark.parametrize(
    ("changes", "alpha"),
    [
        ({"teachers": ["sampled"]}, 0.0),
        ({"teachers": ["b"]}, 0.0),  # all its ids are stored
        ({"teachers": ["sampled"], "tail": "controlled"}, 0.0),
        ({"teachers": ["sampled", "a:0"]}, 0.0),
        ({"teachers": ["a"]}, 0.5),
        ({"teachers": ["sampled", "a"]}, 0.5),
        ({"teachers": ["sampled"], "tail": "bucket"}, 0.5),
        ({"teachers": ["sampled"], "loss": "jsd"}, 0.5),
        ({"teachers": ["sampled"], "alpha": 0.5}, 0.5),
        ({"teachers": []}, 1.0),
    ],
)
def test_alpha_follows_the_targets_where_it_is_left_open(
    world: Path, tmp_path: Path, changes: dict[str, Any], alpha: float
) -> None:
    report = train(job_in(world, tmp_path / "out", temperature=1, training={"max_steps": 2}, **changes))
    assert report.job.alpha == alpha
    entry = report.train_log[0]
    parts = [value for name, value in entry.items() if name.startswith(("kl_sampled", "kl_b", "jsd"))]
    if alpha in (0.0, 1.0):
        assert entry["loss"] == pytest.approx(parts[0] if parts else entry["cross_entropy"], rel=1e-5)


def test_an_interpolated_temperature_reports_its_error_bound(world: Path, tmp_path: Path) -> None:
    job = job_in(world, tmp_path / "out", temperature=1.5, interpolate_tail=True, training={"max_steps": 1})
    lines: list[str] = []
    report = train(job, lines.append)
    bound = report.tail_bounds["a"]
    assert 0 < bound.mean < bound.greatest < 0.5
    assert bound.positions == 32 * 16
    assert report.tail_bounds["b"].greatest == 0, "all its ids are stored"
    (line,) = [line for line in lines if line.startswith("teacher a at temperature 1.5")]
    assert f"{bound.mean:.4f} of the true one on average and {bound.greatest:.4f} at worst over 512 positions" in line
    schedule = {"output_dir": str(tmp_path / "schedule"), "temperature": 2.0, "temperature_end": 1.0}
    worst = train(job.model_copy(update=schedule), lines.append).tail_bounds["a"]
    # 1.5 is one of those that it passes through.
    assert worst.mean >= bound.mean
    assert worst.greatest >= bound.greatest
    assert any(line.startswith("teacher a at temperature 2 to 1: the mass") for line in lines)


WRONG: dict[str, tuple[list[str], str]] = {
    "temperature": (["--temperature", "1.5"], "exact only at 1 and 2; take one of them, or --interpolate-tail"),
    "a mixture of no KL": (["--loss", "jsd"], "loss jsd of several teachers (a, b)"),
    "mix too large": (["--loss", "jsd", "--mix", "2"], "--mix"),
    "nothing sampled": (["--tail", "sampled"], "teacher a stores its top-k ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_choices_are_one_line_and_leave_nothing(world: Path, tmp_path: Path, case: str) -> None:
    more, expected = WRONG[case]
    done = invoke(world, tmp_path / "out", *more)
    refused(done, expected)
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_lean_entry_trains_the_student_of_a_full_one(world: Path, tmp_path: Path) -> None:
    """To the last bit; what is held out is measured under the name of what it is."""
    training = {"max_steps": 3, "logging_steps": 1}
    lean, full = (
        train(job_in(world, tmp_path / name, teachers=[name], temperature=1, training=training,
                     eval_cache=str(world / "held")))
        for name in ("lean", "all")
    )  # fmt: skip
    assert have_equal_weights(tmp_path / "lean", tmp_path / "all")
    assert [entry["grad_norm"] for entry in lean.train_log] == [entry["grad_norm"] for entry in full.train_log]
    assert (lean.job.alpha, full.job.alpha) == (0.0, 0.0)
    one, other = lean.held_out.kl["lean"], full.held_out.kl["all"]
    assert (one.log_name, one.lower_bound, other.log_name) == ("teacher_ce", False, "kl")
    # The constant is the entropy of the teacher, near 2.4 nats at random tables of such a width.
    assert 1.5 < one.nats - other.nats < 3.5
    best = {"metric_for_best_model": "kl_lean", **training}
    with pytest.raises(
        InputError, match=r"'kl_lean' is not measured; there is: loss, .*, teacher_ce_lean, distillation"
    ):
        train(job_in(world, tmp_path / "best", teachers=["lean"], temperature=1, training=best,
                     eval_cache=str(world / "held")))  # fmt: skip
    assert not (tmp_path / "best").exists()


def test_figures_of_a_teacher_are_means_over_the_rows_that_have_its_targets(world: Path, tmp_path: Path) -> None:
    """With whole epochs as steps and a learning rate of 0, a step has the rows of the whole stream."""
    windows = len(DistillationWindows(str(world / "train"), ["some"], 16, "random", seed=5))
    training = {"max_steps": 1, "per_device_train_batch_size": windows, "learning_rate": 0.0, "logging_steps": 1}
    changes = {"teachers": ["some", "all"], "temperature": 1, "alpha": 0.25, "eval_cache": str(world / "held")}
    report = train(job_in(world, tmp_path / "out", training=training, **changes))
    entry, held = report.train_log[0], report.held_out
    # Where one of the two has no targets, the other has the whole weight.
    share = 1 / 3
    mixture = 0.5 * share * entry["kl_some"] + (1 - 0.5 * share) * entry["kl_all"]
    assert entry["loss"] == pytest.approx(0.25 * entry["cross_entropy"] + 0.75 * mixture, rel=5e-3)
    assert entry["kl_some"] == pytest.approx(entry["kl_all"], rel=0.2)
    assert held.kl["some"].nats == pytest.approx(held.kl["all"].nats, rel=0.2)


def test_babyllama_scale_and_windows_that_begin_with_bos_are_refused(world: Path, tmp_path: Path) -> None:
    """The row of a window's last label depends on whether it began with BOS already."""
    job = job_in(world, tmp_path / "out", teachers=[], loss_scale="babyllama", bos_each_window=True)
    with pytest.raises(InputError, match=r"babyllama .* BOS: take --loss-scale token"):
        train(job)
    assert not (tmp_path / "out").exists()


def test_a_schedule_needs_a_teacher(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"alpha is 0\.5 but no teacher is named"):
        job_in(world, tmp_path / "out", teachers=[], alpha=1.0, alpha_end=0.5)
