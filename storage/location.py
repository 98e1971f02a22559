"""Where bytes live: the only file that knows a local folder from a remote store.

A `Location` reads, lists and publishes whole objects under one URL. `publish` does not replace: it is how
something becomes committed. On a local disk an object is written to a temporary file beside its place,
synced, hard-linked to its name (which fails if the name is taken), and the folder is synced; a killed
writer leaves at most a `*.partial` file, which nobody reads. Elsewhere it is one PUT after a look whether the
name is taken, so two writers at the same instant can both succeed: there, one worker writes a shard.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from storage.errors import InputError, StorageFull, is_out_of_space
from storage.format import KEY

PARTIAL = ".partial"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class Location(ABC):
    """Objects under one URL, addressed by keys such as `teachers/a/kept/c/0`."""

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    @abstractmethod
    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start .. stop` of an object for each range; shorter past its end. Raises FileNotFoundError."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Length in bytes, or None where there is no object."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """Names of the objects and folders directly under a folder (`""` is the root), sorted."""

    @abstractmethod
    def walk(self, prefix: str = "") -> list[str]:
        """Keys of all objects under a folder, sorted."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Delete an object. Only for what no receipt lists, or a receipt that is to be made anew."""

    @abstractmethod
    def publish(self, key: str, data: bytes) -> bool:
        """Write an object that is not there yet, whole or not at all; False if the key is taken."""

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Write an object in place of one that no receipt covers, whole or not at all."""

    @property
    def local_path(self) -> Path | None:
        """The folder, where the location is one on this machine."""
        return None

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[None]:
        """Keep other writers out of a folder while the body runs, where the location has locks at all."""
        yield

    def where(self, key: str) -> str:
        """The full address of an object, for messages."""
        return f"{self.url.rstrip('/')}/{key}"


def check_key(key: str, extra_names: frozenset[str] = frozenset()) -> str:
    """The key itself; raises InputError for one that could leave the cache or is not of the format."""
    parts = key.split("/")
    named = "/".join(part for part in parts if part not in extra_names)
    if any(part in ("", ".", "..") for part in parts) or (named and not KEY.match(named)):
        raise InputError(f"{key!r} is not a key of a cache: lower-case letters, digits, '.', '_', '-' and '/' only")
    return key


class LocalLocation(Location):
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self._root = path
        self.url = str(path)

    @property
    def local_path(self) -> Path:
        return self._root

    def _path(self, key: str) -> Path:
        return self._root.joinpath(*key.split("/"))

    def read(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._path(key).open("rb", buffering=0) as file:
            return [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]

    def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, prefix: str) -> list[str]:
        try:
            return sorted(os.listdir(self._path(prefix) if prefix else self._root))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise InputError(f"{self.url} is a file; a cache is a folder: give another path") from None

    def walk(self, prefix: str = "") -> list[str]:
        folder = self._path(prefix) if prefix else self._root
        # Links are listed and not followed: what they point to is not part of the cache.
        return sorted(
            (Path(parent) / name).relative_to(self._root).as_posix()
            for parent, _, names in os.walk(folder)
            for name in names
        )

    def remove(self, key: str) -> None:
        path = self._path(key)
        path.unlink()
        _sync_folder(path.parent)

    def publish(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        if path.exists():
            return False
        return self._put(path, data, replace=False)

    def replace(self, key: str, data: bytes) -> None:
        self._put(self._path(key), data, replace=True)

    @contextlib.contextmanager
    def exclusive(self, folder: str) -> Iterator[None]:
        path = self._path(folder)
        with _plain_errors(path, 0):
            _make_folders(path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # The kernel lets go of the lock when its holder is killed. Some network mounts have none; there the
            # receipt is what exposes two workers with different bytes.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _put(self, path: Path, data: bytes, *, replace: bool) -> bool:
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
        with _plain_errors(path, len(data)):
            try:
                _make_folders(path.parent)
                try:
                    with temporary.open("xb") as file:
                        file.write(data)
                        file.flush()
                        os.fsync(file.fileno())
                    if replace:
                        os.replace(temporary, path)
                    else:
                        _link_new(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
                _sync_folder(path.parent)
            except FileExistsError:
                return False
        return True


@contextlib.contextmanager
def _plain_errors(path: Path, size: int) -> Iterator[None]:
    """What the operating system refuses, as an error that says what to do."""
    try:
        yield
    except OSError as error:
        if is_out_of_space(error):
            raise StorageFull(
                f"no space left for {path} ({size} bytes): free some room and run the command again, "
                f"it goes on where it stopped"
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError)) or error.errno == errno.EROFS:
            raise InputError(f"cannot write {path}: {error.strerror}; choose a place that is writable") from error
        raise


def _link_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems (exFAT, a few network mounts) have no hard links; there the check and the rename
        # are two steps, and the receipt is what exposes a race between them.
        if path.exists():
            raise FileExistsError(str(path)) from None
        os.rename(temporary, path)


def _make_folders(folder: Path) -> None:
    """Create missing folders and sync each parent, so that a power cut cannot lose the folder of a synced file."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FsspecLocation(Location):
    """Anything else that fsspec reaches. Credentials come from its standard chains only."""

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self.url = url
        self._fs = filesystem
        self._root = root.rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def read(self, key: str) -> bytes:
        data: bytes = self._fs.cat_file(self._path(key))
        return data

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = self._path(key)
        data: list[bytes] = self._fs.cat_ranges(
            [path] * len(ranges), [start for start, _ in ranges], [stop for _, stop in ranges], on_error="raise"
        )
        return data

    def size(self, key: str) -> int | None:
        # A listing kept from before would hide what another worker has written since.
        self._fs.invalidate_cache()
        try:
            return int(self._fs.info(self._path(key))["size"])
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            entries = self._fs.ls(self._path(prefix.rstrip("/")), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def walk(self, prefix: str = "") -> list[str]:
        self._fs.invalidate_cache()
        found = self._fs.find(self._path(prefix) if prefix else self._root)
        return sorted(str(path)[str(path).index(self._root) + len(self._root) + 1 :] for path in found)

    def remove(self, key: str) -> None:
        self._fs.rm_file(self._path(key))

    def publish(self, key: str, data: bytes) -> bool:
        if self.size(key) is not None:
            return False
        self.replace(key, data)
        return True

    def replace(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(key), data)


def locate(url: str) -> Location:
    """The location of a URL: a path, `file://`, or any protocol of fsspec whose package is installed."""
    protocol, separator, rest = url.partition("://")
    if not url or "::" in url:
        raise InputError(f"{url!r} is not a place for a cache: give a path or a URL such as s3://bucket/folder")
    if not separator:
        return LocalLocation(Path(url).absolute())
    if protocol == "file":
        return LocalLocation(Path(rest).absolute())
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'logit-cache[{extra}]'" if extra else str(error)
        raise InputError(f"{protocol}:// needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise InputError(f"cannot open {url}: {error}") from None
    return FsspecLocation(url, filesystem, root)
