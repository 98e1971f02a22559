"""The staging folder of a copy to a local target, where it lies until all of it has been checked.

    cache/      the copy as it will be
    manifest/   its records and receipts, and those of the source; fetched anew by every run

It is on the target's file system, so that a rename publishes the copy: `<target>.incoming` beside a target that does
not exist, `<target>/.incoming` in a folder that does, which may be a mount point, or have a parent that is not
writable. One process at a time holds its lock. A later run reuses the objects that a killed run left in `cache/` if
their sha256 is right.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from storage.cache.inventory import CARD_FILES, ROOT_KEY
from storage.errors import InputError
from storage.files import STAGING, atomic_file, sync_path
from storage.locks import lock
from storage.stores.local import LocalStore

_SYNCS_AT_ONCE = 16


class StagingFolder:
    def __init__(self, folder: Path, target: Path) -> None:
        self.folder = folder
        self.target = target
        self.cache = LocalStore(folder / "cache")
        self.manifest = folder / "manifest"
        self._folders: set[Path] = set()

    @classmethod
    @contextlib.contextmanager
    def of(cls, target: Path) -> Iterator[StagingFolder]:
        """The locked staging folder of a target, kept afterwards only if it holds objects that another run can use.

        Raises InputError when another process holds the lock, and where no folder can be made.
        """
        beside, inside = target.with_name(target.name + STAGING), target / STAGING
        folder = inside if target.is_dir() and not beside.is_dir() else beside
        # On a mount without locks it holds none: two runs do the same work there, and both check it.
        refusal = f"{folder}: another push or pull is at work there; wait for it, or stop it"
        descriptor = lock(folder, partial(_opened, folder), lambda _: refusal)
        try:
            if folder == beside and target.is_dir():
                # Left there before the target existed, or by an earlier version.
                folder = _moved(beside, inside)
            staging = cls(folder, target)
            _remove_links(folder)
            staging._take_back()
            shutil.rmtree(staging.manifest, ignore_errors=True)
            staging.manifest.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging.manifest, ignore_errors=True)
                if not staging.holds_objects():
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)

    def path(self, key: str) -> Path:
        return self.cache.local_path / key

    def holds_objects(self) -> bool:
        """Whether it holds files that a later run can use."""
        return any(names for _, _, names in os.walk(self.cache.local_path))

    def write(self, key: str, data: bytes) -> None:
        """Write a file; `sync` makes it durable together with all others."""
        with self._renamed(key) as temporary:
            temporary.write_bytes(data)

    def copy(self, source: LocalStore, key: str, size: int, *, link: bool) -> None:
        """Copy a local object, at most `size` bytes of it; `link`: or link it, where the file system can.

        Not every file system can be copied from in this way: check the object afterwards.
        """
        with source.opened(key) as descriptor, self._renamed(key) as temporary:
            if link:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                    os.link(source.local_path / key, temporary)
                    return
            with contextlib.suppress(OSError), temporary.open("wb") as file:
                while size > 0 and (count := os.sendfile(file.fileno(), descriptor, None, size)):
                    size -= count

    @contextlib.contextmanager
    def _renamed(self, key: str) -> Iterator[Path]:
        """A temporary file, renamed to the key's path after the body has written it."""
        path = self.path(key)
        if path.parent not in self._folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(path.parent)
        with atomic_file(path) as temporary:
            yield temporary

    def keep_only(self, keys: Collection[str]) -> None:
        """Remove all files that are not of the copy: those of another source, or temporary files of a killed run."""
        for key in self.cache.walk():
            if key not in keys:
                self.path(key).unlink()
        for parent, folders, _ in os.walk(self.cache.local_path, topdown=False):
            for name in folders:
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(os.path.join(parent, name))

    def become_target(self) -> None:
        """Sync everything, then rename the copy to the target. Raises InputError if there is anything by now.

        In a folder that exists, the root record is renamed last: no reader opens the cache before.
        """
        self.sync()
        if self.folder.parent != self.target:
            rename_folder(self.cache.local_path, self.target)
            return
        there = set(os.listdir(self.target)) - {STAGING}
        if not there.issubset(CARD_FILES):
            raise _appeared(self.target)
        for name in {*os.listdir(self.cache.local_path)} - there - {ROOT_KEY}:
            os.rename(self.path(name), self.target / name)
        sync([self.target])
        os.rename(self.path(ROOT_KEY), self.target / ROOT_KEY)
        sync([self.target])

    def _take_back(self) -> None:
        """Move back the folders that a killed run had renamed before it came to the root record."""
        if self.folder.parent == self.target and not (self.target / ROOT_KEY).exists():
            self.cache.local_path.mkdir(exist_ok=True)
            for path in self.target.iterdir():
                if path.is_dir() and path != self.folder:
                    os.rename(path, self.path(path.name))

    def sync(self) -> None:
        folders = [parent for parent, _, _ in os.walk(self.cache.local_path)]
        files = [os.path.join(parent, name) for parent, _, names in os.walk(self.cache.local_path) for name in names]
        # In one pass at the end, when the system has written most of it already, and in parallel.
        sync(files)
        sync(folders)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def sync(paths: Iterable[str | Path]) -> None:
    with ThreadPoolExecutor(_SYNCS_AT_ONCE) as pool:
        list(pool.map(sync_path, paths))


def rename_folder(folder: Path, target: Path) -> None:
    """Rename a folder durably, replacing at most an empty folder. Raises InputError for any other existing target."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _appeared(target) from None
        raise
    sync([target.parent])


def _appeared(target: Path) -> InputError:
    return InputError(f"{target}: appeared while the copy was made; nothing there was touched: run the command again")


def _opened(folder: Path) -> int:
    """A descriptor of the folder, which is made where it is missing."""
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
            with contextlib.suppress(FileNotFoundError):  # its last holder has just removed it
                return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise InputError(
                f"{folder}: {error.strerror}; a copy is staged there: make room for it, or give another target"
            ) from None


def _moved(beside: Path, inside: Path) -> Path:
    """The staging folder of a target that exists, moved into it."""
    try:
        os.rename(beside, inside)
    except OSError as error:
        raise InputError(
            f"{beside}: left by an earlier copy, and cannot be moved to {inside} ({error.strerror}): remove it"
        ) from None
    return inside


def _remove_links(folder: Path) -> None:
    """Remove symbolic links: a copy has none, and would write elsewhere through one."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(parent, name)
            if os.path.islink(path):
                os.unlink(path)
