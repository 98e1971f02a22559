"""`logit-cache project` through its command: what it writes, says and refuses, and that it resumes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.caches.copies import push
from support.caches.projection import DOCUMENTS, write_cache, write_entries
from support.caches.small import entry_2, make_corpus, make_entry, make_entry_2, random_sample, write_entry
from support.commands import in_process, refused, succeeded

from logit_cache.projection.run import _spelling
from logit_cache.projection.spelling import Spelling
from storage import LogitCache
from storage.cache.writer import EntryWriter
from storage.errors import FormatError

Caches = Callable[[str], Path]


def project(source: Path | str, to: Path | str, *flags: object, name: str = "exact"):  # type: ignore[no-untyped-def]
    return in_process("logit-cache", "project", source, "--name", name, "--to", to, *flags)


def texts_until(url: Path, positions: int) -> list[bytes]:
    """What a stream spells up to each position, without spaces at the beginning of documents, token by token."""
    cache = LogitCache.open(str(url))
    spelling, starts = _spelling(cache), set(cache.document_starts.tolist())
    found, head, texts = b"", True, []
    for at, token in enumerate(cache.tokens.read(0, positions).tolist()):
        if at in starts:
            found, head = found + b"\x00", True
        data = spelling[token].lstrip(b" ") if head else spelling[token]
        found, head = found + data, head and not data
        texts.append(found)
    return texts


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_rows_are_at_positions_that_have_read_the_same_text(world: Path, caches: Caches, kind: str) -> None:
    to = caches(kind)
    succeeded(project(world / "gpt2", to))
    cache = LogitCache.open(str(to))
    targets = cache.teacher("exact").read(0, cache.record.corpus.positions)
    source = LogitCache.open(str(world / "gpt2"))
    read, ours = set(texts_until(world / "gpt2", 600)), texts_until(to, 500)
    assert all(text in read for text, kept in zip(ours, targets.kept, strict=False) if kept)
    assert 0.3 < (targets.kept > 0).mean() < 1
    # The likeliest id is mostly the text's next one, as the teacher's is.
    tokens = cache.tokens.read(0, cache.record.corpus.positions)
    here = np.flatnonzero(targets.kept[:-1])
    assert (targets.token_ids[here, 0] == tokens[here + 1]).mean() > 0.7
    assert source.teacher("exact").record_sha256 == cache.teacher("exact").entry.projected_from.entry_sha256


@pytest.mark.parametrize("name", ["exact", "drawn"])
def test_into_the_same_vocabulary_it_is_the_entry_again(world: Path, caches: Caches, name: str) -> None:
    to = caches("gpt2")
    succeeded(project(world / "gpt2", to, "--as", "again", name=name))
    cache = LogitCache.open(str(to))
    n = cache.record.corpus.positions
    one, other = (cache.teacher(each).read(0, n) for each in (name, "again"))
    for each, array in one.arrays().items():
        if each in other.arrays():
            np.testing.assert_array_equal(other.arrays()[each], array, err_msg=each)


def test_a_killed_job_resumes_and_shards_do_not_matter(
    world: Path, caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to, commit, shards = caches("llama3"), EntryWriter.commit, []

    def interrupted(*arguments):  # type: ignore[no-untyped-def]
        if len(shards) == 2:
            raise KeyboardInterrupt
        shards.append(arguments[1])
        return commit(*arguments)

    flags = ("--shard-tokens", 512, "--chunk-tokens", 128)
    monkeypatch.setattr(EntryWriter, "commit", interrupted)
    assert project(world / "gpt2", to, *flags, name="drawn").returncode != 0
    assert LogitCache.open(str(to)).teacher("drawn").missing()
    monkeypatch.undo()
    succeeded(project(world / "gpt2", to, *flags, name="drawn"))
    succeeded(project(world / "gpt2", to, "--as", "whole", name="drawn"))
    cache = LogitCache.open(str(to))
    n = cache.record.corpus.positions
    one, other = (cache.teacher(each).read(0, n).arrays() for each in ("drawn", "whole"))
    assert all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in one)
    refused(project(world / "gpt2", to, *flags, "--most-uncertain", 0.1, name="drawn"), "most_uncertain")
    # From one store to another it is the same.
    stores = [f"memory://{tmp_path.name}/{kind}" for kind in ("gpt2", "llama3")]
    for kind, store in zip(("gpt2", "llama3"), stores, strict=True):
        push(world / kind, store)
    succeeded(project(*stores, *flags, name="drawn"))
    third = LogitCache.open(stores[1]).teacher("drawn").read(0, n).arrays()
    assert all(np.array_equal(one[name], third[name], equal_nan=one[name].dtype.kind == "f") for name in one)


def test_what_it_is_is_shown_and_checked(world: Path, caches: Caches) -> None:
    to = caches("llama3")
    said = succeeded(project(world / "gpt2", to, name="drawn")).stdout
    assert "shared boundaries: " in said
    assert "mass of ids whose first token is uncertain: 0." in said
    succeeded(in_process("logit-cache", "verify", to))
    shown = succeeded(in_process("logit-cache", "inspect", to)).stdout
    assert "from an entry in another vocabulary" in shown
    assert "shared boundaries: " in shown
    assert "forward KL with tail sampled, at temperature 1\n" in shown
    assert json.loads(succeeded(in_process("logit-cache", "inspect", to, "--at", "5", "--json")).stdout)
    assert "lower bounds" not in said
    assert LogitCache.open(str(to)).teacher("drawn").entry.projected_from.outside_mass is None
    bounds = succeeded(project(world / "gpt2", to)).stdout
    rows = LogitCache.open(str(to)).teacher("exact").read(0, LogitCache.open(str(to)).record.corpus.positions)
    outside = np.exp(rows.log_tail[rows.kept > 0]).mean()
    lack = float(re.findall(r"those of a row lack (0\.\d+) at most", bounds)[0])
    np.testing.assert_allclose(lack, outside, rtol=0.1)  # of all rows, also those that are left out
    smaller = in_process("logit-cache", "recompress", to, "--name", "drawn", "--to", "small", "-k", 6)
    succeeded(smaller)
    succeeded(in_process("logit-cache", "verify", to))
    assert LogitCache.open(str(to)).teacher("small").entry.made == "projected"


def test_a_threshold_leaves_rows_without_targets(world: Path, caches: Caches) -> None:
    to, count = caches("llama3"), []
    for share in (0, 0.5, 1):
        done = succeeded(project(world / "gpt2", to, "--as", f"at-{10 * share:g}", "--most-uncertain", share, "--json"))
        count.append(json.loads(done.stdout)["with_targets"])
    assert count[0] < count[1] < count[2]


OTHER_TEXTS = {
    "another word": ([*DOCUMENTS[:3], "x" + DOCUMENTS[3][1:], *DOCUMENTS[4:]], "at byte 0 of document 3"),
    "another order": ([DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]], "at byte 0 of document 0"),
    "one document less": (DOCUMENTS[:-1], f"at byte {len(DOCUMENTS[-2])} of document {len(DOCUMENTS) - 2}"),
    "other documents": ([DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]], "of document 0"),
}


@pytest.mark.parametrize("what", OTHER_TEXTS)
def test_another_text_is_refused_by_its_first_byte(world: Path, tmp_path: Path, what: str) -> None:
    documents, said = OTHER_TEXTS[what]
    to = write_cache(tmp_path, "llama3", documents)
    refused(project(world / "gpt2", to), said)
    assert not LogitCache.open(str(to)).teachers


def test_a_tokenizer_that_normalises_is_refused_by_the_first_difference(world: Path, tmp_path: Path) -> None:
    to = write_cache(tmp_path, "seeds")
    refused(project(world / "gpt2", to), "have other texts", "NFKC", "fine")


def test_what_cannot_be_aligned_or_stay_unbiased_is_refused(world: Path, caches: Caches, tmp_path: Path) -> None:
    to = caches("llama3")
    words = tmp_path / "words"
    make_corpus(str(words), np.zeros(4, dtype=np.uint16), 30)
    refused(project(world / "gpt2", words), "WordLevel")
    refused(project(world / "gpt2", to, "--most-uncertain", 2), "--most-uncertain")
    source = caches("gpt2")
    record = LogitCache.open(str(source)).record
    positions, size = record.corpus.positions, record.tokenizer.vocabulary_size
    tempered = entry_2(make_entry(record, 4), "half-tail", method="varopt", temperature=2.0)
    write_entry(source, "tempered", tempered, random_sample(positions, size, 4, 2.0))
    refused(project(source, to, name="tempered"), "temperature 2")
    begun = entry_2(make_entry(record, 4, shard_tokens=512, chunk_tokens=128), method="varopt")
    write_entry(source, "begun", begun, random_sample(positions, size, 4), missing=[0])
    refused(project(source, to, name="begun"), "begun lacks")
    labels = make_entry_2(record, 0, ("label",), method="none", tail="unknown")
    write_entry(source, "labels", labels, random_sample(positions, size, 4))
    refused(project(source, to, name="labels"), "no ids to project")


def test_a_record_that_names_more_ids_than_there_are_is_refused(world: Path) -> None:
    with pytest.raises(FormatError, match="says 1,000,000,000 ids"):
        Spelling(LogitCache.open(str(world / "gpt2")).tokenizer_files(), 10**9, "here")


def test_students_learn_from_it_alone_and_beside_a_native_entry(world: Path, caches: Caches, tmp_path: Path) -> None:
    to = caches("llama3")
    write_entries(to)
    succeeded(project(world / "gpt2", to, "--as", "from-gpt2", name="drawn"))
    small = ("--model", "llama-tiny", "--set", "max_steps=3", "--set", "per_device_train_batch_size=4")
    for number, teachers in enumerate([("from-gpt2",), ("from-gpt2:0.5", "drawn:0.5"), ("from-gpt2", "exact")]):
        flags = [word for name in teachers for word in ("--teacher", name)]
        out = tmp_path / f"student-{number}"
        succeeded(in_process("train-student", "--cache", to, *flags, *small, "--output-dir", out))
        assert json.loads((out / "report.json").read_text())["steps"] == 3
    for flags in (("--loss", "reverse-kl"), ("--tail", "bucket"), ("--tail", "controlled"), ("--temperature", "2")):
        done = in_process("train-student", "--cache", to, "--teacher", "from-gpt2", *small, *flags, "--output-dir",
                          tmp_path / "none")  # fmt: skip
        refused(done, "projected into this one", "forward-kl with tail sampled")
