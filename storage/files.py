"""Files on this machine, written under a temporary name and renamed: readers see the old or the new one, never half."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from storage.errors import InputError

PARTIAL = ".partial"  # suffix of temporary files, which no reader looks at
STAGING = ".incoming"  # suffix or name of the folder in which a copy is staged; it belongs to no cache


@contextlib.contextmanager
def atomic_file(
    path: Path, *, durable: bool = False, shared: bool = False, place: Callable[[Path, Path], None] | None = None
) -> Iterator[Path]:
    """A temporary path beside `path`; the file that the body writes there is renamed to `path`, or moved by `place`.

    durable     fsync the file before it has its name, and the folder after
    shared      other processes may write the same file: the temporary name is unique. Otherwise the leftover of a
                killed writer is written over by the next

    A body that raises leaves `path` as it was, and no temporary file.
    """
    unique = f".{os.getpid()}-{secrets.token_hex(4)}" if shared else ""
    temporary = path.with_name(f"{path.name}{unique}{PARTIAL}")
    try:
        yield temporary
        if durable:
            sync_path(temporary)
        (place or os.replace)(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_path(path.parent)


def check_writable(option: str, file: str) -> None:
    """Raise InputError where an option names no possible file: before the work whose result goes there."""
    path = Path(file).expanduser()
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{option} {file}: expected a file in a folder that exists: give another name")


def replace_file(path: Path, data: bytes) -> None:
    """Replace a small file beside a cache or run.

    Without fsync: only for files that a program can write again. A cache's own objects go through `LocalStore`.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def sync_path(path: str | Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
