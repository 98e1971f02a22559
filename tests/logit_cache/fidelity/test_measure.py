"""The fidelity report: every figure against plain dense arithmetic, and its lifecycle beside the entry.

Legend: `N` positions of the stream, `V` vocabulary, `K` stored ids. The samples here are the whole stream, so that a
figure has one true value.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.caches.copies import pull, push
from support.caches.small import make_corpus
from support.commands import Run, succeeded
from support.crash_disk import Crash, Disk
from support.jobs import cache_logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import open_job
from logit_cache.caching.windows import windows
from logit_cache.fidelity import measure as fidelity
from logit_cache.fidelity.measure import is_wanted, measure
from logit_cache.fidelity.metrics import FORWARDS, RESIDUALS, Measures, StoredRows
from logit_cache.sharing.card import card_text
from storage import LogitCache, SparseTargets
from storage.cache.verify import verify
from storage.errors import CorruptCache, FormatError
from storage.format.fidelity import FidelityReport
from storage.format.sealing import sealed_bytes
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.target_batch import TargetBatch

V, N, CONTEXT, SHARD = 97, 300, 32, 96
World = tuple[Path, Path]
KINDS: dict[str, dict[str, Any]] = {
    "codes": {"k": 12, "targets": "topk"},
    "exact": {"k": 12, "targets": "topk", "encoding": "float32"},
    "pruned": {"k": 40, "top_p": 0.5},
    "isolated": {"k": 12, "targets": "topk", "isolate_documents": True, "stride_tokens": 16},
    "varopt": {"k": 12, "targets": "varopt", "encoding": "float32"},
    "varopt-codes": {"k": 12, "targets": "varopt", "head_ids": 4},
    "whole": {"k": V, "targets": "topk", "encoding": "float32"},
    "one": {"k": 1, "targets": "topk"},
    "lean": {"k": 12, "targets": "varopt", "fields": ("lean",)},
    "lean-for-2": {"k": 12, "targets": "varopt", "fields": ("lean",), "target_temperature": 2},
    "trained": {"k": 12, "targets": "varopt", "fields": ("lean",), "encoding": "float32", "positions": "trained"},
    "1": {"k": 12, "targets": "topk", "fields": (), "positions": None, "format_version": 1},
    "1-varopt": {"k": 12, "targets": "varopt", "head_ids": 4, "fields": (), "positions": None, "format_version": 1},
}
ALL: dict[str, Any] = {
    "fields": ("all",),
    "positions": "all",
    "stride_tokens": None,
    "context_tokens": CONTEXT,
    "shard_tokens": SHARD,
    "isolate_documents": False,
}
WHOLE = {"bucket", "renormalise", "none"}
TREATMENTS = {"lean": {"sampled"}, "trained": {"sampled"}, "lean-for-2": set(), "varopt": WHOLE | {"sampled"}}
TREATMENTS |= {"varopt-codes": TREATMENTS["varopt"], "1-varopt": TREATMENTS["varopt"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_teacher: Callable[..., Path]) -> World:
    """A stream of random tokens in three documents, a teacher, and an entry of every kind without a report."""
    cache, teacher = tmp_path_factory.mktemp("world") / "cache", make_teacher(3, vocabulary_size=V + 7)
    tokens = np.random.default_rng(1).zipf(1.3, N).clip(max=V) - 1
    trained = np.random.default_rng(2).random(N) < 0.4
    make_corpus(str(cache), tokens.astype(np.uint16), V, np.array([0, 70, 75]), trained)
    for name, fields in KINDS.items():
        cache_logits(cache, name, teacher, **ALL | fields)
    return cache, teacher


def report_of(world: World, name: str, positions: int = 20 * N) -> FidelityReport:
    cache, teacher = world
    job = CacheJob(cache=str(cache), teacher=str(teacher), name=name, **ALL | KINDS[name])
    return measure(open_job(job), positions)


def dense(world: World, name: str) -> tuple[Tensor, SparseTargets, Tensor]:
    """Of the rows with targets, all N but for `trained`: the model's own logits [N, V] in float64, the stored targets,
    and the labels [N] (-100: none)."""
    cache, teacher = world
    opened = LogitCache.open(str(cache))
    entry = opened.teacher(name).entry
    tokens = torch.from_numpy(opened.tokens.read(0, N).astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    logits, labels = torch.empty(N, V, dtype=torch.float64), torch.full((N,), -100)
    for window in windows(0, N, N, entry.windowing, opened.document_starts):
        with torch.no_grad():
            rows = model(tokens[None, window.start : window.stop]).logits[0, :, :V].double()
        logits[window.first : window.last] = rows[window.first - window.start : window.last - window.start]
        last = min(window.last, window.end - 1)
        labels[window.first : last] = tokens[window.first + 1 : last + 1]
    stored = opened.teacher(name).read(0, N)
    rows = stored.kept > 0
    return logits[rows], SparseTargets(0, **{n: values[rows] for n, values in stored.arrays().items()}), labels[rows]


def distributions(stored: SparseTargets, step: float, counts: np.ndarray) -> dict[str, np.ndarray]:
    """[N, V] of each reading of the stored values, one row after the other, by the definitions; all but `sampled` of
    the ids that have log-probs."""
    names = ("bucket", "bucket-unigram", "renormalise", "none", "sampled")
    found = {name: np.zeros((len(stored), V)) for name in names}
    for t in range(len(stored)):
        kept, certain = int(stored.kept[t]), int(stored.certain[t])
        every = stored.token_ids[t, :kept].astype(int)
        p = np.exp(stored.logprobs[t, :kept].astype(np.float64))
        ids, p = every[~np.isnan(p)], p[~np.isnan(p)]
        tail = math.exp(stored.log_tail[t])
        rest, sampled = tail, float(p[certain:].sum())
        if sampled:
            rest = tail * -math.expm1(min(math.log(sampled / tail), -max(step / 2, 1e-6)))
        outside = np.setdiff1d(np.arange(V), ids)
        total = p.sum() + rest
        for name, shape in (("bucket", np.ones(V)), ("bucket-unigram", counts)):
            found[name][t, ids] = p / total
            found[name][t, outside] = rest / total * shape[outside] / (shape[outside].sum() or 1)
        found["none"][t, ids] = p / total
        found["renormalise"][t, ids] = p / (p.sum() or 1)
        total = p[:certain].sum() + tail
        found["sampled"][t, every[:certain]] = p[:certain] / total
        if certain < kept:
            found["sampled"][t, every[certain:]] = tail / total / (kept - certain)
        else:
            found["sampled"][t, outside] = tail / total / max(1, len(outside))
    return found


def kl(p: np.ndarray, q: np.ndarray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(-1).mean())


def same(found: float | None, expected: float, absolute: float = 2e-6) -> None:
    """Float32 logits differ in their last bits from batch to batch."""
    if math.isinf(expected):
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=1e-4, abs=absolute)


@pytest.mark.parametrize("name", KINDS)
def test_masses_and_divergences(world: World, name: str) -> None:
    report, (logits, stored, _) = report_of(world, name), dense(world, name)
    p = torch.softmax(logits, 1).numpy()
    opened = LogitCache.open(str(world[0]))
    entry = opened.teacher(name).entry
    counts = np.ones(V)
    for start in range(0, N, SHARD):
        for window in windows(start, min(start + SHARD, N), N, entry.windowing, opened.document_starts):
            np.add.at(counts, opened.tokens.read(window.start, window.stop), 1)
    rows = len(stored)
    assert report.positions == rows == (int(opened.loss_mask.read(0, N).sum()) if name == "trained" else N)
    assert report.format_version == entry.format_version
    is_stored, is_known = np.zeros((rows, V), dtype=bool), np.zeros((rows, V), dtype=bool)
    for t in range(rows):
        ids, known = stored.token_ids[t, : stored.kept[t]].astype(int), ~np.isnan(stored.logprobs[t, : stored.kept[t]])
        is_stored[t, ids], is_known[t, ids] = True, known
    residual = np.where(is_stored, 0, p).sum(1)
    same(report.residual_mass.mean, residual.mean())
    for field, q in (("q05", 0.05), ("q50", 0.5), ("q99", 0.99), ("maximum", 1)):
        same(getattr(report.residual_mass, field), np.quantile(residual, q))
    same(report.size.mean_kept, stored.kept.mean())
    readings = distributions(stored, entry.encoding.step_nats or 0, counts)
    bucket = readings["bucket"]
    exact, decoded = (
        np.concatenate([np.where(is_known, x, 0), np.where(is_known, 0, x).sum(1)[:, None]], 1) for x in (p, bucket)
    )
    same(report.quantisation, kl(exact, decoded), 1e-7)
    treatments = TREATMENTS.get(name, WHOLE)
    assert set(report.gradients) == treatments
    assert set(report.divergences) == treatments | ({"bucket-unigram"} if "bucket" in treatments else set())
    for reading, found in report.divergences.items():
        s = readings[reading]
        if reading == "none" and name != "whole":
            assert (found.forward, found.reverse, found.mean_forward) == (None, None, None)
            assert found.infinite == "not a distribution"
            continue
        same(found.forward, kl(p, s))
        same(found.reverse, kl(s, p))
        same(found.mean_forward, kl(p.mean(0), s.mean(0)))
        same(found.mean_reverse, kl(s.mean(0), p.mean(0)))
        assert (found.infinite is None) == (None not in (found.forward, found.mean_forward, found.reverse))
    if name == "exact":
        same(report.divergences["renormalise"].reverse, -np.log(1 - residual).mean())


def loss_gradient(world: World, name: str, tail: str, z: Tensor) -> Tensor:
    """[N, V] from autograd of the loss that students are trained with, in float64."""
    _, stored, _ = dense(world, name)
    member = Member.of("a", LogitCache.open(str(world[0])).teacher(name).entry)
    arrays = {field: values for field, values in stored.arrays().items() if field != "label_logprob"}
    kinds = {field: np.float64 if values.dtype == np.float32 else np.int64 for field, values in arrays.items()}
    batch = TargetBatch(**{field: torch.from_numpy(values.astype(kinds[field])) for field, values in arrays.items()})
    z = z.clone().requires_grad_()
    loss = DistillationLoss(V, 0.0, 1.0, [member], tail=tail)
    loss(z, torch.zeros(len(stored), dtype=torch.int64), {"a": batch}).loss_sum.backward()
    assert z.grad is not None
    return z.grad


def degrees(a: Tensor, b: Tensor) -> float:
    return math.degrees(
        2 * math.atan2(float((a / a.norm() - b / b.norm()).norm()), float((a / a.norm() + b / b.norm()).norm()))
    )


@pytest.mark.parametrize("name", KINDS)
def test_angles_are_those_of_the_students_loss(world: World, name: str) -> None:
    report, (logits, _, _) = report_of(world, name), dense(world, name)
    p = torch.softmax(logits, 1)
    for reference, z in (("uniform", torch.zeros_like(logits)), ("tempered", logits / 2)):
        whole = torch.softmax(z, 1) - p
        for tail, angles in report.gradients.items():
            sparse = loss_gradient(world, name, tail, z)
            same(angles[reference].positions, degrees(whole, sparse), 2e-3)
            same(angles[reference].mean, degrees(whole.mean(0), sparse.mean(0)), 2e-3)


@pytest.mark.parametrize("name", ["exact", "pruned", "isolated", "varopt", "trained"])
def test_calibration(world: World, name: str) -> None:
    report, (logits, stored, labels) = report_of(world, name), dense(world, name)
    p = torch.softmax(logits, 1).numpy()
    known = labels.numpy() >= 0
    assert report.labelled == known.sum()
    assert known.sum() == (N - 3 if name == "isolated" else N - 1) or name == "trained"
    readings = distributions(stored, 1 / 32 if name in ("pruned", "isolated") else 0.0, np.ones(V))
    assert report.calibration is not None
    for found, s in (
        (report.calibration.full, p),
        *((value, readings[tail]) for tail, value in report.calibration.stored.items()),
    ):
        # Equal sampled ids alone at the top: the first column's.
        own = np.take_along_axis(s, np.where(stored.is_kept, stored.token_ids, stored.token_ids[:, :1]).astype(int), 1)
        guess = s.argmax(1) if s is p else np.take_along_axis(stored.token_ids, own.argmax(1)[:, None], 1)[:, 0]
        confidence, correct = s.max(1)[known], (guess == labels.numpy())[known]
        error = 0.0
        for low in range(15):
            inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
            error += abs(correct[inside].sum() - confidence[inside].sum()) / known.sum()
        same(found, error, 1e-5)


def test_the_k_needed(world: World) -> None:
    report, (logits, _, _) = report_of(world, "codes"), dense(world, "codes")
    p = -np.sort(-torch.softmax(logits, 1).numpy(), axis=1)
    residual, divergence = [], []
    for k in range(1, V + 1):
        even = p.copy()
        even[:, k:] = p[:, k:].mean(1, keepdims=True) if k < V else 0
        residual.append(p[:, k:].sum(1).mean())
        divergence.append(kl(p, even))
    assert [(item.at_most, item.k) for item in report.k_for_residual_mass] == [
        (bound, next(k for k in range(1, V + 1) if residual[k - 1] <= bound)) for bound in RESIDUALS
    ]
    assert [(item.at_most, item.k) for item in report.k_for_forward] == [
        (bound, next(k for k in range(1, V + 1) if divergence[k - 1] <= bound)) for bound in FORWARDS
    ]
    assert [point.k for point in report.curve] == [1, 2, 4, 8, 16, 32, 64, V]
    for point in report.curve:
        same(point.residual_mass, residual[point.k - 1])
        same(point.forward, divergence[point.k - 1])
    assert (report.curve[-1].residual_mass, report.curve[-1].forward) == (0.0, 0.0)
    for item in (*report.k_for_residual_mass, *report.k_for_forward):
        assert (item.bytes_per_token is not None) == (3 <= item.k <= 48)


def test_all_ids_stored_is_no_distance(world: World) -> None:
    report = report_of(world, "whole")
    assert report.residual_mass.maximum == 0
    for found in report.divergences.values():
        assert (found.infinite, max(found.forward, found.reverse, found.mean_forward, found.mean_reverse) < 1e-9) == (
            None,
            True,
        )
    for angles in report.gradients.values():
        assert all(value < 1e-3 for angle in angles.values() for value in (angle.positions, angle.mean))
    assert report.calibration is not None
    for error in report.calibration.stored.values():
        assert error == pytest.approx(report.calibration.full, abs=1e-6)


@pytest.mark.parametrize("name", ["codes", "trained"])
def test_size(world: World, name: str) -> None:
    report, targets = report_of(world, name), LogitCache.open(str(world[0])).teacher(name)
    size, rows = report.size, report.positions
    assert size.bytes_per_token == pytest.approx(targets.stored_bytes() / N)
    ids = rows / N * size.mean_kept
    assert size.overhead_bytes_per_token + ids * size.bytes_per_id == pytest.approx(size.bytes_per_token)
    stored = sum(
        p.stat().st_size
        for n in ("ids", "certain_codes", "certain_logprobs")
        for p in (world[0] / f"teachers/{name}/{n}/c").rglob("*")
        if p.is_file()
    )
    assert size.bytes_per_id == pytest.approx(stored / rows / size.mean_kept)
    assert size.bytes_per_target == (pytest.approx(targets.stored_bytes() / rows) if name == "trained" else None)


def test_reports_of_version_1_stay_as_they_were(world: World) -> None:
    report = report_of(world, "1-varopt").model_dump()
    assert report["format_version"] == 1
    assert set(report["size"]) == {"mean_kept", "bytes_per_token", "bytes_per_id", "overhead_bytes_per_token"}
    only = {
        "gradients": {"sampled": report["gradients"]["sampled"]},
        "divergences": {"sampled": report["divergences"]["sampled"]},
        "calibration": None,
    }
    assert FidelityReport.model_validate(report | only | {"format_version": 2}).format_version == 2
    with pytest.raises(ValidationError, match="a treatment that every entry has is missing"):
        FidelityReport.model_validate(report | only)


def test_an_unknown_tail_has_one_treatment() -> None:
    """Imported ids without the mass outside them: the reader knows nothing but their ratios."""
    logits = torch.randn(64, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    top = torch.log_softmax(logits, 1).topk(9)
    stored = StoredRows(
        top.indices,
        top.values - 0.3,
        torch.full((64,), 9),
        torch.full((64,), 9),
        torch.full((64,), -torch.inf).double(),
    )
    found = Measures(torch.ones(V, dtype=torch.float64), 0.0, ("renormalise",))
    found.add(logits, stored, np.zeros(64, dtype=np.int64))
    assert found.per_position("quantisation").max() < 1e-12
    assert set(found.divergences()) == set(found.gradients()) == {"renormalise"}
    expected = -top.values.logsumexp(1).mean()
    assert found.divergences()["renormalise"].reverse == pytest.approx(float(expected))


def test_noise_averages_out_and_bias_does_not() -> None:
    """Heavy tails, the same p at every position: the sampled mean gradient approaches the dense one, as does its KL, by
    the predicted noise; the bucket's stays the same."""
    from teachers.reduction.reduce import reduce_varopt
    from teachers.reduction.varopt import Sampling, random_bits

    vocabulary, k = 400, 16
    logits = -1.1 * torch.arange(1, vocabulary + 1).double().log()

    def figures(positions: int) -> tuple[float, float, float, float]:
        rows = logits.expand(positions, -1).float().contiguous()
        labels = torch.zeros(positions, dtype=torch.int64)
        sampling = Sampling(1.0, 0, torch.from_numpy(random_bits(5, 0, positions)))
        reduced = reduce_varopt(rows, vocabulary, k, labels, -2000.0, sampling)
        found = Measures(torch.ones(vocabulary, dtype=torch.float64), 0.0, ("bucket", "renormalise", "none", "sampled"))
        kept = torch.full((positions,), k)
        stored = StoredRows(
            reduced.token_ids, reduced.logprobs.double(), kept, reduced.certain, reduced.log_tail.double()
        )
        for start in range(0, positions, 512):
            here = slice(start, start + 512)
            found.add(rows[here].double(), stored.rows(here), labels[here].numpy())
        gradients, sampled = found.gradients(), found.divergences()["sampled"]
        return (
            gradients["sampled"]["tempered"].mean,
            gradients["bucket"]["tempered"].mean,
            sampled.mean_reverse,
            sampled.mean_noise,
        )

    few, many = figures(100), figures(6400)
    assert many[0] < few[0] / 4  # 8 in the mean
    assert many[1] > 0.7 * few[1] > 1
    assert many[2] == pytest.approx(many[3], rel=0.3)
    assert many[3] == pytest.approx(few[3] / 64, rel=1e-3)


def test_ensembles_and_half_precision(world: World, make_teacher: Callable[..., Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world[0], tmp_path / "cache"))
    teachers = [str(world[1]), str(make_teacher(4, vocabulary_size=V))]
    fields = {"context_tokens": CONTEXT, "k": V, "combine": "mixture", "dtype": "bfloat16", "encoding": "float32"}
    fields |= {"fields": ("lean",)}
    cache_logits(cache, "both", *map(Path, teachers), **fields)
    report = measure(open_job(CacheJob(cache=str(cache), teacher=teachers, name="both", **fields)), 64)
    # In the recorded batch shape, a half precision repeats its values.
    assert report.quantisation < 1e-9
    assert report.positions <= 64


def test_few_positions_are_spread_and_no_more_than_asked_for(world: World) -> None:
    for positions in (1, 3, 50):
        report = report_of(world, "codes", positions)
        assert 1 <= report.positions <= positions
        assert report.windows == min(positions, 10)
    isolated = report_of(world, "isolated", 40)
    assert isolated.positions <= 40


def test_two_positions(tmp_path: Path, make_teacher: Callable[..., Path]) -> None:
    cache = tmp_path / "cache"
    make_corpus(str(cache), np.array([3, 4], dtype=np.uint16), V)
    teacher = make_teacher(3, vocabulary_size=V)
    fields = {"context_tokens": CONTEXT, "k": 5}
    cache_logits(cache, "a", teacher, **fields)
    report = measure(open_job(CacheJob(cache=str(cache), teacher=str(teacher), name="a", **fields)), 2048)
    assert (report.positions, report.labelled, report.windows) == (2, 1, 1)


def test_without_any_targets_there_is_no_report(tmp_path: Path, make_teacher: Callable[..., Path], run: Run) -> None:
    cache, teacher = tmp_path / "cache", make_teacher(3, vocabulary_size=V)
    make_corpus(str(cache), np.arange(N).astype(np.uint16) % V, V, loss_mask=np.zeros(N, dtype=bool))
    fields = {"context_tokens": CONTEXT, "k": 5, "fields": ("lean",), "positions": "trained"}
    cache_logits(cache, "a", teacher, **fields)
    assert not is_wanted(open_job(CacheJob(cache=str(cache), teacher=str(teacher), name="a", **fields)), 2048)
    shown = run("logit-cache", "inspect", cache).stdout
    assert "300 of 300 positions, complete; targets at 0 of them" in shown
    assert "coverage: 300 of 300 positions (100.00%); targets at 0 of them" in card_text(LogitCache.open(str(cache)))


def test_tiles_change_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(value: Any) -> list[Any]:
        if isinstance(value, dict | list | tuple):
            return [x for item in (value.values() if isinstance(value, dict) else value) for x in numbers(item)]
        return [value] if isinstance(value, float | int) else []

    whole = numbers(report_of(world, "varopt-codes").model_dump())
    monkeypatch.setattr(fidelity, "_TILE_LOGITS", 5 * V)
    assert numbers(report_of(world, "varopt-codes").model_dump()) == pytest.approx(whole, rel=1e-7, abs=1e-12)


# --- its lifecycle beside the entry ----------------------------------------------------------------------------------

ARGUMENTS = ("--name", "a", "-k", 8, "--context-tokens", CONTEXT, "--shard-tokens", SHARD, "--fields", "all",
             "--positions", "all", "--no-isolate-documents")  # fmt: skip
JOB: dict[str, Any] = {
    "k": 8, "context_tokens": CONTEXT, "shard_tokens": SHARD, "fields": ("all",), "positions": "all",
    "isolate_documents": False,
}  # fmt: skip


@pytest.fixture
def cache(world: World, tmp_path: Path) -> Path:
    """The stream alone."""
    return Path(shutil.copytree(world[0], tmp_path / "cache", ignore=shutil.ignore_patterns(*KINDS)))


@pytest.fixture
def reported(cache: Path, world: World) -> Path:
    """A cache with an entry and its report."""
    cache_logits(cache, "a", world[1], **JOB)
    opened = job(cache, world)
    assert is_wanted(opened, 50)
    assert opened.writer.publish_fidelity(measure(opened, 50))
    return cache


def job(cache: Path, world: World) -> Any:
    return open_job(CacheJob(cache=str(cache), teacher=str(world[1]), name="a", **JOB))


def report_file(cache: Path) -> Path:
    return cache / "teachers/a/fidelity.json"


def test_the_command_makes_it_once(cache: Path, world: World, run: Run, tmp_path: Path) -> None:
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    base = ("cache-logits", "--teacher", world[1], *ARGUMENTS)
    # As if killed between the last shard and the report.
    assert run(*base, "--cache", cache, "--fidelity-positions", 0).returncode == 0
    assert not report_file(cache).exists()
    assert LogitCache.open(str(cache)).teacher("a").fidelity() is None
    done = succeeded(run(*base, "--cache", cache))
    assert "fidelity of a: 300 positions" in done.stderr
    found = report_file(cache).read_bytes()
    again = run(*base, "--cache", cache, "--fidelity-positions", 20)
    assert (again.returncode, "fidelity" in again.stderr) == (0, False)
    assert report_file(cache).read_bytes() == found
    # One of two, which the other leaves alone with all of it.
    assert run(*base, "--cache", other, "--worker", "1/2").returncode == 0
    assert report_file(other).read_bytes() == found
    done = run(*base, "--cache", other, "--worker", "0/2")
    assert (done.returncode, "fidelity" in done.stderr) == (0, False)
    assert report_file(other).read_bytes() == found
    shown = run("logit-cache", "inspect", cache).stdout
    assert "fidelity    on 300 positions" in shown
    assert "gradient to dense" in shown
    report = LogitCache.open(str(cache)).teacher("a").fidelity()
    whole = json.loads(run("logit-cache", "inspect", cache, "--json").stdout)["teachers"]["a"]["fidelity"]
    assert FidelityReport.model_validate(whole) == report


def test_it_is_a_function_of_the_entry(reported: Path, world: World) -> None:
    assert sealed_bytes(measure(job(reported, world), 50)) == report_file(reported).read_bytes()
    assert not is_wanted(job(reported, world), 50)
    assert not job(reported, world).writer.publish_fidelity(measure(job(reported, world), 10))


def test_killed_at_every_step_of_its_publication(reported: Path, world: World, tmp_path: Path) -> None:
    whole = report_file(reported).read_bytes()
    report_file(reported).unlink()
    report = measure(job(reported, world), 50)
    at, dead = 0, True
    while dead:
        victim = Path(shutil.copytree(reported, tmp_path / f"victim-{at}"))
        writer, disk = job(victim, world).writer, Disk(victim, tmp_path / f"graves-{at}")
        try:
            with disk.process(at):
                writer.publish_fidelity(report)
            dead = False
        except Crash:
            at += 1
        disk.cut_power(lambda: False)
        there = report_file(victim).exists()
        assert not there or report_file(victim).read_bytes() == whole
        assert verify(str(victim), deep=True).problems == []
        assert is_wanted(job(victim, world), 50) == (not there)
        shutil.rmtree(victim)
    assert at > 4
    assert there


@pytest.mark.parametrize("damage", ["flip", "cut", "other entry", "too long", "other shape", "no JSON"])
def test_a_damaged_one_is_named_removed_and_made_again(reported: Path, world: World, run: Run, damage: str) -> None:
    path = report_file(reported)
    whole = path.read_bytes()
    report = LogitCache.open(str(reported)).teacher("a").fidelity()
    assert report is not None
    path.write_bytes(
        {
            "flip": whole.replace(b'"positions": ', b'"positions": 1', 1),
            "cut": whole[:-40],
            "other entry": sealed_bytes(report.model_copy(update={"record_sha256": "0" * 64})),
            "too long": whole + b" " * (1 << 16),
            "other shape": sealed_bytes(report.model_copy(update={"divergences": {}})),
            "no JSON": b"\xff",
        }[damage]
    )
    with pytest.raises((CorruptCache, FormatError), match=r"teachers/a/fidelity\.json"):
        LogitCache.open(str(reported)).teacher("a").fidelity()
    found = verify(str(reported))
    assert len(found.problems) == 1
    assert "teachers/a/fidelity.json" in found.problems[0]
    # Targets are no worse for it.
    assert len(LogitCache.open(str(reported)).teacher("a").read(0, N)) == N
    found = verify(str(reported), repair=True)
    assert found.repaired == [str(path)]
    assert verify(str(reported)).sound
    if damage == "flip":
        base = ("cache-logits", "--teacher", world[1], *ARGUMENTS, "--cache", reported, "--fidelity-positions", 50)
        assert run(*base).returncode == 0
        assert path.read_bytes() == whole


def test_push_and_pull_keep_it(reported: Path, tmp_path: Path) -> None:
    whole = report_file(reported).read_bytes()
    shared, back, into = (str(tmp_path / name) for name in ("shared", "back", "into"))
    push(str(reported), shared)
    assert "fidelity, measured against the full distributions" in (Path(shared) / "README.md").read_text()
    pull(shared, back)
    assert report_file(Path(shared)).read_bytes() == report_file(Path(back)).read_bytes() == whole
    # Into a cache that has the entry, and not the report.
    shutil.copytree(back, into)
    report_file(Path(into)).unlink()
    found = verify(into, deep=True)
    assert (found.sound, found.leftovers) == (True, []), "its absence is no problem"
    pull(shared, into)
    assert report_file(Path(into)).read_bytes() == whole
    # And into an object store.
    push(shared, "memory://fidelity/cache")
    assert LogitCache.open("memory://fidelity/cache").teacher("a").fidelity() is not None
    for url in (into, "memory://fidelity/cache"):
        found = verify(url, deep=True)
        assert (found.sound, found.leftovers) == (True, [])


def test_without_tokens_it_belongs_to_the_new_record(reported: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "target")
    push(str(reported), target, without_tokens=True)
    targets, original = (LogitCache.open(url).teacher("a") for url in (target, str(reported)))
    report, before = targets.fidelity(), original.fidelity()
    assert report is not None
    assert before is not None
    assert report.record_sha256 == targets.record_sha256 != original.record_sha256
    assert report.model_copy(update={"record_sha256": before.record_sha256}) == before
    assert verify(target, deep=True).sound


@pytest.mark.parametrize("without_tokens", [False, True])
def test_a_damaged_one_is_not_copied(reported: Path, tmp_path: Path, without_tokens: bool) -> None:
    path = report_file(reported)
    path.write_bytes(path.read_bytes().replace(b'"positions": ', b'"positions": 1', 1))
    with pytest.raises(CorruptCache, match="fidelity"):
        push(str(reported), str(tmp_path / "target"), without_tokens=without_tokens)
    assert not (tmp_path / "target").exists()
