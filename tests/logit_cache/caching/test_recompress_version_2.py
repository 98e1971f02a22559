"""`recompress` into version 2: the values of version 1, fewer fields and positions, coarser codes, smaller samples."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.commands import Run, refused, succeeded
from support.jobs import files
from support.references.varopt import sampled_targets

from logit_cache.caching.recompress import RecompressJob, recompress
from storage import LogitCache, SparseTargets
from storage.cache.corpus_writer import write_corpus
from storage.cache.reader import TeacherTargets
from storage.cache.verify import verify
from storage.cache.writer import EntryWriter
from storage.errors import LogitCacheError
from storage.format import version_2
from storage.format.manifest.entry import Encoding, Shrunk, Targets
from storage.format.pruning import shrink
from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.loss.distillation import forward_kl
from student.loss.teacher_targets import Member

V, N, K = 83, 700, 16
STEP, VALUE_STEP, SAMPLED_STEP = 1 / 32, 1 / 256, 1 / 2
VALUES = ("log_tail", "log_tail_half", "label_logprob", "entropy")


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, V)) * rng.choice([0.1, 1.0, 3.0], size=(N, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, logits: np.ndarray) -> Path:
    """A cache with entries of version 1 of every kind."""
    path = tmp_path_factory.mktemp("made") / "cache"
    labels = np.arange(N) % V
    mask = np.random.default_rng(1).random(N) < 0.4
    record = make_corpus(str(path), np.append(0, labels[:-1]).astype(np.uint16), V, loss_mask=mask)
    labels[-1] = -1
    for encoding in ("codes", "exact"):
        cut = {"shard_tokens": 256, "chunk_tokens": 64, "encoding": "float32" if encoding == "exact" else "codes"}
        write_entry(path, f"topk-{encoding}", make_entry(record, K, **cut), dense_targets(logits, K, labels))
        write_entry(path, f"whole-{encoding}", make_entry(record, V, **cut), dense_targets(logits, V, labels))
        for temperature in (1, 2):
            targets = sampled_targets(logits, K, 3, temperature, head_ids=2)
            targets.label_logprob[-1] = np.nan
            kind = Targets(
                method="varopt", k=K, head_ids=2, seed=3, temperature=temperature, has_label_logprob=True
            )  # fmt: skip
            entry = make_entry(record, K, **cut).model_copy(update={"targets": kind})
            write_entry(path, f"sampled-{temperature}-{encoding}", entry, targets)
    return path


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def rewrite(cache: Path, name: str, to: str = "new", **changes: Any) -> tuple[TeacherTargets, SparseTargets]:
    recompress(RecompressJob(cache=str(cache), name=name, to=to, **changes))
    return read(cache, to)


def read(cache: Path, name: str) -> tuple[TeacherTargets, SparseTargets]:
    targets = LogitCache.open(str(cache)).teacher(name)
    return targets, targets.read(0, N)


def by_id(targets: SparseTargets) -> SparseTargets:
    """The sampled ids of each row in ascending order, as version 2 has them."""
    key = np.where(targets.is_certain, np.arange(targets.k) - targets.k, targets.token_ids.astype(int))
    order = key.argsort(axis=1)
    per_id = {name: np.take_along_axis(getattr(targets, name), order, 1) for name in ("token_ids", "logprobs")}
    return replace(targets, **per_id)


def log_masses(targets: SparseTargets) -> tuple[np.ndarray, np.ndarray]:
    """Logs of the mass of the certain ids and of that outside them, float64 [N]."""
    inside = np.where(targets.is_certain, targets.logprobs.astype(np.float64), -np.inf)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(inside).sum(1)), targets.log_tail.astype(np.float64)


KINDS = ("topk", "whole", "sampled-1", "sampled-2")


@pytest.mark.parametrize("kind", KINDS)
def test_exact_values_stay_exact(cache: Path, kind: str) -> None:
    before = by_id(read(cache, f"{kind}-exact")[1])
    entry, after = rewrite(cache, f"{kind}-exact", format_version=2)
    for name, values in before.arrays().items():
        assert np.array_equal(getattr(after, name), values, equal_nan=values.dtype.kind == "f"), name
    assert entry.entry.encoding == Encoding(kind="float32", step_nats=None)
    assert np.isneginf(after.log_tail).all() == (kind == "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_within_their_bounds(cache: Path, kind: str) -> None:
    source, before = read(cache, f"{kind}-codes")
    before = by_id(before)
    entry, after = rewrite(cache, f"{kind}-codes", format_version=2)
    for name in ("token_ids", "kept", "certain"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name
    stored = {n: each.stored(0, N).arrays for n, each in (("old", source), ("new", entry))}
    certain = after.is_certain
    # Distances along a row are the same codes; masses sum to 1, each within half a step times the other.
    assert np.array_equal(stored["new"]["certain_codes"][certain], stored["old"]["logprob_codes"][certain])
    old_head, old_tail = log_masses(before)
    head, tail = log_masses(after)
    np.testing.assert_allclose(np.exp(head) + np.exp(tail), 1.0, atol=1e-6)
    total = np.logaddexp(old_head, old_tail)
    some = after.certain > 0
    assert (np.abs(head - old_head + total)[some] <= (STEP / 2 * np.exp(tail) + 1e-3)[some]).all()
    if kind == "whole":
        assert np.isneginf(after.log_tail).all()
        assert np.isneginf(after.log_tail_half).all()
    else:
        assert (np.abs(tail - old_tail + total) <= STEP / 2 * np.exp(head) + 1e-3).all()
        assert np.abs(after.log_tail_half - before.log_tail_half).max() <= VALUE_STEP / 2 + 1e-5
    assert np.nanmax(np.abs(after.label_logprob - before.label_logprob)) <= VALUE_STEP / 2 + 1e-5
    assert np.array_equal(np.isnan(after.label_logprob), np.isnan(before.label_logprob))
    assert np.abs(after.entropy - before.entropy).max() <= VALUE_STEP / 2 + 1e-5
    sampled = after.is_kept & ~certain
    if sampled.any():
        off = (after.logprobs - before.logprobs)[sampled].astype(np.float64)
        assert np.abs(off).max() < SAMPLED_STEP + STEP
        assert_mean_is(1.0, np.exp(-off))


def assert_mean_is(expected: float, values: np.ndarray) -> None:
    assert abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5


def test_the_record_says_how_it_was_made(cache: Path) -> None:
    source = read(cache, "sampled-2-codes")[0]
    entry = rewrite(cache, "sampled-2-codes", fields="lean", profile="fast")[0].entry
    assert (entry.format_version, entry.made, entry.derived_from) == (2, "recompressed", source.record_sha256)
    # Ids sampled for temperature 2 weigh by the half-tail.
    assert entry.targets == Targets(
        method="varopt", k=K, head_ids=2, seed=3, temperature=2, fields=("half-tail",), positions="all", tail="exact",
        sampling="systematic", order="ids",
    )  # fmt: skip
    assert entry.encoding == Encoding(step_nats=STEP, value_step_nats=VALUE_STEP)
    changed = {"format_version", "made", "targets", "encoding", "layout", "derived_from", "created_with"}
    assert entry.model_dump(exclude=changed) == source.entry.model_dump(exclude=changed)
    assert verify(str(cache), deep=True).sound


def test_dropped_fields_leave_the_other_arrays_as_they_are(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(cache, "sampled-1-codes", "all", format_version=2)
    before = files(cache / "teachers/all")
    # What is a code already is not rounded, whatever number is drawn.
    last = partial(np.full, fill_value=1 - 2.0**-53)
    monkeypatch.setattr(version_2, "uniforms", lambda seed, use, start, stop, columns: last((stop - start, columns)))
    targets, _ = rewrite(cache, "all", "some", fields=("sampled-logprobs", "label"))
    assert targets.entry.targets.fields == ("label", "sampled-logprobs")
    rewrite(cache, "some", "lean", fields="lean")
    assert targets.entry.encoding.sampled_step_nats == SAMPLED_STEP
    for name, absent in (("some", {"entropy_code", "half_tail_code"}), ("lean", {"label_code", "sampled_codes"})):
        after = files(cache / "teachers" / name)
        assert not any(key.startswith(tuple(absent)) for key in after)
        objects = {key for key in after if "/c/" in key}
        assert {key: after[key] for key in objects} == {key: before[key] for key in objects}
    targets, lean = read(cache, "lean")
    assert lean.entropy is lean.label_logprob is lean.log_tail_half is None
    assert np.isnan(lean.logprobs[lean.is_kept & ~lean.is_certain]).all()
    assert targets.entry.encoding.sampled_step_nats is None


@pytest.mark.parametrize("source", ["topk-codes", "sampled-1-codes"])
def test_positions_that_are_not_trained_have_no_targets(cache: Path, source: str) -> None:
    mask = LogitCache.open(str(cache)).loss_mask.read(0, N)
    _, whole = rewrite(cache, source, "whole", format_version=2)
    targets, found = rewrite(cache, source, positions="trained")
    assert targets.entry.targets.positions == "trained"
    assert not found.kept[~mask].any()
    assert all(np.isnan(getattr(found, name)[~mask]).all() for name in VALUES)
    for name, values in found.arrays().items():
        assert np.array_equal(values[mask], getattr(whole, name)[mask], equal_nan=values.dtype.kind == "f"), name
    assert targets.stored_bytes() < 0.8 * LogitCache.open(str(cache)).teacher("whole").stored_bytes()
    statistics, _ = targets.statistics()
    assert statistics is not None
    assert statistics.positions == mask.sum()
    smaller, again = rewrite(cache, "new", "smaller", k=7, fields="lean")
    assert smaller.entry.targets.positions == "trained"
    assert np.array_equal(again.kept, 7 * mask)


def test_rounding_again_does_not_shift_the_mean(cache: Path) -> None:
    """Of 1 / p, of which unbiased losses take the mean: the random numbers of the first rounding would shift it."""
    rewrite(cache, "sampled-1-exact", "half", encoding="codes", format_version=2)
    _, exact = read(cache, "sampled-1-exact")
    exact = by_id(exact)
    sampled = exact.is_kept & ~exact.is_certain
    name = "half"
    for step in (0.75, 1.0):
        targets, found = rewrite(cache, name, f"at-{round(100 * step)}", sampled_step_nats=step)
        name = f"at-{round(100 * step)}"
        assert targets.entry.encoding == Encoding(step_nats=STEP, value_step_nats=VALUE_STEP, sampled_step_nats=step)
        off = (exact.logprobs - found.logprobs)[sampled].astype(np.float64)
        assert_mean_is(1.0, np.exp(off))
        # Unbiased one by one too: what lies high within a step as what lies low.
        high = exact.logprobs[sampled] % 1.0 > 0.5
        assert_mean_is(1.0, np.exp(off[high]))
    assert np.abs(off).max() < SAMPLED_STEP + 0.75 + 1.0


def test_a_sample_of_a_sample(cache: Path) -> None:
    """Of version 1, float32: the same ids whatever the shards; the record has the chain, and the source's fields."""
    before = read(cache, "sampled-1-exact")[1]
    targets, found = rewrite(cache, "sampled-1-exact", k=9)
    expected = shrink(before, 9, 1.0, 2, seed=4)
    for name, values in by_id(expected).arrays().items():
        assert np.array_equal(getattr(found, name), values, equal_nan=values.dtype.kind == "f"), name
    assert (found.certain < before.certain).sum() > 100
    kind = targets.entry.targets
    assert (kind.k, kind.seed, kind.shrunk_from) == (9, 4, (Shrunk(k=K, seed=3),))
    assert kind.fields == ("entropy", "half-tail", "label", "sampled-logprobs")
    _, other = rewrite(cache, "sampled-1-exact", "cut", k=9, shard_tokens=128, chunk_tokens=32, profile="fast")
    assert np.array_equal(other.token_ids, found.token_ids)
    twice, _ = rewrite(cache, "new", "twice", k=5, seed=77, fields="lean")
    assert twice.entry.targets.shrunk_from == (Shrunk(k=K, seed=3), Shrunk(k=9, seed=4))
    assert (twice.entry.targets.k, twice.entry.targets.seed) == (5, 77)
    assert rewrite(cache, "twice", "third", k=4)[0].entry.targets.seed == 78
    assert verify(str(cache), deep=True).sound


def test_a_sample_of_a_sample_in_an_order_of_its_own(cache: Path) -> None:
    """The new entry has the order too, and is sampled in it."""
    source, before = rewrite(cache, "sampled-1-exact", "numbered", format_version=2)
    order = np.random.default_rng(5).permutation(V)
    targets = source.entry.targets.model_copy(update={"order": "embeddings"})
    writer = EntryWriter.open(str(cache), "ordered", source.entry.model_copy(update={"targets": targets}))
    writer.sampling_order(lambda: order)
    for shard in writer.pending():
        writer.commit(shard, before.rows(*source.entry.layout.shard_range(shard, N)))
    writer.finish()
    made, found = rewrite(cache, "ordered", k=9, fields="lean")
    assert np.array_equal(made.sampling_order(), order)
    assert np.array_equal(found.token_ids, by_id(shrink(before, 9, 1.0, 2, seed=4, order=order)).token_ids)
    assert verify(str(cache), deep=True).sound


@pytest.mark.parametrize("temperature", [1, 2])
@pytest.mark.parametrize("changes", [{"format_version": 2}, {"fields": "lean"}, {"k": 7}], ids=str)
def test_a_student_learns_the_same(cache: Path, logits: np.ndarray, temperature: int, changes: dict[str, Any]) -> None:
    """The sampled loss of both, by its gradient: equal within the codes, or in the mean where ids are sampled again."""
    source = f"sampled-{temperature}-codes"
    rewrite(cache, source, **changes)
    student = torch.from_numpy(np.random.default_rng(4).normal(size=(N - 1, V)))
    gradients = {}
    for name in (source, "new"):
        batch = collate(DistillationWindows(str(cache), [name], window_tokens=N - 1).__getitems__([0]))
        targets = batch["targets"][name].flat().decoded()
        own = student.clone().requires_grad_()
        member = Member.of(name, LogitCache.open(str(cache)).teacher(name).entry)
        loss = forward_kl(own, targets, member, float(temperature), tail="sampled")
        assert bool(torch.isfinite(loss).all())
        (gradients[name],) = torch.autograd.grad(loss.sum(), own)
    off = (gradients["new"] - gradients[source]).abs()
    if "k" not in changes:
        assert float(off.max()) < STEP
    teacher = torch.softmax(torch.from_numpy(logits[: N - 1]) / temperature, 1)
    exact = (torch.softmax(student / temperature, 1) - teacher) / temperature
    for ids in (np.arange(20), np.arange(0, V, 2), np.arange(60, V)):
        error = (gradients["new"] - exact)[:, ids].sum(1)
        assert abs(float(error.mean())) < 5 * float(error.std()) / N**0.5 + 2e-3


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a field that is not there": ("lean", {"fields": "entropy"}, r"--fields entropy: lean does not store it"),
    "log-probs of sampled ids of none": ("topk-codes", {"fields": "sampled-logprobs"}, "topk-codes does not store it"),
    "the way back": ("lean", {"format_version": 1, "k": 9}, "there is no way back"),
    "fields of version 1": ("topk-codes", {"format_version": 1, "fields": "lean"}, "--fields makes .* version 2"),
    "a sample of version 1": ("sampled-1-codes", {"format_version": 1, "k": 9}, "-k makes an entry of version 2"),
    "part of a sample": ("sampled-1-codes", {"top_p": 0.9}, "--top-p cannot be applied to sampled-1-codes"),
    "more ids": ("sampled-1-codes", {"k": 17}, "give at most 16"),
    "ids that stay certain": ("sampled-1-codes", {"k": 2}, "the 2 likeliest ids"),
    "a seed that was used": ("sampled-1-codes", {"k": 9, "seed": 3}, "--seed 3: .* was sampled with it"),
    "a seed of no sample": ("topk-codes", {"k": 9, "seed": 3}, "takes no sample"),
    "a finer step of sampled ids": ("all", {"sampled_step_nats": 0.25}, "stores codes of 0.5 nat of its sampled ids"),
    "a step of nothing": ("lean", {"sampled_step_nats": 1.0}, "has no log-probs of sampled ids"),
    "a step between": ("all", {"step_nats": 3 / 64}, "at least 0.0625"),
    "nothing to do": ("lean", {"fields": "lean", "format_version": 2}, "already as asked for"),
}


@pytest.fixture(scope="module")
def with_version_2(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = Path(shutil.copytree(made, tmp_path_factory.mktemp("both") / "cache"))
    rewrite(cache, "sampled-1-codes", "all", format_version=2)
    rewrite(cache, "sampled-1-codes", "lean", fields="lean")
    return cache


@pytest.mark.parametrize("case", REFUSED)
def test_refused(with_version_2: Path, case: str) -> None:
    name, changes, words = REFUSED[case]
    before = files(with_version_2)
    with pytest.raises(LogitCacheError, match=words) as caught:
        rewrite(with_version_2, name, **changes)
    assert "\n" not in str(caught.value)
    assert files(with_version_2) == before


def test_what_a_stream_lacks(cache: Path, tmp_path: Path) -> None:
    opened = LogitCache.open(str(cache))
    corpus = opened.record.corpus
    bare, unmasked = tmp_path / "bare", tmp_path / "unmasked"
    record = opened.record.model_copy(update={"corpus": corpus.model_copy(update={"tokens_included": False})})
    write_corpus(str(bare), record, opened.tokenizer_files(), {})
    with pytest.raises(LogitCacheError, match="leave them out with --fields"):
        rewrite(cache, "topk-codes", out=str(bare), format_version=2)
    recompress(RecompressJob(cache=str(cache), name="topk-codes", to="new", out=str(bare), fields=("entropy",)))
    assert LogitCache.open(str(bare)).teacher("new").missing() == []
    record = make_corpus(str(unmasked), np.zeros(20, dtype=np.uint16), V)
    write_entry(
        unmasked, "a", make_entry(record, 4), dense_targets(np.zeros((20, V)), 4, np.append(np.zeros(19, int), -1))
    )
    with pytest.raises(LogitCacheError, match="has no loss mask"):
        rewrite(unmasked, "a", positions="trained")


def test_the_command(cache: Path, run: Run) -> None:
    arguments = ("logit-cache", "recompress", cache, "--name", "sampled-1-codes", "--to", "new", "-k", 9)
    done = succeeded(
        run(*arguments, "--fields", "sampled-logprobs", "--fields", "label", "--sampled-step-nats", 1, "--json")
    )
    assert json.loads(done.stdout)["k_after"] == 9
    entry = LogitCache.open(str(cache)).teacher("new").entry
    assert entry.targets.fields == ("label", "sampled-logprobs")
    assert entry.encoding.sampled_step_nats == 1
    refused(run(*arguments, "--fields", "lean", "--fields", "label"), "--fields", "lean", "leave out label")
    refused(run(*arguments, "--positions", "all"), "--positions")
    refused(run(*arguments, "--format-version", 3), "--format-version")
    refused(run(*arguments[:-2], "--seed", 1), "--seed", "-k")
    refused(run(*arguments, "--encoding", "float32", "--sampled-step-nats", 1), "--sampled-step-nats")
