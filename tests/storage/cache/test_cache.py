"""A cache is written through our writer and checked through other readers; faults never become data."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
import zarr.buffer
from support.caches.known import contents
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.caches.two_entries import K, N, Stream, V

from storage import LogitCache
from storage.cache.verify import verify
from storage.cache.writer import EntryWriter, ShardWriter
from storage.errors import (
    CacheNotFound,
    CorruptCache,
    FormatError,
    IdentityMismatch,
    IncompleteCache,
    InputError,
    LogitCacheError,
)
from storage.format.manifest.entry import TeacherEntry, Windowing
from storage.format.stored import StoredTargets


@pytest.mark.parametrize("scheme", ["path", "file", "memory"])
def test_round_trip_over_backends(scheme: str, tmp_path: Path, stream: Stream) -> None:
    url = {"path": str(tmp_path / "c"), "file": f"file://{tmp_path}/c", "memory": f"memory://{tmp_path.name}/c"}[scheme]
    tokens, targets = stream
    record = make_corpus(url, tokens, V)
    write_entry(url, "a", make_entry(record, K, shard_tokens=256, chunk_tokens=64), targets)
    opened = LogitCache.open(url)
    assert opened.teachers == ("a",)
    assert np.array_equal(opened.tokens.read(3, 997), tokens[3:997])
    for start, stop in [(0, N), (0, 1), (63, 65), (255, 257), (100, 700), (999, 1000), (5, 5)]:
        read = opened.teacher("a").read(start, stop)
        assert (read.start, len(read)) == (start, stop - start)
        assert np.array_equal(read.token_ids, targets.token_ids[start:stop])
        assert np.allclose(read.logprobs, targets.logprobs[start:stop], atol=1 / 64 + 1e-5, rtol=0)
        for name in ("log_tail", "log_tail_half", "entropy", "label_logprob"):
            assert np.allclose(getattr(read, name), getattr(targets, name)[start:stop], rtol=2**-12, equal_nan=True)
    found = verify(url, deep=True)
    assert (found.sound, found.leftovers) == (True, [])


def test_float32_is_exact(original: Path, stream: Stream) -> None:
    read = LogitCache.open(str(original)).teacher("exact").read(0, N)
    for name in ("token_ids", "logprobs", "log_tail", "log_tail_half", "entropy", "label_logprob"):
        assert np.array_equal(getattr(read, name), getattr(stream[1], name), equal_nan=name == "label_logprob"), name


def test_a_hole_is_never_data(tmp_path: Path, stream: Stream) -> None:
    record = make_corpus(str(tmp_path / "c"), stream[0], V)
    entry = make_entry(record, K, shard_tokens=256, chunk_tokens=64)
    writer = EntryWriter.open(str(tmp_path / "c"), "a", entry)
    writer.commit(1, stream[1].rows(256, 512))
    writer.commit(3, stream[1].rows(768, 1000))
    writer.finish()
    targets = LogitCache.open(str(tmp_path / "c")).teacher("a")
    assert targets.missing() == [(0, 256), (512, 768)]
    assert len(targets.read(256, 512)) == 256
    for start, stop in [(0, 1), (255, 300), (511, 513), (600, 601)]:
        with pytest.raises(IncompleteCache, match=r"0\.\.256, 512\.\.768"):
            targets.read(start, stop)
    assert writer.pending() == [0, 2]


def codes_of(cache: Path) -> TeacherEntry:
    return LogitCache.open(str(cache)).teacher("codes").entry


def test_committing_twice_changes_nothing(cache: Path, stream: Stream) -> None:
    before = contents(cache)
    writer = EntryWriter.open(str(cache), "codes", codes_of(cache))
    assert writer.pending() == []
    writer.commit(2, stream[1].rows(512, 768))
    writer.finish()
    assert contents(cache) == before


def test_committed_objects_are_never_replaced(cache: Path, stream: Stream) -> None:
    writer = EntryWriter.open(str(cache), "codes", codes_of(cache))
    other = dense_targets(np.random.default_rng(9).normal(size=(256, V)), K, np.zeros(256, dtype=np.int64), start=512)
    with pytest.raises(CorruptCache, match="already committed"):
        writer.commit(2, other)
    assert np.array_equal(LogitCache.open(str(cache)).teacher("codes").read(0, N).token_ids, stream[1].token_ids)


def test_leftovers_without_a_receipt_are_replaced(cache: Path, stream: Stream) -> None:
    entry_folder = cache / "teachers/codes"
    expected = (entry_folder / "token_ids/c/2/0").read_bytes()
    (entry_folder / "receipts/00000002.json").unlink()
    (entry_folder / "receipts/index.json").unlink()
    (entry_folder / "token_ids/c/2/0").write_bytes(b"half a shard")
    (entry_folder / "token_ids/c/2/0.77-abc.partial").write_bytes(b"a killed writer's")
    with pytest.raises(IncompleteCache):
        LogitCache.open(str(cache)).teacher("codes").read(512, 513)
    write_entry(cache, "codes", codes_of(cache), stream[1])
    assert (entry_folder / "token_ids/c/2/0").read_bytes() == expected
    assert LogitCache.open(str(cache)).teacher("codes").missing() == []


def test_another_identity_is_refused_with_the_fields_that_differ(cache: Path) -> None:
    record = LogitCache.open(str(cache)).record
    before = (cache / "teachers/codes/zarr.json").read_bytes()
    changed = make_entry(record, K - 1, shard_tokens=256, chunk_tokens=64, weights_sha256="1" * 64)
    with pytest.raises(IdentityMismatch) as error:
        EntryWriter.open(str(cache), "codes", changed)
    assert "targets.k: the cache has 33, this job has 32" in str(error.value)
    assert "1" * 13 not in str(error.value), "of a digest the first digits are enough"
    assert error.value.fields[0].startswith("targets.k"), "what people can read comes first"
    assert any(field.startswith("teacher.members.0.weights_sha256") for field in error.value.fields)
    assert (cache / "teachers/codes/zarr.json").read_bytes() == before


def test_a_cache_of_other_text_is_refused(cache: Path, stream: Stream) -> None:
    with pytest.raises(IdentityMismatch, match="stream_sha256"):
        make_corpus(str(cache), stream[0][::-1].copy(), V)


def test_a_cache_keeps_its_tokenizer_files(tmp_path: Path, stream: Stream) -> None:
    first = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"written": "so"}'}
    other = first | {"tokenizer_config.json": b'{"written": "otherwise"}'}
    make_corpus(str(tmp_path), stream[0], V, tokenizer_files=first)
    make_corpus(str(tmp_path), stream[0], V, tokenizer_files=other)
    assert LogitCache.open(str(tmp_path)).tokenizer_files() == first
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_bytes(b'{"written": "no"}')
    with pytest.raises(CorruptCache, match=r"tokenizer/tokenizer_config\.json: expected sha256"):
        make_corpus(str(tmp_path), stream[0], V, tokenizer_files=first)
    (tmp_path / "receipts" / "tokenizer.json").unlink()
    make_corpus(str(tmp_path), stream[0], V, tokenizer_files=other)
    assert LogitCache.open(str(tmp_path)).tokenizer_files() == other


@pytest.mark.parametrize("content", ["a file", "another zarr group"])
def test_a_folder_that_holds_something_else_is_left_alone(content: str, tmp_path: Path, stream: Stream) -> None:
    if content == "a file":
        (tmp_path / "thesis.txt").write_text("three years of work")
    else:
        zarr.create_group(str(tmp_path), attributes={"mine": 1})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((InputError, FormatError), match=r"not a cache|not one of logit-cache"):
        make_corpus(str(tmp_path), stream[0], V)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_entry_may_have_fewer_ids_than_the_tokenizer(tmp_path: Path) -> None:
    """Its own number decides the type of its ids; more than the tokenizer's are refused."""
    url, rng = str(tmp_path / "c"), np.random.default_rng(0)
    tokens = np.array([5, 65_534, 7, 1], dtype=np.uint32)
    record = make_corpus(url, tokens, 65_536, tokenizer_files={"tokenizer.json": b"{}"})
    for name, size in (("fewer", 65_535), ("more", 65_537)):
        entry = make_entry(record, 3).model_copy(update={"vocabulary_size": size})
        write_entry(url, name, entry, dense_targets(rng.normal(size=(4, size)), 3, np.array([65_534, 7, 1, -1])))
    cache = LogitCache.open(url)
    assert cache.tokens.read(0, 4).dtype == np.uint32
    found = cache.teacher("fewer").read(0, 4)
    assert found.token_ids.dtype == np.uint16
    refused = "its positions or vocabulary are not this cache's"
    assert verify(url, deep=True).problems == [f"{url}/teachers/more/zarr.json: {refused}"]
    with pytest.raises(FormatError, match=refused):
        cache.teacher("more")


def test_a_missing_cache_or_entry_is_an_error(tmp_path: Path, original: Path) -> None:
    with pytest.raises(CacheNotFound, match="no cache there"):
        LogitCache.open(str(tmp_path / "nowhere"))
    with pytest.raises(CacheNotFound, match="codes, exact"):
        LogitCache.open(str(original)).teacher("other")
    with pytest.raises(FormatError, match="cannot name"):
        LogitCache.open(str(original)).teacher("../codes")


def read_everything(path: Path) -> None:
    opened = LogitCache.open(str(path))
    opened.tokens.read(0, N)
    _ = opened.document_starts
    opened.tokenizer_files()
    for name in ("codes", "exact"):
        opened.teacher(name).read(0, N)


FAULTS = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "victim",
    [
        "zarr.json",
        "tokens/c/0",
        "tokens/zarr.json",
        "document_starts/c/0",
        "tokenizer/tokenizer.json",
        "receipts/tokenizer.json",
        "receipts/tokens/00000000.json",
        "teachers/codes/zarr.json",
        "teachers/codes/token_ids/zarr.json",
        "teachers/codes/token_ids/c/1/0",
        "teachers/codes/logprob_codes/c/3/0",
        "teachers/codes/log_tail/c/2",
        "teachers/exact/logprobs/c/0/0",
        "teachers/codes/receipts/00000001.json",
    ],
)
def test_damage_is_an_error_that_names_the_object(fault: str, victim: str, cache: Path) -> None:
    FAULTS[fault](cache / victim)
    with pytest.raises(LogitCacheError) as error:
        read_everything(cache)
    folder = victim.split("/c/")[0].split("/zarr.json")[0]
    assert str(cache) in str(error.value)
    assert folder.split("/")[-1].split(".")[0] in str(error.value)


def test_values_that_break_the_format_are_refused_though_their_receipt_is_right(tmp_path: Path, stream: Stream) -> None:
    """A foreign cache can be consistent with itself and wrong: ids beyond V, a NaN, a label missing."""
    record = make_corpus(str(tmp_path / "c"), stream[0], V)
    entry = make_entry(record, K)
    url = str(tmp_path / "c")
    cases = [("token_ids", V), ("kept", K + 1), ("entropy", np.nan), ("label_logprob", np.nan), ("log_tail", -np.inf)]
    for number, (name, value) in enumerate(cases):
        values = getattr(stream[1], name).copy()
        values[17] = value
        damaged = dataclasses.replace(stream[1], **{name: values})
        writer = EntryWriter.open(url, f"e{number}", entry)
        with pytest.raises(FormatError, match="is not written"):
            writer.commit(0, damaged)
        assert writer.pending() == [0]
        receipts = LogitCache.open(url).teacher(f"e{number}").receipts
        ShardWriter(receipts).commit(0, StoredTargets.of(entry, damaged).arrays)
        with pytest.raises(CorruptCache, match="breaks the format"):
            LogitCache.open(url).teacher(f"e{number}").read(0, 5)


def test_workers_with_other_bytes_cannot_mix_a_shard(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second worker whose bytes differ arrives between the first one's objects and its receipt."""
    url = str(tmp_path / "c")
    entry = make_entry(make_corpus(url, stream[0], V), K, shard_tokens=256, chunk_tokens=64)
    other = dense_targets(np.random.default_rng(9).normal(size=(256, V)), K, np.zeros(256, dtype=np.int64))
    second: list[threading.Thread] = []
    outcome: list[BaseException | None] = []
    original = ShardWriter._publish_receipt

    def commit_other() -> None:
        try:
            EntryWriter.open(url, "a", entry).commit(0, other)
            outcome.append(None)
        except CorruptCache as error:
            outcome.append(error)

    def interrupted(self: ShardWriter, *arguments: Any) -> Any:
        if not second:
            second.append(threading.Thread(target=commit_other))
            second[0].start()
            second[0].join(timeout=0.5)
        return original(self, *arguments)

    monkeypatch.setattr(ShardWriter, "_publish_receipt", interrupted)
    EntryWriter.open(url, "a", entry).commit(0, stream[1].rows(0, 256))
    second[0].join()
    assert isinstance(outcome[0], CorruptCache)
    assert np.array_equal(LogitCache.open(url).teacher("a").read(0, 256).token_ids, stream[1].token_ids[:256])


def test_empty_ranges_read_nothing(tmp_path: Path, stream: Stream) -> None:
    url = str(tmp_path / "c")
    record = make_corpus(url, stream[0][:512], V)
    EntryWriter.open(url, "a", make_entry(record, K, shard_tokens=256, chunk_tokens=64))
    for position in (0, 256, 300, 512):
        empty = LogitCache.open(url).teacher("a").read(position, position)
        assert (len(empty), empty.start, empty.logprobs.shape) == (0, position, (0, K))


def test_out_of_range_reads_raise(original: Path) -> None:
    opened = LogitCache.open(str(original))
    for start, stop in [(-1, 5), (5, 4), (0, N + 1)]:
        with pytest.raises(IndexError):
            opened.teacher("codes").read(start, stop)
        with pytest.raises(IndexError):
            opened.tokens.read(start, stop)


def test_an_object_that_goes_away_after_it_was_checked_is_not_read_as_fill_values(cache: Path) -> None:
    opened = LogitCache.open(str(cache))
    opened.teacher("codes").read(0, 10)
    for name in ("label_logprob/c/0", "kept/c/0", "token_ids/c/0/0"):
        path = cache / "teachers/codes" / name
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(CorruptCache, match=name):
            opened.teacher("codes").read(70, 80)
        path.write_bytes(data)
    assert len(opened.teacher("codes").read(70, 80)) == 10


def test_an_object_that_is_replaced_after_it_was_checked_is_checked_again(cache: Path) -> None:
    opened = LogitCache.open(str(cache))
    opened.teacher("codes").read(0, 10)
    folder = cache / "teachers/codes/entropy/c"
    shutil.copy(folder / "1", folder / "new")
    (folder / "new").rename(folder / "0")
    with pytest.raises(CorruptCache, match="entropy/c/0"):
        opened.teacher("codes").read(70, 80)


def test_a_link_inside_a_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    path = cache / "teachers/codes/entropy/c/0"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCache, match="symbolic link"):
        LogitCache.open(str(cache)).teacher("codes").read(0, 10)
    shutil.move(cache / "receipts", tmp_path / "receipts")
    (cache / "receipts").symlink_to(tmp_path / "receipts")
    with pytest.raises(CorruptCache, match="symbolic link"):
        LogitCache.open(str(cache)).tokens.read(0, 10)


@pytest.mark.parametrize("isolated", [False, True])
def test_labels_are_missing_exactly_where_no_token_follows(tmp_path: Path, isolated: bool) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, 100).astype(np.uint16)
    starts = np.array([0, 30, 31, 64], dtype=np.uint64)
    labels = np.append(tokens[1:].astype(np.int64), -1)
    labels[starts[1:].astype(int) - 1] = -1 if isolated else labels[starts[1:].astype(int) - 1]
    record = make_corpus(str(tmp_path / "c"), tokens, 50, starts)
    windowing = Windowing(context_tokens=16, stride_tokens=16, isolate_documents=isolated)
    entry = make_entry(record, 5, windowing=windowing, shard_tokens=64, chunk_tokens=32)
    targets = dense_targets(rng.normal(size=(100, 50)), 5, labels)
    write_entry(tmp_path / "c", "good", entry, targets)
    assert len(LogitCache.open(str(tmp_path / "c")).teacher("good").read(0, 100)) == 100
    for position, value in [(29, -1.0), (63, -1.0), (99, -1.0), (40, np.nan), (64, np.nan)]:
        if not isolated and position in (29, 63):
            continue
        label = targets.label_logprob.copy()
        label[position] = value
        name = f"bad{position}"
        # A writer without the documents cannot detect it; the reader, which has them, does.
        wrong = dataclasses.replace(targets, label_logprob=label)
        if not isolated or position == 99:
            with pytest.raises(FormatError, match="label_logprob"):
                write_entry(tmp_path / "c", name, entry, wrong)
            continue
        write_entry(tmp_path / "c", name, entry, wrong)
        with pytest.raises(CorruptCache, match="label_logprob"):
            LogitCache.open(str(tmp_path / "c")).teacher(name).read(0, 100)
