"""Windows, reading order and batches: every position once, targets beside their own tokens."""

from __future__ import annotations

import os
import pickle
import shutil
import tracemalloc
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from support.caches.small import dense_targets, make_corpus, make_entry, make_entry_2, without_rows, write_entry
from support.caches.streams import chat_lengths
from torch.utils.data import DataLoader

import storage.cache.reader
from storage.cache.writer import EntryWriter
from storage.errors import IdentityMismatch, IncompleteCache, InputError
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import Windowing
from storage.format.manifest.shared import ArrayLayout
from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets
from student.data.batches import collate
from student.data.blocks import Blocks
from student.data.order import BUFFER_GROUPS, ReadingOrder
from student.data.windows import DistillationWindows, reading_order
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member

V = 53
ISOLATED = Windowing(context_tokens=16, stride_tokens=16, isolate_documents=True)


def marked_targets(tokens: np.ndarray, k: int, starts: list[int] | None = None) -> SparseTargets:
    """Targets whose entropy is the row's position, which identifies it."""
    rng = np.random.default_rng(0)
    labels = np.append(tokens[1:], -1).astype(np.int64)
    if starts is not None:
        labels[np.array([*starts[1:], len(tokens)]) - 1] = -1
    targets = dense_targets(rng.normal(size=(len(tokens), V)), k, labels)
    targets.entropy[:] = np.arange(len(tokens))
    return targets


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray, CacheRecord]:
    """A cache of 203 tokens with two complete teachers, in chunks of 16 positions. To be read only."""
    tokens = np.random.default_rng(1).integers(0, V, 203).astype(np.uint16)
    url = str(tmp_path_factory.mktemp("made") / "cache")
    record = make_corpus(url, tokens, V)
    for name, k, encoding in (("a", 7, "codes"), ("b", V, "float32")):
        entry = make_entry(record, k, encoding=encoding, shard_tokens=64, chunk_tokens=16)
        write_entry(url, name, entry, marked_targets(tokens, k))
    return url, tokens, record


@pytest.fixture
def stream(made: tuple[str, np.ndarray, CacheRecord], tmp_path: Path) -> tuple[str, np.ndarray, CacheRecord]:
    """A copy of it in the test's own folder."""
    url, tokens, record = made
    return str(shutil.copytree(url, tmp_path / "cache")), tokens, record


@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_fixed_blocks_are_the_brute_force_cover_of_labelled_positions(size: int) -> None:
    starts = np.array([0, 1, 2, 9, 30, 31, 63], dtype=np.uint64)
    stops = [1, 2, 9, 30, 31, 63, 64]
    blocks = Blocks.of(64, starts, size, "fixed", seed=0)
    expected = [
        (first, min(size, stop - 1 - first))
        for start, stop in zip(starts.tolist(), stops, strict=True)
        for first in range(start, stop - 1, size)
    ]
    assert [blocks.span(i, epoch=3) for i in range(len(blocks))] == expected
    assert blocks.lengths(np.arange(len(blocks))).tolist() == [length for _, length in expected]
    covered = [p for start, length in expected for p in range(start, start + length)]
    assert covered == [p for p in range(64) if p + 1 not in stops]


@pytest.mark.parametrize("size", [1, 5, 16])
def test_random_blocks_stay_inside_documents_and_reach_every_offset(size: int) -> None:
    starts = np.array([0, 2, 3, 8, 60], dtype=np.uint64)
    stops = np.array([2, 3, 8, 60, 100])
    blocks = Blocks.of(100, starts, size, "random", seed=5)
    seen: list[set[int]] = [set() for _ in range(len(blocks))]
    for epoch in range(150):
        for window in range(len(blocks)):
            start, length = blocks.span(window, epoch)
            document = int(np.searchsorted(starts, start, side="right")) - 1
            assert starts[document] <= start
            assert start + length < stops[document], "the last position read has a next token in its document"
            assert 1 <= length <= size
            assert length == size or length == stops[document] - int(starts[document]) - 1
            seen[window].add(start)
    # A document long enough for several windows: all but its last window can start at each of T offsets.
    first_of_long = next(i for i in range(len(blocks)) if blocks.span(i)[0] >= 8)
    assert len(seen[first_of_long]) == size


def test_random_offsets_depend_on_seed_epoch_and_window_only() -> None:
    def offsets(seed: int, epoch: int) -> list[tuple[int, int]]:
        blocks = Blocks.of(1000, None, 16, "random", seed)
        return [blocks.span(i, epoch) for i in reversed(range(len(blocks)))]

    assert offsets(1, 2) == offsets(1, 2)
    assert offsets(1, 2) != offsets(1, 3)
    assert offsets(1, 2) != offsets(2, 2)


@pytest.mark.parametrize(
    ("windows", "group", "buffer", "step"),
    [
        (1, 1, 1, 1),
        (103, 8, 4, 1),
        (64, 16, 2, 4),
        (50, 7, 100, 3),
        (1000, 8, 16, 8),
        (1003, 8, 16, 24),
        (999, 4, 8, 20),
    ],
)
def test_reading_order_is_a_permutation_that_keeps_groups_together(
    windows: int, group: int, buffer: int, step: int
) -> None:
    order = ReadingOrder(windows, group_windows=group, buffer_groups=buffer, windows_per_step=step, seed=3)
    for epoch in range(3):
        order.set_epoch(epoch)
        found = np.array(list(order)) - epoch * windows
        assert sorted(found) == list(range(windows))
        assert (found == order.permutation(epoch)).all()
        index = np.argsort(found)
        # The end of an epoch, where lanes run out, is shuffled together.
        rest = windows - 2 * order.lanes * group - step
        for first in range(0, windows, group):
            indices = index[first : first + group]
            if indices.max() < rest:
                assert indices.max() - indices.min() < max(buffer, order.lanes) * group + step
    if windows > 20:
        assert (order.permutation(0) != order.permutation(1)).any()
        for changed in ({"seed": 4}, {"windows_per_step": step + 8}):
            other = ReadingOrder(
                windows, group_windows=group, buffer_groups=buffer, **{"seed": 3, "windows_per_step": step, **changed}
            )
            assert (order.permutation(0) != other.permutation(0)).any()


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (1, 8), (2, 4)])
def test_each_process_reads_groups_of_its_own(processes: int, micro_batches: int) -> None:
    step, group, windows = 16, 8, 8 * 300
    order = ReadingOrder(windows, group_windows=group, windows_per_step=step, seed=5)
    batch = step // processes // micro_batches
    found = order.permutation(2)
    # As accelerate deals batches out: batch n of the order belongs to process n mod processes.
    mine = [found.reshape(-1, processes, batch)[:, rank].ravel() for rank in range(processes)]
    whole = (windows - 2 * order.lanes * group) // processes
    groups = [set((some[:whole] // group).tolist()) for some in mine]
    assert sum(len(some) for some in groups) == len(set().union(*groups)), "no group is read by two processes"
    assert min(len(some) for some in groups) > 250 // processes
    # And at any time a process holds its share of the buffer: the groups started and not finished.
    for some in mine:
        first, last = {}, {}
        for index, number in enumerate((some[:whole] // group).tolist()):
            first.setdefault(number, index)
            last[number] = index
        held = np.zeros(whole, dtype=int)
        for number in first:
            held[first[number] : last[number] + 1] += 1
        assert held.max() <= BUFFER_GROUPS // processes


def test_an_order_is_made_as_it_is_read() -> None:
    """A hundred million windows (10^10 positions): the first steps cost the groups' numbers, and no more."""
    order = ReadingOrder(100_000_000, group_windows=64, windows_per_step=32, seed=0)
    tracemalloc.start()
    first = list(islice(order, 3200))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(first)) == 3200
    assert peak < 40_000_000


@pytest.mark.parametrize("size", [1, 16, 30, 202])
@pytest.mark.parametrize("offset", ["fixed", "random"])
def test_windows_equal_slices_of_the_stream(
    stream: tuple[str, np.ndarray, CacheRecord], size: int, offset: str
) -> None:
    url, tokens, _ = stream
    windows = DistillationWindows(url, ["a", "b"], size, offset, seed=9)  # type: ignore[arg-type]
    reference = {name: storage.cache.reader.LogitCache.open(url).teacher(name).stored(0, 203) for name in ("a", "b")}
    indices = [int(i) for i in np.random.default_rng(2).permutation(2 * len(windows))]
    for index, window in zip(indices, windows.__getitems__(indices), strict=True):
        start, length = windows.blocks.span(index % len(windows), index // len(windows))
        assert (window["input_ids"][:length] == tokens[start : start + length]).all()
        assert (window["labels"][:length] == tokens[start + 1 : start + length + 1]).all()
        assert (window["labels"][length:] == -100).all()
        assert len(window["labels"]) == len(window["input_ids"]) == size
        for name, whole in reference.items():
            (targets,) = window["targets"][name]
            assert (targets.start, targets.stop, window["firsts"]) == (start, start + length, [0])
            for array in ("token_ids", "logprob_codes" if name == "a" else "logprobs"):
                assert (targets.arrays[array] == whole.arrays[array][start : start + length]).all()


def test_fixed_windows_count_every_labelled_position_once(stream: tuple[str, np.ndarray, CacheRecord]) -> None:
    url, tokens, _ = stream
    windows = DistillationWindows(url, ["a"], 24)
    batch = collate(windows.__getitems__(range(len(windows))))
    trained = batch["labels"] != -100
    positions = batch["targets"]["a"].arrays["entropy"][trained]
    assert positions.sort().values.tolist() == list(range(202))
    assert batch["labels"][trained].tolist() == tokens[1:].tolist()
    assert batch["shift_labels"] is batch["labels"]


def test_batch_has_the_stated_types(stream: tuple[str, np.ndarray, CacheRecord]) -> None:
    windows = DistillationWindows(stream[0], ["a", "b"], 16)
    batch = next(iter(DataLoader(windows, batch_size=4, collate_fn=collate)))
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    a, b = batch["targets"]["a"], batch["targets"]["b"]
    codes, exact = a.arrays["logprob_codes"], b.arrays["logprobs"]
    assert (codes.dtype, codes.shape) == (torch.uint16, (4, 16, 7)), "as stored: decoded on the training device"
    assert (exact.dtype, exact.shape) == (torch.float32, (4, 16, V))
    for decoded in (a.decoded(), b.decoded()):
        assert {values.dtype for values in (decoded.token_ids, decoded.kept, decoded.certain)} == {torch.int32}
        floats = (decoded.logprobs, decoded.log_tail, decoded.log_tail_half, decoded.entropy)
        assert {values.dtype for values in floats if values is not None} == {torch.float32}


def test_neighbouring_windows_are_read_in_one_piece(
    stream: tuple[str, np.ndarray, CacheRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = DistillationWindows(stream[0], ["a"], 10)
    asked: list[tuple[int, int]] = []
    real = storage.cache.reader.TeacherTargets.stored

    def read(self: storage.cache.reader.TeacherTargets, start: int, stop: int) -> StoredTargets:
        asked.append((start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(storage.cache.reader.TeacherTargets, "stored", read)
    windows.__getitems__([7, 3, 2, 8, 15])
    assert asked == [(20, 40), (70, 90), (150, 160)]


def test_loss_mask_becomes_labels_that_are_not_trained(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.uint16)
    mask = np.random.default_rng(4).random(40) < 0.5
    make_corpus(str(tmp_path / "c"), tokens, V, loss_mask=mask)
    batch = collate(DistillationWindows(str(tmp_path / "c"), (), 8).__getitems__(range(5)))
    expected = np.append(np.where(mask[:39], tokens[1:].astype(np.int64), -100), -100)
    assert batch["labels"].flatten().tolist() == expected.tolist()
    assert batch["targets"] == {}


def test_windows_are_a_sequence(made: tuple[str, np.ndarray, CacheRecord]) -> None:
    windows = DistillationWindows(Path(made[0]), ["a"], 16, "random", seed=3)
    firsts = [window["input_ids"].tolist() for window in windows]
    assert len(firsts) == len(windows) == 12
    for index in (0, -1, 11, -12, np.int64(5), np.uint8(7), torch.tensor(2)):
        assert windows[index]["input_ids"].tolist() == firsts[int(index)]
    for cut in (slice(2), slice(-2, None), slice(None, None, -5), slice(20, 30)):
        assert [window["input_ids"].tolist() for window in windows[cut]] == firsts[cut]
    for index in (12, -13, 1 << 40):
        with pytest.raises(IndexError, match=f"no window {index} among 12"):
            windows[index]
    for wrong in (1.0, "1", True, None, np.float32(1), [1]):
        with pytest.raises(TypeError, match="a whole number or a slice, not by"):
            windows[wrong]  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="whole numbers, not by float64"):
        windows.__getitems__([0, 1.5])  # type: ignore[list-item]


def test_objects_say_in_a_line_what_they_are(made: tuple[str, np.ndarray, CacheRecord]) -> None:
    url, cache = made[0], storage.cache.reader.LogitCache.open(made[0])
    windows = DistillationWindows(url, ["a"], 16)
    assert repr(windows) == f"DistillationWindows({url!r}, ['a']: 13 windows of 16 tokens, fixed offset)"
    assert repr(cache) == f"LogitCache({url!r}: 203 tokens, 53 ids)"
    assert repr(cache.teacher("a").read(3, 9)) == "SparseTargets(positions 3..9 of 7 ids)"
    loss = DistillationLoss(V, 0.25, 2.0, [Member.of("a", windows.entries["a"])])
    assert repr(loss) == "DistillationLoss(forward-kl to a 1; alpha 0.25, temperature 2)"


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_a_teacher_of_sources_has_targets_in_their_documents_alone(
    tmp_path: Path, version: int, isolated: bool
) -> None:
    url, starts, names = str(tmp_path / "c"), np.array([0, 37, 38, 90]), ("math", "code", "web", "math")
    tokens = np.random.default_rng(1).integers(0, V, 150).astype(np.uint16)
    record = make_corpus(url, tokens, V, starts, document_sources=names)
    make = make_entry if version == 1 else partial(make_entry_2, fields=("entropy", "label"))
    windowing = ISOLATED if isolated else Windowing(context_tokens=16, stride_tokens=16)
    entry = make(record, 7, encoding="float32", shard_tokens=64, chunk_tokens=16, windowing=windowing)
    for name in ("t", "all"):
        write_entry(url, name, entry, marked_targets(tokens, 7, starts.tolist() if isolated else None))
    windows = DistillationWindows(url, ["t", "all"], 16, sources={"t": ["math"]})
    batch = collate(windows[:])
    found, others = (batch["targets"][name].decoded() for name in ("t", "all"))
    position = others.entropy.long()
    math = (position < 37) | (position >= 90)
    assert torch.equal(found.kept > 0, math & (others.kept > 0))
    assert torch.equal(found.logprobs[math], others.logprobs[math])
    assert (found.certain[~math] == 0).all()
    indices = range(len(windows))
    assert windows.trained_positions(indices, ["math"]) == int((math & (batch["labels"] != -100)).sum())
    assert windows.taught_sources("t") == ("math",)
    assert windows.untaught_sources() == []
    assert DistillationWindows(url, ["t"], 16, sources={"t": ["math"]}).untaught_sources() == ["code", "web"]


def test_sources_that_nothing_is_from_are_refused(tmp_path: Path) -> None:
    url, tokens = str(tmp_path / "c"), np.arange(40, dtype=np.uint16)
    record = make_corpus(url, tokens, V, np.array([0, 20]), document_sources=("math", "code"))
    entry = make_entry_2(record, 7, sources=("code",), chunk_tokens=16, shard_tokens=32)
    write_entry(url, "t", entry, without_rows(marked_targets(tokens, 7), np.arange(40) < 20))
    for sources, message in (
        ({"t": ["web"]}, "no document is from the source 'web'; there is: 'code', 'math'"),
        ({"t": ["code", "math"]}, "teacher t has targets of 'code' alone, and none of 'math'"),
        ({"u": ["code"]}, "sources are given for 'u', which is none of the teachers"),
    ):
        with pytest.raises(InputError, match=message):
            DistillationWindows(url, ["t"], 8, sources=sources)


@pytest.mark.parametrize("offset", ["fixed", "random"])
def test_trained_positions_are_those_with_a_label(tmp_path: Path, offset: Literal["fixed", "random"]) -> None:
    mask = np.random.default_rng(4).random(40) < 0.5
    layout = ArrayLayout(shard=14, chunk=7, compression="lz4")
    make_corpus(str(tmp_path / "c"), np.arange(40, dtype=np.uint16), V, loss_mask=mask, tokens_layout=layout)
    windows = DistillationWindows(str(tmp_path / "c"), (), 8, offset)
    indices = [3, 0, 7, 1]
    labels = collate(windows.__getitems__(indices))["labels"]
    read = sum(length for window in windows.spans(indices) for _, length in window)
    assert windows.positions_read(indices) == read
    assert windows.trained_positions(indices) == int((labels != -100).sum())


def test_windows_begin_with_an_id_of_their_own(stream: tuple[str, np.ndarray, CacheRecord]) -> None:
    url, tokens, _ = stream
    plain = DistillationWindows(url, ["a"], 24)
    begin = int(tokens[48])  # window 2 begins with it, as a document may
    windows = DistillationWindows(url, ["a"], 24)
    windows.begin_id = begin
    assert windows.input_tokens == 25
    entropy = collate(windows[:])["targets"]["a"].decoded().entropy
    for number, (old, new) in enumerate(zip(plain, windows, strict=True)):
        length = plain.blocks.span(number)[1]
        lead = int(old["input_ids"][0] != begin)
        assert lead == (number != 2)
        inside = slice(lead, lead + length)
        assert new["input_ids"].tolist()[:lead] == [begin] * lead
        assert (new["input_ids"][inside] == old["input_ids"][:length]).all()
        assert (new["labels"][inside] == old["labels"][:length]).all()
        assert set(new["labels"].tolist()[:lead] + new["labels"].tolist()[lead + length :]) <= {-100}
        assert len(new["labels"]) == 25
        assert entropy[number, inside].tolist() == list(range(24 * number, 24 * number + length))


def test_isolated_documents_are_not_crossed(tmp_path: Path) -> None:
    url = str(tmp_path / "c")
    tokens = np.arange(50, dtype=np.uint16)
    starts = [0, 13, 14, 40]
    record = make_corpus(url, tokens, V, document_starts=np.array(starts))
    entry = make_entry(record, 5, windowing=ISOLATED)
    write_entry(url, "a", entry, marked_targets(tokens, 5, starts))
    windows = DistillationWindows(url, ["a"], 8)
    assert windows.isolate_documents
    control = DistillationWindows(url, (), 8, isolate_documents=True)
    batch, plain = (collate(w.__getitems__(range(len(w)))) for w in (windows, control))
    assert torch.equal(batch["labels"], plain["labels"])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    trained = batch["labels"] != -100
    labels = batch["labels"][trained]
    assert labels.sort().values.tolist() == [t for t in range(50) if t not in starts]
    assert torch.equal(batch["targets"]["a"].arrays["entropy"][trained], labels.float() - 1)
    with pytest.raises(InputError, match="teacher a saw isolated documents"):
        DistillationWindows(url, ["a"], 8, isolate_documents=False)
    write_entry(url, "across", make_entry(record, 5), marked_targets(tokens, 5))
    with pytest.raises(InputError, match="cannot be mixed"):
        DistillationWindows(url, ["a", "across"], 8)


@pytest.mark.parametrize("offset", ["fixed", "random"])
@pytest.mark.parametrize("begin", [None, 0])
def test_documents_share_windows_and_keep_what_they_have_alone(
    tmp_path: Path, offset: Literal["fixed", "random"], begin: int | None
) -> None:
    url, lengths = str(tmp_path / "c"), chat_lengths(60, 9, 40)
    starts = np.cumsum(lengths) - lengths
    tokens = (1 + np.arange(lengths.sum()) % (V - 1)).astype(np.uint16)
    tokens[starts[::2]] = 0
    mask = np.random.default_rng(4).random(len(tokens)) < 0.5
    record = make_corpus(url, tokens, V, document_starts=starts, loss_mask=mask)
    entry = make_entry(record, 5, windowing=ISOLATED)
    write_entry(url, "a", entry, marked_targets(tokens, 5, starts.tolist()))
    packed = DistillationWindows(url, ["a"], 16, offset, 3)
    alone = DistillationWindows(url, ["a"], 16, offset, 3, pack_documents=False)
    packed.begin_id = alone.begin_id = begin
    packed = packed.cut(20, offset).cut(16, offset)  # packed again, with room for the id
    assert len(packed) < 0.7 * len(alone)
    indices = (np.arange(len(packed)) + 2 * len(packed)).tolist()
    third = (np.arange(len(alone)) + 2 * len(alone)).tolist()
    expected = {span: window for (span,), window in zip(alone.spans(third), alone.__getitems__(third), strict=True)}
    batch, seen = collate(packed.__getitems__(indices)), 0
    assert batch["use_cache"] is False
    entropy = batch["targets"]["a"].decoded().entropy
    for row, spans in enumerate(packed.spans(indices)):
        at = 0
        for start, length in spans:
            window = expected.pop((start, length))
            size = length + window["firsts"][0]
            inside = slice(at, at + size)
            assert batch["input_ids"][row, inside].tolist() == window["input_ids"][:size].tolist()
            assert batch["labels"][row, inside].tolist() == window["labels"][:size].tolist()
            assert batch["position_ids"][row, inside].tolist() == list(range(size))
            assert entropy[row, at + size - length : at + size].tolist() == list(range(start, start + length))
            at += size
            seen += length
        assert set(batch["labels"][row, at:].tolist()) <= {-100}
        padding = range(at, packed.input_tokens) if len(spans) == 1 else range(packed.input_tokens - at)
        assert batch["position_ids"][row, at:].tolist() == list(padding)
    assert not expected
    assert packed.positions_read(indices) == seen
    assert packed.trained_positions(indices) == int((batch["labels"] != -100).sum())
    assert sorted(reading_order(packed, 4)) == list(range(len(packed)))


def test_incomplete_entry_is_refused_with_the_missing_range(
    stream: tuple[str, np.ndarray, CacheRecord],
) -> None:
    url, tokens, record = stream
    entry = make_entry(record, 7, shard_tokens=64, chunk_tokens=16)
    writer = EntryWriter.open(url, "partial", entry)
    writer.commit(0, marked_targets(tokens, 7).rows(0, 64))
    writer.commit(2, marked_targets(tokens, 7).rows(128, 192))
    with pytest.raises(IncompleteCache, match=r"teacher partial lacks .*64\.\.128.*192\.\.203"):
        DistillationWindows(url, ["partial"], 8)


def test_entry_of_another_stream_is_refused(stream: tuple[str, np.ndarray, CacheRecord]) -> None:
    url, tokens, record = stream
    entry = make_entry(record, 7).model_copy(update={"stream_sha256": "f" * 64})
    write_entry(url, "foreign", entry, marked_targets(tokens, 7))
    with pytest.raises(IdentityMismatch, match="stream_sha256"):
        DistillationWindows(url, ["foreign"], 8)


def test_window_longer_than_the_corpus_is_refused(stream: tuple[str, np.ndarray, CacheRecord]) -> None:
    DistillationWindows(stream[0], (), 202)
    with pytest.raises(InputError, match="203"):
        DistillationWindows(stream[0], (), 203)


def test_wide_vocabularies_have_64_bit_ids(tmp_path: Path) -> None:
    url, wide = str(tmp_path / "c"), 70_000
    tokens = np.array([5, 69_999, 7, 1], dtype=np.uint32)
    record = make_corpus(url, tokens, wide, tokenizer_files={"tokenizer.json": b"{}"})
    entry = make_entry(record, 3)
    rng = np.random.default_rng(0)
    targets = dense_targets(rng.normal(size=(4, wide)), 3, np.array([69_999, 7, 1, -1]))
    targets.kept[:] = 2
    targets.certain[:] = 2
    targets.token_ids[:, 2] = 4_294_967_295
    write_entry(url, "a", entry, targets)
    batch = collate(DistillationWindows(url, ["a"], 3).__getitems__([0]))
    ids = batch["targets"]["a"].decoded().token_ids
    assert ids.dtype == torch.int64
    assert ids[0, :, 2].tolist() == [4_294_967_295] * 3
    assert batch["labels"].tolist() == [[69_999, 7, 1]]


def test_a_pickled_or_forked_dataset_opens_the_cache_for_itself(
    stream: tuple[str, np.ndarray, CacheRecord],
) -> None:
    windows = DistillationWindows(stream[0], ["a"], 16)
    assert windows._handle is not None
    again = pickle.loads(pickle.dumps(windows))
    assert again._handle is None
    assert (again[3]["input_ids"] == windows[3]["input_ids"]).all()
    windows._handle = (os.getpid() + 1, windows._handle[1])  # the state in a forked child
    windows[0]
    assert windows._handle is not None
    assert windows._handle[0] == os.getpid()


def test_worker_processes_read_the_same_batches(stream: tuple[str, np.ndarray, CacheRecord]) -> None:
    windows = DistillationWindows(stream[0], ["a"], 16, "random", seed=1)
    order = ReadingOrder(len(windows), group_windows=4, seed=1)
    order.set_epoch(2)
    alone = list(DataLoader(windows, batch_size=3, sampler=order, collate_fn=collate))
    # spawn: a fork of a process that has run threads may hang, and the data set must survive being sent.
    loader = DataLoader(
        windows, batch_size=3, sampler=order, collate_fn=collate, num_workers=1, multiprocessing_context="spawn"
    )
    for one, other in zip(alone, loader, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(*(each["targets"]["a"].arrays["logprob_codes"].int() for each in (one, other)))
