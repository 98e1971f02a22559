"""Whole teacher entries of a cache: removed, or given another name.

Either may be interrupted at any moment and repeated. What is left then are entries that lack shards, as sound as one
that was never finished: a record comes before all else and goes after it, and nothing is promised before it is there,
or after it is gone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from storage.cache.leases import leased_shard, leases_in
from storage.cache.reader import LogitCache
from storage.cache.records import teacher_folder
from storage.errors import InputError
from storage.files import PARTIAL, sync_path
from storage.format.fidelity import FIDELITY_FILE
from storage.format.layout import SAMPLING_ORDER
from storage.format.manifest.shared import TEACHER_NAME
from storage.progress import Advance
from storage.stores import open_store
from storage.stores.base import Store

_AT_ONCE = 8


def remove_entry(url: str, name: str, progress: Advance | None = None) -> int:
    """Remove a teacher entry and whatever a killed worker has left of it; returns the bytes that it took.

    `progress` receives the bytes removed since the last call. Raises InputError for a name that the cache does not
    have, while a worker holds a lease on a shard, and where the store cannot list or remove.
    """
    store, folder = _unused_entry(url, name)
    sizes = store.walk(folder.rstrip("/"))

    def remove(key: str) -> None:
        store.remove(key)
        if progress is not None:
            progress(sizes[key])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for keys in reversed(_in_order_of_writing(folder, sizes)):
            list(pool.map(remove, keys))
    if store.local_path is not None:
        shutil.rmtree(store.local_path / folder, ignore_errors=True)  # empty folders
    return sum(sizes.values())


def rename_entry(url: str, name: str, new_name: str, progress: Advance | None = None) -> None:
    """Give a teacher entry another name: on a disk at once, in a store by copies, after which the old one is removed.

    `progress` receives the bytes copied since the last call. Raises InputError as `remove_entry` does, and for a name
    that is taken by another entry or is none.
    """
    store, folder = _unused_entry(url, name)
    if not re.fullmatch(TEACHER_NAME, new_name):
        raise InputError(f"{new_name!r} is no name of an entry: lower-case letters, digits, '-' and '_'")
    target = teacher_folder(new_name)
    taken = store.size(f"{target}zarr.json") is not None
    if taken and (name == new_name or store.read(f"{target}zarr.json") != store.read(f"{folder}zarr.json")):
        raise InputError(f"{url}: {new_name} is another entry: give another name, or remove it first")
    root = store.local_path
    if root is not None and not taken:
        (root / folder).rename(root / target)
        sync_path((root / target).parent)
        return
    sizes = store.walk(folder.rstrip("/"))

    def copy(key: str) -> None:
        other, data = target + key.removeprefix(folder), store.read(key)
        if not store.publish(other, data) and store.read(other) != data:
            raise InputError(f"{store.where(other)}: something else lies there: remove the entry {new_name} first")
        if progress is not None:
            progress(sizes[key])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for keys in _in_order_of_writing(folder, [key for key in sizes if not _is_leftover(key)]):
            list(pool.map(copy, keys))
    remove_entry(url, name)


def _unused_entry(url: str, name: str) -> tuple[Store, str]:
    """The store of a cache, and the key prefix of one of its entries, at which no worker is at work."""
    cache, store = LogitCache.open(url), open_store(url)
    if not re.fullmatch(TEACHER_NAME, name) or not store.names(f"teachers/{name}"):
        has = f"it has {', '.join(cache.teachers)}" if cache.teachers else "it has none"
        raise InputError(f"{url}: no entry {name!r}; {has}")
    receipts = f"{teacher_folder(name)}receipts"
    for folder in (receipts, f"{receipts}/{SAMPLING_ORDER}"):
        leases = leases_in(store, folder)
        shards = [shard for shard in map(leased_shard, store.names(folder)) if shard is not None]
        held = [shard for shard in shards if leases.is_held(shard)]
        if held:
            raise InputError(f"{url}: a worker is at work on {name} (shard {held[0]}): stop it first")
    return store, teacher_folder(name)


def _in_order_of_writing(folder: str, keys: Iterable[str]) -> list[list[str]]:
    """Keys of an entry in groups: the record, objects and what describes them, the receipt of the sampling order, those
    of shards, what sums them up."""
    order = f"receipts/{SAMPLING_ORDER}/"
    groups: list[list[str]] = [[], [], [], [], []]
    for key in keys:
        name = key.removeprefix(folder)
        if name == "zarr.json":
            groups[0].append(key)
        elif name in ("receipts/index.json", f"{order}index.json", FIDELITY_FILE):
            groups[4].append(key)
        elif name.startswith("receipts/"):
            groups[2 if name.startswith(order) else 3].append(key)
        else:
            groups[1].append(key)
    return groups


def _is_leftover(key: str) -> bool:
    """Whether a key is a killed worker's: its lease, its note on a failed shard, its temporary file."""
    name = key.rpartition("/")[2]
    return leased_shard(name) is not None or name.endswith((PARTIAL, ".failed.json"))
