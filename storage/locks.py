"""The lock of a folder on this machine in which one job works at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from storage.errors import InputError

LOCK = "logit-cache.lock"
"""Name of a folder's lock file, which exists while a job works there, and after one that was killed."""


@contextlib.contextmanager
def locked(folder: Path, job: str, *, name: str = LOCK, wait: bool = False) -> Iterator[int]:
    """Hold the lock (flock) of an existing folder; the kernel releases it when the last process that holds it ends.

    Yields its descriptor: a child that is given it holds the lock, too. A file system without locks gives none, and
    nothing is refused there. Raises InputError while another process holds it, or waits for its end; `job` names what
    is at work there, `name` the file.
    """
    path = folder / name

    def refusal(descriptor: int) -> str:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace")
        return f"{folder}: {job} is at work there (process {holder}); wait for it, or stop it"

    descriptor = lock(path, lambda: open_lock(path), refusal, wait)
    try:
        with contextlib.suppress(OSError):  # another user's file, which this one may only read
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, created if need be; of another user's file, which can be locked too, for reading."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def lock(path: Path, opened: Callable[[], int], refusal: Callable[[int], str], wait: bool = False) -> int:
    """A descriptor of `path`, from `opened`, that holds its flock; of a file system without locks, one without it.

    Raises InputError, with the text that `refusal` makes of the descriptor, while another process holds the lock, or
    waits for its end.
    """
    while True:
        descriptor = opened()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            message = refusal(descriptor)
            os.close(descriptor)
            raise InputError(message) from None
        except FileNotFoundError:
            pass  # its last holder has just removed it
        except OSError:
            return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def held(descriptor: int, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Wait for the flock of an open file or folder, which is closed after the body; a mount without locks gives none.

    The kernel releases it when its holder is killed.
    """
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def has_locks(folder: Path) -> bool:
    """Whether the file system of an existing folder has locks, of which a second one is refused."""
    first, name = tempfile.mkstemp(dir=folder)
    try:
        second = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.unlink(name)
    try:
        fcntl.flock(first, fcntl.LOCK_EX)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(first)
        os.close(second)
    return False
