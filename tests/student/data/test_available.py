"""Windows of entries that are still being written: those of the whole text that lie in what is committed.

Legend: `T` positions of a window.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry

from storage.cache.writer import EntryWriter
from storage.errors import IncompleteCache, InputError
from storage.format.manifest.entry import Windowing
from student.data.batches import collate
from student.data.blocks import Blocks
from student.data.windows import DistillationWindows, reading_order
from student.job import StudentJob

V, N, T, SHARD = 53, 640, 12, 64
STARTS = np.array([0, 3, 40, 41, 160, 300, 330, 520, 600], dtype=np.uint64)


@pytest.mark.parametrize("offset", ["fixed", "random"])
@pytest.mark.parametrize("starts", [None, STARTS], ids=["stream", "documents"])
@pytest.mark.parametrize("ranges", [[(0, 64)], [(64, 192), (320, 384)], [(0, 640)], [], [(60, 71), (500, 640)]])
def test_chosen_windows_are_those_that_never_leave_the_ranges(
    ranges: list[tuple[int, int]], starts: np.ndarray | None, offset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.data.blocks._CHOSEN_AT_ONCE", 7)
    whole = Blocks.of(N, starts, T, offset, seed=3)
    some = whole.inside(ranges)
    # So many epochs that every offset of every window comes up.
    spans = [[whole.span(window, epoch) for epoch in range(200)] for window in range(len(whole))]
    expected = [
        window
        for window, places in enumerate(spans)
        if any(all(a <= start and start + n <= b for start, n in places) for a, b in ranges)
    ]
    assert len(some) == len(expected)
    numbers = np.arange(len(some))
    for epoch in (0, 5):
        assert some.spans(numbers + epoch * len(some)) == [spans[window][epoch] for window in expected]
    assert some.lengths(numbers).tolist() == [spans[window][0][1] for window in expected]
    assert (some.positions(), some.whole.positions()) == (sum(some.lengths(numbers)), whole.positions())
    assert (len(some) < len(whole)) == (ranges != [(0, N)])
    # Several teachers, one after the other: what lies in the ranges of all.
    both = some.inside([(64, 128)])
    in_both = set(some.spans(numbers)) & set(whole.inside([(64, 128)]).spans(range(len(whole.inside([(64, 128)])))))
    assert set(both.spans(range(len(both)))) == in_both


@pytest.fixture(params=["stream", "documents"])
def cut_short(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(a cache with entries a and b, a copy in which a has the shards 0, 1, 2, 5 and b the shards 1, 2, 3, 5)."""
    isolated = request.param == "documents"
    tokens = np.random.default_rng(1).integers(0, V, N).astype(np.uint16)
    url, copy = str(tmp_path / "whole"), str(tmp_path / "copy")
    record = make_corpus(url, tokens, V, **({"document_starts": STARTS} if isolated else {}))
    labels = np.append(tokens[1:], -1).astype(np.int64)
    if isolated:
        labels[np.append(STARTS[1:].astype(int), N) - 1] = -1
    targets = dense_targets(np.random.default_rng(0).normal(size=(N, V)), 7, labels)
    targets.entropy[:] = np.arange(N)
    windowing = Windowing(context_tokens=16, stride_tokens=16, isolate_documents=isolated)
    entry = make_entry(record, 7, shard_tokens=SHARD, chunk_tokens=16, windowing=windowing)
    shutil.copytree(url, copy)
    for name, shards in (("a", (0, 1, 2, 5)), ("b", (1, 2, 3, 5))):
        write_entry(url, name, entry, targets)
        writer = EntryWriter.open(copy, name, entry)
        for shard in shards:
            writer.commit(shard, targets.rows(shard * SHARD, (shard + 1) * SHARD))
    return url, copy


def complete(url: str, whole: str) -> None:
    for name in "ab":
        shutil.copytree(f"{whole}/teachers/{name}", f"{url}/teachers/{name}", dirs_exist_ok=True)


@pytest.mark.parametrize("offset", ["fixed", "random"])
def test_windows_are_read_within_what_all_have_and_stay_so(cut_short: tuple[str, str], offset: Any) -> None:
    whole, url = cut_short
    windows = DistillationWindows(url, ["a", "b"], T, offset, available=True)
    assert windows.available == {"a": ((0, 192), (320, 384)), "b": ((64, 256), (320, 384))}
    assert 0 < len(windows) < len(DistillationWindows(whole, ["a", "b"], T, offset))
    order = [
        int(index) for epoch in (0, 1) for index in reading_order(windows, 4).permutation(epoch) + epoch * len(windows)
    ]
    spans = [span for window in windows.spans(order) for span in window]
    assert all(any(a <= start and start + n <= b for a, b in ((64, 192), (320, 384))) for start, n in spans)
    batch = collate(windows.__getitems__(order))
    complete(url, whole)
    later = DistillationWindows(url, ["a", "b"], T, offset, available=windows.available)
    again = collate(later.__getitems__(order))
    for name in "ab":
        one, other = batch["targets"][name].decoded(), again["targets"][name].decoded()
        assert one.entropy.tolist() == other.entropy.tolist()
        taught = one.kept > 0
        assert int(taught.sum()) == windows.positions_read(order) == sum(n for _, n in spans)
    assert batch["labels"].tolist() == again["labels"].tolist()
    for other_windows in (later.cut(T + 4, offset), later.cut(T + 4, offset).cut(T, offset)):
        assert other_windows.available == windows.available
    assert later.cut(T + 4, offset).cut(T, offset).spans(order) == windows.spans(order)


def test_an_entry_that_is_complete_has_the_windows_of_every_run(cut_short: tuple[str, str]) -> None:
    whole, _ = cut_short
    one, other = (DistillationWindows(whole, ["a"], T, available=given) for given in (True, False))
    assert one.available == {"a": ((0, N),)}
    assert one.spans(range(len(one))) == other.spans(range(len(other)))


def test_what_is_not_committed_is_refused_by_name(cut_short: tuple[str, str]) -> None:
    _, url = cut_short
    with pytest.raises(
        IncompleteCache, match=r"teacher a lacks the positions 192\.\.320, .* committed of it with --avail"
    ):
        DistillationWindows(url, ["a", "b"], T)
    with pytest.raises(InputError, match="available has ranges of a; the teachers are a, b"):
        DistillationWindows(url, ["a", "b"], T, available={"a": ((0, 64),)})
    with pytest.raises(InputError, match="no window of 100 positions lies within what is committed of a and b"):
        DistillationWindows(url, ["a", "b"], 100, available={"a": ((0, 64),), "b": ((64, 128),)})
    # A shard that is gone since.
    with pytest.raises(IncompleteCache, match=r"teacher a lacks the positions 192\.\.320 of 640"):
        DistillationWindows(url, ["a"], T, available={"a": ((0, 256),)})


@pytest.mark.parametrize(
    ("teachers", "available", "words"),
    [
        ([], True, "available is about entries that are still being written: name a teacher"),
        (["a", "b"], {"a": [[0, 4]]}, "available has ranges of a; the teachers are a, b"),
        (["a"], {"a": [[4, 8], [0, 2]]}, "the ranges of a do not ascend, or do not lie apart"),
        (["a"], {"a": [[0, 4], [4, 8]]}, "the ranges of a do not ascend, or do not lie apart"),
    ],
)
def test_jobs_name_ranges_of_their_teachers(teachers: list[str], available: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StudentJob(cache="c", model="llama-tiny", output_dir="o", teachers=teachers, available=available)


def test_ids_that_a_student_lacks_are_looked_for_where_it_reads(cut_short: tuple[str, str]) -> None:
    _, url = cut_short
    windows = DistillationWindows(url, ["a"], T, available=True)
    teacher = windows._cache().teacher("a")
    (first, named) = teacher.first_beyond(V - 1, windows.available["a"])
    assert named == V - 1
    assert teacher.first_beyond(V - 1, [(320, 384)])[0] >= 320 > first
    with pytest.raises(IncompleteCache):
        teacher.first_beyond(V - 1, [(200, 210)])
