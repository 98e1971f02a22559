"""Local copies of a remote cache's shard objects: fetched whole, checked, renamed, bounded, shared by all processes.

    $LOGIT_CACHE_LOCAL_DIR (default ~/.cache/logit-cache)
      objects/<sha256 of the URL, 32 digits>/<key>   as in the cache
      locks/<0..63>                                  locks, so that processes that need one object at once fetch it once

A copy is not trusted: every reader checks it against the receipt first, as it would an object of a local cache, and
fetches it again if it does not pass. The least recently used copies are evicted when all of them exceed
`LOGIT_CACHE_LOCAL_BYTES` (default: 64 GiB, at most half of the disk's free space); readers notice an evicted copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

from storage.errors import CorruptCache, InputError, StorageFull, is_out_of_space
from storage.files import PARTIAL, atomic_file, local_path
from storage.format.manifest.receipts import ObjectDigest
from storage.locks import held, open_lock
from storage.stores.base import Store
from storage.stores.local import LocalStore

_DEFAULT_BYTES = 64 << 30
_LOCKS = 64
# A copy is read within milliseconds of its check; one that was opened just now is not evicted under its reader.
_IN_USE_S = 5.0
_ABANDONED_S = 3600.0


class Mirror:
    def __init__(self, remote: Store) -> None:
        self._remote = remote
        self._top = _top_folder()
        self._most = _most_bytes(self._top)
        self.local = LocalStore(self._top / "objects" / hashlib.sha256(remote.url.encode()).hexdigest()[:32])
        self._until_sweep = 0

    def path(self, key: str) -> Path:
        """Path of the copy of an object, whether it exists or not."""
        return self.local.local_path / key

    def opened(self, key: str) -> None:
        """Mark a copy as the most recently used."""
        with contextlib.suppress(OSError):  # evicted, on a read-only mount, or another user's
            # The time of access only: by the time of modification, readers recognise the bytes that they have checked.
            os.utime(self.path(key), ns=(time.time_ns(), self.path(key).stat().st_mtime_ns))

    def drop(self, key: str) -> None:
        _remove(self.path(key))

    def fetch(self, key: str, expected: ObjectDigest) -> None:
        """Fetch an object unless its copy has the receipt's length and sha256.

        Raises CorruptCache if the store keeps returning other bytes, or none; StoreUnavailable if it does not answer.
        """
        with self._locked(key):
            if self._is_there(key, expected):
                return  # another process fetched it while this one waited
            self._keep(key, self._download(key, expected))
        self._until_sweep -= expected.bytes
        if self._until_sweep < 0:
            self._until_sweep = self._most // 32
            _sweep(self._top / "objects", self._most)

    def _is_there(self, key: str, expected: ObjectDigest) -> bool:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            data = self.path(key).read_bytes()
            return (len(data), hashlib.sha256(data).hexdigest()) == (expected.bytes, expected.sha256)
        return False

    def _download(self, key: str, expected: ObjectDigest) -> bytes:
        def request() -> bytes:
            data = self._remote.read(key, expected.bytes)
            sha256 = hashlib.sha256(data).hexdigest()
            if (len(data), sha256) != (expected.bytes, expected.sha256):
                raise CorruptCache(
                    f"{self._remote.where(key)}: expected {expected.bytes} bytes with sha256 {expected.sha256}, "
                    f"found {len(data)} bytes with {sha256}"
                )
            return data

        return self._remote.insist(key, "its receipt exists", request)

    def _keep(self, key: str, data: bytes) -> None:
        path = self.path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, shared=True) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            if is_out_of_space(error):
                raise StorageFull(
                    f"no space left for local copies in {self._top}: free some room, or set LOGIT_CACHE_LOCAL_DIR to "
                    f"another folder or LOGIT_CACHE_LOCAL_BYTES to less"
                ) from error
            raise self._not_kept(error) from error

    def _not_kept(self, error: OSError) -> InputError:
        return InputError(
            f"cannot keep local copies in {self._top} ({error.strerror}): set LOGIT_CACHE_LOCAL_DIR to a folder "
            f"that can be written"
        )

    def _locked(self, key: str) -> AbstractContextManager[None]:
        number = int(hashlib.sha256(f"{self.local.url}/{key}".encode()).hexdigest(), 16) % _LOCKS
        folder = self._top / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_lock(folder / str(number))
        except OSError as error:
            raise self._not_kept(error) from error
        return held(descriptor)  # on a mount without locks, at worst the object is fetched twice


_sweeping = threading.Lock()


def _sweep(folder: Path, most: int) -> None:
    """Evict the least recently used copies until the rest fits, and remove the leftovers of killed processes."""
    if not _sweeping.acquire(blocking=False):
        return
    try:
        now = time.time()
        files = []
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent) / name
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    files.append((found.st_atime, found.st_size, path))
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            abandoned = path.name.endswith(PARTIAL) and now - used > _ABANDONED_S
            if abandoned or (total > most and now - used > _IN_USE_S):
                _remove(path)
                total -= size
    finally:
        _sweeping.release()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone by now, or another user's
        path.unlink()


def _top_folder() -> Path:
    given = os.environ.get("LOGIT_CACHE_LOCAL_DIR")
    if given:
        return local_path(given).absolute()
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "logit-cache"


def _most_bytes(top: Path) -> int:
    text = os.environ.get("LOGIT_CACHE_LOCAL_BYTES")
    if text is not None:
        if not text.isdecimal() or int(text) == 0:
            raise InputError(f"LOGIT_CACHE_LOCAL_BYTES={text}: expected a number of bytes, such as {_DEFAULT_BYTES}")
        return int(text)
    existing = next(folder for folder in (top, *top.parents) if folder.exists())
    return max(1, min(_DEFAULT_BYTES, shutil.disk_usage(existing).free // 2))
