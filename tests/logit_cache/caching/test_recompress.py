"""`recompress` against a float64 dense reference: kept ids, the tail, refusals, and kills."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.commands import Run, refused, succeeded
from support.jobs import contents, files

from logit_cache.caching.recompress import RecompressJob, recompress
from storage import LogitCache, SparseTargets
from storage.cache.corpus_writer import write_corpus
from storage.cache.verify import verify
from storage.errors import IdentityMismatch, IncompleteCache, InputError, LogitCacheError
from storage.format.encoding import MIN_STEP_NATS, logprob_floor
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import Encoding, Targets, TeacherEntry
from storage.format.pruning import prune
from storage.format.sealing import digest
from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.loss.distillation import forward_kl
from student.loss.teacher_targets import Member

V, N, K = 211, 700, 64
STEP = 1 / 32


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(N, V)) * rng.choice([0.1, 2.0, 6.0], size=(N, 1))
    rows[10, 5:] = -np.inf  # a teacher that masks all ids but five
    rows[11] = 0.0
    return rows


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 5, N).astype(np.uint16)


@pytest.fixture(scope="module")
def dense(logits: np.ndarray) -> np.ndarray:
    """Log-probs float64 [N, V]."""
    z = logits - logits.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def top(logits: np.ndarray, tokens: np.ndarray, k: int, step: float = STEP) -> SparseTargets:
    """Top-k targets as a teacher's worker makes them, floor included."""
    floor = np.float32(logprob_floor(step))
    targets = dense_targets(np.maximum(logits, -1e30), k, np.append(tokens[1:], -1).astype(np.int64))
    floored = {
        name: np.where(
            np.isneginf(getattr(targets, name)) & (k == V), -np.inf, np.maximum(getattr(targets, name), floor)
        )
        for name in ("log_tail", "log_tail_half", "label_logprob", "logprobs")
    }
    entropy = np.nan_to_num(targets.entropy)
    return replace(targets, entropy=entropy, **{n: values.astype(np.float32) for n, values in floored.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, logits: np.ndarray, tokens: np.ndarray) -> tuple[Path, CacheRecord]:
    """A cache with the same teacher at k = 64 in codes, and exactly; and all its ids."""
    path = tmp_path_factory.mktemp("made") / "cache"
    record = make_corpus(str(path), tokens, V)
    cut = {"shard_tokens": 256, "chunk_tokens": 64}
    write_entry(path, "codes", make_entry(record, K, **cut), top(logits, tokens, K))
    write_entry(path, "exact", make_entry(record, K, encoding="float32", **cut), top(logits, tokens, K))
    write_entry(path, "whole", make_entry(record, V, encoding="float32", **cut), top(logits, tokens, V))
    return path, record


@pytest.fixture
def cache(made: tuple[Path, CacheRecord], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "cache"))


def rewrite(cache: Path, name: str = "codes", to: str = "new", **changes: Any) -> SparseTargets:
    recompress(RecompressJob(cache=str(cache), name=name, to=to, **changes))
    return LogitCache.open(str(changes.get("out", cache))).teacher(to).read(0, N)


@pytest.mark.parametrize("source", ["codes", "exact", "whole"])
def test_fewer_ids_are_what_caching_fewer_would_have_given(
    cache: Path, made: tuple[Path, CacheRecord], logits: np.ndarray, tokens: np.ndarray, source: str
) -> None:
    found = rewrite(cache, source, k=16)
    encoding = "codes" if source == "codes" else "float32"
    write_entry(cache, "direct", make_entry(made[1], 16, encoding=encoding), top(logits, tokens, 16))
    direct = LogitCache.open(str(cache)).teacher("direct").read(0, N)
    for name in ("token_ids", "kept", "certain", "logprobs"):
        assert np.array_equal(getattr(found, name), getattr(direct, name)), name
    assert np.array_equal(found.label_logprob, direct.label_logprob, equal_nan=True)
    assert np.array_equal(found.entropy, direct.entropy)
    # Ids that joined the tails were off by half a step at most; and the mantissas are rounded.
    allowed, rounding = (STEP / 2, 2.0**-12) if encoding == "codes" else (0.0, 2.0**-22)
    for name, share in (("log_tail", 1.0), ("log_tail_half", 0.5)):
        # Row 10 has ids at the floor only; nothing and 48 times nothing are both no mass.
        a, b = (np.maximum(getattr(each, name).astype(np.float64), -900) for each in (found, direct))
        assert (np.abs(a - b) <= allowed * share + rounding * np.abs(b) + 1e-6).all(), name


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
def test_rows_are_cut_where_their_mass_first_suffices(cache: Path, top_p: float) -> None:
    source = LogitCache.open(str(cache)).teacher("codes").read(0, N)
    found = rewrite(cache, top_p=top_p, profile="fast")
    mass = np.exp(source.logprobs.astype(np.float64)).cumsum(axis=1)
    total = mass[:, -1] + np.exp(source.log_tail.astype(np.float64))
    assert np.abs(total - 1).max() < np.expm1(STEP / 2)
    mass /= total[:, None]
    for row in range(N):
        kept = int(found.kept[row])
        assert kept == K or mass[row, kept - 1] >= top_p
        assert kept == 1 or mass[row, kept - 2] < top_p
    assert np.array_equal(found.certain, found.kept)
    # All of it is only there where the rest is nothing at all.
    cut = found.kept < K
    assert cut.any()
    if top_p == 1:
        assert (found.log_tail[cut] < -30).all()
    beyond = np.arange(K) >= found.kept[:, None]
    assert (found.token_ids[beyond] == 65_535).all()
    assert np.array_equal(found.token_ids[~beyond], source.token_ids[~beyond])
    assert np.array_equal(found.logprobs[~beyond], source.logprobs[~beyond])
    after = np.exp(found.logprobs.astype(np.float64)).sum(axis=1) + np.exp(found.log_tail.astype(np.float64))
    assert np.abs(after - total).max() < 1e-3  # the tail's mantissa
    assert LogitCache.open(str(cache)).teacher("new").entry.targets == Targets(k=K, top_p=top_p, has_label_logprob=True)


def test_the_same_step_gives_the_same_codes_byte_for_byte(cache: Path) -> None:
    before = files(cache / "teachers/codes")
    rewrite(cache, shard_tokens=256, chunk_tokens=32)
    rewrite(cache, "new", "back", shard_tokens=256, chunk_tokens=64)
    after = files(cache / "teachers/back")
    objects = {key for key in before if "/c/" in key}
    assert len(objects) == 9 * 3
    assert {key: after[key] for key in objects} == {key: before[key] for key in objects}
    assert files(cache / "teachers/codes") == before


@pytest.mark.parametrize(
    ("source", "step"), [("exact", 1 / 32), ("exact", MIN_STEP_NATS), ("codes", 1 / 16), ("codes", 0.3)]
)
def test_another_step_is_within_its_bound(
    cache: Path, logits: np.ndarray, tokens: np.ndarray, source: str, step: float
) -> None:
    found = rewrite(cache, source, encoding="codes", step_nats=step)
    exact = np.maximum(top(logits, tokens, K).logprobs, logprob_floor(step))
    allowed = step / 2 if source == "exact" else step / 2 + STEP / 2
    assert np.abs(found.logprobs - exact)[:, 1:].max() <= allowed + 1e-4
    entry = LogitCache.open(str(cache)).teacher("new").entry
    assert entry.encoding == Encoding(kind="codes", step_nats=step, mantissa_bits=12)
    assert found.logprobs.min() >= logprob_floor(step) - step, "what the step cannot reach is floored"
    assert found.log_tail.min() >= logprob_floor(step)


def test_a_step_that_doubles_again_and_again_stays_within_one_of_itself(
    cache: Path, logits: np.ndarray, tokens: np.ndarray
) -> None:
    exact = top(logits, tokens, K).logprobs
    name, step = "codes", STEP
    while 2 * step <= 1:
        step *= 2
        found = rewrite(cache, name, f"at-{round(step / STEP)}", step_nats=step)
        name = f"at-{round(step / STEP)}"
        assert np.abs(found.logprobs - exact).max() < step
    assert step == 1


def test_the_record_names_its_source_and_keeps_the_rest(cache: Path) -> None:
    source = LogitCache.open(str(cache)).teacher("codes")
    found = recompress(RecompressJob(cache=str(cache), name="codes", to="new", k=8, top_p=0.9))
    made = LogitCache.open(str(cache)).teacher("new")
    assert made.entry.derived_from == digest(source.entry) == found.derived_from == source.record_sha256
    changed = {"targets", "layout", "derived_from", "created_with"}
    assert made.entry.model_dump(exclude=changed) == source.entry.model_dump(exclude=changed)
    assert made.entry.layout == source.entry.layout
    assert (found.bytes_before, found.bytes_after) == (source.stored_bytes(), made.stored_bytes())
    assert found.bytes_after < found.bytes_before / 3
    assert (found.k_before, found.k_after, found.positions) == (K, 8, N)
    assert found.head_mass_before is not None
    assert found.head_mass_after is not None
    assert found.head_mass_after < found.head_mass_before
    report = verify(str(cache), deep=True)
    assert (report.sound, report.missing, report.leftovers) == (True, {}, [])


def sampled_entry(record: CacheRecord, targets: SparseTargets) -> tuple[TeacherEntry, SparseTargets]:
    """Eight certain ids, and the others as if they had been sampled; all of row 10, where these have no mass."""
    entry = make_entry(record, K, shard_tokens=256, chunk_tokens=64)
    method = Targets(method="varopt", k=K, head_ids=8, seed=3, has_label_logprob=True)
    certain = np.where(np.arange(N) == 10, K, 8).astype(np.uint16)
    rest = np.where(np.arange(K) < certain[:, None], -np.inf, targets.logprobs.astype(np.float64))
    changed = replace(
        targets,
        certain=certain,
        log_tail=np.logaddexp(targets.log_tail, np.logaddexp.reduce(rest, axis=1)).astype(np.float32),
        log_tail_half=np.logaddexp(targets.log_tail_half, np.logaddexp.reduce(rest / 2, axis=1)).astype(np.float32),
    )
    return entry.model_copy(update={"targets": method}), changed


def test_a_sample_is_kept_whole(
    cache: Path, made: tuple[Path, CacheRecord], logits: np.ndarray, tokens: np.ndarray
) -> None:
    write_entry(cache, "sampled", *sampled_entry(made[1], top(logits, tokens, K)))
    for option, value in (("k", 16), ("step_nats", 0.25), ("encoding", "codes")):
        with pytest.raises(InputError, match=rf"--?{option.replace('_', '-')} makes an entry of version 2"):
            rewrite(cache, "sampled", format_version=1, **{option: value})
    with pytest.raises(InputError, match=r"--top-p .* sample \(varopt\)"):
        rewrite(cache, "sampled", top_p=0.9)
    before = LogitCache.open(str(cache)).teacher("sampled").read(0, N)
    found = rewrite(cache, "sampled", profile="fast", chunk_tokens=128)
    assert LogitCache.open(str(cache)).teacher("new").entry.format_version == 1
    for name in ("token_ids", "logprobs", "kept", "certain", "log_tail", "log_tail_half", "entropy"):
        assert np.array_equal(getattr(found, name), getattr(before, name)), name
    with pytest.raises(AssertionError, match="whole"):
        prune(before, 16, None, -2000.0)


@pytest.mark.parametrize("source", ["codes", "whole"])
def test_version_2_has_no_mass_either_where_a_teacher_masks_ids(cache: Path, source: str) -> None:
    """Row 10 has all but five ids at the floor of version 1; all of them are certain, or those left are at it too."""
    before = LogitCache.open(str(cache)).teacher(source).read(10, 11)
    found = rewrite(cache, source, format_version=2, encoding="codes").rows(10, 11)
    assert np.abs(found.logprobs[0, :5] - before.logprobs[0, :5]).max() <= 2 * STEP
    assert np.exp(found.logprobs[0].astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)
    assert (found.logprobs[0, 5:] < -1900).all()
    assert found.log_tail[0] < -1000
    assert found.log_tail_half[0] < -100
    assert np.isneginf(found.log_tail[0]) or source == "codes"


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "more ids": ("codes", {"k": 65}, "holds 64 ids per position: give at most 64"),
    "float32 of codes": ("codes", {"encoding": "float32"}, "be no more exact"),
    "a finer step": ("codes", {"step_nats": 1 / 64}, "at least 0.0625"),
    "more mass": ("pruned", {"top_p": 0.95}, "already cut at a mass of 0.8"),
    "nothing to do": ("codes", {}, "already as asked for"),
    "the same again": ("codes", {"k": 64, "step_nats": 1 / 32, "profile": "small"}, "already as asked for"),
    "a cut that is none": ("codes", {"chunk_tokens": 24}, "multiple of the stride"),
    "itself": ("codes", {"k": 8, "to": "codes"}, "never rewritten"),
    "a name that is none": ("nobody", {"k": 8}, "no teacher entry 'nobody'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(cache: Path, case: str) -> None:
    name, changes, words = REFUSED[case]
    if name == "pruned":
        rewrite(cache, to="pruned", top_p=0.8)
    before = files(cache)
    with pytest.raises(LogitCacheError, match=words):
        rewrite(cache, name, **{"to": "new", **changes})
    assert files(cache) == before


def test_an_entry_under_that_name_is_not_touched(cache: Path) -> None:
    rewrite(cache, k=16)
    before = files(cache)
    rewrite(cache, k=16)
    assert files(cache) == before
    for name, changes in (("codes", {"k": 8}), ("exact", {"k": 16}), ("codes", {"k": 16, "top_p": 0.5})):
        with pytest.raises(IdentityMismatch, match="new"):
            rewrite(cache, name, **changes)
    with pytest.raises(IdentityMismatch, match="derived_from"):
        rewrite(cache, to="exact", k=16)
    assert files(cache) == before


def test_an_incomplete_or_damaged_source(cache: Path) -> None:
    receipts = cache / "teachers/codes/receipts"
    (receipts / "index.json").unlink()
    (receipts / "00000001.json").unlink()
    with pytest.raises(IncompleteCache, match=r"256\.\.512"):
        rewrite(cache, k=16)
    assert not (cache / "teachers/new").exists()
    path = cache / "teachers/exact/logprobs/c/1/0"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(LogitCacheError, match="exact/logprobs"):
        rewrite(cache, "exact", k=16)
    assert LogitCache.open(str(cache)).teacher("new").missing() == [(256, N)]


def test_into_another_cache_of_the_same_tokens_only(
    cache: Path, made: tuple[Path, CacheRecord], tokens: np.ndarray, tmp_path: Path
) -> None:
    same, other, bare = tmp_path / "same", tmp_path / "other", tmp_path / "bare"
    make_corpus(str(same), tokens, V)
    make_corpus(str(other), tokens[::-1].copy(), V)
    opened = LogitCache.open(str(cache))
    without = made[1].model_copy(update={"corpus": made[1].corpus.model_copy(update={"tokens_included": False})})
    write_corpus(str(bare), without, opened.tokenizer_files(), {})
    found = rewrite(cache, k=16, out=str(same))
    assert np.array_equal(found.token_ids, rewrite(cache, k=16).token_ids)
    with pytest.raises(IdentityMismatch, match="stream_sha256"):
        rewrite(cache, k=16, out=str(other))
    with pytest.raises(InputError, match="log-probs of labels"):
        rewrite(cache, k=16, out=str(bare))
    with pytest.raises(LogitCacheError, match="no cache there"):
        rewrite(cache, k=16, out=str(tmp_path / "nowhere"))
    assert not list(other.glob("teachers/*/"))
    assert not list(bare.glob("teachers/*/"))


KILLED = """
import json, os, sys
from storage.stores.local import LocalStore
from logit_cache.caching.recompress import RecompressJob, recompress
publish, left = LocalStore.publish, {writes}
def killed(self, key, data):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return publish(self, key, data)
LocalStore.publish = killed
recompress(RecompressJob(cache=sys.argv[1], to="new", **json.loads(sys.argv[2])))
"""


@pytest.mark.parametrize(
    ("name", "changes", "kills"),
    [
        ("codes", {"k": 16, "top_p": 0.95, "step_nats": 0.0625}, (1, 6, 13, 19, 27, 39)),
        ("sampled", {"k": 16, "fields": ["sampled-logprobs"], "sampled_step_nats": 1.0}, (9, 15)),
    ],
    ids=["pruned", "sampled again"],
)
def test_killed_at_any_write_it_resumes_to_the_same_bytes(
    cache: Path,
    made: tuple[Path, CacheRecord],
    logits: np.ndarray,
    tokens: np.ndarray,
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    kills: tuple[int, ...],
) -> None:
    """After the record, within the metadata, between the objects of a shard, before a receipt, before the index."""
    if name == "sampled":
        write_entry(cache, "sampled", *sampled_entry(made[1], top(logits, tokens, K)))
    whole = Path(shutil.copytree(cache, tmp_path / "whole"))
    rewrite(whole, name, **changes)
    for writes in kills:
        victim = Path(shutil.copytree(cache, tmp_path / f"victim-{writes}"))
        pid = os.fork()
        if pid == 0:  # a child of a process that has imported everything: quick, and killed like any other
            sys.argv = ["", str(victim), json.dumps({"name": name, **changes})]
            exec(KILLED.format(writes=writes), {})
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        with pytest.raises(LogitCacheError):
            LogitCache.open(str(victim)).teacher("new").read(0, N)
        rewrite(victim, name, **changes)
        assert contents(victim, "new") == contents(whole, "new")
        assert verify(str(victim), deep=True).sound


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("source", ["codes", "exact"])
def test_the_loss_takes_pruned_rows(cache: Path, dense: np.ndarray, source: str, temperature: float) -> None:
    """Rows of different lengths, read as training reads them: the bucketed KL of a float64 reference of each row."""
    found = rewrite(cache, source, k=32, top_p=0.8)
    assert len(np.unique(found.kept)) > 5
    batch = collate(DistillationWindows(str(cache), ["new"], window_tokens=N - 1).__getitems__([0]))
    targets = batch["targets"]["new"].flat().decoded()
    rng = np.random.default_rng(4)
    student = torch.from_numpy(rng.normal(size=(N - 1, V)) * 2).requires_grad_()
    member = Member.of("new", LogitCache.open(str(cache)).teacher("new").entry)
    kl = forward_kl(student, targets, member, temperature)
    kl.sum().backward()
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())

    q = torch.log_softmax(student.detach() / temperature, dim=1).numpy()
    tails = found.log_tail if temperature == 1.0 else found.log_tail_half

    def bucketed_kl(values: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        """From the log-probs, normalised or not, of a row's ids and of all others together."""
        kls = np.empty(N - 1)
        for row in range(N - 1):
            ids = found.token_ids[row, : int(found.kept[row])].astype(np.int64)
            p = values(row, ids)
            p -= np.logaddexp.reduce(p)
            of_student = np.append(q[row, ids], np.logaddexp.reduce(np.delete(q[row], ids)))
            kls[row] = (np.exp(p) * (p - of_student)).sum()
        return kls

    def stored(row: int, ids: np.ndarray) -> np.ndarray:
        return np.append(found.logprobs[row, : len(ids)].astype(np.float64) / temperature, tails[row])

    def exact(row: int, ids: np.ndarray) -> np.ndarray:
        p = np.maximum(dense[row], -2000.0) / temperature
        return np.append(p[ids], np.logaddexp.reduce(np.delete(p, ids)))

    assert np.abs(kl.detach().numpy() - bucketed_kl(stored)).max() < 1e-4
    # And it is the teacher's: with the exact values of the float64 reference in place of the stored ones.
    assert np.abs(bucketed_kl(stored) - bucketed_kl(exact)).max() < (0.05 if source == "codes" else 1e-4)


def test_the_command(cache: Path, run: Run) -> None:
    arguments = ("logit-cache", "recompress", cache, "--name", "codes", "--to", "new", "-k", 16, "--top-p", 0.9)
    done = succeeded(run(*arguments, "--json"))
    found = json.loads(done.stdout)
    opened = LogitCache.open(str(cache))
    assert found["bytes_before"] == opened.teacher("codes").stored_bytes()
    assert found["bytes_after"] == opened.teacher("new").stored_bytes()
    assert found["derived_from"] == opened.teacher("codes").record_sha256
    refused(run(*arguments, "--encoding", "float32", "--step-nats", 0.5), "--step-nats")
    refused(run("cache-logits", "--cache", cache, "--name", "new", "--teacher", cache), str(cache))
    shown = json.loads(run("logit-cache", "inspect", cache, "--at", 300, "--json").stdout)
    assert shown["teachers"]["new"]["certain"] + shown["teachers"]["new"]["sampled"] <= 16


def test_the_example_of_its_help_shrinks_an_entry(cache: Path, run: Run) -> None:
    rewrite(cache, "codes", "llama-fast", profile="fast")
    example = re.search(r"^ *(logit-cache recompress .*)$", run("logit-cache", "recompress", "--help").stdout, re.M)
    assert example is not None
    done = succeeded(run(*example[1].replace("run/train", str(cache)).split()))
    before, after = (LogitCache.open(str(cache)).teacher(name).stored_bytes() for name in ("llama-fast", "llama-small"))
    assert after < before
    sizes = f"{before / N:.1f} → {after / N:.1f} bytes per token ({100 * after / before:.0f} %)"
    assert done.stdout == f"{cache}: llama-small from llama-fast, {sizes}\n"
