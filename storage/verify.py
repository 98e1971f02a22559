"""Every object of a cache against what commits it, and what lies there that nothing commits.

quick   records against their own digests, receipts against the index, every object's length and seal
deep    besides, every byte of every object against its sha256
repair  removes what no receipt lists, and the receipts of damaged shards, so that the command that made the
        shard computes it again, and a damaged index of receipts, which the same command writes again; a
        damaged record cannot be repaired

Safe beside a running job on a local disk: what looked like a leftover is looked at again under the lock that a
commit holds. Where a location has no locks, repair a cache only while nobody writes to it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from storage.arrays import check_object, metadata_bytes
from storage.errors import CacheNotFound, CorruptCache, LogitCacheError
from storage.format import ArraySpec, corpus_arrays, group_metadata
from storage.location import Location, locate
from storage.manifest import TEACHER_NAME, FilesReceipt, ShardReceipt, digest, parse_json, unseal
from storage.reader import LogitCache, tokenizer_key
from storage.receipts import Receipts

Progress = Callable[[int], None]


@dataclass
class Verification:
    """What `verify` found.

    problems    one line for each damaged or missing object, with its address
    leftovers   addresses of objects that no receipt lists; readers never look at them
    missing     by group of arrays ("tokens", "teachers/<name>"), ranges of positions that are not committed yet
    repaired    what was removed
    """

    objects: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    missing: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged; shards that are missing, and leftovers, do no harm."""
        return not self.problems


@dataclass(frozen=True)
class _Group:
    """Arrays with receipts in common: where they lie, and under which name to report them."""

    name: str
    folder: str
    receipts: Receipts

    def keys(self, shard: int) -> set[str]:
        """Keys of a shard's receipt and objects."""
        objects = {self.folder + spec.shard_key(shard) for spec in self.receipts.specs.values()}
        return {self.receipts.key(shard), *objects}

    def owns(self, key: str) -> bool:
        """Whether a key lies below this group's arrays or receipts."""
        folders = [self.receipts.folder, *(self.folder + name for name in self.receipts.specs)]
        return any(key.startswith(folder + "/") for folder in folders)


def verify(
    url: str, *, deep: bool = False, repair: bool = False, workers: int = 4, progress: Progress | None = None
) -> Verification:
    """Check the cache at `url`; see the module for `deep` and `repair`.

    `progress` is given the bytes of the objects checked since the last call. Raises CacheNotFound where there is no
    cache; damage is reported, not raised.
    """
    location = locate(url)
    # Listed before anything is checked: what a worker commits meanwhile is then known, or not in the list.
    listed = location.walk()
    found = Verification()
    known = {"zarr.json", "teachers/zarr.json"}
    try:
        cache = LogitCache.open(url)
    except (CorruptCache, ValueError) as error:
        found.problems.append(str(error))
        return found
    _check_bytes(location, "teachers/zarr.json", metadata_bytes(group_metadata({})), found)
    _check_tokenizer(location, known, found)
    groups = list(_groups(location, cache, known, found))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for group in groups:
            _check_group(location, group, known, found, deep, pool, progress, repair)
    leftovers = [key for key in listed if key not in known]
    found.leftovers = [location.where(key) for key in leftovers]
    if repair:
        _remove_leftovers(location, groups, leftovers, found)
    return found


def _remove_leftovers(location: Location, groups: list[_Group], leftovers: list[str], found: Verification) -> None:
    left = set(leftovers)
    for group in groups:
        # A worker between its objects and its receipt holds this lock; afterwards they are no leftovers any more.
        with location.exclusive(group.receipts.folder):
            group.receipts.forget_index()
            left -= {key for shard in np.flatnonzero(group.receipts.committed()) for key in group.keys(int(shard))}
            for key in sorted(key for key in left if group.owns(key)):
                _remove(location, key, found)
                left.remove(key)
    for key in sorted(left):
        _remove(location, key, found)


def _remove(location: Location, key: str, found: Verification) -> None:
    location.remove(key)
    found.repaired.append(location.where(key))


def _groups(location: Location, cache: LogitCache, known: set[str], found: Verification) -> Iterator[_Group]:
    for name, spec in corpus_arrays(cache.record).items():
        yield _Group(name, "", Receipts(location, f"receipts/{name}", {name: spec}, digest(cache.record)))
    for name in location.names("teachers"):
        key = f"teachers/{name}/zarr.json"
        if name == "zarr.json" or not re.fullmatch(TEACHER_NAME, name):
            continue
        try:
            targets = cache.teacher(name)
        except LogitCacheError as error:
            absent = f"{location.where(key)}: missing, so nothing of this entry can be read"
            found.problems.append(absent if isinstance(error, CacheNotFound) else str(error))
            # Nothing below a broken record can be told from leftovers, so all of it is left alone.
            known.update(location.walk(f"teachers/{name}"))
            continue
        known.add(key)
        yield _Group(f"teachers/{name}", f"teachers/{name}/", targets.receipts)


def _check_group(
    location: Location,
    group: _Group,
    known: set[str],
    found: Verification,
    deep: bool,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
    repair: bool,
) -> None:
    receipts = group.receipts
    for spec in receipts.specs.values():
        key = f"{group.folder}{spec.name}/zarr.json"
        known.add(key)
        _check_bytes(location, key, metadata_bytes(spec.metadata()), found)
    known.add(receipts.index_key)
    try:
        _ = receipts.index
    except LogitCacheError as error:
        found.problems.append(str(error))
        if not repair:
            known.update(location.walk(group.folder.rstrip("/") or group.name))
            known.update(location.walk(receipts.folder))
            return
        # The index repeats what the receipts say; the next run of the command that made it writes it again.
        _remove(location, receipts.index_key, found)
    committed = np.flatnonzero(receipts.committed()).tolist()
    missing = receipts.missing_ranges()
    if missing:
        found.missing[group.name] = missing
    for shard in committed:
        known |= group.keys(shard)
        try:
            receipt = receipts.read(shard)
            assert receipt is not None, "a committed shard has a receipt"
        except LogitCacheError as error:
            damaged = [str(error)]
        else:
            check = partial(_check_object_of, location, group, receipt, deep)
            checks = pool.map(check, receipts.specs.values())
            damaged = [problem for problem in checks if problem is not None]
            found.objects += len(receipt.objects)
            size = sum(item.bytes for item in receipt.objects.values())
            found.bytes += size
            if progress is not None:
                progress(size)
        found.problems += damaged
        if damaged and repair:
            # The index first: it lists the receipt. The objects stay; the worker replaces them as any leftover.
            for key in (receipts.index_key, receipts.key(shard)):
                if location.size(key) is not None:
                    _remove(location, key, found)
            receipts.forget_index()


def _check_object_of(
    location: Location, group: _Group, receipt: ShardReceipt, deep: bool, spec: ArraySpec
) -> str | None:
    key = group.folder + spec.shard_key(receipt.shard)
    try:
        check_object(location, key, spec, receipt)
        if deep:
            sha256 = hashlib.sha256(location.read(key)).hexdigest()
            if sha256 != receipt.objects[spec.name].sha256:
                return f"{location.where(key)}: expected sha256 {receipt.objects[spec.name].sha256}, found {sha256}"
    except FileNotFoundError:
        return f"{location.where(key)}: missing, though its receipt exists"
    except LogitCacheError as error:
        return str(error)
    return None


def _check_tokenizer(location: Location, known: set[str], found: Verification) -> None:
    key = "receipts/tokenizer.json"
    known.add(key)
    where = location.where(key)
    try:
        receipt = unseal(FilesReceipt, parse_json(location.read(key), where), where)
    except FileNotFoundError:
        found.problems.append(f"{where}: missing; the cache has no tokenizer that can be trusted")
        known.update(location.walk("tokenizer"))
        return
    except LogitCacheError as error:
        found.problems.append(str(error))
        known.update(location.walk("tokenizer"))
        return
    for name, expected in receipt.files.items():
        file = tokenizer_key(name)
        known.add(file)
        found.objects += 1
        found.bytes += expected.bytes
        try:
            data = location.read(file)
        except FileNotFoundError:
            found.problems.append(f"{location.where(file)}: missing, though its receipt exists")
            continue
        if (len(data), hashlib.sha256(data).hexdigest()) != (expected.bytes, expected.sha256):
            found.problems.append(f"{location.where(file)}: differs from its receipt")


def _check_bytes(location: Location, key: str, expected: bytes, found: Verification) -> None:
    where = location.where(key)
    try:
        data = location.read(key)
        same = parse_json(data, where) == parse_json(expected, where)
    except FileNotFoundError:
        found.problems.append(f"{where}: missing")
    except LogitCacheError as error:
        found.problems.append(str(error))
    else:
        if not same:
            found.problems.append(f"{where}: not the metadata that this cache's record implies; it was changed")
