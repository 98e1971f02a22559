"""Advisory leases: which worker works on which shard now. Correctness does not depend on them.

A worker takes a lease on a shard before it computes it, so that others take another one. Two workers that compute one
shard all the same, because a lease was lost, expired or could not be taken, write the same bytes or get an error
(`storage.cache.writer`).

A lease is a file beside the shard's receipt, `receipts/<shard>.claim`. No receipt lists it: readers never look at it,
and the file of a killed worker is a leftover like any other.

local disk     a lock (flock) on the file; the kernel releases it when the holder is killed
object store   an object made by the store's atomic create, where it has one. It holds its expiry time, renewed while
               the work continues, and the holder's process name, so that on the holder's machine the lease ends with
               the holder. A store that only pretends to create atomically lets two workers hold one lease.
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
from dataclasses import dataclass
from pathlib import Path

from storage.cache.processes import has_ended, this_process
from storage.errors import LogitCacheError
from storage.stores.base import Store

SUFFIX = ".claim"
LEASE_SECONDS = 120.0
"""How long a lease in an object store is valid after it was created or last renewed."""

_MOST_LEASE_BYTES = 4_096


class Leases(ABC):
    """Leases, or on a local disk locks, on the shards of one receipts folder.

    exclusive  whether a shard that one worker holds is refused to the others; determined by a trial when this is read
    """

    @property
    @abstractmethod
    def exclusive(self) -> bool: ...

    @abstractmethod
    def take(self, shard: int) -> bool:
        """Take the lease on a shard; False while another worker holds it. True as well where no lease can be had."""

    @abstractmethod
    def keep(self) -> None:
        """Renew all leases that are held; cheap enough to be called after every batch."""

    @abstractmethod
    def release(self, shard: int) -> None:
        """Release a lease; harmless for one that is not held."""

    @abstractmethod
    def is_held(self, shard: int) -> bool:
        """Whether any worker holds the lease on a shard now."""


def leases_in(store: Store, folder: str) -> Leases:
    """The leases of a receipts folder: locks on a local disk, leases that expire on any other store."""
    root = store.local_path
    return _RemoteLeases(store, folder) if root is None else _LocalLocks(store, folder, root / folder)


def lease_name(shard: int) -> str:
    """File name of the lease on a shard, beside the shard's receipt."""
    return f"{shard:08d}{SUFFIX}"


def leased_shard(name: str) -> int | None:
    """The shard of a lease, from its file name; None for any other file name."""
    number = name.removesuffix(SUFFIX)
    return int(number) if number != name and len(number) >= 8 and number.isdecimal() else None


class _LocalLocks(Leases):
    def __init__(self, store: Store, folder: str, path: Path) -> None:
        self._store, self._folder, self._path = store, folder, path
        self._held: dict[int, int] = {}
        self._has_locks = True  # until the disk turns out to have none

    @property
    def exclusive(self) -> bool:
        with contextlib.suppress(OSError), self._store.exclusive(self._folder):
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                # `Store.exclusive` has locked the folder: where locks work, this second lock is refused.
                self._has_locks &= not self._lock(descriptor)
            finally:
                os.close(descriptor)
        return self._has_locks

    def take(self, shard: int) -> bool:
        path = self._path / lease_name(shard)
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                # The store creates its folders itself, synced, so that they survive a power loss.
                with self._store.exclusive(self._folder):
                    continue
            except OSError:  # a disk that refuses this file raises when the shard is written
                return True
            if not self._lock(descriptor):
                os.close(descriptor)
                return False
            # The previous holder may have removed the file between open and lock; then the lock is on a deleted file.
            if _is_still(path, descriptor):
                self._held[shard] = descriptor
                return True
            os.close(descriptor)

    def keep(self) -> None:
        pass

    def release(self, shard: int) -> None:
        descriptor = self._held.pop(shard, None)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path / lease_name(shard))
            os.close(descriptor)

    def is_held(self, shard: int) -> bool:
        try:
            descriptor = os.open(self._path / lease_name(shard), os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN)
        else:
            return False
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network mount without locks
            self._has_locks = False
        return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


class _RemoteLeases(Leases):
    def __init__(self, store: Store, folder: str) -> None:
        self._store, self._folder = store, folder
        self._held: dict[int, float] = {}
        self._holder = secrets.token_hex(8)
        self._process = this_process()
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

    def take(self, shard: int) -> bool:
        if self._has_creates is False:
            return True
        try:
            taken = self._store.create(self._key(shard), self._payload()) or self._take_over(shard)
        except NotImplementedError:
            self._has_creates = False
            return True
        except (LogitCacheError, OSError):  # the work itself meets the same store, and raises the error
            return True
        if taken:
            self._held[shard] = time.monotonic()
        return taken

    def keep(self) -> None:
        now = time.monotonic()
        for shard in [shard for shard, since in self._held.items() if now - since > LEASE_SECONDS / 3]:
            self._held[shard] = now
            with contextlib.suppress(LogitCacheError, OSError):
                # After it expired, another worker may have taken it.
                if self._read(shard).holder == self._holder:
                    self._store.replace(self._key(shard), self._payload())

    def release(self, shard: int) -> None:
        if self._held.pop(shard, None) is not None:
            with contextlib.suppress(LogitCacheError, OSError):  # it expires by itself
                if self._read(shard).holder == self._holder:
                    self._store.remove(self._key(shard))

    def is_held(self, shard: int) -> bool:
        try:
            return self._read(shard).is_valid
        except (LogitCacheError, OSError):
            return False

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
        self._store.replace(self._key(shard), self._payload())
        return True

    def _read(self, shard: int) -> _Lease:
        return _lease_of(self._store.read(self._key(shard), _MOST_LEASE_BYTES))

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{lease_name(shard)}"

    def _payload(self) -> bytes:
        until = time.time() + LEASE_SECONDS
        return json.dumps({"holder": self._holder, "process": self._process, "until": until}).encode()


@dataclass(frozen=True)
class _Lease:
    """A lease in an object store. The defaults stand for one that cannot be parsed, which counts as expired."""

    holder: str = ""
    process: str = ""
    until: float = 0.0

    @property
    def is_valid(self) -> bool:
        now = time.time()
        # An expiry later than any lease can have is from a wrong clock, or from no worker.
        return now < self.until <= now + 2 * LEASE_SECONDS and not has_ended(self.process)


def _lease_of(data: bytes) -> _Lease:
    try:
        found = json.loads(data)
        holder, until = str(found["holder"]), found["until"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _Lease()
    return _Lease(holder, str(found.get("process")), until if isinstance(until, int | float) else 0.0)
