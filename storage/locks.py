"""The lock of a folder on this machine in which one job works at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
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
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace")
            os.close(descriptor)
            raise InputError(f"{folder}: {job} is at work there (process {holder}); wait for it, or stop it") from None
        except FileNotFoundError:
            pass  # its last holder has just removed it
        except OSError:
            break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def has_locks(folder: Path) -> bool:
    """Whether the file system of an existing folder has locks."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return False
    return True
