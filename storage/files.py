"""Small files on this machine, replaced by atomic rename, and the lock of a folder that one job works in."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from storage.errors import InputError

PARTIAL = ".partial"  # suffix of temporary files, which no reader looks at
LOCK = "lock"
"""Name of a folder's lock file, which exists while a job works there and after one that was killed."""


def replace_file(path: Path, data: bytes) -> None:
    """Replace a small file beside a cache or run: a killed writer leaves the old one or the new one, never half.

    Without fsync: only for files that a program can write again. A cache's own objects go through `LocalStore`.
    """
    temporary = path.with_name(path.name + PARTIAL)
    temporary.write_bytes(data)
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(folder: Path, job: str) -> Iterator[int]:
    """Hold the lock (flock) of an existing folder; the kernel releases it when the last process that holds it ends.

    Yields its descriptor: a child that is given it holds the lock, too. A file system without locks gives none, and
    nothing is refused there. Raises InputError while another process holds it; `job` names what is at work there.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
