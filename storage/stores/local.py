"""A folder on this machine: objects are fsynced and hard-linked to their names; commits hold a lock.

An object is written to a temporary file in the same folder, fsynced and hard-linked to its name (which fails if the
name is taken), and the folder is fsynced; a killed writer leaves at most a `*.partial` file, which is never read.
Symbolic links are not followed: their targets are not part of the cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

from storage.errors import CorruptCache, InputError, StorageFull, is_out_of_space
from storage.files import UNSUPPORTED, atomic_file, check_writable, sync_path
from storage.locks import held
from storage.stores.base import MOST_BYTES, Store

_MOST_PATHS = 4_096
# No permission, a file where a folder should be, a read-only mount, or one that lacks an operation.
_REFUSED = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP} | UNSUPPORTED


class LocalStore(Store):
    def __init__(self, path: Path) -> None:
        self._root = path
        self.url = str(path)
        self._plain_folders: set[Path] = set()
        self._synced_folders: set[Path] = set()
        # A reader of chunks uses the same few hundred paths all the time, and pathlib is slow.
        self._path = lru_cache(_MOST_PATHS)(lambda key: path.joinpath(*key.split("/")))

    @property
    def local_path(self) -> Path:
        return self._root

    def read(self, key: str, at_most: int = MOST_BYTES) -> bytes:
        with self.opened(key) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > at_most:
                raise CorruptCache(f"{self.where(key)}: {size} bytes, at most {at_most} belong there")
            with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
                return file.readall()

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self.opened(key) as descriptor:
            return [os.pread(descriptor, stop - start, start) for start, stop in ranges]

    def size(self, key: str) -> int | None:
        path = self._path(key)
        try:
            found = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._refuse_links(path, found)
        return found.st_size

    @contextlib.contextmanager
    def opened(self, key: str) -> Iterator[int]:
        """An open file descriptor of an object, closed after the body. Raises FileNotFoundError and CorruptCache."""
        path = self._path(key)
        found = path.lstat()
        self._refuse_links(path, found)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptCache(f"{path}: not a file, where a cache has one; a read from a pipe would block forever")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _refuse_links(self, path: Path, found: os.stat_result) -> None:
        if stat.S_ISLNK(found.st_mode):
            raise CorruptCache(
                f"{path}: a symbolic link, and a cache has none: its target could be changed from outside; "
                f"copy the cache with cp -rL if you trust its links"
            )
        if path.parent in self._plain_folders:
            return
        for folder in path.relative_to(self._root).parents:
            parent = self._root / folder
            if parent == self._root or parent in self._plain_folders:
                break
            self._refuse_links(parent, parent.lstat())
            self._plain_folders.add(parent)

    def names(self, prefix: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path(prefix)))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise InputError(f"{self.url} is a file; a cache is a folder: give another path") from None

    def folders(self, folder: str) -> list[str]:
        with os.scandir(self._path(folder)) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    def listing(self, folder: str) -> Iterator[tuple[str, float | None]]:
        try:
            entries = os.scandir(self._path(folder))
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file, gone by now
                    yield entry.name, entry.stat(follow_symlinks=False).st_mtime

    def walk(self, prefix: str = "") -> dict[str, int]:
        folder = self._path(prefix)
        # Links are listed and not followed.
        found = {}
        for parent, folders, names in os.walk(folder, onerror=_raise_unless_gone):
            for name in [*names, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]:
                path = Path(parent) / name
                with contextlib.suppress(FileNotFoundError):  # a writer's temporary file, gone by now
                    found[path.relative_to(self._root).as_posix()] = path.lstat().st_size
        return dict(sorted(found.items()))

    def check_writable(self) -> None:
        if not os.access(self._root, os.W_OK | os.X_OK):  # also where it does not exist yet
            check_writable(self._root, self.url)

    def remove(self, key: str) -> None:
        path = self._path(key)
        path.unlink()
        sync_path(path.parent)

    def publish(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if path.exists():
            self._sync_name(path)
            return False
        return self._put(path, data, replace=False)

    def create(self, key: str, data: bytes) -> bool:
        return self._put(self._path(key), data, replace=False)

    def replace(self, key: str, data: bytes) -> None:
        self._put(self._path(key), data, replace=True)

    def exclusive(self, folder: str) -> AbstractContextManager[None]:
        return self._locked(folder, fcntl.LOCK_EX)

    def shared(self, folder: str) -> AbstractContextManager[None]:
        return self._locked(folder, fcntl.LOCK_SH)

    def _locked(self, folder: str, kind: int) -> AbstractContextManager[None]:
        path = self._path(folder)
        with _plain_errors(path, 0):
            self._make_folders(path)
        # Some network mounts have no locks; there the receipt exposes two workers with different bytes.
        return held(os.open(path, os.O_RDONLY), kind)

    def _put(self, path: Path, data: bytes, *, replace: bool) -> bool:
        with _plain_errors(path, len(data)):
            try:
                self._make_folders(path.parent)
                with atomic_file(path, durable=True, shared=True, place=None if replace else _link_new) as temporary:
                    temporary.write_bytes(data)
            except FileExistsError:
                self._sync_name(path)
                return False
        return True

    def _sync_name(self, path: Path) -> None:
        """Sync the folder of an object that another writer published: it may have been killed before it had synced the
        folder, and a receipt is going to rely on the object."""
        self._make_folders(path.parent)
        sync_path(path.parent)

    def _make_folders(self, folder: Path) -> None:
        """Create missing folders and sync each into its parent, so that a power cut cannot lose the folder of a synced
        file. Existing folders are synced once, too: their creator may have been killed before it had."""
        unsure = []
        for path in (folder, *folder.parents):
            if path.exists() and (path in self._synced_folders or self._root not in path.parents):
                break
            unsure.append(path)
        for path in reversed(unsure):
            if not path.exists():
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
            sync_path(path.parent)
            self._synced_folders.add(path)


@contextlib.contextmanager
def _plain_errors(path: Path, size: int) -> Iterator[None]:
    """Turn errors of the operating system into errors that state the remedy."""
    try:
        yield
    except OSError as error:
        if is_out_of_space(error):
            raise StorageFull(
                f"no space left for {path} ({size} bytes): free some room and run the command again, "
                f"it resumes where it stopped"
            ) from error
        if error.errno in _REFUSED:
            raise InputError(f"cannot write {path}: {error.strerror}; choose a writable folder") from error
        raise


def _raise_unless_gone(error: OSError) -> None:
    """Of a folder that cannot be listed: `os.walk` alone would leave out what is in it."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _link_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems (exFAT, a few network mounts) have no hard links; there the check and the rename are two
        # steps, and the receipt exposes a race between them.
        if path.exists():
            raise FileExistsError(str(path)) from None
        os.rename(temporary, path)
