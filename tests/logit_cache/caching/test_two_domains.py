"""Two teachers, two sources, one student, by the commands: each document reads its own teacher, and is so reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.caches.streams import write
from support.commands import Run, refused
from support.models.saved import dense_logprobs
from transformers import AutoModelForCausalLM

from storage import LogitCache
from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member

V, CONTEXT, WINDOW = 400, 64, 32


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, text_file: Path, small_cache: Path, run: Run) -> Path:
    """A cache of texts of two sources and of one that nobody teaches."""
    folder = tmp_path_factory.mktemp("domains")
    text = text_file.read_text(encoding="utf-8")
    parts = {"math": text[:5_000], "code": text[12_000:17_000], "web": text[30_000:31_000]}
    inputs = [("--text", f"{name}={write(folder / f'{name}.txt', part)}") for name, part in parts.items()]
    done = run(
        "logit-cache", "tokenize", *(word for pair in inputs for word in pair), "--document-separator", "\\n\\n",
        "--tokenizer", small_cache / "tokenizer", "--out", folder / "cache",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "cache"


def source_of_positions(cache: LogitCache) -> np.ndarray:
    """The name of each position's source, by the arrays alone."""
    assert cache.document_sources is not None
    starts, names = cache.document_starts.astype(np.int64), [s.name for s in cache.record.corpus.sources]
    lengths = np.diff(np.append(starts, len(cache.tokens)))
    return np.repeat([names[number] for number in cache.document_sources], lengths)


def test_each_document_is_learnt_from_its_own_teacher(
    both: Path, teacher: Path, make_teacher: object, run: Run, tmp_path: Path
) -> None:
    models = {"math": teacher, "code": make_teacher(7)}  # type: ignore[operator]
    for name, model in models.items():
        done = run(
            "cache-logits", "--cache", both, "--teacher", model, "--name", name, "--sources", name, "-k", V,
            "--targets", "topk", "--encoding", "float32", "--context-tokens", CONTEXT, "--fidelity-positions", 0,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    cache = LogitCache.open(str(both))
    source, n = source_of_positions(cache), len(cache.tokens)
    for name in models:
        assert np.array_equal(cache.teacher(name).read(0, n).kept > 0, source == name)

    out = tmp_path / "student"
    line = ("train-student", "--cache", both, "--model", "llama-tiny", "--window-tokens", WINDOW, "--alpha", 0)
    done = run(
        *line, "--teacher", "math:3@source=math", "--teacher", "code@source=code", "--output-dir", out,
        "--loss", "forward-kl", "--set", "max_steps=3", "--set", "logging_steps=1", "--windows-per-step", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no teacher teaches the documents of 'web': nothing is learnt there, as alpha is 0" in done.stderr
    report = json.loads((out / "report.json").read_text())
    assert [(each["name"], each["sources"]) for each in report["job"]["teachers"]] == [
        ("math", ["math"]), ("code", ["code"])
    ]  # fmt: skip
    taught = report["tokens_taught"]
    assert min(taught.values()) > 0
    assert sum(taught.values()) < report["tokens_trained"]
    printed = " ".join(done.stdout.split())
    for name in models:
        assert f"taught by {name} {taught[name]:,} positions in documents of {name}" in printed

    windows = DistillationWindows(both, ["math", "code"], WINDOW, sources={name: [name] for name in models})
    members = [
        Member.of(name, windows.entries[name], weight, [name]) for name, weight in (("math", 3.0), ("code", 1.0))
    ]
    loss = DistillationLoss(windows.vocabulary_size, alpha=0.25, temperature=1.0, members=members)
    edges = np.flatnonzero(source[1:] != source[:-1]) + 1
    chosen = sorted({int(edge) // WINDOW for edge in edges} | {0, len(windows) // 3})
    batch = collate([windows[index] for index in chosen])
    student = AutoModelForCausalLM.from_pretrained(out).double().eval()
    z = student(batch["input_ids"]).logits.flatten(0, 1).detach()
    labels = batch["labels"].flatten()
    found = loss(z, labels, batch["targets"])

    tokens, log_q = cache.tokens.read(0, n), torch.log_softmax(z, 1)
    dense = {name: dense_logprobs(model, tokens, CONTEXT, CONTEXT).double() for name, model in models.items()}
    position = np.concatenate([np.arange(WINDOW) + index * WINDOW for index in chosen])
    expected, counts = torch.zeros((), dtype=torch.float64), dict.fromkeys(models, 0)
    for row, at in enumerate(position.tolist()):
        if labels[row] == -100:
            continue
        expected += 0.25 * -log_q[row, labels[row]]
        own = str(source[at])
        if own in models:
            log_p = dense[own][at]
            expected += 0.75 * (log_p.exp() * (log_p - log_q[row])).sum()
            counts[own] += 1
    assert min(counts.values()) > 0
    assert sum(counts.values()) < int((labels != -100).sum())
    assert float(found.loss_sum) == pytest.approx(float(expected), rel=1e-5)
    assert {name: int(value) for name, value in found.taught.items()} == counts

    page = run("logit-cache", "report", out, "-o", tmp_path / "page.html")
    assert page.returncode == 0, page.stderr
    shown = re.sub(r"<[^>]*>", " ", (tmp_path / "page.html").read_text(encoding="utf-8"))
    for name, weight in (("math", "3.00"), ("code", "1.00")):
        assert f"{name} {weight} {name} {taught[name]:,}" in " ".join(shown.split())
    refused(
        run(*line, "--teacher", "math@source=news", "--output-dir", tmp_path / "x"),
        "no document is from the source 'news'",
    )
    refused(run(*line, "--teacher", "math@source=code", "--output-dir", tmp_path / "x"), "has targets of 'math' alone")
    again = ("--teacher", "math@source=math", "--teacher", "math@source=code")
    refused(run(*line, *again, "--output-dir", tmp_path / "x"), "each teacher may be named once")
    twice = ("--teacher", "math@source=math@source=math", "--output-dir", tmp_path / "x")
    refused(run(*line, *twice), "name each source once")
    assert not (tmp_path / "x").exists()
