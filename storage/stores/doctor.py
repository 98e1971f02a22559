"""Probes of the guarantees of a store, run at the location that a cache is meant for.

`examine(url)` writes, overwrites, races and deletes small objects in a folder of its own below the URL and removes them
afterwards, also when it fails. Each probe measures one guarantee and states the consequence for a cache there. Nothing
is taken from the store's own documentation: servers that ignore a condition or a checksum do not report it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from storage.errors import InputError, LogitCacheError, error_text
from storage.stores import open_store
from storage.stores.base import Store
from storage.stores.local import LocalStore
from storage.stores.remote import READ_ONLY
from storage.stores.s3 import S3Store

_RACERS, _ROUNDS = 8, 5
_OVERWRITES, _READERS = 8, 4
_LEAST_FREE_BYTES = 1 << 30
# Run in another process, on the lock that this one holds: exits with status 0 if it acquires it.
_TRY_LOCK = """
import fcntl, os, sys
try:
    fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(7)
"""


@dataclass(frozen=True)
class Finding:
    """The result of one probe.

    name      the guarantee
    state     whether the store has it
    needed    whether a cache cannot be written safely without it
    meaning   the consequence for a cache there, preceded by the observation where the guarantee is broken
    """

    name: str
    state: Literal["ok", "not", "not applicable"]
    needed: bool
    meaning: str


@dataclass(frozen=True)
class _Probe:
    """One guarantee: `measure` returns None when it holds, and otherwise the observation that breaks it."""

    name: str
    needed: bool
    kinds: frozenset[str]
    measure: Callable[[Store, str], str | None]
    holds: str
    fails: str


def examine(url: str) -> list[Finding]:
    """Probe the store of a URL; needs no cache there. Takes seconds.

    Raises LogitCacheError when the store cannot be reached at all, or when the probes' objects cannot be removed.
    """
    store = open_store(url)
    if url.partition("://")[0] in READ_ONLY:
        return _examine_reading(store)
    store.size("zarr.json")  # raises if the store is unreachable or refuses access
    with _scratch(store) as folder:
        found = []
        for probe in _PROBES:
            found.append(_finding(probe, store, folder))
            if found[0].state == "not":  # without writes, no other probe can run
                return found + (_examine_reading(store)[1:] if store.size("zarr.json") is not None else [])
        return found


def safe_to_write(findings: list[Finding]) -> bool:
    """Whether a cache can be written at the store: no needed guarantee is broken."""
    return all(finding.state != "not" for finding in findings if finding.needed)


def _finding(probe: _Probe, store: Store, folder: str) -> Finding:
    if _kind(store) not in probe.kinds:
        kinds = " and ".join(sorted(probe.kinds))
        return Finding(probe.name, "not applicable", probe.needed, f"applies to {kinds} stores only")
    try:
        seen = probe.measure(store, f"{folder}/{probe.name.replace(' ', '-')}")
    except (LogitCacheError, OSError, ValueError) as error:
        seen = error_text(error, None)
    if seen is None:
        return Finding(probe.name, "ok", probe.needed, probe.holds)
    return Finding(probe.name, "not", probe.needed, f"{seen}; {probe.fails}")


def _kind(store: Store) -> str:
    if isinstance(store, LocalStore):
        return "local"
    return "S3" if isinstance(store, S3Store) else "remote"


@contextlib.contextmanager
def _scratch(store: Store) -> Iterator[str]:
    """A temporary folder for the probes, removed afterwards together with the parents created for it."""
    folder = f"doctor-{secrets.token_hex(6)}"
    root = store.local_path
    made = [path for path in (root, *root.parents) if not path.exists()] if root is not None else []
    try:
        yield folder
    finally:
        if root is not None:
            if (root / folder).exists():
                shutil.rmtree(root / folder)
            for path in made:
                with contextlib.suppress(OSError):  # never created, or in use by another process by now
                    path.rmdir()
        else:
            for key in store.walk(folder):
                store.remove(key)


def _examine_reading(store: Store) -> list[Finding]:
    """The probes of a read-only store: they need a cache to read."""
    read_only = Finding(
        "write and read back", "not", True, "this store is read-only; a cache is put there by other means"
    )
    key = "zarr.json"
    try:
        whole = store.read(key)
    except FileNotFoundError:
        raise InputError(
            f"{store.where(key)}: not there; a read-only store can be examined only at the URL of a cache"
        ) from None
    reading = Finding("read", "ok", False, "objects can be read; a cache there can be opened, verified and pulled")
    ranges = replace(_RANGE_READS, needed=False, measure=lambda *_: _compare_ranges(store, key, whole))
    return [read_only, reading, _finding(ranges, store, "")]


def _writes(store: Store, folder: str) -> str | None:
    large = secrets.token_bytes(1 << 20)
    for number, data in enumerate((b"", b"a few bytes", large)):
        store.replace(f"{folder}/{number}", data)
        if store.read(f"{folder}/{number}") != data or store.size(f"{folder}/{number}") != len(data):
            return f"an object of {len(data)} bytes was read back differently"
    store.replace(f"{folder}/2", b"another")
    return None if store.read(f"{folder}/2") == b"another" else "the old version was read after an overwrite"


def _lists(store: Store, folder: str) -> str | None:
    expected: dict[str, int] = {}
    for number in range(10):
        key = f"{folder}/{number % 3}/{number}"
        store.replace(key, bytes(number))
        expected[key] = number
        if store.walk(folder) != dict(sorted(expected.items())):
            return "an object was missing from the listing right after it had been written"
    return None if store.names(folder) == ["0", "1", "2"] else "folders are not listed"


def _ranges(store: Store, folder: str) -> str | None:
    data = secrets.token_bytes(100_000)
    store.replace(f"{folder}/data", data)
    return _compare_ranges(store, f"{folder}/data", data)


def _compare_ranges(store: Store, key: str, data: bytes) -> str | None:
    end = len(data)
    ranges = [(0, 1), (end - 5, end), (end // 2, end // 2 + end // 5), (7, 8)]
    found = store.read_ranges(key, ranges)
    return None if found == [data[start:stop] for start, stop in ranges] else "other bytes came than those asked for"


def _replaces_whole(store: Store, folder: str) -> str | None:
    """Readers see one whole version of an object while it is overwritten."""
    key = f"{folder}/data"
    versions = [bytes([number]) * size for number, size in enumerate((1_000_000, 700_000, 1_300_000))]
    store.replace(key, versions[0])
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, _OVERWRITES + 1):
                store.replace(key, versions[number % len(versions)])
                time.sleep(0.02)
        finally:
            done.set()

    def read() -> str | None:
        while not done.is_set():
            try:
                if store.read(key) not in versions:
                    return "a reader saw a mix of two versions, or a part of one"
            except FileNotFoundError:
                return "the object was gone for a moment"
        return None

    with ThreadPoolExecutor(_READERS + 1) as pool:
        writer = pool.submit(write)
        seen = [future.result() for future in [pool.submit(read) for _ in range(_READERS)]]
        writer.result()
    return next((observed for observed in seen if observed is not None), None)


def _creates(store: Store, folder: str) -> str | None:
    """Create-if-absent is refused for an existing object, and has exactly one winner in a race."""
    key = f"{folder}/taken"
    try:
        if not store.create(key, b"first"):
            return "a free name was refused"
        if store.create(key, b"second"):
            return "a taken name was not refused"
    except NotImplementedError:
        return "the store has no conditional write"
    if store.read(key) != b"first":
        return "a refused write replaced the object"
    for number in range(_ROUNDS):
        winners = _race(store, f"{folder}/race-{number}")
        if len(winners) != 1:
            return f"of {_RACERS} writers at once, {len(winners)} were told that they had created the object"
        if store.read(f"{folder}/race-{number}") != _racer(winners[0]):
            return "the object is not the one of the writer that was told it had created it"
    return None


def _race(store: Store, key: str) -> list[int]:
    barrier = threading.Barrier(_RACERS)

    def run(number: int) -> bool:
        barrier.wait()
        return store.create(key, _racer(number))

    with ThreadPoolExecutor(_RACERS) as pool:
        return [number for number, won in enumerate(pool.map(run, range(_RACERS))) if won]


def _racer(number: int) -> bytes:
    return bytes([number]) * 50_000


def _checks_uploads(store: Store, folder: str) -> str | None:
    assert isinstance(store, S3Store)
    filesystem, root = store.s3
    data = b"these bytes"

    def stored(name: str, stated: bytes) -> bool:
        md5 = base64.b64encode(hashlib.md5(stated, usedforsecurity=False).digest()).decode()
        try:
            filesystem.pipe_file(f"{root}/{folder}/{name}", data, ContentMD5=md5)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a refused digest arrives as EINVAL; any other error is no answer
                raise
        return store.size(f"{folder}/{name}") is not None

    if not stored("right", data):
        return "an upload with its right MD5 was refused"
    return "an upload that did not have its stated MD5 was accepted" if stored("wrong", b"other bytes") else None


def _deletes(store: Store, folder: str) -> str | None:
    key = f"{folder}/data"
    store.replace(key, b"data")
    store.remove(key)
    if store.size(key) is not None or key in store.walk(folder):
        return "the object was still there"
    try:
        store.read(key)
    except FileNotFoundError:
        return None
    return "the object could still be read"


def _root(store: Store) -> Path:
    root = store.local_path
    assert root is not None
    return root


def _links(store: Store, folder: str) -> str | None:
    path = _root(store) / folder
    path.mkdir(parents=True)
    (path / "one").write_bytes(b"data")
    (path / "two").hardlink_to(path / "one")
    return None if (path / "two").read_bytes() == b"data" else "a hard link did not lead to its file"


def _locks(store: Store, folder: str) -> str | None:
    with store.exclusive(folder):
        tried = subprocess.run([sys.executable, "-c", _TRY_LOCK, str(_root(store) / folder)], check=False)
    return None if tried.returncode == 7 else "another process got the lock that this one held"


def _syncs(store: Store, folder: str) -> str | None:
    # `replace` syncs the file, and lets a folder be that its file system cannot sync.
    store.replace(f"{folder}/data", b"data")
    descriptor = os.open(_root(store) / folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return None


def _distinguishes_case(store: Store, folder: str) -> str | None:
    store.replace(f"{folder}/name", b"small")
    store.replace(f"{folder}/NAME", b"large")
    return None if store.read(f"{folder}/name") == b"small" else "two names that differ in case are one file"


def _has_room(store: Store, folder: str) -> str | None:
    free = shutil.disk_usage(_root(store)).free
    return None if free >= _LEAST_FREE_BYTES else f"only {free >> 20} MiB are free"


_ANY = frozenset(("local", "S3", "remote"))
_LOCAL = frozenset(("local",))
_RANGE_READS = _Probe(
    "range reads", True, _ANY, _ranges,
    "quick checks read the ends of objects only",
    "give verify --deep, which reads objects whole",
)  # fmt: skip
_PROBES = (
    _Probe(
        "write and read back", True, _ANY, _writes,
        "what is written is what is read, at once",
        "a cache cannot be written here",
    ),
    _Probe(
        "listing after a write", True, _ANY, _lists,
        "workers see at once what others have committed",
        "shards that are done would be done again, and leftovers missed: do not write a cache here",
    ),
    _RANGE_READS,
    _Probe(
        "atomic overwrite", True, _ANY, _replaces_whole,
        "readers see whole objects only, also while one is written",
        "a reader can meet half an object, and takes it for damage: do not read a cache here while it is written",
    ),
    _Probe(
        "create only if absent", False, _ANY, _creates,
        "of two workers on one shard exactly one commits it",
        "two workers must never have the same shard: one cache-logits at a time, or several with --worker shares",
    ),
    _Probe(
        "damaged uploads refused", False, frozenset(("S3",)), _checks_uploads,
        "bytes that change on their way up are not stored",
        "bytes that change on their way up are noticed by readers, not by the writer: run verify --deep after writing",
    ),
    _Probe(
        "delete", False, _ANY, _deletes,
        "verify --repair can re-open damaged shards",
        "verify --repair cannot re-open damaged shards here: make the cache again elsewhere",
    ),
    _Probe(
        "hard links", False, _LOCAL, _links,
        "a committed object is never replaced, whoever writes at the same instant",
        "an object is renamed to its name after a check: give two workers different shards, with --worker",
    ),
    _Probe(
        "locks between processes", False, _LOCAL, _locks,
        "a second worker on one shard waits for the first",
        "two workers must never have the same shard: one cache-logits at a time, or several with --worker shares",
    ),
    _Probe(
        "sync to disk", True, _LOCAL, _syncs,
        "files and folders are synced before a receipt relies on them; whether the disk keeps its word, only a power "
        "cut would show",
        "a power cut can lose what was committed",
    ),
    _Probe(
        "upper and lower case", False, _LOCAL, _distinguishes_case,
        "names are kept apart",
        "a cache has lower-case names only and is not affected; tokenizer files that differ in case would be",
    ),
    _Probe(
        "free space", False, _LOCAL, _has_room,
        "at least 1 GiB is free",
        "make room before a long run: a full disk stops it, cleanly",
    ),
)  # fmt: skip
