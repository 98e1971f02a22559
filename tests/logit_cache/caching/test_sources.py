"""Entries of the documents of some sources: which rows have targets, what is scored, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.small import make_corpus
from support.commands import Run, refused
from support.jobs import cache_logits, refusal

from logit_cache.caching.forecast import Question, forecast
from logit_cache.caching.job import CacheJob
from logit_cache.caching.recompress import RecompressJob, recompress
from logit_cache.fidelity.audit import AuditJob, audit
from storage import LogitCache
from storage.errors import IdentityMismatch
from storage.progress import untracked
from storage.transfer.copy import CopyJob, prepare
from teachers.huggingface.teacher import HuggingFaceTeacher

N, STARTS = 4_096, np.array([0, 700, 1_500, 1_510, 3_000])
NAMES = ("math", "code", "web", "math", "code")
KIND: dict[str, Any] = {"k": 8, "fields": "all", "shard_tokens": 1_024, "chunk_tokens": 512}
MATH = np.isin(np.searchsorted(STARTS, np.arange(N), side="right") - 1, [0, 3])


@pytest.fixture(scope="module")
def tokens(small_cache: Path) -> np.ndarray:
    return LogitCache.open(str(small_cache)).tokens.read(0, N)


@pytest.fixture
def mixed(tokens: np.ndarray, tmp_path: Path) -> Path:
    """A stream of documents of three sources, half of it trained."""
    mask = np.random.default_rng(3).random(N) < 0.5
    make_corpus(str(tmp_path / "mixed"), tokens, 400, STARTS, loss_mask=mask, document_sources=NAMES)
    return tmp_path / "mixed"


@pytest.mark.parametrize("positions", ["all", "trained"])
@pytest.mark.parametrize("isolated", [False, True])
def test_rows_of_the_sources_are_those_of_an_entry_of_all(
    mixed: Path, teacher: Path, positions: str, isolated: bool
) -> None:
    kind = {**KIND, "isolate_documents": isolated}
    _, everywhere = cache_logits(mixed, "all", teacher, **kind, positions="all")
    targets, found = cache_logits(mixed, "math", teacher, **kind, positions=positions, sources=["math", "math"])
    assert targets.entry.targets.sources == ("math",)
    wanted = MATH & LogitCache.open(str(mixed)).positions(trained=positions == "trained").read(0, N)
    assert np.array_equal(found.kept > 0, wanted)
    # Other windows share a pass, so that the last bits may differ.
    assert (found.token_ids[wanted] == everywhere.token_ids[wanted]).all(1).mean() > 0.99
    np.testing.assert_allclose(found.entropy[wanted], everywhere.entropy[wanted], atol=2e-3)
    statistics, _ = targets.statistics()
    assert statistics is not None
    assert statistics.positions == wanted.sum()


def test_windows_without_a_document_of_the_sources_are_not_scored(
    mixed: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, score = [], HuggingFaceTeacher.score

    def counting(self: HuggingFaceTeacher, *given: Any) -> Any:
        for logits in score(self, *given):
            scored.append(len(logits))
            yield logits

    monkeypatch.setattr(HuggingFaceTeacher, "score", counting)
    cache_logits(mixed, "web", teacher, **KIND, batch_windows=4, positions="all", sources=["web"], fidelity_positions=0)
    assert sum(scored) == 10


def test_what_is_recorded_holds_and_other_sources_are_another_entry(mixed: Path, teacher: Path) -> None:
    cache_logits(mixed, "t", teacher, **KIND, sources=["math", "code"])
    cache_logits(mixed, "t", teacher, **KIND, sources=["code", "math"])
    cache_logits(mixed, "t", teacher, **KIND)
    assert "targets.sources" in refusal(mixed, "t", teacher, **KIND, sources=["math"])
    cache_logits(mixed, "every", teacher, **KIND)
    assert "targets.sources" in refusal(mixed, "every", teacher, **KIND, sources=["math"])


def test_sources_that_are_not_there(
    mixed: Path, cache: Path, teacher: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    found = refusal(mixed, "t", teacher, **KIND, sources=["math", "news"])
    assert found == f"{mixed}: no document is from the source 'news'; there is: 'code', 'math', 'web'"
    make_corpus(str(tmp_path / "old"), tokens, 400, STARTS)
    assert "does not say where its documents are from" in refusal(tmp_path / "old", "t", teacher, sources=["made-up"])
    assert "--sources is of version 2" in refusal(cache, "t", teacher, k=8, sources=["x"], format_version=1)
    assert not (mixed / "teachers" / "t").exists()


def test_everything_that_reads_an_entry_knows_its_sources(mixed: Path, teacher: Path, run: Run, tmp_path: Path) -> None:
    line = ("cache-logits", "--cache", mixed, "--teacher", teacher, "-k", 8, "--context-tokens", 64)
    done = run(*line, "--name", "t", "--sources", "math", "--sources", "web", "--fidelity-positions", 64)
    assert done.returncode == 0, done.stderr
    shown = " ".join(run("logit-cache", "inspect", mixed).stdout.split())
    for words in ("math 2 documents 2,190 tokens", "web 1 document 10 tokens", "in documents of math, web"):
        assert words in shown
    assert run("logit-cache", "verify", mixed, "--deep").returncode == 0
    found = audit(AuditJob(str(mixed), (str(teacher),), windows=8, name="t"))
    assert found.consistent, found.problems
    assert LogitCache.open(str(mixed)).teacher("t").fidelity() is not None
    job = CacheJob(cache=str(mixed), teacher=(str(teacher),), name="u", k=8, context_tokens=64, sources=("math",))
    share = LogitCache.open(str(mixed)).positions(trained=True, sources=["math"]).read(0, N).sum()
    assert forecast(job, Question(), untracked)["size"]["positions_with_targets"] == share
    recompress(RecompressJob(cache=str(mixed), name="t", to="smaller", k=4))
    smaller = LogitCache.open(str(mixed)).teacher("smaller")
    assert smaller.entry.targets.sources == ("math", "web")
    assert (smaller.read(0, N).kept > 0).sum() == LogitCache.open(str(mixed)).teacher("t").statistics()[0].positions
    pushed = run("logit-cache", "push", mixed, tmp_path / "copy")
    assert pushed.returncode == 0, pushed.stderr
    assert run("logit-cache", "verify", tmp_path / "copy", "--deep").returncode == 0
    refused(run(*line, "--name", "x", "--sources", "news"), "no document is from the source 'news'")


@pytest.mark.parametrize("way", ["push", "recompress"])
def test_a_stream_of_other_sources_does_not_get_the_entry(
    mixed: Path, teacher: Path, tokens: np.ndarray, tmp_path: Path, way: str
) -> None:
    cache_logits(mixed, "t", teacher, **KIND, sources=["math"])
    mask, other = LogitCache.open(str(mixed)).loss_mask, str(tmp_path / "other")
    assert mask is not None
    make_corpus(other, tokens, 400, STARTS, loss_mask=mask.read(0, N), document_sources=("math", *NAMES[1:4], "web"))

    def copy() -> None:
        if way == "recompress":
            recompress(RecompressJob(cache=str(mixed), name="t", to="t", out=other, k=4))
        else:
            with prepare(CopyJob(source=str(mixed), target=other)):
                pass

    with pytest.raises(IdentityMismatch, match="sources of documents"):
        copy()
    assert not (Path(other) / "teachers" / "t").exists()
