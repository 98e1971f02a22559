"""`logit-cache doctor` finds the guarantees that a store lacks, and leaves nothing behind.

Each store of the tests breaks one guarantee; the doctor must find that one and no other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from support.commands import Run, refused
from support.servers.fault_proxy import Fault, FaultProxy
from support.servers.s3 import Bucket, use
from support.servers.web import serving

import storage.stores.doctor
from storage.errors import InputError, StoreUnavailable
from storage.stores.doctor import Finding, examine, safe_to_write
from storage.stores.local import LocalStore


def broken(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.state == "not"]


class Torn(LocalStore):
    """Overwrites in place, in two steps."""

    def replace(self, key: str, data: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(0.005)
            file.write(data[len(data) // 2 :])
            file.truncate()


class Deleting(LocalStore):
    """Removes the old version before it writes the new one."""

    def replace(self, key: str, data: bytes) -> None:
        self._path(key).unlink(missing_ok=True)
        time.sleep(0.005)
        super().replace(key, data)


class Careless(LocalStore):
    """Refuses a taken name, but by a check that is not part of the write."""

    def create(self, key: str, data: bytes) -> bool:
        if self._path(key).exists():
            return False
        time.sleep(0.01)
        self.replace(key, data)
        return True


class Unconditional(LocalStore):
    """Ignores the condition, as some S3 servers do."""

    def create(self, key: str, data: bytes) -> bool:
        self.replace(key, data)
        return True


class NoCondition(LocalStore):
    def create(self, key: str, data: bytes) -> bool:
        raise NotImplementedError


class Late(LocalStore):
    """Lists only objects older than 0.2 s."""

    def walk(self, prefix: str = "") -> dict[str, int]:
        found = super().walk(prefix)
        return {k: v for k, v in found.items() if time.time() - self._path(k).stat().st_mtime > 0.2}


class WholeOnly(LocalStore):
    """Ignores ranges."""

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(key) for _ in ranges]


class Undeletable(LocalStore):
    def remove(self, key: str) -> None:
        """Returns without removing the object."""


class Stale(LocalStore):
    """Always serves the first version of an object that was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._first: dict[str, bytes] = {}

    def read(self, key: str, at_most: int = 1 << 30) -> bytes:
        return self._first.setdefault(key, super().read(key, at_most))


class ReadOnly(LocalStore):
    def replace(self, key: str, data: bytes) -> None:
        raise StoreUnavailable("access refused")


STORES = [
    (Torn, "atomic overwrite", False),
    (Deleting, "atomic overwrite", False),
    (Late, "listing after a write", False),
    (WholeOnly, "range reads", False),
    (Stale, "write and read back", False),
    (ReadOnly, "write and read back", False),
    (Careless, "create only if absent", True),
    (Unconditional, "create only if absent", True),
    (NoCondition, "create only if absent", True),
    (Undeletable, "delete", True),
]


@pytest.mark.parametrize(("store", "name", "safe"), STORES)
def test_each_broken_guarantee_is_found(
    store: Callable[[Path], LocalStore], name: str, safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.stores.doctor, "open_store", lambda url: store(Path(url)))
    found = examine(str(tmp_path / "folder"))
    assert broken(found) == [name]
    assert safe_to_write(found) == safe
    assert os.listdir(tmp_path) == []


def test_a_sound_folder_and_nothing_left(tmp_path: Path) -> None:
    found = examine(str(tmp_path / "new" / "folder"))
    assert broken(found) == []
    assert {finding.name for finding in found if finding.state == "not applicable"} == {"damaged uploads refused"}
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").write_text("stays")
    examine(str(tmp_path))
    assert os.listdir(tmp_path) == ["mine"]


# What a file system may lack: the call that fails there, and how; the guarantee found broken; and whether a cache
# can be written all the same. A folder that cannot sync cannot be written at all.
LACKING = [
    ("os.link", PermissionError(1, "Operation not permitted"), "hard links", True),
    ("fcntl.flock", OSError(95, "Operation not supported"), "locks between processes", True),
    ("os.fsync", OSError(22, "Invalid argument"), "write and read back", False),
]


@pytest.mark.parametrize(("call", "error", "name", "safe"), LACKING)
def test_guarantees_that_a_file_system_may_lack(
    call: str, error: OSError, name: str, safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(call, refuse)
    found = examine(str(tmp_path))
    # Without links a race may have one winner by luck.
    assert [each for each in broken(found) if each != "create only if absent"] == [name]
    assert safe_to_write(found) == safe
    assert os.listdir(tmp_path) == []


def test_a_disk_with_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5 << 20}))
    found = examine(str(tmp_path))
    assert broken(found) == ["free space"]
    assert safe_to_write(found)


def test_on_moto(moto_bucket: Bucket, run: Run) -> None:
    """moto accepts an upload with a wrong checksum, and the doctor reports it."""
    done = run("logit-cache", "doctor", f"{moto_bucket.url}/runs", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    states = {item["name"]: item["state"] for item in found["findings"]}
    assert found["safe"]
    assert states.pop("damaged uploads refused") == "not"
    assert {name for name, state in states.items() if state == "ok"} == {
        "write and read back", "listing after a write", "range reads", "atomic overwrite", "create only if absent",
        "delete",
    }  # fmt: skip
    assert moto_bucket.objects() == {}


def test_a_server_that_ignores_the_condition(moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(moto_bucket.server.url) as proxy:
        use(monkeypatch, moto_bucket.server, proxy.url)
        proxy.faults.append(Fault("unconditional", "PUT"))
        found = examine(moto_bucket.url)
    assert broken(found) == ["create only if absent", "damaged uploads refused"]
    (finding,) = [finding for finding in found if finding.name == "create only if absent"]
    assert "a taken name was not refused" in finding.meaning
    assert "--worker" in finding.meaning
    assert moto_bucket.objects() == {}


def test_no_answer_is_no_finding(moto_bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed measurement does not pass, and the scratch folder is removed all the same."""
    monkeypatch.setenv("LOGIT_CACHE_PATIENCE_S", "0.5")
    with FaultProxy(moto_bucket.server.url) as proxy:
        use(monkeypatch, moto_bucket.server, proxy.url)
        proxy.faults += [Fault("503", "PUT", "/damaged-uploads-refused/"), Fault("503", "PUT", "/taken")]
        found = examine(moto_bucket.url)
        assert broken(found) == ["create only if absent", "damaged uploads refused"]
        proxy.reset()
        proxy.faults.append(Fault("403", "PUT"))
        found = examine(moto_bucket.url)
        assert broken(found) == ["write and read back"]
        assert "access refused" in found[0].meaning
        proxy.faults.append(Fault("403", "HEAD"))
        with pytest.raises(StoreUnavailable, match="access refused"):
            examine(moto_bucket.url)
    assert moto_bucket.objects() == {}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/zarr.json").write_bytes(bytes(range(200)))
    with serving(tmp_path) as (url, _):
        yield url


def test_a_web_server_is_examined_for_reading(web: str, run: Run) -> None:
    """Python's own web server ignores ranges."""
    found = examine(f"{web}/cache")
    assert {finding.name: finding.state for finding in found} == {
        "write and read back": "not", "read": "ok", "range reads": "not",
    }  # fmt: skip
    assert not safe_to_write(found)
    with pytest.raises(InputError, match="not there"):
        examine(f"{web}/nothing")
    done = run("logit-cache", "doctor", f"{web}/cache")
    assert done.returncode == 1
    assert "not be written here safely" in done.stdout


def test_the_command(tmp_path: Path, run: Run) -> None:
    done = run("logit-cache", "doctor", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ok   atomic overwrite" in done.stdout
    (tmp_path / "file").write_text("")
    refused(run("logit-cache", "doctor", "s4://bucket"), "s4")
    done = run("logit-cache", "doctor", tmp_path / "file")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
