"""`logit-cache plan` against the real `cache-logits`: bytes, file counts, refusals; and it writes nothing.

No test looks at how long anything takes: docs/planning.md has the figures of processor time that were measured by hand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.caches.small import make_corpus
from support.commands import LIBRARY, Run, refused, succeeded
from support.jobs import cache_logits, refusal
from support.jobs import files as stored
from torch import Tensor

from logit_cache.caching import step_cost
from logit_cache.caching.forecast import Question, forecast
from logit_cache.caching.job import CacheJob
from storage import LogitCache
from storage.config import build_config
from storage.errors import LogitCacheError
from storage.format.manifest.receipts import ReceiptIndex
from storage.format.sealing import sealed_bytes
from storage.progress import progress
from teachers.huggingface.teacher import HuggingFaceTeacher

# Some hundred thousand tokens in documents, of which a probe scores a quarter or less.
MODULES = ("argparse", "ast", "difflib", "enum", "shutil")
JOBS: dict[str, dict[str, Any]] = {
    "sampled": {"k": 24, "fields": ("all",)},
    "lean": {"k": 24, "fields": ("lean",)},
    "version-1": {"k": 24, "format_version": 1},
    "cut": {
        "targets": "topk", "k": 32, "top_p": 0.9, "profile": "fast", "chunk_tokens": 1024, "shard_tokens": 8192,
        "fields": ("entropy", "label"),
    },
    "trained": {"k": 24, "fields": ("lean",), "positions": "trained"},
    "isolated": {"k": 8, "encoding": "float32", "isolate_documents": True, "stride_tokens": 32, "batch_windows": 48},
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join((LIBRARY / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
    (folder / "library.txt").write_text(text, encoding="utf-8")
    succeeded(run(
        "logit-cache", "tokenize", "--text", folder / "library.txt", "--train-tokenizer", 400,
        "--document-separator", r"\n\n\n", "--out", folder / "cache",
    ))  # fmt: skip
    return folder / "cache"


def predicted(cache: Path, *teachers: Path, question: Question | None = None, **fields: Any) -> dict[str, Any]:
    given = {"cache": str(cache), "name": "x", "teacher": [str(teacher) for teacher in teachers]}
    job = build_config(CacheJob, {**given, "context_tokens": 64, **fields}, {}, "cache-logits")
    return forecast(job, question or Question(), progress)


@pytest.fixture(scope="module")
def masked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text, of which the middle half is trained, more and more densely."""
    tokens = LogitCache.open(str(corpus)).tokens
    at = np.arange(len(tokens)) / len(tokens)
    mask = (np.random.default_rng(0).random(len(tokens)) < at) & (abs(at - 0.5) < 0.25)
    path = tmp_path_factory.mktemp("masked") / "cache"
    make_corpus(str(path), tokens.read(0, len(tokens)), 400, loss_mask=mask)
    return path


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("lean", "isolated")]


@pytest.mark.parametrize("name", ["sampled", "version-1", "cut", "trained", *SLOW])
def test_bytes_and_files_are_those_of_the_real_job(
    name: str, corpus: Path, masked: Path, teacher: Path, tmp_path: Path
) -> None:
    source = masked if name == "trained" else corpus
    found = predicted(source, teacher, **JOBS[name])
    assert found["probe"]["positions"] < 0.4 * found["tokens"]
    path = Path(shutil.copytree(source, tmp_path / "cache"))
    targets, rows = cache_logits(path, "x", teacher, **JOBS[name])
    assert found["size"]["positions_with_targets"] == np.count_nonzero(rows.kept)
    files = {key: len(data) for key, data in stored(path / "teachers/x").items()}
    size = found["size"]
    assert size["bytes"] == pytest.approx(sum(files.values()), rel=0.05)
    assert size["bytes_per_token"] == pytest.approx(sum(files.values()) / len(targets), rel=0.05)
    objects = {key: length for key, length in files.items() if "/c/" in key}
    for array, length in size["array_bytes"].items():
        real = sum(size for key, size in objects.items() if key.startswith(array + "/"))
        # Of the small arrays, a position with nothing to say compresses to nothing, and there are few such.
        assert length == pytest.approx(real, rel=0.05, abs=0.005 * size["bytes"]), array
    assert (size["files"], size["objects"]) == (len(files), len(objects))
    assert size["shards"] == size["receipts"] == targets.receipts.shards
    assert size["receipts_bytes"] == pytest.approx(
        sum(length for key, length in files.items() if key.startswith("receipts/0")), rel=0.03
    )
    assert size["index_bytes"] == pytest.approx(files["receipts/index.json"], abs=100)
    assert size["largest_object_bytes"] == pytest.approx(max(objects.values()), rel=0.1)
    assert max(objects.values()) <= size["largest_object_bound_bytes"]
    assert found["entry"]["layout"] == targets.entry.layout.model_dump()
    assert found["entry"]["execution"] == targets.entry.execution.model_dump(mode="json")


def test_by_command_with_a_student_and_nothing_is_written(
    corpus: Path, teacher: Path, make_teacher: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    other = make_teacher(1)
    (tmp_path / "here").mkdir()
    student = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    (tmp_path / "student.json").write_text(json.dumps({**student, "num_attention_heads": 2}))
    (tmp_path / "job.yaml").write_text("k: 99\ncontext-tokens: 64\ncombine: logit-mean\n")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [corpus, *corpus.rglob("*")]}
    arguments = (
        "logit-cache", "plan", "--cache", corpus, "--teacher", teacher, "--teacher", other, "-k", 16,
        "--config", tmp_path / "job.yaml", "--runs", 3, "--epochs", 2, "--workers", 4, "--probe-windows", 160,
    )  # fmt: skip
    done = succeeded(run(*arguments, "--student", tmp_path / "student.json", "--json", cwd=tmp_path / "here"))
    found = json.loads(done.stdout)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [corpus, *corpus.rglob("*")]} == before
    assert list((tmp_path / "here").iterdir()) == []

    assert found["probe"]["windows"] == 128  # whole chunks of them
    assert found["entry"]["targets"]["k"] == 16
    speed, time, paid = found["speed"], found["time"], found["break_even"]
    assert time["hours"] == pytest.approx(found["tokens"] / speed["positions_per_second"] / 3600 / 4)
    assert paid["student"]["live"] > 0
    assert paid["student"]["cached"] > 0
    hours = found["tokens"] / 3600
    cached = paid["student"]["cached"] + paid["reading_cpu_seconds_per_token"]
    assert paid["caching_hours"] == pytest.approx(speed["paid_seconds_per_token"] * hours)
    assert paid["cached_hours"] == pytest.approx(paid["caching_hours"] + 6 * cached * hours)
    assert paid["live_hours"] == pytest.approx(6 * paid["student"]["live"] * hours)
    if paid["student"]["live"] > cached:
        assert paid["epochs_until_paid"] == pytest.approx(
            speed["paid_seconds_per_token"] / (paid["student"]["live"] - cached)
        )
    else:
        assert paid["epochs_until_paid"] is None
    assert found["memory"]["process_bytes"] > 50 << 20

    text = succeeded(run(*arguments, cwd=tmp_path / "here"))
    assert "the teachers' share alone" in text.stdout
    assert "is not compared (--student does)" in text.stdout
    assert f"{found['tokens']:,} tokens" in text.stdout
    assert f"{found['size']['objects']:,} objects and {found['size']['receipts']:,} receipts" in text.stdout


def test_a_corpus_that_is_not_tokenised_yet(corpus: Path, teacher: Path) -> None:
    fields = ("entropy", "half-tail", "label", "sampled-logprobs")
    found = predicted(corpus, teacher, k=16, fields=fields, question=Question(tokens=100_000_000_000, probe_windows=64))
    here = predicted(corpus, teacher, k=16, fields=fields, question=Question(probe_windows=64))
    size = found["size"]
    assert found["tokens"] == 100_000_000_000
    assert found["tokens_in_the_cache"] == here["tokens"]
    assert found["entry"]["layout"]["shard"] == 65_536
    assert (size["shards"], size["receipts"], size["objects"]) == (1_525_879, 1_525_879, 9 * 1_525_879)
    assert size["bytes_per_token"] == pytest.approx(here["size"]["bytes_per_token"], rel=0.02)
    assert found["opening"]["listing_requests_while_incomplete"] == 1_526
    index = ReceiptIndex(record_sha256="0" * 64, receipts=("0" * 64,) * 1_525_879, object_bytes=10**12)
    assert size["index_bytes"] == pytest.approx(len(sealed_bytes(index)), abs=1_000)
    # A digest takes 113 bytes as a string and some more on its way.
    assert found["opening"]["memory_bytes"] > 113 * 1_525_879
    assert found["time"]["hours"] == pytest.approx(1e11 / found["speed"]["positions_per_second"] / 3600)
    with pytest.raises(LogitCacheError, match=r"--tokens 1000000000000: .* more than 2097152 shards: give larger"):
        predicted(corpus, teacher, question=Question(tokens=10**12))


def test_fewer_windows_than_a_chunk_has(corpus: Path, teacher: Path) -> None:
    found = predicted(corpus, teacher, k=16, fields=("lean",), question=Question(probe_windows=10))
    assert (found["probe"]["windows"], found["probe"]["pieces"]) == (8, 4)
    whole = predicted(corpus, teacher, k=16, fields=("lean",))
    assert found["size"]["bytes"] == pytest.approx(whole["size"]["bytes"], rel=0.2)
    # One position more than a single window.
    assert predicted(corpus, teacher, k=16, question=Question(probe_windows=1))["probe"]["positions"] == 64


@pytest.mark.parametrize("most", [1, 8, 100])
def test_no_more_windows_are_scored_than_asked_where_each_document_has_its_own(
    most: int, corpus: Path, teacher: Path
) -> None:
    found = predicted(corpus, teacher, k=4, isolate_documents=True, question=Question(probe_windows=most))
    assert most / 4 < found["probe"]["windows"] <= most


@pytest.mark.parametrize("isolate_documents", [False, True])
def test_caching_and_the_live_step_read_the_same_kind_of_windows(
    isolate_documents: bool, corpus: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts the tokens which the teacher reads, one pass over the text pays for the cache."""
    score, read = HuggingFaceTeacher.score, 0

    def counting(
        self: HuggingFaceTeacher, windows: Tensor, rows: Tensor, positions: Tensor | None = None
    ) -> Iterator[Tensor]:
        nonlocal read
        read += windows.numel()
        return score(self, windows, rows, positions)

    def clock() -> float:
        return float(read)

    monkeypatch.setattr(HuggingFaceTeacher, "score", counting)
    monkeypatch.setattr(step_cost, "time", SimpleNamespace(perf_counter=clock, process_time=clock))
    found = predicted(corpus, teacher, k=4, context_tokens=128, isolate_documents=isolate_documents)
    read_per_position = found["speed"]["paid_seconds_per_token"]
    assert read_per_position < 1.25, "short documents share rows"
    assert found["break_even"]["epochs_until_paid"] == pytest.approx(1.0, rel=0.25)


def test_it_refuses_the_jobs_that_cache_logits_would_refuse(
    corpus: Path, teacher: Path, make_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(corpus, tmp_path / "cache"))
    narrow = make_teacher(vocabulary_size=300)

    def refused_alike(*teachers: Path, named: bool = False, **fields: Any) -> None:
        reason = refusal(path, "x", *teachers, **fields)
        with pytest.raises(LogitCacheError) as caught:
            predicted(path, *teachers, question=Question(named=named), **fields)
        assert str(caught.value) == reason

    refused_alike(narrow)
    refused_alike(teacher, narrow, combine="mixture")
    for fields in ({"k": 401}, {"context_tokens": 256}, {"shard_tokens": 1000}, {"top_p": 0.5, "seed": 3}):
        refused_alike(teacher, **fields)
    assert not (path / "teachers/x").exists()
    cache_logits(path, "x", teacher, k=4, shard_tokens=65_536)
    refused_alike(teacher, named=True, k=5, shard_tokens=65_536)


@pytest.mark.parametrize("fields", [{}, {"targets": "topk"}, {"target_temperature": 2}, {"positions": "trained"}])
def test_a_student_of_lean_targets(fields: dict[str, Any], masked: Path, teacher: Path) -> None:
    question = Question(student="llama-tiny", probe_windows=16)
    found = predicted(masked, teacher, k=8, fields=("lean",), question=question, **fields)
    assert found["break_even"]["student"]["cached"] > 0


def test_without_a_trained_position_there_is_nothing_to_plan(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    tokens = LogitCache.open(str(corpus)).tokens.read(0, 9_000)
    make_corpus(str(tmp_path / "none"), tokens, 400, loss_mask=np.zeros(9_000, dtype=bool))
    with pytest.raises(LogitCacheError, match="no position of the stream is trained"):
        predicted(tmp_path / "none", teacher, k=8, fields=("lean",), positions="trained")


def test_refusals_of_the_command(corpus: Path, teacher: Path, run: Run, tmp_path: Path) -> None:
    base = ("logit-cache", "plan", "--cache", corpus)
    refused(run(*base), "--teacher is missing")
    refused(run(*base, "--teacher", teacher, "--stride-tokens", 200), "--stride-tokens 200 is larger")
    (tmp_path / "job.yaml").write_text("kk: 3\n")
    refused(run(*base, "--teacher", teacher, "--config", tmp_path / "job.yaml"), "no field 'kk'")
    refused(run("logit-cache", "plan", "--cache", tmp_path, "--teacher", teacher), "no cache there")
    student = run(*base, "--teacher", teacher, "--student", "llama-tyny", "--probe-windows", 4)
    refused(student, "llama-tyny", "did you mean 'llama-tiny'")
