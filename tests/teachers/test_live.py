"""Live teachers: the dense loss against float64 references, and runs beside teachers against runs from a cache.

Legend: `B` windows, `T` positions of a window, `P` = B·T, `V` vocabulary, `W` columns of the student's head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import Run, refused, succeeded
from support.models.short_heads import beside, swap_ids
from support.references.divergences import definition
from support.references.live_runs import STEPS, TRAINING, T, V, cached_losses, live_losses, world
from torch import Tensor

from storage.errors import IdentityMismatch, InputError
from student.job import StudentJob
from student.labels import NOT_TRAINED
from student.loss.dense import DenseLoss
from student.report import TrainingReport
from student.training.run import train
from teachers.live import load_live

__all__ = ["world"]

WINDOWS, LENGTH = 3, 5
PADDED = 7


class Fixed:
    """Teachers whose logits are a table of the windows' positions, in chunks of `rows`."""

    provenance: Mapping[str, str] = {"weights": "0" * 64}

    def __init__(self, logits: Tensor, rows: int) -> None:
        self.logits, self.rows, self.columns = logits, rows, logits.shape[1]
        self.calls = 0

    def packs(self, length: int) -> bool:
        return True

    def __call__(self, windows: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        assert windows.numel() == len(self.logits)
        self.calls += 1
        yield from self.logits.split(self.rows)


def numbers(seed: int, columns: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(WINDOWS * LENGTH, columns, generator=generator, dtype=torch.float64)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Labels with untrained positions among them, windows, position weights."""
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(V, (WINDOWS * LENGTH,), generator=generator)
    labels[[0, 4, 11]] = NOT_TRAINED
    weights = torch.rand(WINDOWS * LENGTH, generator=generator, dtype=torch.float64)
    return labels, torch.zeros(WINDOWS, LENGTH, dtype=torch.int64), weights


CASES: list[tuple[str, float, dict[str, Any]]] = [
    ("forward-kl", 1.0, {}),
    ("forward-kl", 2.0, {"loss_scale": "babyllama", "window_tokens": LENGTH}),
    ("forward-kl", 3.0, {"interpolate_tail": True, "min_entropy": 1.5}),
    ("reverse-kl", 1.0, {}),
    ("jsd", 2.0, {"mix": 0.3}),
    ("skew-forward-kl", 1.0, {"mix": 0.2}),
    ("skew-reverse-kl", 2.0, {"mix": 0.2, "min_entropy": 1.5}),
]


@pytest.mark.parametrize(("name", "tau", "options"), CASES, ids=[f"{case[0]}-{case[1]:g}" for case in CASES])
@pytest.mark.parametrize("rows", [4, 100], ids=["chunks", "one chunk"])
def test_value_and_gradient_are_the_dense_ones(name: str, tau: float, options: dict[str, Any], rows: int) -> None:
    alpha = 0.3
    # A teacher's head may be wider than the vocabulary, too; its further columns count for nothing.
    teacher, student = numbers(1, V + 3, 3.0), numbers(2, V, 2.0).requires_grad_()
    labels, windows, weights = batch()
    source = Fixed(teacher, rows)
    loss = DenseLoss(source, V, alpha, tau, loss=name, **options)
    sums = loss(student, labels, position_weights=weights, windows=windows)
    (found,) = torch.autograd.grad(3 * sums.loss_sum, student)

    trained = labels != NOT_TRAINED
    p, q = torch.softmax(teacher[:, :V] / tau, 1), torch.softmax(student / tau, 1)
    divergence = definition(name, options.get("mix", 0.0), p, q)
    cross_entropy = -torch.log_softmax(student, 1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    of_label, of_teacher = weights * trained, weights * trained
    if options.get("loss_scale"):
        inside = torch.arange(len(labels)) % LENGTH < LENGTH - 1
        of_label, of_teacher = of_label * inside * LENGTH / (LENGTH - 1), of_teacher * LENGTH
    if options.get("min_entropy"):
        plain = torch.softmax(teacher[:, :V], 1)
        chosen = -(plain * plain.log()).sum(1) >= options["min_entropy"]
        assert 0 < chosen.sum() < len(chosen), "the selection selects"
        of_teacher = of_teacher * chosen
    expected = (alpha * of_label * cross_entropy + (1 - alpha) * tau**2 * of_teacher * divergence).sum()
    (gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(sums.loss_sum, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(sums.cross_entropy, (cross_entropy * trained).sum().detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(sums.divergence["live"], (divergence * trained).sum().detach(), rtol=1e-9, atol=1e-10)
    assert sums.count == trained.sum()


def test_a_padded_student_pays_for_mass_on_padding() -> None:
    """Columns beyond the vocabulary are part of the student's softmax and get nothing from the teacher."""
    teacher, student = numbers(1, V, 3.0), numbers(2, V + PADDED, 2.0).requires_grad_()
    labels, windows, _ = batch()
    sums = DenseLoss(Fixed(teacher, 4), V, 0.0, 1.0)(student, labels, windows=windows)
    trained = labels != NOT_TRAINED
    log_p, log_q = torch.log_softmax(teacher, 1), torch.log_softmax(student, 1)[:, :V]
    expected = ((log_p.exp() * (log_p - log_q)).sum(1) * trained).sum()
    torch.testing.assert_close(sums.loss_sum, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (sums.loss_sum, expected)))


def test_half_precision_logits_get_a_gradient_of_their_type() -> None:
    teacher, student = numbers(1, V, 3.0).float(), numbers(2, V, 2.0).bfloat16().requires_grad_()
    labels, windows, _ = batch()
    sums = DenseLoss(Fixed(teacher, 4), V, 0.0, 2.0)(student, labels, windows=windows)
    assert sums.loss_sum.dtype == torch.float32
    (found,) = torch.autograd.grad(sums.loss_sum, student)
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(student.detach().float() / 2, 1)
    expected = 4 * (q - p) / 2 * (labels != NOT_TRAINED)[:, None]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)


def test_without_a_share_the_teachers_do_not_run() -> None:
    source = Fixed(numbers(1, V, 3.0), 4)
    labels, windows, _ = batch()
    sums = DenseLoss(source, V, 1.0, 1.0)(numbers(2, V, 2.0).requires_grad_(), labels, windows=windows)
    assert source.calls == 0
    assert sums.divergence == {}
    torch.testing.assert_close(sums.loss_sum.detach(), sums.cross_entropy)
    with pytest.raises(InputError, match="give its input_ids"):
        DenseLoss(source, V, 0.5, 1.0)(numbers(2, V, 2.0), labels)


def test_teachers_must_score_every_id() -> None:
    with pytest.raises(InputError, match=f"{V - 1} columns, the vocabulary {V} ids"):
        DenseLoss(Fixed(numbers(1, V - 1, 1.0), 4), V, 0.0, 1.0)


def live_job(world: Path, out: Path, sources: list[str], temperature: float, **changes: Any) -> StudentJob:
    return StudentJob.model_validate({
        "cache": str(world / "cache"), "live_teachers": [str(world / name) for name in sources],
        "model": str(world / "student.json"), "alpha": 0.5,
        "temperature": temperature, "window_tokens": T, "output_dir": str(out), "seed": 3, "training": TRAINING,
        **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "combine", "temperature"),
    [("a", None, 1.0), ("b", None, 2.0), ("ab", "logit-mean", 2.0), ("ab", "mixture", 1.0), ("ab", "mixture", 2.0)],
)
def test_a_run_beside_its_teachers(
    world: Path, tmp_path: Path, sources: str, combine: str | None, temperature: float
) -> None:
    """Step for step the loop of plain torch, which shares no loss with it, and the run from a cache of all ids."""
    job = live_job(world, tmp_path / "live", list(sources), temperature, combine=combine)
    report = train(job, lambda line: None, load_live)
    found = np.array([entry["loss"] for entry in report.train_log if "loss" in entry])
    weights = {name: 1 / len(sources) for name in sources}
    assert np.abs(found - live_losses(world, weights, temperature, combine or "")).max() < 1e-4
    if combine is None:
        assert np.abs(found - cached_losses(world, tmp_path / "cached", weights, temperature)).max() < 1e-4
    assert len(found) == STEPS
    assert report.divergence == {"live": "of the teachers' whole distributions"}
    assert report.live.sources == tuple(str(world / name) for name in sources)
    assert not report.fused_head
    assert report.train_log[0]["kl_live"] > 0


def test_the_runs_own_loss_on_held_out_text(world: Path, tmp_path: Path) -> None:
    """From a cache of all ids and beside the teacher it is one number; the best epoch can be chosen by it."""
    by_it = {
        "metric_for_best_model": "distillation_loss", "load_best_model_at_end": True, "eval_strategy": "steps",
        "eval_steps": 10, "save_strategy": "steps", "save_steps": 10,
    }  # fmt: skip
    changes = {"eval_cache": str(world / "cache"), "training": {**TRAINING, **by_it}, "loss_scale": "babyllama"}
    from_cache = {"teachers": ["a"], "live_teachers": (), **changes}
    reports = [
        train(live_job(world, tmp_path / "live", ["a"], 2.0, **changes), lambda line: None, load_live),
        train(live_job(world, tmp_path / "cached", [], 2.0, **from_cache), lambda line: None),
    ]
    for report in reports:
        assert len(report.eval_log) == 2
        best = min(entry["eval_distillation_loss"] for entry in report.eval_log)
        assert report.held_out.distillation_loss == pytest.approx(best, abs=1e-5)
    live, cached = (report.held_out for report in reports)
    assert live.distillation_loss == pytest.approx(cached.distillation_loss, abs=1e-3)
    # BabyLlama's scale: T times the divergence, here at temperature 2, which no other figure has.
    assert cached.distillation_loss > 0.5 * cached.cross_entropy


def test_best_by_a_loss_that_cannot_be_measured_is_refused(world: Path, tmp_path: Path) -> None:
    best = {"metric_for_best_model": "distillation_loss", "load_best_model_at_end": True, "eval_strategy": "epoch"}
    training = {**best, "save_strategy": "epoch", "per_device_train_batch_size": 8}
    fields = {"eval_cache": str(world / "cache"), "training": training}
    job = StudentJob(cache=str(world / "cache"), model="llama-tiny", output_dir=str(tmp_path / "out"), **fields)
    with pytest.raises(InputError, match="distillation_loss cannot be measured: without teachers"):
        train(job, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_the_command(world: Path, tmp_path: Path, run: Run) -> None:
    line = ["train-teacher", "--cache", world / "cache", "--model", world / "student.json", "--window-tokens", T]
    live = ["--live-teacher", world / "a", "--live-teacher", world / "b", "--combine", "logit-mean"]
    steps = ["--set", "max_steps=2", "--set", "logging_steps=1"]
    succeeded(run(*line, *live, *steps, "--alpha", "0.5", "--temperature", "2", "--output-dir", tmp_path / "out"))
    report = TrainingReport.model_validate(json.loads((tmp_path / "out" / "report.json").read_text()))
    assert report.live.combine == "logit-mean"
    assert report.live.provenance.keys() >= {"combine", "0/weights_sha256", "1/weights_sha256"}
    assert 1 << 27 < report.peak_memory.process_bytes < 1 << 32
    assert report.peak_memory.device_bytes is None
    # Another teacher is another run, and its folder is refused.
    other = ["--live-teacher", world / "a", *steps, "--alpha", "0.5", "--temperature", "2"]
    refused(run(*line, *other, "--output-dir", tmp_path / "out"), "live/")


WRONG: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "several without a word": (["--live-teacher", "{a}", "--live-teacher", "{b}"], ("logit-mean or mixture",)),
    "combined alone": (["--live-teacher", "{a}", "--combine", "mixture"], ("one is not",)),
    "combine without any": (["--combine", "mixture"], ("belongs to live teachers",)),
    "a loss of stored ids": (["--live-teacher", "{a}", "--loss", "tail-aware-kl"], ("for targets from a cache",)),
    "a tail": (["--live-teacher", "{a}", "--tail", "bucket"], ("no tail",)),
    "no such model": (["--live-teacher", "{world}/none"], ("none",)),
    "an empty name": (["--live-teacher", ""], ("live-teachers",)),
    "a fused head": (["--live-teacher", "{a}", "--fused-head", "on"], ("fused head", "live teachers")),
    "alpha without any": (["--alpha", "0.5"], ("no teacher is named",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(world: Path, tmp_path: Path, run: Run, case: str) -> None:
    given, words = WRONG[case]
    filled = [part.format(a=world / "a", b=world / "b", world=world) for part in given]
    line = ["train-teacher", "--cache", world / "cache", "--model", world / "student.json", "--window-tokens", T]
    refused(run(*line, *filled, "--output-dir", tmp_path / "out"), *words)
    assert not (tmp_path / "out" / "config.json").exists()


def test_train_student_runs_no_live_teacher(world: Path, tmp_path: Path, run: Run) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(json.dumps({"live_teachers": [str(world / "a")]}))
    line = ["train-student", "--config", config, "--cache", world / "cache", "--model", world / "student.json"]
    done = run(*line, "--window-tokens", T, "--output-dir", tmp_path / "out")
    refused(done, "loads no teacher", "train-teacher --live-teacher")


def test_a_teacher_of_another_tokenizer_is_refused(
    small_cache: Path, make_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = beside(make_teacher(5), small_cache / "tokenizer", tmp_path / "teacher")
    swap_ids(teacher)
    job = StudentJob(
        cache=str(small_cache), live_teachers=(str(teacher),), model="llama-tiny", output_dir=str(tmp_path / "o")
    )
    with pytest.raises(IdentityMismatch, match="tokenizer"):
        train(job, lambda line: None, load_live)
