"""Names of processes: whether one has ended is known on its own machine only, never guessed; and their errors."""

from __future__ import annotations

import errno
import fcntl
import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import storage.processes
from storage.errors import CorruptCache, IdentityMismatch, InputError, LogitCacheError, StorageFull
from storage.locks import LOCK, locked
from storage.processes import has_ended, this_process

CHILD = "from storage.processes import this_process; print(this_process(), flush=True); input()"


def named_child() -> tuple[subprocess.Popen[str], str]:
    """A process that runs until it gets a line, and its name."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    return child, name


@pytest.fixture
def name() -> str:
    """This process's name."""
    found = this_process()
    assert found is not None
    return found


def test_a_process_has_ended_when_it_is_gone() -> None:
    child, name = named_child()
    assert not has_ended(name)
    child.communicate("\n", timeout=60)
    assert has_ended(name)


def test_a_reused_pid_is_another_process(name: str) -> None:
    assert not has_ended(name)
    machine, pid, start = name.split("/")
    assert has_ended(f"{machine}/{pid}/{int(start) - 1}")


def test_a_hidden_process_is_not_taken_for_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc hides the processes of other users: a signal is refused, or goes through."""

    def no_such_process(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    child, name = named_child()
    with monkeypatch.context() as hidden:
        hidden.setattr(psutil, "Process", no_such_process)
        assert not has_ended(name)
        child.communicate("\n", timeout=60)
        assert has_ended(name)


def test_a_clock_that_is_set_ends_no_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time since boot is psutil's difference of two dates, and both move with the clock."""
    assert int(name.split("/")[2]) == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    right, moves = psutil.boot_time(), iter([0.0, 1.0, 2.0, 2.0, 2.0])

    def boot_time() -> float:
        return right + next(moves, 2.0)

    monkeypatch.setattr(psutil._psplatform, "boot_time", boot_time)
    assert not has_ended(name)
    assert has_ended(name + "1")


def test_nothing_is_known_of_other_machines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pid, start = name.split("/")
    assert not has_ended(f"another/{pid}/{int(start) - 1}")
    monkeypatch.setattr(storage.processes.socket, "gethostname", lambda: "another")
    assert not has_ended(name.replace(start, "1"))


@pytest.mark.parametrize(
    "rest", ["", "/", "/1", "/-1/1", "/1/x", "/../1", "/self/1", "/²/1", f"/{'9' * 40}/1", f"/{'9' * 5000}/1"]
)
def test_a_malformed_name_has_not_ended(name: str, rest: str) -> None:
    assert not has_ended(name.split("/")[0] + rest)
    assert not has_ended("None")


def test_without_proc_there_are_no_names(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(storage.processes, "_PROC", tmp_path)
    assert this_process() is None
    assert not has_ended(name)


@pytest.mark.parametrize(
    "error",
    [
        InputError("job.yaml: k is missing"),
        CorruptCache("kept/c/1: its checksum differs"),
        StorageFull("no space left"),
        IdentityMismatch("teachers/a", ["k: 8 and 9", "seed: 1 and 2"], "Give another --name"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_it_was_raised(error: LogitCacheError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert (str(arrived), vars(arrived)) == (str(error), vars(error))


def test_a_file_system_without_locks_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path, "a job"):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(InputError, match="a job is at work there"), locked(tmp_path, "a job"):
            pass

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path, "a job"), locked(tmp_path, "a job"):
        pass
    assert not (tmp_path / LOCK).exists()
