"""Advisory leases: which worker works on which shard now. Correctness does not depend on them.

A worker takes a lease on a shard before it computes it, so that others take another one. Two workers that compute one
shard all the same, because a lease was lost, expired or could not be taken, write the same bytes or get an error
(`storage.cache.writer`).

A lease is a file beside the shard's receipt, `receipts/<shard>.claim`, which holds when it expires, and the name of the
holder's process. The holder renews it while its work continues: the lease of a process that hangs expires, and that of
one that was killed ends with it, at once for workers of the same machine. No receipt lists the file: readers never look
at it, and that of a killed worker is a leftover like any other.

local disk     a file under a lock (flock), which the kernel releases when the holder is killed
object store   an object made by the store's atomic create, where it has one. A store that only pretends to create
               atomically lets two workers hold one lease.
elsewhere      there are no leases: every worker gets every shard it asks for
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.errors import LogitCacheError
from storage.locks import has_locks
from storage.processes import has_ended, this_process
from storage.stores.base import Store

SUFFIX = ".claim"
LEASE_SECONDS = 120.0
"""How long a lease is valid after it was taken or last renewed, at least."""

# A holder renews its leases after every batch of windows. Where one takes long, a lease lasts for so many of them.
_BATCHES = 4
_MOST_LEASE_SECONDS = 1_800.0
_SECONDS_BETWEEN_TRIES = 0.05
_MOST_LEASE_BYTES = 4_096


def leases_in(store: Store, folder: str) -> Leases:
    """The leases of a receipts folder: locks on a local disk, objects on any other store."""
    root = store.local_path
    return _ObjectLeases(store, folder) if root is None else _LocalLocks(store, folder, root / folder)


def lease_name(shard: int) -> str:
    """File name of the lease on a shard, beside the shard's receipt."""
    return f"{shard:08d}{SUFFIX}"


def leased_shard(name: str) -> int | None:
    """The shard of a lease, from its file name; None for any other file name."""
    number = name.removesuffix(SUFFIX)
    return int(number) if number != name and len(number) >= 8 and number.isdecimal() else None


class Leases(ABC):
    """Leases on the shards of one receipts folder, as one worker takes and sees them."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self._holder = secrets.token_hex(8)
        self._process = this_process()
        self._renewed: dict[int, float] = {}  # the leases that are held
        self._seconds = LEASE_SECONDS
        self._kept = time.monotonic()

    @property
    @abstractmethod
    def exclusive(self) -> bool:
        """Whether a shard that one worker holds is refused to the others; found out by a trial."""

    def take(self, shard: int) -> bool:
        """Take the lease on a shard; False while another worker holds it. True as well where no lease can be had."""
        now = self._kept = time.monotonic()
        taken = self._take(shard)
        if taken:
            self._renewed[shard] = now
        return taken

    def keep(self) -> None:
        """Renew all leases that are held; cheap enough to be called after every batch."""
        now = time.monotonic()
        self._seconds = min(max(LEASE_SECONDS, _BATCHES * (now - self._kept)), _MOST_LEASE_SECONDS)
        self._kept = now
        for shard, since in list(self._renewed.items()):  # a commit may take one of its own meanwhile
            if now - since > LEASE_SECONDS / 3:
                self._renewed[shard] = now
                with contextlib.suppress(LogitCacheError, OSError):
                    self._renew(shard)

    def release(self, shard: int) -> None:
        """Release a lease; harmless for one that is not held."""
        if self._renewed.pop(shard, None) is not None:
            with contextlib.suppress(LogitCacheError, OSError):  # it expires
                self._end(shard)

    @contextlib.contextmanager
    def committing(self, shard: int) -> Iterator[None]:
        """While the body publishes a shard's objects and its receipt, no other worker of this machine does."""
        yield

    @abstractmethod
    def is_held(self, shard: int) -> bool:
        """Whether any worker holds the lease on a shard now."""

    @abstractmethod
    def _take(self, shard: int) -> bool: ...

    @abstractmethod
    def _renew(self, shard: int) -> None: ...

    @abstractmethod
    def _end(self, shard: int) -> None: ...

    def _content(self) -> bytes:
        until = time.time() + self._seconds
        return json.dumps({"holder": self._holder, "process": self._process, "until": until}).encode()


class _LocalLocks(Leases):
    def __init__(self, store: Store, folder: str, path: Path) -> None:
        super().__init__(store, folder)
        self._path = path
        self._files: dict[int, int] = {}  # descriptors of the leases that are held
        self._has_locks = True  # until the disk turns out to have none

    @property
    def exclusive(self) -> bool:
        with contextlib.suppress(OSError), self._store.shared(self._folder):
            self._has_locks &= has_locks(self._path)
        return self._has_locks

    @contextlib.contextmanager
    def committing(self, shard: int) -> Iterator[None]:
        # The folder's lock is shared, so that a worker that hangs in a commit holds its own shard and no other.
        with self._store.shared(self._folder):
            mine = shard in self._files
            while not (mine or self.take(shard)):
                time.sleep(_SECONDS_BETWEEN_TRIES)
            try:
                yield
            finally:
                if not mine:
                    self.release(shard)

    def is_held(self, shard: int) -> bool:
        path = self._path / lease_name(shard)
        with contextlib.suppress(OSError), open(path, "rb", opener=_opened_unless_link) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN) and not _has_expired(file.fileno())
        return False

    def _take(self, shard: int) -> bool:
        path = self._path / lease_name(shard)
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                # The store creates its folders itself, synced, so that they survive a power loss.
                with self._store.shared(self._folder):
                    continue
            except OSError as error:  # a disk that refuses this file raises when the shard is written
                if not isinstance(error, PermissionError) or not path.exists():
                    return True
                if self.is_held(shard):  # by another user's worker
                    return False
                try:
                    os.unlink(path)
                except OSError:
                    return True
                continue
            if self._lock(file):
                # The previous holder may have removed the file between open and lock: the lock is on a deleted file.
                if _is_still(path, file):
                    self._files[shard] = file
                    self._renew(shard)
                    return True
            elif not _has_expired(file):
                os.close(file)
                return False
            elif _is_still(path, file):
                # Its holder hangs, with a lock that the kernel keeps for it: the next file has another lock.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            os.close(file)

    def _renew(self, shard: int) -> None:
        file = self._files.get(shard)
        if file is not None:
            content = self._content()
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a date
                os.pwrite(file, content, 0)
                os.truncate(file, len(content))

    def _end(self, shard: int) -> None:
        file = self._files.pop(shard, None)
        if file is not None:
            path = self._path / lease_name(shard)
            try:
                if _is_still(path, file):  # after it expired, another worker may have taken it
                    os.unlink(path)
            finally:
                os.close(file)

    def _lock(self, file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network mount without locks
            self._has_locks = False
        return True


def _opened_unless_link(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NOFOLLOW)


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _has_expired(file: int) -> bool:
    """Whether a locked file holds a date that has passed. Earlier versions wrote none, and held it until their end."""
    content = os.pread(file, _MOST_LEASE_BYTES, 0)
    return bool(content) and not _parsed(content).is_valid


class _ObjectLeases(Leases):
    def __init__(self, store: Store, folder: str) -> None:
        super().__init__(store, folder)
        self._has_creates: bool | None = None

    @property
    def exclusive(self) -> bool:
        if self._has_creates is None:
            key = f"{self._folder}/{self._holder}{SUFFIX}"
            try:
                self._has_creates = self._store.create(key, b"")
                self._store.remove(key)
            except NotImplementedError:
                self._has_creates = False
            except (LogitCacheError, OSError):
                return False
        return self._has_creates

    def is_held(self, shard: int) -> bool:
        try:
            return self._read(shard).is_valid
        except (LogitCacheError, OSError):
            return False

    def _take(self, shard: int) -> bool:
        if self._has_creates is False:
            return True
        try:
            return self._store.create(self._key(shard), self._content()) or self._take_over(shard)
        except NotImplementedError:
            self._has_creates = False
            return True
        except (LogitCacheError, OSError):  # the work itself meets the same store, and raises the error
            return True

    def _take_over(self, shard: int) -> bool:
        """Take a lease that is no longer valid. Two workers that do so at the same time both hold it."""
        try:
            found = self._read(shard)
        except FileNotFoundError:
            found = _Lease()
        if found.holder == self._holder:  # created by a request whose response was lost, and then retried
            return True
        if found.is_valid:
            return False
        self._store.replace(self._key(shard), self._content())
        return True

    def _renew(self, shard: int) -> None:
        if self._read(shard).holder == self._holder:  # after it expired, another worker may have taken it
            self._store.replace(self._key(shard), self._content())

    def _end(self, shard: int) -> None:
        if self._read(shard).holder == self._holder:
            self._store.remove(self._key(shard))

    def _read(self, shard: int) -> _Lease:
        return _parsed(self._store.read(self._key(shard), _MOST_LEASE_BYTES))

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{lease_name(shard)}"


@dataclass(frozen=True)
class _Lease:
    """The content of a lease. The defaults stand for one that cannot be parsed, which counts as expired."""

    holder: str = ""
    process: str = ""
    until: float = 0.0

    @property
    def is_valid(self) -> bool:
        now = time.time()
        # An expiry later than any lease can have is from a wrong clock, or from no worker.
        return now < self.until <= now + _MOST_LEASE_SECONDS + LEASE_SECONDS and not has_ended(self.process)


def _parsed(content: bytes) -> _Lease:
    try:
        found = json.loads(content)
        holder, until = str(found["holder"]), found["until"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _Lease()
    return _Lease(holder, str(found.get("process")), until if isinstance(until, int | float) else 0.0)
