"""`cache-logits --targets varopt` and `--top-p` as they are installed: stored targets, sampled once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import Run
from support.jobs import cache_logits, contents, copy_of, refusal, whole
from support.models.saved import dense_logprobs
from transformers import AutoModelForCausalLM

from logit_cache.caching.job import CacheJob
from logit_cache.caching.recompress import RecompressJob, recompress
from storage import LogitCache
from storage.format.manifest.entry import TARGET_FIELDS, Targets
from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets
from teachers.huggingface.teacher import HuggingFaceTeacher

K = 16
VAROPT = {"k": K, "targets": "varopt", "encoding": "float32", "fields": "all"}
TOPK = {"k": K, "targets": "topk", "encoding": "float32", "fields": "all"}
ARRAYS = ("token_ids", "logprobs", "kept", "certain", "log_tail", "log_tail_half", "entropy")


@pytest.fixture(scope="session")
def teacher(make_teacher: Callable[..., Path]) -> Path:
    """A random model with logits as spread as a trained one's: most rows have certain ids and others."""
    return make_teacher(4, initializer_range=0.6)


def outside(dense: np.ndarray, stored: SparseTargets, beta: float) -> np.ndarray:
    """log of the sum of p**beta over the ids that are not certain, float64."""
    certain = np.arange(stored.k) < stored.certain[:, None]
    mask = np.zeros_like(dense, dtype=bool)
    rows = np.broadcast_to(np.arange(len(dense))[:, None], certain.shape)
    mask[rows[certain], stored.token_ids[certain].astype(np.int64)] = True
    return np.log(np.where(mask, 0.0, np.exp(beta * dense)).sum(1))


def at_ids(values: np.ndarray, stored: SparseTargets) -> np.ndarray:
    """values [T, V] at the ids of each row, [T, K]; NaN where no id is kept."""
    ids = np.where(stored.is_kept, stored.token_ids, 0).astype(np.int64)
    return np.where(stored.is_kept, np.take_along_axis(values, ids, 1), np.nan)


def weights(share: np.ndarray, stored: SparseTargets) -> np.ndarray:
    """What each stored id stands for, [T, K], of shares [T, V] that sum to one."""
    certain = np.where(stored.is_certain, at_ids(share, stored), 0.0)
    number = np.maximum(stored.kept.astype(int) - stored.certain, 1)
    sampled = stored.is_kept & ~stored.is_certain
    return np.where(sampled, ((1 - certain.sum(1)) / number)[:, None], certain)


@pytest.mark.parametrize(("temperature", "sizes"), [(1, "fixed"), (2, "fixed"), (1, None), (2, None)])
def test_stored_samples_are_the_model_s(cache: Path, teacher: Path, temperature: int, sizes: str | None) -> None:
    k = K if sizes else 4 * K
    kind = {**VAROPT, "k": k, "head_ids": 2, "seed": 5, "target_temperature": temperature}
    targets, stored = cache_logits(cache, "v", teacher, **kind, **({"sample_size": sizes} if sizes else {}))
    made = {"method": "varopt", "k": k, "head_ids": 2, "seed": 5, "temperature": temperature}
    stated = {"sampling": "systematic", "order": "ids", "positions": "all", "tail": "exact", "fields": TARGET_FIELDS}
    assert targets.entry.targets == Targets(**made, **stated, sample_size=None if sizes else "threshold")
    assert StoredTargets.of(targets.entry, stored).broken_rule() is None
    assert (stored.kept == k).all() if sizes else (stored.kept < k).mean() > 0.9
    assert stored.certain.min() >= 2
    assert 2 < stored.certain.mean() < stored.kept.mean() - 1
    dense = dense_logprobs(teacher, LogitCache.open(str(cache)).tokens.read(0, len(stored)), 64, 64).double().numpy()
    exact = np.where(stored.is_kept, at_ids(dense, stored), -np.inf)
    np.testing.assert_allclose(stored.logprobs, exact, atol=1e-4)
    np.testing.assert_allclose(stored.log_tail, outside(dense, stored, 1.0), atol=1e-4)
    np.testing.assert_allclose(stored.log_tail_half, outside(dense, stored, 0.5), atol=1e-4)
    # Over 10,000 positions the sampled weights have the teacher's mass of any set of ids as their mean.
    share = np.exp(dense / temperature)
    share /= share.sum(1, keepdims=True)
    weighed = weights(share, stored)
    for ids in (np.arange(200), np.arange(1, 400, 2), np.arange(50, 90)):
        sampled = (weighed * np.isin(stored.token_ids, ids)).sum(1)
        difference = sampled - share[:, ids].sum(1)
        assert abs(difference.mean()) < 5 * difference.std() / np.sqrt(len(difference)) + 1e-5


@pytest.mark.parametrize("kind", [TOPK, VAROPT, {**VAROPT, "target_temperature": 2}], ids=["topk", "varopt", "at 2"])
def test_the_parts_of_a_position_sum_to_one(cache: Path, teacher: Path, kind: dict[str, Any], run: Run) -> None:
    """Certain, sampled and other ids; in a loss, each sampled id stands for an equal part of what is not certain."""
    _, stored = cache_logits(cache, "a", teacher, **kind)
    row = stored.rows(9, 10)
    certain, masses = int(row.certain[0]), np.exp(row.logprobs[0].astype(np.float64))
    found = json.loads(run("logit-cache", "inspect", cache, "--at", 9, "--json").stdout)["teachers"]["a"]
    assert (found["certain"], found["sampled"]) == (certain, K - certain)
    assert sum(found[f"{part}_mass"] for part in ("certain", "sampled", "outside")) == pytest.approx(1, abs=1e-5)
    assert found["sampled_mass"] == pytest.approx(masses[certain:].sum())
    marked = {item["id"] for item in found["top"] if item["sampled"]}
    assert marked == set(row.token_ids[0, certain : certain + 10].tolist())
    text = run("logit-cache", "inspect", cache, "--at", 9).stdout
    assert text.count("  sampled  ") == len(marked)
    if kind is TOPK:
        assert (certain, found["sampled_weight"]) == (K, None)
    else:
        tempered = masses[:certain] ** (1 / kind.get("target_temperature", 1))
        share = tempered.sum() / (
            tempered.sum() + np.exp(row.log_tail_half[0] if kind is not VAROPT else row.log_tail[0])
        )
        assert share + (K - certain) * found["sampled_weight"] == pytest.approx(1, rel=1e-6)
        assert f"each stands for {found['sampled_weight']:.5f}" in text


def test_a_sample_depends_on_seed_and_position_alone(cache: Path, teacher: Path) -> None:
    """Cut into other shards and chunks: the same values. Another batch shape: the same ids. Another seed: others."""
    _, a = cache_logits(cache, "a", teacher, **VAROPT)
    _, b = cache_logits(cache, "b", teacher, **VAROPT, shard_tokens=1024, chunk_tokens=512)
    _, c = cache_logits(cache, "c", teacher, **VAROPT, batch_windows=7)
    _, d = cache_logits(cache, "d", teacher, **VAROPT, seed=1)
    for name in ARRAYS:
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    # Another batch shape may move a logit's last bit, and with it a tooth of the comb, almost never.
    assert (a.token_ids == c.token_ids).all(1).mean() > 0.999
    assert (a.certain == d.certain).mean() > 0.999
    assert (a.token_ids == d.token_ids).all(1).mean() < 0.5
    assert "targets.method" in refusal(cache, "a", teacher, **TOPK)
    assert "targets.seed" in refusal(cache, "a", teacher, **VAROPT, seed=1)
    assert "targets.head_ids" in refusal(cache, "a", teacher, **VAROPT, head_ids=1)


def test_samples_in_codes(cache: Path, teacher: Path) -> None:
    """Log-probs of certain ids are within a step and a half, of sampled ids within one of their own."""
    _, exact = cache_logits(cache, "exact", teacher, **VAROPT)
    kept = exact.is_kept
    _, codes = cache_logits(cache, "codes", teacher, k=K, targets="varopt", fields="all")
    assert np.array_equal(exact.token_ids, codes.token_ids)
    off = np.abs(np.where(kept, exact.logprobs, 0) - np.where(kept, codes.logprobs, 0))
    assert off[exact.is_certain].max() <= 3 / 64
    assert off[~exact.is_certain].max() <= 1 / 2 + 1 / 64 + 1e-3


def test_top_p_prunes_as_recompress_does(cache: Path, teacher: Path) -> None:
    _, full = cache_logits(cache, "full", teacher, **TOPK)
    # A mass alone asks for top-k.
    targets, cut = cache_logits(cache, "cut", teacher, k=K, encoding="float32", top_p=0.9)
    assert (targets.entry.targets.method, targets.entry.targets.top_p) == ("top-k", 0.9)
    assert StoredTargets.of(targets.entry, cut).broken_rule() is None
    mass = np.cumsum(np.exp(full.logprobs.astype(np.float64)), axis=1)
    assert np.array_equal(cut.kept, np.minimum((mass < 0.9).sum(1) + 1, K))
    assert 1 < cut.kept.mean() < K
    assert np.array_equal(cut.kept, cut.certain)
    kept_mass = np.exp(cut.logprobs.astype(np.float64)).sum(1)
    np.testing.assert_allclose(kept_mass + np.exp(cut.log_tail.astype(np.float64)), 1.0, atol=1e-5)
    recompress(RecompressJob(cache=str(cache), name="full", to="later", top_p=0.9))
    _, later = whole(cache, "later")
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(cut, name), getattr(later, name), atol=2e-6, err_msg=name)


def test_every_id_is_certain_where_all_are_kept(cache: Path, teacher: Path) -> None:
    _, found = cache_logits(cache, "v", teacher, k=400, targets="varopt", fields=("entropy", "half-tail", "label"))
    cache_logits(cache, "t", teacher, k=400, targets="topk", fields="all")
    stored, top = contents(cache, "v"), contents(cache, "t")
    assert {key for key in stored if stored[key] != top[key]} == {"zarr.json"}
    assert (found.certain == 400).all()
    assert np.isneginf(found.log_tail).all()


def test_wrong_targets_are_one_line(cache: Path, teacher: Path) -> None:
    for fields, words in (
        ({"targets": "sampled"}, ("--targets", "varopt")),
        ({"targets": "topk", "seed": 1}, ("--seed", "--targets varopt")),
        ({"top_p": 0.9, "seed": 1}, ("--seed", "--targets varopt")),
        ({"targets": "topk", "head_ids": 1}, ("--head-ids", "--targets varopt")),
        ({"targets": "topk", "sample_size": "fixed"}, ("--sample-size", "--targets varopt")),
        ({"format_version": 1, "sample_size": "threshold"}, ("--sample-size", "version 2")),
        ({"targets": "topk", "target_temperature": 2}, ("--target-temperature", "--targets varopt")),
        ({"top_p": 1.5}, ("--top-p",)),
        ({"targets": "varopt", "top_p": 0.9}, ("--top-p", "--targets topk")),
        ({"targets": "varopt", "head_ids": 16, "k": 16}, ("--head-ids 16", "-k 16")),
        ({"targets": "varopt", "target_temperature": 1.5}, ("--target-temperature 1.5", "1 or 2")),
        ({"targets": "varopt", "target_temperature": float("nan")}, ("--target-temperature", "1 or 2")),
        ({"targets": "varopt", "seed": -1}, ("--seed",)),
    ):
        line = refusal(cache, "a", teacher, **fields)
        assert all(word in line for word in words), line
    assert not (cache / "teachers" / "a").exists()


def test_a_student_whose_head_is_padded(tmp_path: Path) -> None:
    """A student of 64 columns for 61 ids trains, and gives the three hardly any mass in the end."""
    from support.runs import LLAMA, V, job_in, make_world

    from student.training.run import train

    make_world(tmp_path)
    (tmp_path / "padded.json").write_text(json.dumps({**LLAMA, "vocab_size": V + 3}))
    training = {"max_steps": 40, "learning_rate": 0.05}
    job = job_in(tmp_path, tmp_path / "out", model=str(tmp_path / "padded.json"), alpha=0.3, training=training)
    train(job)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == V + 3
    with torch.no_grad():
        p = torch.softmax(model(torch.arange(1, 17)[None]).logits[0], 1)
    assert float(p[:, V:].sum(1).max()) < 0.5 * 3 / (V + 3)


@pytest.mark.parametrize(
    ("order", "sampling"), [("embeddings", "systematic"), ("embeddings", "pivotal"), ("ids", "pivotal")]
)
def test_ids_sampled_in_an_order_or_by_duels_are_made_read_and_audited(
    cache: Path, teacher: Path, run: Run, order: str, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights have the teacher's mass as their mean; whoever resumes reads the order and draws the same ids."""
    kind = {"k": K, "targets": "varopt", "fields": "lean", "order": order, "sampling": sampling}
    targets, stored = cache_logits(cache, "v", teacher, **kind)
    made = targets.sampling_order()
    assert (made is None) == (order == "ids")
    before = contents(cache, "v")
    receipts = sorted((cache / "teachers/v/receipts").glob("0*.json"))
    for path in (receipts[-1], cache / "teachers/v/receipts/index.json"):
        path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(HuggingFaceTeacher, "output_embeddings", pytest.fail)  # an order that is stored is read
        again, _ = cache_logits(cache, "v", teacher, **kind)
    assert contents(cache, "v") == before
    assert np.array_equal(again.sampling_order(), made) if made is not None else again.sampling_order() is None
    dense = dense_logprobs(teacher, LogitCache.open(str(cache)).tokens.read(0, len(stored)), 64, 64).double().numpy()
    share = np.exp(dense)
    weighed = weights(share, stored)
    for ids in (np.arange(200), np.arange(1, 400, 2)):
        difference = (weighed * np.isin(stored.token_ids, ids)).sum(1) - share[:, ids].sum(1)
        assert abs(difference.mean()) < 5 * difference.std() / np.sqrt(len(difference)) + 1e-5
    for check in (("verify", cache, "--deep"), ("audit", cache, "--name", "v", "--teacher", teacher)):
        done = run("logit-cache", *check)
        assert done.returncode == 0, done.stderr + done.stdout


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, small_cache: Path, run: Run) -> Path:
    """Rows of ids of which a part is trained on: isolated documents, and targets at some positions. Two ids of one
    document are all that it has."""
    folder, rng = tmp_path_factory.mktemp("chats"), np.random.default_rng(3)
    lengths = [2, *rng.integers(2, 60, 80).tolist()]
    rows = [
        {"input_ids": rng.integers(0, 400, n).tolist(), "loss_mask": [0, *rng.integers(0, 2, n - 2).tolist(), 1]}
        for n in lengths
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        "logit-cache", "tokenize", "--text", folder / "rows.jsonl", "--tokenizer", small_cache, "--out", folder / "c"
    )
    assert done.returncode == 0, done.stderr
    return folder / "c"


@pytest.mark.parametrize("encoding", ["codes", "float32"])
def test_targets_without_ids_are_the_label_s_log_probs(chats: Path, teacher: Path, run: Run, encoding: str) -> None:
    """One array of 2 bytes a position, or 4: where a token follows that is trained on, and nowhere else."""
    options = ("--targets", "none", "--encoding", encoding, "--name", encoding)
    done = run("cache-logits", "--cache", chats, "--teacher", teacher, *options, "--json")
    assert done.returncode == 0, done.stderr
    targets, stored = whole(chats, encoding)
    made = Targets(method="none", k=0, fields=("label",), positions="trained", tail="unknown")
    assert targets.entry.targets == made
    (spec,) = targets.specs.values()
    assert (spec.name, spec.itemsize) == {"codes": ("label_code", 2), "float32": ("label_logprob", 4)}[encoding]
    assert json.loads(done.stdout)["bytes_per_token"] < spec.itemsize + 0.5
    opened = LogitCache.open(str(chats))
    _, full = cache_logits(chats, f"full-{encoding}", teacher, **TOPK)
    trained = opened.loss_mask.read(0, len(stored))
    step = targets.entry.encoding.value_step_nats or 0.0
    assert stored.k == 0
    assert np.array_equal(stored.there, trained)
    np.testing.assert_allclose(stored.label_logprob[trained], full.label_logprob[trained], atol=step / 2 + 1e-5)
    assert np.isnan(stored.label_logprob[~trained]).all()
    known = full.label_logprob[trained].astype(np.float64)
    assert json.loads(done.stdout)["summary"]["cross_entropy"] == pytest.approx(-known.mean(), abs=1e-5)


def test_commands_know_an_entry_without_ids(chats: Path, teacher: Path, tmp_path: Path, run: Run) -> None:
    cache = copy_of(chats, tmp_path / "cache")

    made = ("cache-logits", "--cache", cache, "--teacher", teacher, "--name", "n", "--targets", "none")
    planned = run("logit-cache", "plan", *made[1:], "--json")
    assert set(json.loads(planned.stdout)["size"]["array_bytes"]) == {"label_code"}, planned.stderr
    assert run(*made).returncode == 0
    before = contents(cache, "n")
    again = run(*made)
    assert again.returncode == 0, again.stderr
    assert contents(cache, "n") == before
    assert run("logit-cache", "verify", cache, "--deep").returncode == 0
    shown = run("logit-cache", "inspect", cache).stdout
    assert "no ids, the label alone, at trained positions" in shown
    assert "serves      lightning-opd" in shown
    trained = int(np.flatnonzero(LogitCache.open(str(cache)).loss_mask.read(0, 900))[3])
    assert re.search(
        r"teacher n: no ids stored, next token at -\d", run("logit-cache", "inspect", cache, "--at", trained).stdout
    )
    audited = run("logit-cache", "audit", cache, "--name", "n", "--teacher", teacher, "--windows", 8, "--json")
    assert audited.returncode == 0, audited.stderr
    assert set(json.loads(audited.stdout)["fields"]) == {"label_logprob"}
    alone = run("logit-cache", "audit", cache, "--name", "n")
    assert alone.returncode == 0, alone.stderr
    assert "text: without ids" in alone.stdout
    pushed = run("logit-cache", "push", cache, tmp_path / "there")
    assert pushed.returncode == 0, pushed.stderr
    assert contents(tmp_path / "there", "n") == before
    assert "no ids, the label alone" in (tmp_path / "there" / "README.md").read_text()
    fewer = run("logit-cache", "recompress", cache, "--name", "n", "--to", "fast", "--profile", "fast")
    assert fewer.returncode == 0, fewer.stderr
    np.testing.assert_array_equal(whole(cache, "fast")[1].label_logprob, whole(cache, "n")[1].label_logprob)
    for command, said in (
        (("push", cache, tmp_path / "textless", "--without-tokens"), "log-probs of the text's tokens alone"),
        (("export", cache, "--name", "n", "--format", "parquet", "--out", tmp_path / "out"), "stores no ids"),
        (("recompress", cache, "--name", "n", "--to", "m", "-k", 1), "-k: n holds the log-probs"),
        (("recompress", cache, "--name", "n", "--to", "m", "--fields", "lean"), "of which nothing can be left out"),
    ):
        done = run("logit-cache", *command)
        assert done.returncode == 2
        assert said in done.stderr
    assert not (tmp_path / "textless").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"k": 8}, ("--k", "--targets topk or varopt")),
        ({"seed": 1}, ("--seed", "--targets varopt")),
        ({"step_nats": 0.5}, ("--step-nats", "--targets topk or varopt")),
        ({"fields": ("label", "entropy")}, ("--fields", "label's log-prob alone")),
        ({"fields": "lean"}, ("--fields lean",)),
        ({"format_version": 1}, ("version 2",)),
    ],
    ids=str,
)
def test_options_about_ids_go_with_ids(cache: Path, teacher: Path, fields: dict[str, Any], words: tuple[str]) -> None:
    job = CacheJob(cache="c", teacher=("t",), name="n", targets="none")
    assert CacheJob.model_validate(job.model_dump(mode="json")) == job, "as workers of other engines are given it"
    line = refusal(cache, "n", teacher, targets="none", **fields)
    assert all(word in line for word in words), line


def test_another_kind_of_targets_is_another_job(cache: Path, teacher: Path) -> None:
    cache_logits(cache, "n", teacher, targets="none")
    assert "targets.method" in refusal(cache, "n", teacher, **TOPK)
    cache_logits(cache, "a", teacher, **TOPK)
    assert "targets.method" in refusal(cache, "a", teacher, targets="none")
