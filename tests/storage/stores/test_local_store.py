"""Publishing on a local disk: atomic, never over another object, fsynced in the right order."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import storage.stores.remote
from storage.errors import CorruptCache, InputError, MissingObject, StorageFull
from storage.locks import LOCK, locked
from storage.stores import open_store
from storage.stores.base import check_key
from storage.stores.doctor import examine
from storage.stores.local import LocalStore
from storage.stores.remote import RemoteStore


def raising(error: OSError) -> Any:
    """A call of the system that fails."""

    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of syncs, links and renames from now on."""
    events: list[str] = []
    fsync, link, replace = os.fsync, os.link, os.replace

    def log_fsync(descriptor: int) -> None:
        events.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def log(name: str, call: Any) -> Any:
        def logged(*arguments: Any) -> None:
            events.append(name)
            call(*arguments)

        return logged

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "link", log("link", link))
    monkeypatch.setattr(os, "replace", log("replace", replace))
    return events


def test_a_file_is_synced_before_it_has_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    events = recorded(monkeypatch)
    assert store.publish("one", b"1")
    assert events == ["sync file", "link", "sync folder"]
    events.clear()
    store.replace("one", b"2")
    assert events == ["sync file", "replace", "sync folder"]


def test_new_folders_are_synced_into_their_parents_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = recorded(monkeypatch)
    LocalStore(tmp_path).publish("a/b/c", b"1")
    assert events == ["sync folder", "sync folder", "sync file", "link", "sync folder"]


def test_a_name_taken_at_the_last_moment_is_not_replaced_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker publishes between the check and the link."""
    store = LocalStore(tmp_path)
    monkeypatch.setattr(Path, "exists", lambda self: self == tmp_path)
    (tmp_path / "key").write_bytes(b"theirs")
    assert not store.publish("key", b"ours")
    assert (tmp_path / "key").read_bytes() == b"theirs"
    assert sorted(os.listdir(tmp_path)) == ["key"]


@pytest.mark.parametrize("without_links", [False, True])
def test_a_taken_name_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_links: bool) -> None:
    if without_links:
        monkeypatch.setattr(os, "link", raising(PermissionError(1, "Operation not permitted")))
    store = LocalStore(tmp_path)
    assert store.publish("key", b"first")
    assert not store.publish("key", b"second")
    assert store.read("key") == b"first"
    assert store.names("") == ["key"]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO])
def test_file_systems_that_sync_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    store = LocalStore(tmp_path)
    if error == errno.EIO:  # a failure of the disk is no lack of a feature
        with pytest.raises(OSError, match="error"):
            store.publish("key", b"data")
        return
    assert store.publish("key", b"data")
    assert store.read("key") == b"data"
    assert {item.name: item.state for item in examine(str(tmp_path))}["sync to disk"] == "not"


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EROFS, errno.ENAMETOOLONG])
def test_what_a_file_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    for name in ("link", "rename"):
        monkeypatch.setattr(os, name, raising(OSError(error, os.strerror(error))))
    with pytest.raises(InputError, match=r"cannot write .*; choose a writable folder"):
        LocalStore(tmp_path).publish("key", b"data")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.publish("a/b", b"data")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("/a"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        store.walk()
    assert store.walk("nowhere") == {}


def test_a_lock_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left by a killed job in a folder that both may write: it can be read, and so locked, but not removed."""
    path = tmp_path / LOCK
    path.write_text("7")
    call = os.open

    def refuse(name: Any, flags: int, *arguments: Any) -> int:
        if str(name) == str(path) and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return call(name, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "unlink", raising(PermissionError(errno.EPERM, "Operation not permitted")))
    with locked(tmp_path, "a job"), pytest.raises(InputError, match="a job is at work"), locked(tmp_path, "a job"):
        pass
    with locked(tmp_path, "a job"):
        pass


@pytest.mark.parametrize("failing", [("fsync",), ("link", "rename")])
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[str, ...]
) -> None:
    for name in failing:
        monkeypatch.setattr(os, name, raising(OSError(28, "No space left on device")))
    with pytest.raises(StorageFull, match="no space left"):
        LocalStore(tmp_path).publish("key", b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (FileNotFoundError("key"), MissingObject, r"/key: missing, though its receipt exists"),
        (CorruptCache("key: other bytes"), CorruptCache, r"^key: other bytes"),
    ],
)
def test_an_object_that_must_exist_is_retried_across_a_network_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    failure: Exception,
    expected: type[CorruptCache],
    message: str,
) -> None:
    monkeypatch.setattr(storage.stores.remote, "_INSIST_PAUSE_S", 0.0)
    store = open_store(str(tmp_path) if kind == "folder" else f"memory://{tmp_path.name}")
    most, promise = 1 if kind == "folder" else 3, "its receipt exists"

    def failing(times: int) -> Callable[[], str]:
        answers = [failure] * times

        def request() -> str:
            if answers:
                raise answers.pop()
            return "right"

        return request

    for times in range(most):
        assert store.insist("key", promise, failing(times)) == "right"
    with pytest.raises(expected, match=message + (r" \(asked 3 times\)$" if most == 3 else "$")) as raised:
        store.insist("key", promise, failing(most))
    assert type(raised.value) is expected


@pytest.mark.parametrize("conditional", [True, False])
def test_publishing_a_new_object_checks_first_only_where_puts_have_no_condition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    store = open_store(f"memory://{tmp_path.name}")
    asked: list[str] = []
    put, size = RemoteStore._put, RemoteStore.size

    def log_put(self: RemoteStore, key: str, data: bytes, **mode: str) -> None:
        asked.append("create" if mode else "put")
        if mode and not conditional:
            raise NotImplementedError
        put(self, key, data, **mode)

    def log_size(self: RemoteStore, key: str) -> int | None:
        asked.append("look")
        return size(self, key)

    monkeypatch.setattr(RemoteStore, "_put", log_put)
    monkeypatch.setattr(RemoteStore, "size", log_size)
    assert store.publish_new("a", b"1")
    assert asked == (["create"] if conditional else ["create", "look", "put"])
    asked.clear()
    assert not store.publish_new("a", b"2")
    assert asked == (["create"] if conditional else ["look"])
    asked.clear()
    assert store.publish("b", b"1")
    assert asked == ["look", "create" if conditional else "put"]
    assert store.read("a") == b"1"


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "A", "a b", "a\\b", "a:b"])
def test_keys_that_could_leave_the_cache(key: str) -> None:
    with pytest.raises(InputError):
        check_key(key)
