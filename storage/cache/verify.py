"""Checks every object of a cache against its receipt, and finds the leftovers that no receipt lists.

quick   records against their own digests, receipts against the index, every object's length; on a local disk its
        seal and its chunks' sizes too, which cost a remote store nine requests where one listing gives all lengths
deep    every byte of every object against its sha256, its seal and chunks' sizes on every store, and its values by our
        decoder against those by zarr's codecs, from the same bytes: each object is read once
repair  checks as deep does, then removes leftovers; the receipts of damaged shards, so that the command that made a
        shard computes it again; and a damaged index of receipts or fidelity report, which the same command writes
        again. A damaged record cannot be repaired

Safe beside a running job on a local disk: leftovers are checked a second time under the lock that a commit holds.
Where a store has no locks, repair a cache only while nobody writes to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from storage.cache.checked_array import check_object, fetch_object
from storage.cache.inventory import (
    CARD_FILES,
    ROOT_KEY,
    TEACHERS_KEY,
    TEACHERS_METADATA,
    TOKENIZER_RECEIPT_KEY,
    corpus_groups,
    teacher_groups,
)
from storage.cache.leases import leased_shard, leases_in
from storage.cache.reader import ORDER_IS_GONE, LogitCache
from storage.cache.receipts import Receipts
from storage.cache.records import (
    check_metadata,
    read_fidelity,
    read_tokenizer_file,
    read_tokenizer_receipt,
    tokenizer_key,
)
from storage.cache.zarr_store import decode_with_zarr
from storage.errors import CacheNotFound, CorruptCache, InputError, LogitCacheError
from storage.files import PARTIAL, STAGING
from storage.format.layout import ArraySpec
from storage.format.manifest.receipts import ShardReceipt
from storage.format.manifest.shared import TEACHER_NAME
from storage.format.shard import decode_shard
from storage.progress import Advance
from storage.stores import Url, open_store
from storage.stores.base import Store


@dataclass
class Verification:
    """The result of `verify`.

    problems    one line for each damaged or missing object, with its address
    leftovers   addresses of objects that no receipt lists; readers never look at them
    missing     by group of arrays ("tokens", "teachers/<name>"), ranges of positions that are not committed yet
    repaired    addresses of the objects that were removed
    listed      whether the store could be listed; leftovers are found only then
    deep        whether every byte was read
    """

    objects: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    missing: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    listed: bool = True
    deep: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged; missing shards and leftovers do no harm."""
        return not self.problems


def verify(
    url: Url, *, deep: bool = False, repair: bool = False, workers: int = 8, progress: Advance | None = None
) -> Verification:
    """Check the cache at `url`; see the module for `deep` and `repair`.

    `progress` receives the bytes of the objects checked since the last call. Raises CacheNotFound where there is no
    cache, InputError to repair in a store that cannot be listed; damage is reported, not raised.
    """
    store = open_store(url)
    if repair:
        store.check_writable()
    found = Verification(deep=deep or repair)
    # Listed before anything is checked: an object that a worker commits meanwhile is then known, or not in the list.
    try:
        listed = {key: size for key, size in store.walk().items() if not key.startswith(f"{STAGING}/")}
    except InputError:
        if repair:
            raise
        found.listed, listed = False, {}
    try:
        cache = LogitCache.open(url)
    except (CorruptCache, ValueError) as error:
        found.problems.append(str(error))
        return found
    check = _Check(store, found, repair, listed, progress)
    check.check_bytes(TEACHERS_KEY, TEACHERS_METADATA)
    check.check_tokenizer()
    groups = list(check.groups(cache))
    for group in groups:
        check.check_fidelity(group)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for group in groups:
            check.check_group(group, pool)
    leftovers = [key for key in listed if key not in check.known]
    found.leftovers = [store.where(key) for key in leftovers]
    if repair:
        check.remove_leftovers(groups, leftovers)
    return found


@dataclass
class _Check:
    """One call of `verify`: what it looks at, and what it has found so far.

    listed   lengths of the objects, by key
    known    keys that belong to the cache
    """

    store: Store
    found: Verification
    repair: bool
    listed: dict[str, int]
    progress: Advance | None
    known: set[str] = field(default_factory=lambda: {ROOT_KEY, TEACHERS_KEY, *CARD_FILES})

    def remove_leftovers(self, groups: list[Receipts], leftovers: list[str]) -> None:
        left = set(leftovers)
        for group in groups:
            # A worker holds this lock from its first object to its receipt; then they are not leftovers any more.
            with self.store.exclusive(group.folder):
                group.forget_index()
                left -= {key for shard in np.flatnonzero(group.committed()) for key in group.keys(int(shard))}
                for key in sorted(key for key in left if group.owns(key)):
                    if not self._is_held(group, key):
                        self._remove(key)
                    left.remove(key)
        for key in sorted(left):
            self._remove(key)

    def _is_held(self, group: Receipts, key: str) -> bool:
        """Whether an object is a lease that a worker holds now."""
        folder, _, name = key.rpartition("/")
        shard = leased_shard(name) if folder == group.folder else None
        return shard is not None and leases_in(self.store, folder).is_held(shard)

    def _remove(self, key: str) -> None:
        try:
            self.store.remove(key)
        except FileNotFoundError:  # its worker has removed it meanwhile, such as a lease
            return
        self.found.repaired.append(self.store.where(key))

    def groups(self, cache: LogitCache) -> Iterator[Receipts]:
        yield from corpus_groups(cache)
        for name in self.store.names("teachers"):
            key = f"teachers/{name}/zarr.json"
            if name == "zarr.json" or not re.fullmatch(TEACHER_NAME, name):
                continue
            try:
                groups = teacher_groups(cache, name)
            except LogitCacheError as error:
                below = self.store.walk(f"teachers/{name}")
                if isinstance(error, CacheNotFound) and all(key.endswith(PARTIAL) for key in below):
                    continue  # no entry: a stray file, or a worker that was killed before it had written the record
                absent = f"{self.store.where(key)}: missing, so nothing of this entry can be read"
                self.found.problems.append(absent if isinstance(error, CacheNotFound) else str(error))
                # Below a broken record, leftovers cannot be distinguished from other objects, so nothing is removed.
                self.known.update(below)
                continue
            self.known.add(key)
            yield from groups

    def check_group(self, receipts: Receipts, pool: ThreadPoolExecutor) -> None:
        self.known.update(receipts.metadata())
        self.known.add(receipts.index_key)
        try:
            _ = receipts.index
        except LogitCacheError as error:
            self.found.problems.append(str(error))
            if not self.repair:
                self._check_metadata(receipts)
                self.known.update(self.store.walk(receipts.prefix.rstrip("/") or receipts.name))
                self.known.update(self.store.walk(receipts.folder))
                return
            # The index only repeats the receipts; the next run of the command that made it writes it again.
            self._remove(receipts.index_key)
        committed = np.flatnonzero(receipts.committed()).tolist()
        self._check_metadata(receipts, started=bool(committed))
        missing = receipts.missing_ranges()
        if missing and receipts.needed_by is not None and _any_committed(receipts.needed_by):
            self.found.problems.append(f"{self.store.where(receipts.name)}: {ORDER_IS_GONE}")
        elif missing:
            self.found.missing[receipts.name] = missing
        for shard in committed:
            self.known |= receipts.keys(shard)
            damaged, doubtful = self._check_shard(receipts, shard, pool)
            self.found.problems += damaged + doubtful
            # Where the decoders differ the program is wrong and the bytes are not; repair leaves these alone.
            if damaged and self.repair:
                # The index first: it lists the receipt. The objects stay; the worker replaces them like any leftover.
                for key in (receipts.index_key, receipts.key(shard)):
                    if self.store.size(key) is not None:
                        self._remove(key)
                receipts.forget_index()

    def _check_shard(self, receipts: Receipts, shard: int, pool: ThreadPoolExecutor) -> tuple[list[str], list[str]]:
        """The damage of a shard, which repair mends, and differences between the decoders, which it does not."""
        try:
            receipt = receipts.read(shard)
        except LogitCacheError as error:
            return [str(error)], []
        if receipt is None:  # it was listed by the index, which the repair of an earlier shard has removed
            return [f"{self.store.where(receipts.key(shard))}: missing, though the index listed it"], []
        checks = list(pool.map(partial(self._check_object, receipts, receipt), receipts.specs.values()))
        size = sum(item.bytes for item in receipt.objects.values())
        self.found.objects += len(receipt.objects)
        self.found.bytes += size
        if self.progress is not None:
            self.progress(size)
        damaged, doubtful = ([text for text in texts if text is not None] for texts in zip(*checks, strict=True))
        return damaged, doubtful

    def check_fidelity(self, group: Receipts) -> None:
        key = group.fidelity_key
        if key is None:
            return
        self.known.add(key)
        try:
            read_fidelity(self.store, group.prefix, group.record_sha256)
        except LogitCacheError as error:
            self.found.problems.append(str(error))
            if self.repair:
                self._remove(key)

    def _check_metadata(self, group: Receipts, started: bool = True) -> None:
        """Check the arrays' zarr.json; before a shard is committed (not `started`), it may not have been written."""
        for key, data in group.metadata().items():
            if started or self.store.size(key) is not None:
                self.check_bytes(key, data)

    def _check_object(self, group: Receipts, receipt: ShardReceipt, spec: ArraySpec) -> tuple[str | None, str | None]:
        """As `_check_shard`, for one object."""
        store, key = self.store, group.object_key(spec.name, receipt.shard)
        expected = receipt.objects[spec.name]
        try:
            if store.local_path is None:
                # A worker may have committed the shard after the listing.
                size = self.listed[key] if key in self.listed else store.size(key)
                if size != expected.bytes:
                    there = "no object" if size is None else f"{size} bytes"
                    return f"{store.where(key)}: its receipt states {expected.bytes} bytes, found {there}", None
            if self.found.deep:
                data = fetch_object(store, key, spec, receipt)
                return _compare_decoders(store.where(key), spec, receipt.shard, data)
            if store.local_path is not None:
                check_object(store, key, spec, receipt)
        except FileNotFoundError:
            return f"{store.where(key)}: missing, though its receipt exists", None
        except LogitCacheError as error:
            return str(error), None
        return None, None

    def check_tokenizer(self) -> None:
        self.known.add(TOKENIZER_RECEIPT_KEY)
        try:
            files = read_tokenizer_receipt(self.store).files
            keys = [tokenizer_key(name) for name in files]
        except LogitCacheError as error:
            self.found.problems.append(str(error))
            self.known.update(self.store.walk("tokenizer"))
            return
        self.known.update(keys)
        for name, expected in files.items():
            self.found.objects += 1
            self.found.bytes += expected.bytes
            try:
                read_tokenizer_file(self.store, name, expected)
            except LogitCacheError as error:
                self.found.problems.append(str(error))

    def check_bytes(self, key: str, implied: bytes) -> None:
        try:
            check_metadata(self.store, key, implied)
        except LogitCacheError as error:
            self.found.problems.append(str(error))


def _any_committed(receipts: Receipts) -> bool:
    try:
        return bool(receipts.committed().any())
    except LogitCacheError:  # a damaged index, of what was committed
        return True


def _compare_decoders(where: str, spec: ArraySpec, shard: int, data: bytes) -> tuple[str | None, str | None]:
    """As `_Check._check_object`, for an object whose bytes are those of the receipt."""
    decoders = {"our decoder": lambda *given: np.concatenate(list(decode_shard(*given))), "zarr": decode_with_zarr}
    found, failed = {}, []
    for name, decode in decoders.items():
        try:
            values = decode(spec, shard, data)
        except Exception as error:  # codecs have no common error class
            failed.append(f"{name} cannot decode it ({type(error).__name__}: {error})")
        else:
            # As bytes: NaN stands for "no label", and -0 is not 0.
            found[name] = (values.dtype, values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
    if len(failed) == len(decoders):
        return f"{where}: its bytes are those of the receipt, but {' and '.join(failed)}", None
    (dtype, shape, ours), *others = found.values()
    if not failed and all(other[:2] == (dtype, shape) and np.array_equal(other[2], ours) for other in others):
        return None, None
    differ = failed[0] if failed else "our decoder and zarr read different values from it"
    return None, (
        f"{where}: {differ}, though its bytes are those of the receipt: the object is whole, and logit-cache or one of "
        f"its libraries decodes it wrongly; do not train on it, and report this"
    )
