"""`cache-logits` as it is installed: the stored targets, resumption, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import Run, refused, succeeded
from support.jobs import contents, files
from support.models.adapters import save_adapter
from support.models.saved import dense_logprobs
from support.models.short_heads import beside
from support.processes import start_code
from transformers import AutoModelForCausalLM

from storage import LogitCache
from storage.cache.verify import verify
from student.models.adapters.attach import merged, with_adapter
from student.models.adapters.files import find_adapter

K = 40
SMALL = ("--targets", "topk", "--context-tokens", 64, "--shard-tokens", 1024, "-k", K)


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (64, 16)])
def test_stored_targets_are_the_model_s(cache: Path, teacher: Path, run: Run, context: int, stride: int) -> None:
    succeeded(run(
        "cache-logits", "--cache", cache, "--teacher", teacher, "--name", "a", "-k", K, "--targets", "topk",
        "--context-tokens", context, "--stride-tokens", stride, "--shard-tokens", 1024, "--encoding", "float32",
        "--fields", "all",
    ))  # fmt: skip
    opened = LogitCache.open(str(cache))
    total = len(opened.tokens)
    tokens = opened.tokens.read(0, total)
    stored = opened.teacher("a").read(0, total)
    dense = dense_logprobs(teacher, tokens, context, stride)
    top = torch.sort(dense, dim=-1, descending=True, stable=True)
    assert np.abs(stored.logprobs - top.values[:, :K].numpy()).max() < 1e-4
    assert (stored.token_ids == top.indices[:, :K].numpy()).mean() > 0.999
    gathered = dense.gather(1, torch.from_numpy(stored.token_ids.astype(np.int64))).numpy()
    assert np.abs(stored.logprobs - gathered).max() < 1e-4
    labels = dense[:-1].gather(1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0].numpy()
    assert np.abs(stored.label_logprob[:-1] - labels).max() < 1e-4
    assert np.isnan(stored.label_logprob[-1])
    mass = np.exp(stored.logprobs.astype(np.float64)).sum(1) + np.exp(stored.log_tail.astype(np.float64))
    assert np.abs(mass - 1).max() < 1e-5
    entropy = -(dense.double().exp() * dense.double()).sum(1).numpy()
    assert np.abs(stored.entropy - entropy).max() < 1e-4


def test_bos_before_each_window(cache: Path, teacher: Path, run: Run, tmp_path: Path) -> None:
    windows = ("--context-tokens", 64, "--stride-tokens", 32, "--bos-each-window")
    line = ("--cache", cache, "--teacher", teacher, "--name", "a", "-k", K, "--targets", "topk", *windows)
    succeeded(run("cache-logits", *line, "--shard-tokens", 1024, "--encoding", "float32"))
    opened = LogitCache.open(str(cache))
    stored = opened.teacher("a").read(0, len(opened.tokens))
    dense = dense_logprobs(teacher, opened.tokens.read(0, len(opened.tokens)), 64, 32, begin=(1,))
    gathered = dense.gather(1, torch.from_numpy(stored.token_ids.astype(np.int64))).numpy()
    assert np.abs(stored.logprobs - gathered).max() < 1e-4
    more = ("--name", "twice", "--teacher", teacher, "--combine", "mixture", "--shard-tokens", 1024)
    assert run("cache-logits", *line, *more, "--encoding", "float32").returncode == 0
    both = opened.teacher("twice").read(0, len(opened.tokens))
    assert np.abs(np.take_along_axis(dense.numpy(), both.token_ids.astype(np.int64), 1) - both.logprobs).max() < 1e-4
    assert verify(str(cache), deep=True).problems == []
    assert run("logit-cache", "audit", cache, "--name", "a", "--teacher", teacher).returncode == 0
    assert "each begun with BOS" in run("logit-cache", "inspect", cache).stdout
    student = ("train-student", "--cache", cache, "--teacher", "a", "--model", "llama-tiny", "--window-tokens", 64)
    options = ("--set", "max_steps=2", "--output-dir", tmp_path / "out")
    refused(run(*student, *options, "--no-bos-each-window"), "leave the choice out")
    refused(
        run("logit-cache", "evaluate", teacher, "--cache", cache, "--teacher", "a", "--no-bos-each-window"), "id 1 of"
    )
    succeeded(run(*student, *options))
    short = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 64}
    short |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "short.json").write_text(json.dumps(short))
    plan = ("logit-cache", "plan", "--cache", cache, "--teacher", teacher, "-k", K, *windows, "--student")
    assert run(*plan, "llama-tiny").returncode == 0
    for refusing in (
        (*plan, tmp_path / "short.json"),
        (*student, "--model", tmp_path / "short.json", *options[:-1], tmp_path / "no"),
    ):
        refused(run(*refusing), "64 positions, fewer than the 65 tokens of a window")
    long = run("cache-logits", "--cache", cache, "--teacher", teacher, "--name", "b", *windows, "--context-tokens", 128)
    refused(long, "the context is 128 and BOS before it: take a context of 127")


def test_a_finished_entry_is_left_as_it_is(cache: Path, teacher: Path, run: Run) -> None:
    arguments = ("cache-logits", "--cache", cache, "--teacher", teacher, "--name", "a", *SMALL)
    assert run(*arguments).returncode == 0
    before = files(cache)
    again = run(*arguments, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["complete"]
    assert files(cache) == before


def test_the_batch_size_of_an_entry_is_kept(cache: Path, teacher: Path, run: Run) -> None:
    arguments = ("cache-logits", "--cache", cache, "--teacher", teacher, "--name", "a", *SMALL)
    assert run(*arguments, "--batch-windows", 3, "--worker", "0/2", "--no-help-others").returncode == 0
    succeeded(run(*arguments))
    targets = LogitCache.open(str(cache)).teacher("a")
    assert (targets.missing(), targets.entry.execution.batch_windows) == ([], 3)
    refused(run(*arguments, "--batch-windows", 4), "batch_windows")


def test_shards_are_small_by_default_and_those_of_an_entry_are_kept(cache: Path, teacher: Path, run: Run) -> None:
    """A small corpus has shards of a chunk, whose loss costs seconds; one that was begun in larger ones resumes."""
    job = ("cache-logits", "--cache", cache, "--teacher", teacher, "-k", 4, "--context-tokens", 64)
    assert run(*job, "--name", "new").returncode == 0
    layout = LogitCache.open(str(cache)).teacher("new").entry.layout
    assert layout.shard == layout.chunk == 8_192
    assert run(*job, "--name", "old", "--shard-tokens", 65_536, "--chunk-tokens", 8_192).returncode == 0
    before = files(cache)
    for name in ("index.json", "00000000.json"):
        (cache / "teachers/old/receipts" / name).unlink()
    (cache / "teachers/old/ids/c/0/0").unlink()
    succeeded(run(*job, "--name", "old"))
    assert contents(cache, "old") == {
        key.removeprefix("teachers/old/"): data
        for key, data in before.items()
        if key.startswith("teachers/old/") and "/receipts/" not in key
    }


@pytest.mark.parametrize(
    ("made", "others"),
    [
        (
            ("--format-version", 1),
            [(("--fields", "lean"), "format_version"), (("--format-version", 2), "format_version")],
        ),
        (
            ("--fields", "all", "--sampled-step-nats", 0.25, "--sampling", "pivotal"),
            [(("--fields", "lean"), "targets.fields"), (("--sampling", "systematic"), "targets.sampling"),
             (("--targets", "topk"), "targets.method"), (("--target-temperature", 2), "targets.temperature")],
        ),
        (("--fields", "lean", "--order", "embeddings"), [(("--order", "ids"), "targets.order")]),
        (("--sample-size", "fixed"), [(("--sample-size", "threshold"), "targets.sample_size")]),
    ],
    ids=["version 1", "all fields", "an order", "a fixed size"],
)  # fmt: skip
def test_what_an_entry_has_holds_where_nothing_is_said(
    made: tuple[object, ...], others: list[tuple[tuple[object, ...], str]], cache: Path, teacher: Path, run: Run
) -> None:
    size = ("-k", 16, "--context-tokens", 64, "--shard-tokens", 512, "--fidelity-positions", 0)
    job = ("cache-logits", "--cache", cache, "--teacher", teacher, "--name", "a", *size)
    assert run(*job, *made, "--worker", "0/2", "--no-help-others").returncode == 0
    record = (cache / "teachers/a/zarr.json").read_bytes()
    for options, field in others:
        refused(run(*job, *options), field)
    assert run(*job).returncode == 0
    assert (cache / "teachers/a/zarr.json").read_bytes() == record
    assert LogitCache.open(str(cache)).teacher("a").missing() == []


def test_another_identity_under_the_same_name(
    cache: Path, teacher: Path, make_teacher: Callable[..., Path], run: Run
) -> None:
    base = ("cache-logits", "--cache", cache, "--name", "a", "--shard-tokens", 1024)
    assert run(*base, "--teacher", teacher, "-k", K, "--context-tokens", 64).returncode == 0
    before = files(cache)
    cases = [
        (("--teacher", make_teacher(1), "-k", K, "--context-tokens", 64), "weights_sha256"),
        (("--teacher", teacher, "-k", 8, "--context-tokens", 64), "targets.k: the cache has 40, this job has 8"),
        (("--teacher", teacher, "-k", K, "--context-tokens", 128), "windowing.context_tokens"),
        (("--teacher", teacher, "-k", K, "--context-tokens", 64, "--stride-tokens", 32), "windowing.stride_tokens"),
        (("--teacher", teacher, "-k", K, "--context-tokens", 64, "--encoding", "float32"), "encoding.kind"),
        (("--teacher", teacher, "-k", K, "--context-tokens", 64, "--isolate-documents"), "isolate_documents"),
    ]
    for arguments, field in cases:
        refused(run(*base, *arguments), field, "--name")
    assert files(cache) == before


def test_an_adapter_as_a_teacher(cache: Path, teacher: Path, run: Run, tmp_path: Path) -> None:
    """The targets of base and adapter; another adapter on the same base is another teacher."""
    one, other = (save_adapter(tmp_path / f"adapter-{seed}", teacher, seed=seed) for seed in (0, 1))
    base = ("cache-logits", "--cache", cache, *SMALL, "--encoding", "float32")
    succeeded(run(*base, "--teacher", one, "--name", "adapted"))
    before = files(cache)
    refused(run(*base, "--teacher", other, "--name", "adapted"), "teacher.members.0.adapter_sha256", "--name")
    refused(run(*base, "--teacher", teacher, "--name", "adapted"), "teacher.members.0.adapter", "--name")
    assert files(cache) == before
    whole = tmp_path / "whole"
    model = with_adapter(AutoModelForCausalLM.from_pretrained(teacher), find_adapter(one), trained=False)
    merged(model, "").save_pretrained(whole)
    succeeded(run(*base, "--teacher", whole, "--name", "merged"))
    opened = LogitCache.open(str(cache))
    stored = [opened.teacher(name).read(0, len(opened.tokens)) for name in ("adapted", "merged")]
    for field in ("token_ids", "logprobs", "log_tail"):
        np.testing.assert_array_equal(getattr(stored[0], field), getattr(stored[1], field))
    assert f"{teacher.name} with adapter-0" in run("logit-cache", "inspect", cache).stdout
    audit = ("logit-cache", "audit", cache, "--name", "adapted", "--windows", 2)
    succeeded(run(*audit, "--teacher", one))
    assert "adapter_sha256" in run(*audit, "--teacher", other).stdout


def wrong_inputs(cache: Path, teacher: Path, make: Callable[..., Path], tmp: Path) -> dict[str, tuple[tuple, tuple]]:
    broken = Path(shutil.copytree(teacher, tmp / "broken"))
    (broken / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:5000])
    no_config = tmp / "no-config"
    no_config.mkdir()
    base = ("--cache", cache, "--teacher", teacher, "--name", "a")
    return {
        "no cache": (("--cache", tmp / "nowhere", "--teacher", teacher, "--name", "a"), ("nowhere", "tokenize")),
        "no teacher": (("--cache", cache, "--teacher", tmp / "none", "--name", "a"), ("none",)),
        "an empty model folder": (("--cache", cache, "--teacher", no_config, "--name", "a"), ("no-config",)),
        "cut weights": (("--cache", cache, "--teacher", broken, "--name", "a", *SMALL), ("broken",)),
        "a head too small": (
            ("--cache", cache, "--teacher", make(2, vocabulary_size=399), "--name", "a", *SMALL),
            ("399", "400"),
        ),
        "k above V": ((*base, "-k", 401), ("401", "400")),
        "k of zero": ((*base, "-k", 0), ("--k", "1")),
        "stride above context": ((*base, "--context-tokens", 32, "--stride-tokens", 64), ("64", "32")),
        "context above the model's": ((*base, "--context-tokens", 256), ("256", "128")),
        "a bad name": (("--cache", cache, "--teacher", teacher, "--name", "../a"), ("--name",)),
        "an unknown dtype": ((*base, "--dtype", "float8"), ("--dtype", "float32")),
        "an unknown device": ((*base, "--device", "abacus"), ("abacus",)),
        "a missing option": (("--cache", cache, "--name", "a"), ("--teacher",)),
        "no such config": ((*base, "--config", tmp / "job.yaml"), ("job.yaml",)),
        "a shard that does not divide": ((*base, "--shard-tokens", 1000), ("1000", "128")),
        "a bad worker": ((*base, "--worker", "2/2"), ("--worker", "0/4")),
        "a worker that is no number": ((*base, "--worker", "²/3"), ("--worker", "0/4")),
        "text without out": (("--text", "x.txt", "--teacher", teacher, "--name", "a"), ("--out",)),
    }


def test_wrong_input_is_one_line_and_changes_nothing(
    cache: Path, teacher: Path, make_teacher: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    before = files(cache)
    for case, (arguments, words) in wrong_inputs(cache, teacher, make_teacher, tmp_path).items():
        done = run("cache-logits", *arguments)
        assert done.returncode == 2, f"{case}: {done.stdout}{done.stderr}"
        refused(done, *words)
        assert files(cache) == before, case


def test_yaml_job_with_flags_that_override_it(cache: Path, teacher: Path, run: Run, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"cache: {cache}\nteacher: {teacher}\nname: a\nk: 8\ncontext-tokens: 64\nshard_tokens: 1024\n")
    done = succeeded(run("cache-logits", "--config", job, "-k", 16, "--json"))
    found = json.loads(done.stdout)
    assert (found["targets"]["k"], found["windowing"]["context_tokens"]) == (16, 64)
    job.write_text(job.read_text() + "contxt_tokens: 5\n")
    refused(run("cache-logits", "--config", job), "contxt_tokens", "context_tokens")


def test_from_raw_text_in_one_step(teacher: Path, cache: Path, text_file: Path, run: Run, tmp_path: Path) -> None:
    with_tokenizer = beside(teacher, cache / "tokenizer", tmp_path / "complete")
    out = tmp_path / "one-step"
    succeeded(
        run("cache-logits", "--text", text_file, "--out", out, "--teacher", with_tokenizer, "--name", "a", *SMALL)
    )
    opened = LogitCache.open(str(out))
    assert opened.teacher("a").missing() == []
    assert np.array_equal(opened.tokens.read(0, 500), LogitCache.open(str(cache)).tokens.read(0, 500))

    job = tmp_path / "job.yaml"
    job.write_text(
        f"text: [{text_file}]\nout: {tmp_path / 'yaml'}\nteacher: {with_tokenizer}\nname: a\nk: {K}\n"
        f"targets: topk\ncontext_tokens: 64\nshard_tokens: 1024\n"
    )
    succeeded(run("cache-logits", "--config", job))
    assert contents(tmp_path / "yaml", "a") == contents(out, "a")


def test_a_wrong_teacher_leaves_no_stream_behind(cache: Path, text_file: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for teacher in (tmp_path / "none", cache):
        refused(
            run("cache-logits", "--text", text_file, "--out", out, "--teacher", teacher, "--name", "a",
                "--tokenizer", cache / "tokenizer"),
            teacher.name,
        )  # fmt: skip
        assert not out.exists()
    refused(run("cache-logits", "--tokenizer", cache, "--cache", cache, "--teacher", cache, "--name", "a"), "--text")


# No file may grow beyond 16 kB: the kernel's answer to a full quota.
IN_LITTLE_SPACE = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))
from logit_cache.cli.main import cache_logits
cache_logits()
"""


def test_a_full_disk(cache: Path, teacher: Path, run: Run) -> None:
    """The run ends cleanly, and can be resumed."""
    arguments = ("--cache", cache, "--teacher", teacher, "--name", "a", *SMALL)
    refused(start_code(IN_LITTLE_SPACE, *arguments).end(), "no space left")
    assert not list(cache.rglob("*.partial"))
    assert not list((cache / "teachers/a/receipts").glob("*")) if (cache / "teachers/a/receipts").exists() else True
    succeeded(run("cache-logits", *arguments))
    assert LogitCache.open(str(cache)).teacher("a").missing() == []


def test_inspect(cache: Path, teacher: Path, run: Run) -> None:
    line = ("--cache", cache, "--teacher", teacher, "--name", "a", *SMALL, "--fields", "all")
    assert run("cache-logits", *line).returncode == 0
    found = json.loads(run("logit-cache", "inspect", cache, "--json").stdout)
    opened = LogitCache.open(str(cache))
    total = len(opened.tokens)
    read = opened.teacher("a").read(0, total)
    entry = found["teachers"]["a"]
    assert entry["positions_cached"] == total == found["corpus"]["tokens"]
    stored = sum(p.stat().st_size for p in (cache / "teachers/a").rglob("c/**/*") if p.is_file())
    assert entry["stored_bytes"] == stored
    assert entry["bytes_per_token"] == pytest.approx(stored / total)
    loss = -np.nanmean(read.label_logprob.astype(np.float64))
    assert entry["summary"]["cross_entropy"] == pytest.approx(loss, rel=1e-3)
    assert entry["summary"]["perplexity"] == pytest.approx(np.exp(loss), rel=1e-2)
    shown = run("logit-cache", "inspect", cache).stdout
    assert "gpt2-0" in shown
    assert "complete" in shown

    at = json.loads(run("logit-cache", "inspect", cache, "--at", 500, "--json").stdout)
    assert at["next"]["id"] == int(opened.tokens.read(501, 502)[0])
    assert [item["id"] for item in at["teachers"]["a"]["top"]] == read.token_ids[500, :10].tolist()
    assert at["teachers"]["a"]["certain_mass"] == pytest.approx(np.exp(read.logprobs[500]).sum(), rel=1e-5)
    text = run("logit-cache", "inspect", cache, "--at", 500).stdout
    assert repr(at["next"]["text"]) in text
    refused(run("logit-cache", "inspect", cache, "--at", total), "--at")
    refused(run("logit-cache", "inspect", cache / "nowhere"), "no cache there")
