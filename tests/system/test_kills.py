"""Writers that are killed, and machines that lose power: what was committed stays, the rest is done again.

Kill points are every step that a writer takes on the disk. A killed process leaves what it has written; a machine that
loses power leaves only what was synced.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.caches import known
from support.commands import TESTS, Run, environment
from support.crash_disk import Crash, Disk

from storage import LogitCache
from storage.cache.leases import SUFFIX
from storage.cache.verify import verify
from storage.cache.writer import EntryWriter
from storage.errors import IncompleteCache
from storage.format.manifest.cache import CacheRecord

pytestmark = pytest.mark.usefixtures("encoded_once")
SHARD = 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed cache."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    known.write_whole(path)
    return known.contents(path)


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, CacheRecord]:
    """A stream and the first shard of an entry."""
    path = tmp_path / "base"
    record = known.write_stream(path)
    known.write_shards(path, [0])
    return path, record


Act = Callable[[Path, CacheRecord], object]


def commit(path: Path, record: CacheRecord) -> None:
    """One shard."""
    entry = known.entries(record)["a"]
    EntryWriter.open(str(path), "a", entry).commit(SHARD, known.rows(entry, SHARD))


def resume(path: Path, record: CacheRecord) -> None:
    """All that is missing, and the index."""
    known.complete(EntryWriter.open(str(path), "a", known.entries(record)["a"]))


def steps_of(act: Act, base: Path, record: CacheRecord, folder: Path) -> list[str]:
    """Everything that an act does on the disk."""
    path = Path(shutil.copytree(base, folder / "counted"))
    disk = Disk(path, folder / "counted-graves")
    with disk.process():
        act(path, record)
    return list(disk.steps)


def check_before_or_after(path: Path, record: CacheRecord) -> bool:
    """The first shard is there, the second is or is not, leftovers are reported; returns whether it is."""
    entry = known.entries(record)["a"]
    opened = LogitCache.open(str(path))
    assert known.shard_part("a", entry, 0).outcome(opened) is None
    committed = (path / f"teachers/a/receipts/{SHARD:08d}.json").exists()
    outcome = known.shard_part("a", entry, SHARD).outcome(opened)
    assert (outcome is None) == committed
    assert committed or isinstance(outcome, IncompleteCache)
    found = verify(str(path), deep=True, workers=1)
    assert found.problems == []
    assert (known.SHARD, known.N) in found.missing["teachers/a"] or committed
    mine = [f"teachers/a/{spec.shard_key(SHARD)}" for spec in opened.teacher("a").specs.values()]
    expected = [key for key in known.contents(path) if key.endswith(".partial") or (key in mine and not committed)]
    leftovers = [address for address in found.leftovers if not address.endswith(SUFFIX)]
    assert sorted(leftovers) == sorted(str(path / key) for key in expected)
    return committed


def check_whole(path: Path, record: CacheRecord, whole: dict[str, bytes]) -> None:
    """The entry is complete, and its arrays are those of an undisturbed run."""
    opened = LogitCache.open(str(path))
    assert opened.teacher("a").missing() == []
    found = verify(str(path), deep=False, workers=1)  # its bytes are compared below
    assert (found.problems, found.missing) == ([], {})
    assert all(address.endswith((".partial", SUFFIX)) for address in found.leftovers)
    others = ("teachers/b/", "teachers/v2/")
    arrays = {key: data for key, data in known.without_receipts(whole).items() if not key.startswith(others)}
    assert arrays_in(path) == arrays


def arrays_in(path: Path) -> dict[str, bytes]:
    """The files of a cache but receipts, leases and partial files."""
    files = known.without_receipts(known.contents(path))
    return {key: data for key, data in files.items() if not key.endswith((".partial", SUFFIX))}


def test_a_process_killed_at_each_step_of_a_commit(
    base: tuple[Path, CacheRecord], whole: dict[str, bytes], tmp_path: Path
) -> None:
    path, record = base
    steps = steps_of(commit, path, record, tmp_path)
    assert {step.split()[0] for step in steps} == {"mkdir", "create", "write", "sync", "link", "unlink"}
    # An object is published in six steps: each of them is met with one object or another, and all of the receipt's.
    tried = [at for at in range(len(steps)) if (at + at // 6) % 2 or at >= receipt_link(steps) - 6]
    committed = []
    for at in tried:
        victim = Path(shutil.copytree(path, tmp_path / f"killed-{at}"))
        disk = Disk(victim, tmp_path / f"graves-{at}")
        child = os.fork()
        if child == 0:
            with disk.process(at, die=lambda: os._exit(9)):
                commit(victim, record)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        committed.append(check_before_or_after(victim, record))
        resume(victim, record)
        check_whole(victim, record, whole)
        shutil.rmtree(victim)
    # The receipt's link is the step that commits.
    assert committed == [at > receipt_link(steps) for at in tried]


def receipt_link(steps: list[str]) -> int:
    return steps.index(f"link teachers/a/receipts/{SHARD:08d}.json")


def test_a_machine_that_loses_power_at_each_step_of_a_commit(
    base: tuple[Path, CacheRecord], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """In half of the cases the next run ends before the power goes: what it relied on must be synced, too."""
    path, record = base
    steps = steps_of(commit, path, record, tmp_path)
    for at in range(len(steps)):
        # An object is published in six steps; each of them meets both cases, with one object or another.
        resumed_first = bool((at + at // 6) % 2)
        victim = Path(shutil.copytree(path, tmp_path / f"cut-{at}"))
        disk = Disk(victim, tmp_path / f"graves-{at}")
        with pytest.raises(Crash), disk.process(at):
            commit(victim, record)
        if resumed_first:
            with disk.process():
                resume(victim, record)
            disk.cut_power(lambda: False)
        else:
            disk.cut_power(lambda: False)
            check_before_or_after(victim, record)
            resume(victim, record)
        check_whole(victim, record, whole)
        shutil.rmtree(victim)


def test_what_a_commit_returned_for_survives_a_loss_of_power(base: tuple[Path, CacheRecord], tmp_path: Path) -> None:
    path, record = base
    disk = Disk(path, tmp_path / "graves")
    with disk.process():
        commit(path, record)
    disk.cut_power(lambda: False)
    assert check_before_or_after(path, record)


@pytest.mark.slow
def test_every_step_of_making_a_whole_cache(whole: dict[str, bytes], tmp_path: Path) -> None:
    """From the first folder to the last index; killed, or without power, or resumed and then without power."""
    top = tmp_path / "counted"
    top.mkdir()
    disk = Disk(top, tmp_path / "graves")
    with disk.process():
        known.write_whole(top / "cache")
    expected = known.without_receipts(whole)
    for at in range(len(disk.steps)):
        # An object is published in six steps; each of them meets each fault, with one object or another.
        fault = ("killed", "power", "resumed, then power")[(at + at // 6) % 3]
        top = tmp_path / f"{at}"
        top.mkdir()
        path, disk = top / "cache", Disk(top, tmp_path / f"{at}-graves")
        with pytest.raises(Crash), disk.process(at):
            known.write_whole(path)
        if fault == "power":
            disk.cut_power(lambda: False)
        with disk.process():
            known.write_whole(path)
        if fault == "resumed, then power":
            disk.cut_power(lambda: False)
        found = verify(str(path), deep=True, workers=1)
        assert (found.problems, found.missing) == ([], {}), (at, fault)
        assert all(address.endswith((".partial", SUFFIX)) for address in found.leftovers)
        assert arrays_in(path) == expected
        shutil.rmtree(top)


@pytest.mark.parametrize("kills", [pytest.param(30, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)])
def test_kills_at_random_moments(make_teacher: Callable[..., Path], run: Run, tmp_path: Path, kills: int) -> None:
    """The entry function of `cache-logits` in forked children: nothing corrupt, nothing lost, the same bytes."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of {i * i}: {i % 7} and {i % 11}\n" for i in range(300)), encoding="utf-8")
    cache = tmp_path / "cache"
    done = run("logit-cache", "tokenize", "--text", text, "--train-tokenizer", 300, "--out", cache)
    assert done.returncode == 0, done.stderr
    teacher = make_teacher(0, vocabulary_size=300, n_embd=16, n_positions=32)
    folder = tmp_path / "work"
    folder.mkdir()
    loop = [sys.executable, str(TESTS / "support/programs/kill_loop.py")]
    done = subprocess.run(
        [*loop, str(cache), str(teacher), str(folder), str(kills)],
        capture_output=True, text=True, env=environment(), timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print("\n" + done.stdout)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] >= kills
    assert seen["most_threads"] == 1
    # Not all of them before there was anything to lose.
    assert seen["kills_after_a_commit"] >= kills // 4
    assert seen["kills_with_leftovers"] >= 1
