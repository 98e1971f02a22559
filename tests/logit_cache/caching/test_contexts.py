"""Windows that a job leaves open, and documents that are longer than they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.small import make_corpus
from support.jobs import cache_logits
from support.models.families import families
from support.models.saved import saver

from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import open_job
from logit_cache.fidelity.measure import measure
from storage.cache.verify import verify
from storage.errors import InputError
from student.data.batches import collate
from student.data.windows import DistillationWindows

V = 61
LENGTHS = np.array([5, 30, 9, 50, 17, 40, 3, 20])
STARTS = np.cumsum(LENGTHS) - LENGTHS
PLACE = np.arange(LENGTHS.sum()) - np.repeat(STARTS, LENGTHS)
MASK = PLACE % 3 == 1


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return saver(tmp_path_factory.mktemp("models"), families(V))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "cache"
    tokens = np.random.default_rng(0).integers(2, V, LENGTHS.sum()).astype(np.uint16)
    make_corpus(str(path), tokens, V, document_starts=STARTS, loss_mask=MASK)
    return path


@pytest.fixture
def chats(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


@pytest.mark.parametrize(("positions", "context"), [(64, 50), (32, 32)])
def test_conversations_are_isolated_in_a_context_of_the_longest_that_the_teacher_reads(
    chats: Path, save: Callable[..., Path], positions: int, context: int, caplog: pytest.LogCaptureFixture
) -> None:
    job = {"k": 4, "context_tokens": None, "fidelity_positions": 0}
    entry, stored = cache_logits(chats, "a", save("llama", max_position_embeddings=positions), **job)
    windowing = entry.entry.windowing
    assert (windowing.isolate_documents, windowing.context_tokens, windowing.stride_tokens) == (True, context, context)
    said = "the longest has 50" if context == 50 else "2 longer ones of up to 50 are cut into windows"
    assert f"each of 8 documents is read by itself, in a context of {context} tokens: {said}" in caplog.text
    assert ((stored.kept > 0) == MASK).all()
    caplog.clear()
    # What the entry has holds, and is not said again.
    cache_logits(chats, "a", save("llama", max_position_embeddings=positions), **job)
    assert "read by itself" not in caplog.text


@pytest.mark.parametrize("context", [128, 40])
def test_what_the_job_gives_holds_and_then_what_the_entry_has(
    chats: Path, save: Callable[..., Path], context: int
) -> None:
    teacher = save("llama", max_position_embeddings=128)
    given = {"context_tokens": None if context == 128 else context, "isolate_documents": False}
    for fields in (given, {"context_tokens": None}):
        across, _ = cache_logits(chats, "a", teacher, k=4, **fields)
        windowing = across.entry.windowing
        assert (windowing.isolate_documents, windowing.context_tokens) == (False, context)


@pytest.mark.parametrize("positions", ["trained", "all"])
@pytest.mark.parametrize("how", ["cut", "truncate", "drop"])
def test_documents_longer_than_the_context(
    chats: Path, save: Callable[..., Path], how: str, positions: str, caplog: pytest.LogCaptureFixture
) -> None:
    job: dict[str, Any] = {"k": 4, "context_tokens": 20, "positions": positions}
    entry, stored = cache_logits(chats, "a", save("llama"), long_documents=how, **job)
    some = {"cut": PLACE >= 0, "truncate": PLACE < 20, "drop": np.repeat(LENGTHS <= 20, LENGTHS)}[how]
    wanted = some & MASK if positions == "trained" else some
    assert ((stored.kept > 0) == wanted).all()
    recorded = entry.entry.targets
    assert (recorded.long_documents, recorded.document_tokens) == ((None, None) if how == "cut" else (how, 20))
    said = {"cut": "are cut into windows", "truncate": "have targets at their first 20", "drop": "have no targets"}
    assert f"3 longer ones of up to 50 {said[how]}" in caplog.text
    assert verify(str(chats), deep=True).problems == []
    windows = DistillationWindows(str(chats), ["a"], 16)
    everything = range(len(windows))
    batch = collate(windows.__getitems__(everything))
    taught = (batch["labels"] != -100) & (batch["targets"]["a"].decoded().kept > 0)
    assert windows.taught_positions(everything, "a") == int(taught.sum())
    # Resumed without the flag, it is the same entry.
    opened = open_job(CacheJob(cache=str(chats), name="a", teacher=(str(save("llama")),), **job))
    assert opened.writer.entry.targets == recorded
    assert opened.writer.pending() == []
    assert 0 < measure(opened, 10_000).positions <= wanted.sum()


def test_documents_longer_than_the_context_are_refused_where_that_is_asked(
    chats: Path, save: Callable[..., Path]
) -> None:
    job = {"k": 4, "context_tokens": 20, "long_documents": "refuse"}
    with pytest.raises(InputError, match="3 longer ones of up to 50 tokens than the context of 20: give a larger"):
        cache_logits(chats, "a", save("llama"), **job)
    with pytest.raises(InputError, match="about documents that are read by themselves"):
        cache_logits(chats, "a", save("llama"), **job, isolate_documents=False)
    assert not (chats / "teachers/a").exists()
