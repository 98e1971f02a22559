"""Files on this machine, written under a temporary name and renamed: readers see the old or the new one, never half."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from storage.errors import InputError

PARTIAL = ".partial"  # suffix of temporary files, which no reader looks at
STAGING = ".incoming"  # suffix or name of the folder in which a copy is staged; it belongs to no cache
# What file systems without the operation answer.
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_WINDOWS = re.compile(r"^[A-Za-z]:\\")


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path that a person gave, `~` and `~user` expanded: shells leave them in `--out=~/x`, and YAML does.

    Raises InputError where there is no such user, for a URL, a path of Windows, and one with a null character.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise InputError(f"{text!r}: a path has no null character")
    if _URL.match(text):
        raise InputError(f"{text}: a URL, where a path of this machine is expected")
    if _WINDOWS.match(text):
        raise InputError(f"{text}: a path of Windows; give it as this system sees it, or as ./{text}")
    expanded = os.path.expanduser(text)  # not pathlib's, for which ./~ is ~
    if expanded.startswith("~"):
        raise InputError(f"{text}: {text.split('/')[0]} has no home folder here; write the path out, or ./{text}")
    return Path(expanded)


def check_output(file: str | os.PathLike[str], option: str) -> Path:
    """The path of a file that a command writes at its end. Raises InputError, before the work, if it cannot then."""
    path = local_path(file)
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{option} {file}: expected a file in a folder that exists: give another name")
    if _is_replaced(path):
        target = Path(os.path.realpath(path))
        check_writable(target.parent, f"{option} {file}")
        # In a folder with the sticky bit, such as /tmp, nobody replaces what is another user's.
        folder, owner = target.parent.stat(), os.geteuid()
        if target.exists() and folder.st_mode & stat.S_ISVTX and owner not in (0, folder.st_uid, target.stat().st_uid):
            raise InputError(f"{option} {file}: it belongs to another user: give another name")
    elif not os.access(path, os.W_OK):
        raise InputError(f"{option} {file}: it cannot be written: give another name")
    return path


def write_output(path: Path, data: bytes) -> None:
    """Write a file of `check_output`: a pipe or device receives the bytes, a link stays one, a file is replaced."""
    if _is_replaced(path):
        replace_file(Path(os.path.realpath(path)), data)
    else:
        path.write_bytes(data)


def _is_replaced(path: Path) -> bool:
    return not path.exists() or (path.is_file() and Path("/dev") not in path.parents)


def check_writable(folder: Path, where: str) -> None:
    """Raise InputError, which begins with `where`, unless a file can be written in a folder, or the folder created.

    Tries it with a file that never has a name: neither permissions nor mount options tell the whole.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(
            f"{where}: cannot write in {existing} ({error.strerror}); choose a folder that can be written"
        ) from None


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


def replace_file(path: Path, data: bytes) -> None:
    """Replace a small file beside a cache or run.

    Without fsync: only for files that a program can write again. A cache's own objects go through `LocalStore`.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def sync_path(path: str | Path) -> None:
    """fsync a file, or a folder where its file system has that (`logit-cache doctor` tells)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)
