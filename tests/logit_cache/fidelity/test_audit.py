"""`audit` against real teachers: honest entries pass in every encoding and arithmetic, and every kind of lie is found.

A lie here is an entry whose record, receipts and checksums are all in order, and whose values are not those that the
record states.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.small import dense_targets, entry_2, make_corpus, make_entry, write_entry
from support.commands import Run, refused, succeeded
from support.jobs import cache_logits
from support.models.short_heads import beside, swap_ids

import logit_cache.fidelity.audit
from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import open_job
from logit_cache.caching.recompress import RecompressJob, recompress
from logit_cache.caching.score_shard import score_shard
from logit_cache.caching.windows import Window, windows
from logit_cache.fidelity.audit import Audit, AuditJob, audit
from logit_cache.fidelity.samples import Examination, TargetRows, sample_windows, shard_rows, take_sample
from storage import LogitCache, SparseTargets
from storage.cache.corpus_writer import write_corpus
from storage.errors import CorruptCache, InputError, LogitCacheError
from storage.format.manifest.entry import Encoding, Shrunk, TeacherEntry, Windowing
from storage.format.manifest.shared import ArrayLayout
from storage.format.sealing import digest

K, CONTEXT, SHARD = 24, 64, 4096
BASE: dict[str, Any] = {
    "targets": "topk", "k": K, "context_tokens": CONTEXT, "shard_tokens": SHARD, "device": "cpu", "fields": ("all",),
}  # fmt: skip
World = tuple[Path, TeacherEntry, SparseTargets]
FIELDS = {"logprobs", "token_ids", "log_tail", "log_tail_half", "label_logprob", "entropy"}
VERSION_1: dict[str, Any] = {"format_version": 1, "fields": ()}
LEAN: dict[str, Any] = {"targets": "varopt", "fields": ("lean",)}


def made(cache: Path, teacher: Path, name: str, **changes: Any) -> TeacherEntry:
    """Caches a teacher for real; returns the entry's record."""
    return cache_logits(cache, name, teacher, **BASE | changes)[0].entry


def scored(cache: Path, teacher: Path, folder: Path, **changes: Any) -> SparseTargets:
    """A teacher's targets of a whole stream, with exact log-probs; the cache itself is unchanged."""
    copy = Path(shutil.copytree(cache, folder, dirs_exist_ok=True))
    opened = open_job(CacheJob(cache=str(copy), teacher=str(teacher), name="scratch", **(BASE | changes)))
    return joined([score_shard(opened, shard) for shard in range(opened.writer.shards)])


def joined(parts: list[SparseTargets]) -> SparseTargets:
    """Adjacent ranges of targets as one."""
    arrays = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()}
    return SparseTargets(parts[0].start, **arrays)


def check(cache: Path, teacher: Path, name: str, **changes: Any) -> Audit:
    fields = {"cache": str(cache), "teacher": (str(teacher),), "name": name, "device": "cpu", "seed": 1}
    return audit(AuditJob(**(fields | changes)))


@pytest.fixture(scope="module")
def world(small_cache: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A cache with the honest entry `codes`, its record, and its targets before encoding. Copy it to write to it."""
    folder = tmp_path_factory.mktemp("audit")
    cache = Path(shutil.copytree(small_cache, folder / "cache"))
    exact = scored(cache, teacher, folder / "scratch")
    return cache, made(cache, teacher, "codes"), exact


@pytest.fixture
def cache(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world[0], tmp_path / "cache"))


HONEST: dict[str, dict[str, Any]] = {
    "float32": {"encoding": "float32"},
    "coarse": {"step_nats": 0.25},
    "overlapping": {"stride_tokens": 16},
    "isolated": {"isolate_documents": True},
    "other-shapes": {"batch_windows": 3, "attention": "eager"},
    "all-ids": {"k": 400},
    "cut-at-a-mass": {"top_p": 0.7},
    "sampled": {"targets": "varopt", "head_ids": 4},
    "sampled-for-2": {"targets": "varopt", "target_temperature": 2, "head_ids": 2, "k": 12},
    "sampled-exact": {"targets": "varopt", "encoding": "float32"},
    "lean": LEAN,
    "lean-for-2": LEAN | {"target_temperature": 2, "k": 12, "head_ids": 3},
    "lean-exact": LEAN | {"encoding": "float32", "isolate_documents": True},
    "lean-topk": {"fields": ("lean",)},
    "1": VERSION_1,
    "1-float32": VERSION_1 | {"encoding": "float32"},
    "1-all-ids": VERSION_1 | {"k": 400},
    "1-sampled": VERSION_1 | {"targets": "varopt", "head_ids": 4},
}


def compared(entry: TeacherEntry) -> set[str]:
    """The fields that an audit of an entry compares."""
    targets = entry.targets
    found = {"logprobs", "token_ids", "log_tail"} | ({"top_logprob"} if entry.format_version == 1 else set())
    found |= {"log_tail_half"} if targets.has("half-tail") else set()
    found |= {"label_logprob"} if targets.has("label") else set()
    found |= {"entropy"} if targets.has("entropy") else set()
    return found | ({"sampled_logprobs"} if targets.method == "varopt" and targets.has("sampled-logprobs") else set())


@pytest.mark.parametrize("name", HONEST)
def test_honest_entries_pass(cache: Path, teacher: Path, name: str) -> None:
    entry = made(cache, teacher, name, **HONEST[name])
    found = check(cache, teacher, name, windows=12)
    assert found.consistent, (found.problems, found.fields)
    assert found.identity == []
    assert found.positions == sum(
        window.last - window.first
        for window in sample_windows(
            entry,
            shard_rows(entry, np.ones(-(-entry.positions // SHARD), dtype=bool)),
            LogitCache.open(str(cache)).document_starts if entry.windowing.isolate_documents else None,
            12,
            np.random.default_rng(found.seed),
        )
    )
    assert set(found.fields) == compared(entry)
    assert (found.sampled is not None) == (name.startswith("lean") and name != "lean-topk")
    assert all(item.values > 0 and item.windows_differing == 0 for item in found.fields.values())


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_an_honest_entry_of_other_kernels_and_a_half_precision(
    cache: Path, teacher: Path, make_teacher: Callable[..., Path], dtype: Any
) -> None:
    """Another attention in bfloat16 rounds differently at every layer, as another device does; the rounding itself,
    measured against float32, explains it. The same tolerance does not let another teacher through."""
    made(cache, teacher, "half", dtype="bfloat16", attention="eager", batch_windows=5)
    found = check(cache, teacher, "half", dtype=dtype, windows=24)
    assert found.consistent, found.fields
    # Without that control it would have been called a lie.
    assert found.controls[-1] == f"the same weights in {'bfloat16' if dtype == 'float32' else 'float32'}"
    assert found.fields["logprobs"].limit_largest > 1e-2
    assert "attention: recorded 'eager', now 'sdpa'" in found.execution
    assert bool(found.identity) == (dtype == "float32")
    other = check(cache, make_teacher(1), "half", dtype=dtype, windows=24)
    assert len(other.differing) == other.windows


def test_where_the_second_model_does_not_fit_the_report_states_it(
    cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(cache, teacher, "half", dtype="bfloat16", attention="eager", batch_windows=5)
    load = logit_cache.fidelity.audit._load

    def smaller(job: AuditJob, entry: TeacherEntry, dtype: Any) -> Any:
        if dtype == "float32":
            raise InputError("does not fit on cuda")
        return load(job, entry, dtype)

    monkeypatch.setattr(logit_cache.fidelity.audit, "_load", smaller)
    found = check(cache, teacher, "half")
    assert not found.consistent
    assert "the rounding of bfloat16 could not be measured: does not fit on cuda" in found.execution


def test_an_entry_that_was_made_smaller_passes_against_the_same_teacher(cache: Path, teacher: Path) -> None:
    made(cache, teacher, "first", **VERSION_1)
    recompress(RecompressJob(cache=str(cache), name="first", to="small", k=12, top_p=0.7, step_nats=0.0625))
    recompress(RecompressJob(cache=str(cache), name="small", to="smaller", k=7, step_nats=0.125))
    for name in ("small", "smaller"):
        found = check(cache, teacher, name)
        assert found.consistent, found.fields
    # A whole step is allowed, as its record states that it came from another; none of it is added to exact values.
    assert found.fields["logprobs"].encoding_error == 0.125
    assert found.fields["entropy"].encoding_error < 0.01


def likeliest(exact: SparseTargets) -> SparseTargets:
    """The best ids as if all but 8 were sampled; every value is right, and losses would be biased."""
    rest = exact.logprobs[:, 8:]
    return replace(
        exact,
        certain=np.full(len(exact), 8, dtype=np.uint16),
        log_tail=np.logaddexp(exact.log_tail, np.logaddexp.reduce(rest, axis=1)),
        log_tail_half=np.logaddexp(exact.log_tail_half, np.logaddexp.reduce(rest / 2, axis=1)),
    )


def test_the_likeliest_ids_are_no_sample(cache: Path, teacher: Path, world: World) -> None:
    _, entry, exact = world
    chosen = entry_2(entry, "entropy", "half-tail", "label", "sampled-logprobs", method="varopt", head_ids=8)
    write_entry(cache, "chosen", chosen, likeliest(exact))
    found = check(cache, teacher, "chosen", windows=8)
    assert found.differing == []
    assert found.fields["token_ids"].values == 8 * found.positions
    assert "no sample" in found.problems[0]
    assert not found.consistent


@pytest.fixture(scope="module")
def samples(
    world: World, teacher: Path, make_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SparseTargets]:
    """Sampled targets that hold the teacher's certain ids and masses, and not the ids that it samples."""
    folder, (cache, _, exact) = tmp_path_factory.mktemp("samples"), world

    def drawn(name: str, model: Path = teacher, **changes: Any) -> SparseTargets:
        return scored(cache, model, folder / name, targets="varopt", **changes)

    honest, other = drawn("honest"), drawn("seed", seed=1)
    tenth = np.arange(len(honest)) % 10 == 3
    # Of the row before where it samples as many: inside a shard all values but the sampled ids are those of their row.
    moved = honest.token_ids.copy()
    alike = (honest.certain[1:] == honest.certain[:-1]) & (honest.kept[1:] == honest.kept[:-1])
    same = np.flatnonzero(alike) + 1
    sampled = (honest.is_kept & ~honest.is_certain)[same]
    moved[same] = np.where(sampled, honest.token_ids[same - 1], honest.token_ids[same])
    return {
        "honest": honest,
        "another seed": other,
        "another teacher": drawn("teacher", make_teacher(1)),
        "a tenth of the rows": replace(honest, token_ids=np.where(tenth[:, None], other.token_ids, honest.token_ids)),
        "one position on": replace(honest, token_ids=moved),
        "the likeliest ids": likeliest(exact),
        "no id": exact,  # the best ids, all of them certain
    }


def test_sampled_ids_are_drawn_again(
    cache: Path, teacher: Path, world: World, samples: dict[str, SparseTargets]
) -> None:
    """They have no log-probs; which ids the teacher and the seed give is all that can be wrong with them."""
    entry = entry_2(world[1], method="varopt", sample_size="threshold")
    for name, targets in samples.items():
        write_entry(cache, name.replace(" ", "-"), entry, targets)
        found = check(cache, teacher, name.replace(" ", "-"), windows=12)
        assert found.sampled is not None
        assert found.consistent == (name == "honest"), name
        assert found.sampled.differs != found.consistent
        assert found.sampled.teacher > 0.99
        assert 0.1 < found.sampled.chance < 0.5
        if name == "another teacher":
            continue
        assert all(item.windows_differing == 0 for item in found.fields.values()), name
        assert found.sampled.windows_differing == 0 if found.consistent else found.sampled.windows_differing > 9
        if name == "honest":
            assert found.sampled.again == 1.0
        elif name != "a tenth of the rows":
            assert found.sampled.again < 0.9
            assert "come again when they are drawn again" in found.problems[0]


def test_sampled_ids_of_a_half_precision_are_drawn_again(cache: Path, teacher: Path) -> None:
    half = LEAN | {"dtype": "bfloat16", "batch_windows": 5}
    made(cache, teacher, "half", attention="eager", **half)
    found = check(cache, teacher, "half", windows=24)
    assert found.consistent, (found.fields, found.sampled)
    assert found.sampled is not None
    assert found.sampled.chance < found.sampled.teacher < 0.99
    entry = made(cache, teacher, "other", seed=5, **half)
    record = entry.model_copy(update={"targets": entry.targets.model_copy(update={"seed": 0})})
    write_entry(cache, "seed", record, LogitCache.open(str(cache)).teacher("other").read(0, entry.positions))
    found = check(cache, teacher, "seed", windows=24)
    assert not found.consistent
    assert found.sampled is not None
    assert found.sampled.differs


def test_ids_sampled_from_a_sample_are_not_drawn_again(
    cache: Path, teacher: Path, world: World, samples: dict[str, SparseTargets]
) -> None:
    entry = entry_2(world[1], method="varopt", sample_size="threshold", shrunk_from=(Shrunk(k=64, seed=3),))
    shrunk = entry.model_copy(update={"made": "recompressed", "derived_from": "0" * 64})
    write_entry(cache, "shrunk", shrunk, samples["another seed"])
    found = check(cache, teacher, "shrunk")
    assert found.consistent
    assert found.sampled is None
    assert found.uncompared[0] == "not stored: entropy, half-tail, label, sampled-logprobs"
    assert "sampled from a stored sample of 64 ids" in found.uncompared[1]
    write_entry(cache, "chosen", shrunk, samples["the likeliest ids"])
    assert "no sample" in check(cache, teacher, "chosen").problems[0]


def test_rows_without_targets_are_not_compared(world: World, teacher: Path, tmp_path: Path, run: Run) -> None:
    """One stretch of the stream is trained, and a position here and there."""
    tokens = LogitCache.open(str(world[0])).tokens.read(0, 3 * SHARD)
    mask = np.random.default_rng(0).random(len(tokens)) < 0.02
    mask[SHARD + 100 : SHARD + 500] = True
    mask[2 * SHARD :] = False
    cache = tmp_path / "masked"
    make_corpus(str(cache), tokens, 400, loss_mask=mask)
    entry = made(cache, teacher, "trained", positions="trained", **LEAN)
    found = check(cache, teacher, "trained", windows=24, seed=5)
    assert found.consistent, found.problems
    rows = TargetRows(LogitCache.open(str(cache)).teacher("trained"))
    assert rows.counts().tolist() == [int(mask[at : at + SHARD].sum()) for at in (0, SHARD, 2 * SHARD)]
    sampled = sample_windows(entry, rows.counts(), None, 24, np.random.default_rng(found.seed), rows.row)
    assert found.windows == len(sampled) > 8
    assert found.positions == sum(int(mask[window.first : window.last].sum()) for window in sampled)
    assert found.sampled is not None
    assert 0 < found.fields["log_tail"].values <= found.positions
    assert all(mask[window.first : window.last].any() for window in sampled)
    # Most of the trained positions lie in that stretch.
    assert sum(SHARD + 64 <= window.first < SHARD + 512 for window in sampled) > 3
    assert rows.row(1, 7) == np.flatnonzero(mask[SHARD:])[7]

    targets = LogitCache.open(str(cache)).teacher("trained").read(0, len(tokens))
    lost = np.where(np.arange(len(tokens)) % 3 == 0, 0, targets.kept).astype(np.uint16)
    write_entry(cache, "lost", entry, replace(targets, kept=lost, certain=np.minimum(targets.certain, lost)))
    with pytest.raises(CorruptCache, match="not those of the record"):
        check(cache, teacher, "lost")
    write_entry(cache, "empty", entry, replace(targets, kept=0 * lost, certain=0 * lost))
    refused(run("logit-cache", "audit", cache, "--teacher", teacher, "--name", "empty"), "nothing to audit")


@pytest.mark.parametrize("combine", ["logit-mean", "mixture"])
def test_an_ensemble_is_run_as_one(cache: Path, teacher: Path, make_teacher: Callable[..., Path], combine: str) -> None:
    other = make_teacher(1)
    both = (str(teacher), str(other))
    cache_logits(cache, "both", teacher, other, **BASE, combine=combine, weight=(1.0, 3.0))
    assert audit(AuditJob(str(cache), both, windows=4, name="both")).consistent
    swapped = audit(AuditJob(str(cache), both[::-1], windows=4, name="both"))
    assert len(swapped.differing) == swapped.windows
    assert [line.split(" ")[0] for line in swapped.identity] == ["weights_sha256"] * 2
    with pytest.raises(LogitCacheError, match="made by 2 models"):
        check(cache, teacher, "both")


def test_an_entry_that_is_not_complete_is_audited_where_it_is(cache: Path, teacher: Path) -> None:
    receipts = cache / "teachers/codes/receipts"
    (receipts / "index.json").unlink()
    for shard in (0, 3):
        (receipts / f"{shard:08d}.json").unlink()
    found = check(cache, teacher, "codes", windows=40)
    assert found.consistent
    assert 30 < found.windows <= 40


@pytest.fixture(scope="module")
def lies(
    world: World, teacher: Path, make_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SparseTargets]:
    """Targets other than the record of `codes` states."""
    import torch
    from transformers import AutoModelForCausalLM

    cache, _, exact = world
    folder = tmp_path_factory.mktemp("lies")
    tokens = LogitCache.open(str(cache)).tokens.read(0, len(exact))
    other = scored(cache, make_teacher(1), folder / "other")

    # Half the hidden state is half of every logit: a softmax at temperature 2.
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.5)
        model.transformer.ln_f.bias.mul_(0.5)
    model.save_pretrained(folder / "hot")

    def of_tokens(name: str, changed: np.ndarray) -> SparseTargets:
        make_corpus(str(folder / name), changed.astype(np.uint16), 400)
        return scored(folder / name, teacher, folder / f"{name}-scratch")

    def shifted(values: np.ndarray) -> np.ndarray:
        moved = np.roll(values, 1, axis=0)
        if np.isnan(values[-1]).any():  # the end of the stream must look like one
            moved[0], moved[-1] = values[0], np.nan
        return moved

    arrays = ("token_ids", "log_tail", "log_tail_half", "label_logprob", "entropy", "logprobs")
    wide = scored(cache, teacher, folder / "wide", k=2 * K)
    below = wide.logprobs[:, :K]
    repeated = np.repeat(exact.logprobs[:, :1], K, axis=1)
    return {
        "another teacher": other,
        "one shard of another teacher": joined(
            [exact.rows(0, SHARD), other.rows(SHARD, 2 * SHARD), exact.rows(2 * SHARD, len(exact))]
        ),
        "shifted by one position": replace(exact, **{name: shifted(getattr(exact, name)) for name in arrays}),
        "temperature 2": scored(cache, folder / "hot", folder / "hot-scratch"),
        "shorter context": scored(cache, teacher, folder / "short", context_tokens=32),
        "longer context": scored(cache, teacher, folder / "long", context_tokens=128),
        "another text": of_tokens("text", tokens[::-1]),
        "another tokenizer": of_tokens("tokenizer", (tokens.astype(np.int64) + 7) % 400),
        "labels of another text": replace(exact, label_logprob=shifted(exact.label_logprob)),
        # The next K ids in place of the first, with their own log-probs and everything else in order.
        "not the best ids": replace(
            wide,
            token_ids=wide.token_ids[:, K:],
            logprobs=wide.logprobs[:, K:],
            kept=exact.kept,
            certain=exact.certain,
            log_tail=np.logaddexp(wide.log_tail, np.logaddexp.reduce(below, axis=1)),
            log_tail_half=np.logaddexp(wide.log_tail_half, np.logaddexp.reduce(below / 2, axis=1)),
        ),
        # One id K times over.
        "the best id repeated": replace(
            exact,
            token_ids=np.repeat(exact.token_ids[:, :1], K, axis=1),
            logprobs=repeated,
            log_tail=np.logaddexp(exact.log_tail, np.logaddexp.reduce(exact.logprobs[:, 1:], axis=1)),
            log_tail_half=np.logaddexp(exact.log_tail_half, np.logaddexp.reduce(exact.logprobs[:, 1:] / 2, axis=1)),
        ),
        "tails renormalised": replace(exact, log_tail=exact.log_tail - np.float32(0.05)),
        # Less than half a step, which is the error that any code may have.
        "log-probs 0.01 nats off": replace(exact, logprobs=exact.logprobs - np.float32(0.01)),
    }


EVERYWHERE = FIELDS - {"token_ids"}
LIES: dict[str, tuple[int, set[str]]] = {
    # windows to sample, and fields that must show it
    "another teacher": (8, FIELDS),
    "one shard of another teacher": (10, FIELDS),
    "shifted by one position": (8, FIELDS),
    "temperature 2": (8, EVERYWHERE),
    "shorter context": (8, FIELDS),
    "longer context": (8, FIELDS),
    "another text": (8, FIELDS),
    "another tokenizer": (8, FIELDS),
    "labels of another text": (8, {"label_logprob"}),
    "not the best ids": (8, {"token_ids"}),
    "the best id repeated": (8, {"token_ids"}),
    "tails renormalised": (8, {"log_tail"}),
    "log-probs 0.01 nats off": (8, {"log_tail"}),  # whose code holds the mass of the others too
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_is_found(cache: Path, teacher: Path, world: World, lies: dict[str, SparseTargets], lie: str) -> None:
    count, fields = LIES[lie]
    write_entry(cache, "lie", world[1], lies[lie])
    found = check(cache, teacher, "lie", windows=count)
    assert not found.consistent
    assert (found.problems, found.identity) == ([], [])
    assert {name for name, item in found.fields.items() if item.windows_differing} == fields
    if lie == "one shard of another teacher":
        assert all(SHARD <= first < last <= 2 * SHARD for first, last in found.differing)
    elif lie == "longer context":
        # The first half of a window of twice the length is the shorter one's.
        assert all(first % (2 * CONTEXT) == CONTEXT for first, _ in found.differing)
    else:
        assert len(found.differing) == found.windows


def test_a_lie_in_version_1(cache: Path, teacher: Path, lies: dict[str, SparseTargets]) -> None:
    entry = made(cache, teacher, "first", **VERSION_1)
    write_entry(cache, "lie", entry, lies["log-probs 0.01 nats off"])
    found = check(cache, teacher, "lie", windows=8)
    assert {name for name, item in found.fields.items() if item.windows_differing} == {"logprobs", "top_logprob"}


def test_lies_in_a_half_precision_s_record(
    cache: Path, teacher: Path, world: World, lies: dict[str, SparseTargets]
) -> None:
    """A record of bfloat16 gets the tolerance of bfloat16, and no more."""
    _, entry, exact = world
    member = entry.teacher.members[0].model_copy(update={"dtype": "bfloat16"})
    half = entry.model_copy(update={"teacher": entry.teacher.model_copy(update={"members": (member,)})})
    for name, lie in enumerate(("shorter context", "temperature 2", "labels of another text")):
        write_entry(cache, f"lie-{name}", half, lies[lie])
        assert len(check(cache, teacher, f"lie-{name}", windows=8).differing) == 8, lie
    write_entry(cache, "rounded", half, exact)
    assert check(cache, teacher, "rounded", windows=8).consistent


def test_an_entry_carried_over_from_another_cache(cache: Path, teacher: Path, world: World) -> None:
    _, entry, exact = world
    write_entry(cache, "carried", entry.model_copy(update={"stream_sha256": "1" * 64}), exact)
    found = check(cache, teacher, "carried")
    assert not found.consistent
    assert "stream_sha256" in found.problems[0]


def test_damage_that_a_window_meets_is_a_finding(cache: Path, teacher: Path) -> None:
    path = cache / "teachers/codes/entropy_code/c/1"
    path.write_bytes(path.read_bytes()[:-1])
    found = check(cache, teacher, "codes", windows=24)
    assert str(path) in found.problems[0]
    assert found.windows < 24
    assert not found.consistent
    assert found.differing == []


def test_a_text_with_an_id_that_the_entry_lacks_is_damage(tmp_path: Path) -> None:
    url, tokens = str(tmp_path / "c"), np.arange(61, dtype=np.uint16)
    record = make_corpus(url, tokens, 61)
    entry = make_entry(record, 3).model_copy(update={"vocabulary_size": 60})
    labels = np.append(tokens[1:].clip(max=59), -1).astype(np.int64)
    write_entry(url, "a", entry, dense_targets(np.random.default_rng(0).normal(size=(61, 60)), 3, labels))
    first, *_, last = windows(0, 61, 61, entry.windowing, None)
    take_sample(LogitCache.open(url), "a", first)
    with pytest.raises(CorruptCache, match="id 60, which teacher a with its vocabulary of 60 ids cannot have scored"):
        take_sample(LogitCache.open(url), "a", last)


def test_the_same_weights_saved_in_another_way(cache: Path, teacher: Path, tmp_path: Path) -> None:
    """Values decide; that the digests differ is reported."""
    import torch
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).save_pretrained(tmp_path / "double")
    found = check(cache, tmp_path / "double", "codes")
    assert found.consistent
    assert [line.split(" ")[0] for line in found.identity] == ["weights_sha256"]


def test_a_teacher_of_another_tokenizer(cache: Path, teacher: Path, tmp_path: Path) -> None:
    other = beside(teacher, cache / "tokenizer", tmp_path / "other")
    assert check(cache, other, "codes").consistent
    swap_ids(other)
    found = check(cache, other, "codes")
    assert not found.consistent
    assert "id 300" in found.problems[0]


def entry_of(positions: int, windowing: Windowing, entry: TeacherEntry, shard: int) -> TeacherEntry:
    layout = ArrayLayout(shard=shard, chunk=windowing.stride_tokens, compression="zstd")
    return entry.model_copy(update={"positions": positions, "windowing": windowing, "layout": layout})


@pytest.mark.parametrize("isolated", [False, True])
def test_sampled_windows_are_those_of_the_plan(world: World, isolated: bool) -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        stride = int(rng.integers(1, 9))
        windowing = Windowing(
            context_tokens=int(rng.integers(stride, 30)), stride_tokens=stride, isolate_documents=isolated
        )
        positions = int(rng.integers(1, 400))
        shard = stride * int(rng.integers(1, 9))
        entry = entry_of(positions, windowing, world[1], shard)
        inner = np.unique(rng.integers(1, max(2, positions), 7))
        starts = np.concatenate([[0], inner[inner < positions]]).astype(np.uint64) if isolated else None
        committed = rng.random(-(-positions // shard)) < 0.7
        committed[0] = True
        rows = shard_rows(entry, committed)
        planned = {
            window
            for number in np.flatnonzero(committed).tolist()
            for window in windows(number * shard, min((number + 1) * shard, positions), positions, windowing, starts)
        }
        sampled = sample_windows(entry, rows, starts, int(rng.integers(1, 40)), np.random.default_rng(0))
        assert set(sampled) <= planned
        assert len(set(sampled)) == len(sampled)
        assert set(sample_windows(entry, rows, starts, positions, np.random.default_rng(0))) == planned


def test_the_chance_to_escape(world: World) -> None:
    windowing = Windowing(context_tokens=16, stride_tokens=16)
    entry = entry_of(16 * 400, windowing, world[1], 160)
    rows = shard_rows(entry, np.ones(40, dtype=bool))
    rng = np.random.default_rng(5)
    corrupt = set((16 * rng.permutation(400)[:20]).tolist())  # a twentieth of the windows, anywhere
    tries, count = 1500, 24

    def sampled(seed: int) -> list[Window]:
        return sample_windows(entry, rows, None, count, np.random.default_rng(seed))

    escaped = sum(not any(window.first in corrupt for window in sampled(seed)) for seed in range(tries))
    bound = Examination(cache="", name="", seed=0, drawn=count).escape(0.05)
    assert bound == pytest.approx(0.95**24)
    assert 0.5 * bound < escaped / tries < bound + 3 * np.sqrt(bound * (1 - bound) / tries)
    # One stretch longer than two parts is always hit.
    for seed in range(200):
        first = 16 * int(rng.integers(0, 400 - 34))
        assert any(first <= window.first < first + 16 * 34 for window in sampled(seed))


def test_entries_that_cannot_be_audited(
    cache: Path, teacher: Path, make_teacher: Callable[..., Path], world: World, tmp_path: Path, run: Run
) -> None:
    _, entry, exact = world
    opened = LogitCache.open(str(cache))
    corpus = opened.record.corpus.model_copy(update={"tokens_included": False})
    bare = tmp_path / "bare"
    record = opened.record.model_copy(update={"corpus": corpus})
    write_corpus(str(bare), record, opened.tokenizer_files(), {})
    without = entry.model_copy(update={"targets": entry.targets.without("label")})
    write_entry(bare, "codes", without, exact)
    write_entry(cache, "other", entry, exact)
    cases: list[tuple[Path, Path, str | None, tuple[str, ...]]] = [
        (bare, teacher, None, ("without its tokens",)),
        (cache, teacher, None, ("--name", "codes, other")),
        (cache, teacher, "nobody", ("no teacher entry 'nobody'",)),
        (cache, make_teacher(0, 300), "codes", ("300 columns", "400 ids")),
        (cache, make_teacher(0, n_positions=32), "codes", ("32 tokens",)),
    ]
    for url, model, name, words in cases:
        with pytest.raises(LogitCacheError) as error:
            audit(AuditJob(str(url), (str(model),), name))
        assert all(word in str(error.value) for word in words), error.value
    shutil.rmtree(cache / "teachers/codes/receipts")
    refused(run("logit-cache", "audit", cache, "--teacher", teacher, "--name", "codes"), "no position yet")


def test_the_command(cache: Path, teacher: Path, make_teacher: Callable[..., Path], run: Run) -> None:
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    done = succeeded(run("logit-cache", "audit", cache, "--teacher", teacher, "--device", "cpu", "--json"))
    found = json.loads(done.stdout)
    assert found["consistent"]
    assert found["positions"] == 16 * CONTEXT == found["fields"]["entropy"]["values"]
    assert found["escape"]["0.1"] == pytest.approx(0.9**16)
    # The reported seed samples the same windows again; without it they are others.
    again = check(cache, teacher, "codes", seed=found["seed"])
    assert again.fields["entropy"].position == found["fields"]["entropy"]["position"]
    one, other = (check(cache, teacher, "codes", seed=None).seed for _ in range(2))
    assert one != other

    stranger = make_teacher(1)
    done = run("logit-cache", "audit", cache, "--teacher", stranger, "--windows", 5)
    assert done.returncode == 1
    assert "weights_sha256" in done.stdout
    assert "NOT CONSISTENT" in done.stdout
    as_data = run("logit-cache", "audit", cache, "--teacher", stranger, "--windows", 5, "--json")
    assert (as_data.returncode, json.loads(as_data.stdout)["consistent"]) == (1, False)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before


def test_a_record_cannot_ask_for_more_memory_than_a_batch_needs(cache: Path, teacher: Path, world: World) -> None:
    _, entry, exact = world
    execution = entry.execution.model_copy(update={"batch_windows": 1 << 40, "device_type": "cuda"})
    greedy = entry.model_copy(update={"execution": execution})
    assert digest(greedy) != digest(entry)
    write_entry(cache, "greedy", greedy, exact)
    found = check(cache, teacher, "greedy", windows=4)
    assert found.consistent
    assert found.controls == ["in batches of 4 and of 1 windows"]
    assert "device_type: recorded 'cuda', now 'cpu'" in found.execution


def test_exact_log_probs_are_held_to_float32(cache: Path, teacher: Path, world: World) -> None:
    _, entry, exact = world
    encoding = Encoding(kind="float32", step_nats=None)
    off = exact.logprobs - np.float32(0.005)
    write_entry(cache, "exact", entry.model_copy(update={"encoding": encoding}), replace(exact, logprobs=off))
    found = check(cache, teacher, "exact", windows=4)
    assert {name for name, item in found.fields.items() if item.windows_differing} == {"logprobs"}
