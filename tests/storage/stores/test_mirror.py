"""Local copies of remote shards: fetched once, checked before use, bounded, healed, and never trusted."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from support.caches.small import make_corpus, make_entry, random_stream, write_entry
from support.caches.two_entries import Stream
from support.servers.web import serving

from storage import LogitCache
from storage.errors import CorruptCache, InputError, LogitCacheError
from storage.stores.mirror import _sweep
from storage.stores.remote import RemoteStore

V, N, K = 97, 640, 9
OBJECT = "teachers/a/token_ids/c/1/0"


@pytest.fixture(scope="module")
def truth() -> Stream:
    return random_stream(V, N, K)


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGIT_CACHE_LOCAL_DIR", str(tmp_path / "copies"))
    monkeypatch.setattr("storage.stores.remote._INSIST_PAUSE_S", 0.0)
    return tmp_path / "copies"


@pytest.fixture
def url(tmp_path: Path, copies: Path, truth: Stream) -> str:
    url = f"memory://{tmp_path.name}/cache"
    record = make_corpus(url, truth[0], V)
    write_entry(url, "a", make_entry(record, K, shard_tokens=128, chunk_tokens=32), truth[1])
    return url


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of all whole-object reads from the store, from now on."""
    keys: list[str] = []
    read = RemoteStore.read

    def log(self: RemoteStore, key: str, *limits: Any) -> bytes:
        keys.append(key)
        return read(self, key, *limits)

    monkeypatch.setattr(RemoteStore, "read", log)
    return keys


def copy_of(copies: Path, key: str) -> Path:
    (folder,) = (copies / "objects").iterdir()
    return folder / key


def ids(url: str) -> np.ndarray:
    return LogitCache.open(url).teacher("a").read(0, N).token_ids


def test_every_object_is_fetched_once(url: str, asked: list[str], truth: Stream) -> None:
    for _ in range(2):
        assert np.array_equal(ids(url), truth[1].token_ids)
        assert np.array_equal(LogitCache.open(url).tokens.read(0, N), truth[0])
    objects = [key for key in asked if "/c/" in key]
    assert len(objects) == len(set(objects)) == 5 * 9 + 1


def test_one_request_for_the_receipt_of_a_shard(url: str, asked: list[str]) -> None:
    LogitCache.open(url).teacher("a").read(130, 140)
    assert asked.count("teachers/a/receipts/00000001.json") == 1


def read_in_a_process(url: str, start: Any, results: Any) -> None:
    start.wait()
    results.put(int(ids(url).sum()))


@pytest.mark.parametrize("fault", ["flipped", "emptied", "deleted", "swapped"])
def test_a_damaged_copy_is_fetched_again(url: str, copies: Path, asked: list[str], truth: Stream, fault: str) -> None:
    ids(url)
    path = copy_of(copies, OBJECT)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    if fault == "deleted":
        path.unlink()
    else:
        other = path.parent.parent / "2" / "0"
        path.write_bytes({"flipped": bytes(data), "emptied": b"", "swapped": other.read_bytes()}[fault])
    asked.clear()
    assert np.array_equal(ids(url), truth[1].token_ids)
    assert asked.count(OBJECT) == 1


def test_a_copy_that_is_evicted_under_its_reader_is_fetched_again(url: str, copies: Path, truth: Stream) -> None:
    cache = LogitCache.open(url)
    cache.teacher("a").read(128, 160)
    for path in copy_of(copies, "teachers/a").rglob("c/1*"):
        if path.is_file():
            path.unlink()
    copy_of(copies, OBJECT).unlink()
    # Another chunk of the shard that was checked before: zarr alone would return fill values.
    assert np.array_equal(cache.teacher("a").read(160, 256).token_ids, truth[1].token_ids[160:256])


@pytest.mark.parametrize(
    "make", [lambda data: b"", lambda data: data[:-1], lambda data: data + b"x", lambda data: None]
)
def test_a_wrong_object_of_the_store_is_an_error_that_names_it(url: str, make: Callable[[bytes], bytes | None]) -> None:
    memory = fsspec.filesystem("memory")
    path = f"{url.removeprefix('memory:/')}/{OBJECT}"
    data = make(memory.cat_file(path))
    memory.rm_file(path)
    if data is not None:
        memory.pipe_file(path, data)
    with pytest.raises(CorruptCache, match=OBJECT):
        ids(url)
    assert np.array_equal(LogitCache.open(url).teacher("a").read(0, 128).start, 0)


def test_a_spurious_answer_is_retried(url: str, monkeypatch: pytest.MonkeyPatch, truth: Stream) -> None:
    read = RemoteStore.read
    answers: dict[str, int] = {}

    def flaky(self: RemoteStore, key: str, *limits: Any) -> bytes:
        count = answers[key] = answers.get(key, 0) + 1
        if "/c/" in key and count == 1:
            raise FileNotFoundError(key)
        return b"" if "/c/" in key and count == 2 else read(self, key, *limits)

    monkeypatch.setattr(RemoteStore, "read", flaky)
    assert np.array_equal(ids(url), truth[1].token_ids)


def test_copies_are_bounded(url: str, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.stores.mirror._IN_USE_S", 0.2)
    monkeypatch.setenv("LOGIT_CACHE_LOCAL_BYTES", "3000")
    cache = LogitCache.open(url)
    for start in range(0, N, 128):
        cache.teacher("a").read(start, start + 128)
        time.sleep(0.25)
        held = sum(path.stat().st_size for path in copies.rglob("*") if path.is_file() and path.name != "zarr.json")
        assert held < 3000 + 9 * 1400, "the bound, and the copies in use at the last sweep"


def test_processes_fetch_one_object_once(tmp_path: Path, copies: Path, truth: Stream) -> None:
    # memory:// belongs to one process, so a web server serves as the store.
    folder = tmp_path / "served"
    record = make_corpus(str(folder), truth[0], V)
    write_entry(folder, "a", make_entry(record, K, shard_tokens=128, chunk_tokens=32), truth[1])
    with serving(folder) as (url, server):
        context = multiprocessing.get_context("spawn")
        start, results = context.Barrier(3), context.Queue()
        workers = [context.Process(target=read_in_a_process, args=(url, start, results)) for _ in range(3)]
        for worker in workers:
            worker.start()
        sums = {results.get(timeout=60) for _ in workers}
        for worker in workers:
            worker.join()
    assert sums == {int(truth[1].token_ids.sum())}
    objects = [path for method, path in server.asked if method == "GET" and "/c/" in path]
    assert len(objects) == len(set(objects)) == 5 * 9


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_bad_bound_is_refused(url: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGIT_CACHE_LOCAL_BYTES", value)
    with pytest.raises(InputError, match="LOGIT_CACHE_LOCAL_BYTES"):
        ids(url)


def test_a_folder_that_cannot_be_written_is_one_clear_error(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOGIT_CACHE_LOCAL_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(LogitCacheError, match="LOGIT_CACHE_LOCAL_DIR"):
        ids(url)


def refusing(
    monkeypatch: pytest.MonkeyPatch, name: str, hit: Callable[..., bool], error: int = errno.EPERM
) -> list[int]:
    """Make calls of `os.<name>` fail as the system does for another user's files, or a read-only mount."""
    call, hits = getattr(os, name), []

    def refuse(path: Any, *arguments: Any, **others: Any) -> Any:
        if hit(str(path), *arguments):
            hits.append(1)
            raise OSError(error, os.strerror(error), str(path))
        return call(path, *arguments, **others)

    monkeypatch.setattr(os, name, refuse)
    return hits


@pytest.mark.parametrize("error", [errno.EPERM, errno.EROFS])
def test_copies_that_another_user_made_are_read(
    url: str, monkeypatch: pytest.MonkeyPatch, truth: Stream, error: int
) -> None:
    """Nobody else may set their time of access, nor may anybody on a mount for reading only."""
    ids(url)
    hits = refusing(monkeypatch, "utime", lambda path, *_: True, error)
    assert np.array_equal(ids(url), truth[1].token_ids)
    assert hits


def test_what_another_user_holds_is_left_there(
    url: str, copies: Path, monkeypatch: pytest.MonkeyPatch, truth: Stream
) -> None:
    ids(url)
    path = copy_of(copies, OBJECT)
    path.write_bytes(b"damaged")
    for file in copies.rglob("*"):
        os.utime(file, (0, 0))
    hits = refusing(monkeypatch, "unlink", lambda name, *_: name == str(path))
    _sweep(copies / "objects", 0)
    assert [file for file in (copies / "objects").rglob("*") if file.is_file()] == [path]
    assert np.array_equal(ids(url), truth[1].token_ids), "what cannot be removed is replaced"
    assert hits


def test_the_lock_of_another_user_is_held_for_reading(
    url: str, copies: Path, monkeypatch: pytest.MonkeyPatch, truth: Stream
) -> None:
    mask = os.umask(0o002)
    try:
        ids(url)
    finally:
        os.umask(mask)
    locks = list((copies / "locks").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in locks} == {0o664}, "as the umask says: a group can share them"
    copy_of(copies, OBJECT).unlink()
    hits = refusing(
        monkeypatch, "open", lambda path, flags, *_: "/locks/" in path and bool(flags & os.O_RDWR), errno.EACCES
    )
    assert np.array_equal(ids(url), truth[1].token_ids)
    assert hits


def test_killed_downloads_are_removed_in_time(url: str, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids(url)
    left = copy_of(copies, "teachers/a/entropy/c/9.77-beef.partial")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    copy_of(copies, OBJECT).unlink()
    ids(url)
    assert not left.exists()
