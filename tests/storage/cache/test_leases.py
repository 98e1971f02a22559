"""Leases on shards: one holder at a time, free when the holder is gone, and never an obstacle to a worker."""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.caches import known
from support.servers.s3 import Bucket

import storage.cache.leases
from storage import LogitCache
from storage.cache.failures import Failures, failed_shard
from storage.cache.leases import LEASE_SECONDS, Leases, lease_name, leased_shard, leases_in
from storage.cache.verify import verify
from storage.stores import open_store

FOLDER = "teachers/a/receipts"
MakeLeases = Callable[[], Leases]


@pytest.fixture(params=["disk", "s3", "memory"])
def make_leases(request: pytest.FixtureRequest, tmp_path: Path) -> MakeLeases:
    """Makes the leases of one more worker on the same store."""
    if request.param == "disk":
        return lambda: leases_in(open_store(str(tmp_path / "cache")), FOLDER)
    if request.param == "memory":
        return lambda: leases_in(open_store(f"memory://{tmp_path.name}/cache"), FOLDER)
    bucket: Bucket = request.getfixturevalue("moto_bucket")
    return lambda: leases_in(open_store(f"{bucket.url}/cache"), FOLDER)


def test_one_holder_at_a_time(make_leases: MakeLeases) -> None:
    one, other = make_leases(), make_leases()
    assert one.exclusive
    assert one.take(3)
    assert other.is_held(3)
    assert not other.take(3)
    assert other.take(4), "another shard is another lease"
    one.keep()
    other.release(3)
    assert other.is_held(3), "only its holder releases it"
    one.release(3)
    assert not other.is_held(3)
    assert other.take(3)
    other.release(3)
    other.release(4)
    one.release(5)


def test_a_lock_on_a_file_that_its_holder_removed_is_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and lock of one worker the holder releases, and a third takes the lease in a new file."""
    one, other, third = (leases_in(open_store(str(tmp_path / "cache")), FOLDER) for _ in range(3))
    assert one.take(3)
    lock, meanwhile = storage.cache.leases._LocalLocks._lock, [True]

    def late(self: Leases, descriptor: int) -> bool:
        if self is other and meanwhile and meanwhile.pop():
            one.release(3)
            assert third.take(3)
        return lock(self, descriptor)

    monkeypatch.setattr(storage.cache.leases._LocalLocks, "_lock", late)
    assert not other.take(3)
    assert not meanwhile
    third.release(3)


def _hold(url: str, ready: object) -> None:
    assert leases_in(open_store(url), FOLDER).take(3)
    ready.set()  # type: ignore[attr-defined]
    time.sleep(600)


@pytest.mark.parametrize("store", [False, True])
def test_a_killed_holder_holds_nothing(store: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = str(tmp_path / "cache")
    if store:
        bucket: Bucket = request.getfixturevalue("moto_bucket")
        url = f"{bucket.url}/cache"
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(url, ready), daemon=True)
    holder.start()
    assert ready.wait(60)
    leases = leases_in(open_store(url), FOLDER)
    assert not leases.take(3)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert not leases.is_held(3), "though its parent has not reaped it yet"
    holder.join()
    assert open_store(url).read(f"{FOLDER}/{lease_name(3)}", 4096) is not None, "its file is still there"
    assert not leases.is_held(3)
    assert leases.take(3)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass, for leases alone."""
    passed = 0.0
    clock = SimpleNamespace(
        time=lambda: time.time() + passed, monotonic=lambda: time.monotonic() + passed, sleep=time.sleep
    )
    monkeypatch.setattr(storage.cache.leases, "time", clock)

    def more(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    return more


def test_a_lease_expires_unless_it_is_renewed(make_leases: MakeLeases, passes: Callable[[float], None]) -> None:
    """So a worker that hangs, whose process lives and on a disk keeps its lock, holds a shard for so long only."""
    one, other = make_leases(), make_leases()
    assert one.take(3)
    for _ in range(20):  # batches
        passes(LEASE_SECONDS / 10)
        one.keep()
    assert not other.take(3), "it was renewed"
    assert other.is_held(3)
    passes(LEASE_SECONDS + 1)
    assert not other.is_held(3)
    assert other.take(3)
    assert not one.take(3)
    one.keep()
    one.release(3)
    assert one.is_held(3), "one that another worker took over is left to it"
    other.release(3)
    assert not one.is_held(3)


def test_a_worker_that_hangs_in_a_commit_holds_its_own_shard_only(
    tmp_path: Path, passes: Callable[[float], None]
) -> None:
    one, other = (leases_in(open_store(str(tmp_path / "cache")), FOLDER) for _ in range(2))

    def commit(shard: int) -> None:
        with other.committing(shard):
            pass

    with concurrent.futures.ThreadPoolExecutor(2) as pool, one.committing(3):
        pool.submit(commit, 4).result(20)
        waits = pool.submit(commit, 3)
        with pytest.raises(TimeoutError):
            waits.result(0.3)
        passes(LEASE_SECONDS + 1)
        waits.result(20)


def test_another_users_worker_holds_its_shard_as_long_as_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file can be read and removed, and not be written."""
    one, other = (leases_in(open_store(str(tmp_path / "cache")), FOLDER) for _ in range(2))
    assert one.take(3)
    path = str(tmp_path / "cache" / FOLDER / lease_name(3))
    created, opened = os.stat(path), os.open

    def refuses(name: object, flags: int, *mode: int) -> int:
        theirs = str(name) == path and os.path.exists(path) and os.path.samestat(os.stat(path), created)
        if theirs and flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", path)
        return opened(name, flags, *mode)  # type: ignore[arg-type]

    monkeypatch.setattr(storage.cache.leases.os, "open", refuses)
    assert not other.take(3)
    os.close(one._files.pop(3))  # type: ignore[attr-defined]
    assert other.take(3), "it was killed, and its file is a leftover"
    assert not one.is_held(4)
    assert one.is_held(3)


def test_the_lease_of_a_worker_with_long_batches_lasts_for_several(
    make_leases: MakeLeases, passes: Callable[[float], None]
) -> None:
    one, other = make_leases(), make_leases()
    assert one.take(3)
    passes(0.9 * LEASE_SECONDS)
    one.keep()
    passes(2 * LEASE_SECONDS)
    assert not other.take(3)
    passes(2 * LEASE_SECONDS)
    assert other.take(3)


def test_a_lock_of_an_earlier_version_holds_as_long_as_its_process(tmp_path: Path) -> None:
    """Its file is empty."""
    path = tmp_path / "cache" / FOLDER / lease_name(3)
    path.parent.mkdir(parents=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        leases = leases_in(open_store(str(tmp_path / "cache")), FOLDER)
        assert leases.is_held(3)
        assert not leases.take(3)
    assert leases.take(3)


def test_a_lease_whose_response_was_lost_is_its_makers(moto_bucket: Bucket) -> None:
    leases = leases_in(open_store(f"{moto_bucket.url}/cache"), FOLDER)
    assert leases.take(3)
    assert leases.take(3), "the store already has it, and it is this worker's"


def test_a_malformed_lease_stops_nobody(moto_bucket: Bucket) -> None:
    store = open_store(f"{moto_bucket.url}/cache")
    no_number = json.dumps({"holder": "another", "process": None, "until": str(time.time() + 60)}).encode()
    texts = (b"", b"[]", b"{}", b'{"until": "x"}', b'{"until": 1e300}', b'{"holder": 1, "until": 1e300}', b"[" * 4000)
    for text in (*texts, no_number):
        store.replace(f"{FOLDER}/{lease_name(3)}", text)
        assert leases_in(store, FOLDER).take(3), text


def test_leases_and_notes_are_leftovers_that_nobody_reads(source: Path) -> None:
    """Beside a complete entry: it reads the same, `verify` names them, and `--repair` removes those not held."""
    store = open_store(str(source))
    leases, failures = leases_in(store, FOLDER), Failures(store, FOLDER)
    assert leases.take(1)
    failures.record(2, 3, "RuntimeError: out of memory")
    cache = LogitCache.open(str(source))
    assert cache.teacher("a").missing() == []
    cache.teacher("a").read(0, known.N)
    names = [lease_name(1), "00000002.failed.json"]
    found = verify(str(source), deep=True)
    assert found.problems == []
    assert sorted(found.leftovers) == sorted(str(source / FOLDER / name) for name in names)
    verify(str(source), repair=True)
    assert failures.read(2) is None
    assert leases.is_held(1), "a lease that a worker holds is left alone"
    leases.release(1)


def test_notes_on_failed_shards(tmp_path: Path) -> None:
    failures = Failures(open_store(str(tmp_path / "cache")), FOLDER)
    assert failures.read(2) is None
    failures.forget(2)
    failures.record(2, 3, "x" * 10_000)
    note = failures.read(2)
    assert note is not None
    assert (note.shard, note.attempts, len(note.error)) == (2, 3, 4_000)
    path = tmp_path / "cache" / FOLDER / "00000002.failed.json"
    for text in ("{}", "[]", "no JSON", path.read_text().replace('"shard": 2', '"shard": 7')):
        path.write_text(text)
        assert failures.read(2) is None
    failures.forget(2)
    assert not path.exists()


def test_names() -> None:
    assert leased_shard(lease_name(7)) == 7
    assert failed_shard("00000007.failed.json") == 7
    for name in ("00000007.json", "7.claim", "index.json", "x.claim", "00000007.failed.json.partial"):
        assert leased_shard(name) is None
        assert failed_shard(name) is None
