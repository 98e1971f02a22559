"""Who is working at which shard at this moment: a courtesy among workers, on which nothing depends.

A worker leases a shard before it computes it, so that others take another one. Two workers who compute one shard all
the same, because a claim was lost, ran out or could not be had, write the same bytes or are told
(`storage.cache.writer`).

A claim is a file beside the shard's receipt, `receipts/<shard>.claim`. No receipt lists it: readers never look at it,
and what a killed worker leaves is a leftover like any other.

local disk     the file is locked by its holder, and the kernel lets go of the lock when the holder is killed
object store   made by the store's atomic create, where it has one; it holds a time until which it counts, put off while
               the work goes on, and its holder's name, so that on the holder's machine it ends with the holder. A store
               that only pretends to create atomically lets two workers have one claim.
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
"""How long a claim in an object store counts after it was made or put off for the last time."""

_MOST_LEASE_BYTES = 4_096


class Leases(ABC):
    """Claims on the shards whose receipts lie in a folder.

    exclusive  whether a shard that is held by one worker is refused to the others; tried once, when it is asked for
    """

    @property
    @abstractmethod
    def exclusive(self) -> bool: ...

    @abstractmethod
    def take(self, shard: int) -> bool:
        """Claim a shard; False while another worker holds it."""

    @abstractmethod
    def keep(self) -> None:
        """Put off the end of all leases that are held; cheap enough to be called after every batch."""

    @abstractmethod
    def release(self, shard: int) -> None:
        """Let go of a claim; harmless for one that is not held."""

    @abstractmethod
    def is_held(self, shard: int) -> bool:
        """Whether somebody holds a claim on the shard now."""


def leases_in(store: Store, folder: str) -> Leases:
    """The leases of a place, of the kind that it can keep."""
    root = store.local_path
    return _RemoteLeases(store, folder) if root is None else _LocalLocks(store, folder, root / folder)


def lease_name(shard: int) -> str:
    """Name of the file of a claim, beside the shard's receipt."""
    return f"{shard:08d}{SUFFIX}"


def leased_shard(name: str) -> int | None:
    """The shard that a file beside the receipts is a claim on; None for anything else."""
    number = name.removesuffix(SUFFIX)
    return int(number) if number != name and len(number) >= 8 and number.isdecimal() else None


class _LocalLocks(Leases):
    def __init__(self, store: Store, folder: str, path: Path) -> None:
        self._store, self._folder, self._path = store, folder, path
        self._held: dict[int, int] = {}
        self._has_locks = True  # until the disk says otherwise

    @property
    def exclusive(self) -> bool:
        with contextlib.suppress(OSError), self._store.exclusive(self._folder):
            descriptor = os.open(self._path, os.O_RDONLY)
            try:
                # The folder is locked, if anything can be, so that this one is refused.
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
                # The place makes its folders itself, so that they outlast a loss of power.
                with self._store.exclusive(self._folder):
                    continue
            except OSError:  # a disk that takes no file will say so when there is something to lose
                return True
            if not self._lock(descriptor):
                os.close(descriptor)
                return False
            # The holder before may have removed the file between the two calls; then the lock is on nothing.
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
            taken = self._store.create(self._key(shard), self._claim()) or self._take_over(shard)
        except NotImplementedError:
            self._has_creates = False
            return True
        except (LogitCacheError, OSError):  # the work itself will meet the same store, and say what is wrong
            return True
        if taken:
            self._held[shard] = time.monotonic()
        return taken

    def keep(self) -> None:
        now = time.monotonic()
        for shard in [shard for shard, since in self._held.items() if now - since > LEASE_SECONDS / 3]:
            self._held[shard] = now
            with contextlib.suppress(LogitCacheError, OSError):
                # Where it had run out, another worker may have it.
                if self._read(shard).holder == self._holder:
                    self._store.replace(self._key(shard), self._claim())

    def release(self, shard: int) -> None:
        if self._held.pop(shard, None) is not None:
            with contextlib.suppress(LogitCacheError, OSError):  # it runs out by itself
                if self._read(shard).holder == self._holder:
                    self._store.remove(self._key(shard))

    def is_held(self, shard: int) -> bool:
        try:
            return self._read(shard).counts
        except (LogitCacheError, OSError):
            return False

    def _take_over(self, shard: int) -> bool:
        """Take a claim that counts no longer. Two workers who do so at once both have it."""
        try:
            found = self._read(shard)
        except FileNotFoundError:
            found = _Lease()
        if found.holder == self._holder:  # made by a request whose answer was lost, and asked for again
            return True
        if found.counts:
            return False
        self._store.replace(self._key(shard), self._claim())
        return True

    def _read(self, shard: int) -> _Lease:
        return _lease_of(self._store.read(self._key(shard), _MOST_LEASE_BYTES))

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{lease_name(shard)}"

    def _claim(self) -> bytes:
        until = time.time() + LEASE_SECONDS
        return json.dumps({"holder": self._holder, "process": self._process, "until": until}).encode()


@dataclass(frozen=True)
class _Lease:
    """What a claim in a store says; of one that says nothing, that it has run out."""

    holder: str = ""
    process: str = ""
    until: float = 0.0

    @property
    def counts(self) -> bool:
        now = time.time()
        # One that leases more than a lease is of a clock that is wrong, or of nobody.
        return now < self.until <= now + 2 * LEASE_SECONDS and not has_ended(self.process)


def _lease_of(data: bytes) -> _Lease:
    try:
        found = json.loads(data)
        holder, until = str(found["holder"]), found["until"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _Lease()
    return _Lease(holder, str(found.get("process")), until if isinstance(until, int | float) else 0.0)
