"""The order in which ids are sampled: one for an entry, made once, there before its shards, and never replaced."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches import known
from support.crash_disk import Crash, Disk

from storage import LogitCache
from storage.cache.entries import remove_entry, rename_entry
from storage.cache.verify import verify
from storage.cache.writer import EntryWriter, ShardWriter
from storage.errors import CorruptCache, FormatError, IncompleteCache
from storage.stores import open_store
from storage.transfer.copy import CopyJob, prepare

OBJECT, RECEIPT = "teachers/v2/sampling_order/c/0", "teachers/v2/receipts/sampling_order/00000000.json"
GONE = "missing, though ids were sampled in this order"


def other_order() -> np.ndarray:
    return known.order()[::-1]


def never() -> np.ndarray:
    raise AssertionError("it is made once")


def open_writer(url: str | Path) -> EntryWriter:
    return EntryWriter.open(str(url), "v2", known.entries(known.write_stream(url))["v2"])


def order_of(url: str | Path) -> Any:
    return LogitCache.open(str(url)).teacher("v2").sampling_order()


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_of_two_workers_that_make_one_the_first_commits_it(scheme: str, tmp_path: Path) -> None:
    """Also where the second is about to write when the first does: its order is no damage, and not kept."""
    url = f"{scheme}://{tmp_path}/cache"
    first, second = open_writer(url), open_writer(url)
    with pytest.raises(IncompleteCache, match="sampling_order"):
        order_of(url)

    def late() -> np.ndarray:
        assert np.array_equal(first.sampling_order(known.order), known.order())
        return other_order()

    assert np.array_equal(second.sampling_order(late), known.order())
    for again in (first, second, open_writer(url)):
        assert np.array_equal(again.sampling_order(never), known.order())
    assert np.array_equal(order_of(url), known.order())
    assert known.write_shards(url, []).sampling_order(never) is None, "ids lie in their own order"
    found = verify(url, deep=True)
    assert (found.problems, found.leftovers) == ([], [])


def test_no_shard_is_committed_before_it(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    with pytest.raises(FormatError, match="shard 0 is not written: the entry has no sampling_order yet"):
        writer.commit(0, known.rows(writer.entry, 0))
    writer.sampling_order(known.order)
    writer.commit(0, known.rows(writer.entry, 0))


def test_killed_at_any_step_it_is_made_again_or_found(tmp_path: Path) -> None:
    """Between the record and the order, between its object and its receipt: what a worker got is what all get."""

    def worker(root: Path, disk: Disk, order: Any, dies_at: int | None) -> Any:
        got = None
        with disk.process(dies_at), contextlib.suppress(Crash):
            got = open_writer(root).sampling_order(order)
        return got

    base = tmp_path / "whole"
    base.mkdir()
    undisturbed = Disk(base, tmp_path / "graves")
    worker(base / "cache", undisturbed, known.order, None)
    steps = len(undisturbed.steps)
    assert steps > 40
    for dies_at in range(steps - 30, steps):
        root = tmp_path / str(dies_at)
        root.mkdir()
        disk = Disk(root, tmp_path / f"graves-{dies_at}")
        assert worker(root / "cache", disk, other_order, dies_at) is None
        disk.cut_power(lambda: False)
        got = worker(root / "cache", disk, known.order, None)
        assert np.array_equal(order_of(root / "cache"), got)
        assert np.array_equal(got, known.order()) or np.array_equal(got, other_order())
        assert verify(str(root / "cache"), deep=True).problems == []


def test_a_lost_or_damaged_one_is_found_never_made_again_and_brought_back_by_a_copy(
    source: Path, tmp_path: Path
) -> None:
    url, path = str(source), source / OBJECT
    with prepare(CopyJob(source=url, target=str(tmp_path / "kept"))) as transfer:
        transfer.deliver()
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!!")
    with pytest.raises(CorruptCache, match=OBJECT):
        order_of(url)
    assert [OBJECT in problem for problem in verify(url).problems] == [True]
    verify(url, repair=True)
    assert not (source / RECEIPT).exists()
    assert [GONE in problem for problem in verify(url).problems] == [True]
    assert len(LogitCache.open(url).teacher("v2").read(0, known.N)) == known.N, "students do not need it"
    with pytest.raises(CorruptCache, match=GONE):
        EntryWriter.open(url, "v2", known.entries(LogitCache.open(url).record)["v2"]).sampling_order(never)
    with prepare(CopyJob(source=str(tmp_path / "kept"), target=url)) as transfer:
        transfer.deliver()
    assert np.array_equal(order_of(url), known.order())
    assert verify(url, deep=True).problems == []


def test_one_that_is_missing_before_any_shard_is_no_damage(tmp_path: Path) -> None:
    open_writer(tmp_path)
    found = verify(str(tmp_path))
    assert found.problems == []
    assert found.missing == {"teachers/v2/sampling_order": [(0, known.V)], "teachers/v2": [(0, known.N)]}


def test_one_that_is_no_order_is_refused(tmp_path: Path) -> None:
    writer = open_writer(tmp_path)
    array = LogitCache.open(str(tmp_path)).teacher("v2").order
    assert array is not None
    twice = known.order().copy()
    twice[3] = twice[4]
    foreign = ShardWriter(array.receipts)
    foreign.prepare()
    foreign.commit(0, {array.spec.name: twice})
    for read in (lambda: order_of(tmp_path), lambda: writer.sampling_order(never)):
        with pytest.raises(CorruptCache, match=f"sampling_order: it does not hold each of the {known.V} ids once"):
            read()


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_it_goes_with_its_entry(scheme: str, source: Path, tmp_path: Path) -> None:
    url = f"{scheme}://{tmp_path}/copy"
    with prepare(CopyJob(source=str(source), target=url, teachers=("v2",))) as transfer:
        assert transfer.deliver().teachers == ["v2"]
    rename_entry(url, "v2", "renamed")
    teacher = LogitCache.open(url).teacher("renamed")
    assert np.array_equal(teacher.sampling_order(), known.order())
    assert teacher.stored_bytes() == sum(size for key, size in open_store(url).walk("teachers").items() if "/c/" in key)
    found = verify(url, deep=True)
    assert (found.problems, found.leftovers, found.missing) == ([], [], {})
    remove_entry(url, "renamed")
    assert open_store(url).walk("teachers/renamed") == {}
