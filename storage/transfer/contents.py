"""The contents of a copy of a cache, known and checked before any of its data moves.

Records and receipts are small and bind everything else, so they come first: each is fetched once, kept in a folder, and
from then on read from there. Sizes are then known, a signature is checked over the very bytes that are used, and data
is compared with the checked receipts, whatever the source returns later. The receipts decide what is copied, not a
listing: objects that no receipt lists are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from storage.cache.inventory import (
    ROOT_KEY,
    TEACHERS_KEY,
    TEACHERS_METADATA,
    TOKENIZER_RECEIPT_KEY,
    Group,
    corpus_groups,
    teacher_group,
)
from storage.cache.reader import LogitCache
from storage.cache.receipts import Receipts, index_of
from storage.cache.records import read_fidelity, read_record, tokenizer_key
from storage.errors import CorruptCache, FormatError, IdentityMismatch, InputError
from storage.format.layout import ArraySpec, group_metadata, metadata_bytes, teacher_arrays
from storage.format.manifest import ATTRIBUTE, CacheRecord, ReceiptIndex, ShardReceipt, TeacherEntry
from storage.format.sealing import Record, digest, parse_json, sealed, sealed_bytes
from storage.stores.base import Result, Store
from storage.transfer.redaction import receipt_without_label, report_without_label, without_label, without_tokens
from storage.transfer.snapshot import Snapshot

# Zarr v2 metadata names codecs in JSON, and these may run code when they are read; a Zarr v3 cache has none of it.
V2_NAMES = (".zarray", ".zgroup", ".zattrs", ".zmetadata")

Item = TypeVar("Item")


@dataclass
class Part:
    """Arrays to copy that share their receipts: one array of the token stream, or a teacher entry.

    source   the group at the source, its receipts read through a snapshot
    origin   the store of the objects
    specs    the arrays to copy: all of them, or all but `label_logprob`
    record   the entry's zarr.json as the target will have it, and `entry` the record in it; None for the token stream
    report   the entry's fidelity report as the target will have it, where there is one
    shards   those that the source has committed
    index    the index as the target will have it; None while shards are missing
    size     bytes of all objects
    """

    source: Group
    origin: Store
    specs: dict[str, ArraySpec]
    record_sha256: str
    record: bytes | None = None
    entry: TeacherEntry | None = None
    report: bytes | None = None
    shards: list[int] = field(default_factory=list)
    index: bytes | None = None
    size: int = 0

    @property
    def name(self) -> str:
        """`tokens`, … or `teachers/<name>`."""
        return self.source.name

    @property
    def record_key(self) -> str:
        """Key of the entry's zarr.json."""
        return f"{self.source.folder}{ROOT_KEY}"

    @property
    def index_key(self) -> str:
        """Key of the index of its receipts."""
        return self.source.receipts.index_key

    @property
    def report_key(self) -> str:
        """Key of the entry's fidelity report."""
        key = self.source.fidelity_key
        assert key is not None, "the token stream has no report"
        return key

    def receipt(self, shard: int) -> tuple[ShardReceipt, bytes]:
        """A committed shard's receipt as the target will have it, and its bytes. Raises CorruptCache."""
        receipts = self.source.receipts
        receipt = receipts.read(shard)
        if receipt is None:
            raise CorruptCache(f"{receipts.store.where(receipts.key(shard))}: gone since it was listed")
        if self.record_sha256 != receipts.record_sha256:
            receipt = receipt_without_label(receipt, self.record_sha256)
            return receipt, sealed_bytes(receipt)
        # The stored bytes, white space included: a signature is of these bytes.
        return receipt, receipts.store.read(receipts.key(shard))

    def at(self, target: Store) -> Group:
        """The same arrays at the target."""
        receipts = Receipts(target, self.source.receipts.folder, self.specs, self.record_sha256)
        return Group(self.name, self.source.folder, receipts)

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of positions that the source lacks."""
        return [] if self.index is not None else self.source.receipts.missing_ranges()


@dataclass(frozen=True)
class Contents:
    """The contents of a copy: everything that a target receives.

    record     its root record, and `root` the bytes of its root zarr.json
    corpus     the source of root, tokenizer and token stream
    tokenizer  keys of the tokenizer's files
    with_root  whether the target receives root, tokenizer and token stream too, or only entries
    """

    record: CacheRecord
    root: bytes
    corpus: Snapshot
    tokenizer: list[str]
    parts: list[Part]
    with_root: bool

    @property
    def size(self) -> int:
        """Bytes of all objects that receipts list."""
        return sum(part.size for part in self.parts)

    def small_files(self) -> Iterator[tuple[str, bytes]]:
        """Keys and bytes of the tokenizer's files, its receipt, and teachers/zarr.json."""
        for key in (*self.tokenizer, TOKENIZER_RECEIPT_KEY, TEACHERS_KEY):
            yield key, self.corpus.read(key)

    def manifest(self) -> Iterator[tuple[str, bytes]]:
        """Keys and bytes of all records and receipts, as the target will have them."""
        yield ROOT_KEY, self.root
        for key in (TOKENIZER_RECEIPT_KEY, TEACHERS_KEY):
            yield key, self.corpus.read(key)
        for part in self.parts:
            for shard in part.shards:
                yield part.source.receipts.key(shard), part.receipt(shard)[1]
            if part.index is not None:
                yield part.index_key, part.index
            if part.report is not None:
                yield part.report_key, part.report
            if part.record is not None:
                yield part.record_key, part.record

    def keys(self) -> set[str]:
        """Keys of everything that the target receives."""
        keys = {ROOT_KEY, TEACHERS_KEY, TOKENIZER_RECEIPT_KEY, *self.tokenizer}
        for part in self.parts:
            group = part.at(self.corpus)
            keys.update(group.metadata(), *(group.keys(shard) for shard in part.shards))
            keys.update([part.index_key] if part.index is not None else [])
            keys.update([part.report_key] if part.report is not None else [])
            keys.update([part.record_key] if part.record is not None else [])
        return keys


def open_source(source: Store, folder: Path) -> tuple[Snapshot, LogitCache]:
    """Open a source whose root zarr.json is the record and nothing else. Raises CacheNotFound, FormatError, …"""
    snapshot = Snapshot(source, folder)
    record = read_record(snapshot, ROOT_KEY, CacheRecord)
    _nothing_else(snapshot, ROOT_KEY)
    try:
        listed: Iterable[str] = source.walk()
    except InputError:
        listed = ()  # a store without listings cannot be searched; such files are not copied either
    for key in listed:
        if key.rpartition("/")[2] in V2_NAMES:
            raise FormatError(
                f"{source.where(key)}: metadata of Zarr v2, whose codecs can run code; a cache is Zarr v3 and has "
                f"none: do not use this one, or remove the file if you know where it came from"
            )
    return snapshot, LogitCache(snapshot, record)


def gather(
    corpus: tuple[Snapshot, LogitCache],
    entries: tuple[Snapshot, LogitCache],
    names: Sequence[str],
    pool: ThreadPoolExecutor,
    *,
    redact: bool,
    with_root: bool,
) -> Contents:
    """Fetch and check all records and receipts of a token stream and of the named entries of the same stream.

    redact     leave out the token stream and `label_logprob`
    with_root  whether root, tokenizer and token stream are copied, or only entries
    """
    snapshot, cache = corpus
    record = without_tokens(cache.record) if redact else cache.record
    root = snapshot.read(ROOT_KEY) if record == cache.record else _record_bytes(record)
    parts = []
    if with_root and not redact:
        parts += [
            Part(group, snapshot.source, group.specs, group.receipts.record_sha256) for group in corpus_groups(*corpus)
        ]
    parts += [_entry_part(*entries, name, redact) for name in names]
    for part in parts:
        _gather_receipts(part, pool)
        _check_metadata(part)
    if not _same(snapshot, TEACHERS_KEY, TEACHERS_METADATA):
        raise FormatError(f"{snapshot.where(TEACHERS_KEY)}: expected a Zarr v3 group without attributes")
    tokenizer = [tokenizer_key(name) for name in cache.tokenizer_files()]
    return Contents(record, root, snapshot, tokenizer, parts, with_root)


def fetch_rest(source: Snapshot, cache: LogitCache, pool: ThreadPoolExecutor) -> None:
    """Fetch the records and receipts besides those of entries: a signature lists all of them."""
    cache.tokenizer_files()
    source.read(TEACHERS_KEY)
    for group in corpus_groups(source, cache):
        each(pool, group.receipts.read, np.flatnonzero(group.receipts.committed()).tolist())


def fetch_whole(store: Store, folder: Path, workers: int) -> list[str]:
    """Fetch all records and receipts of a cache into a folder, check them, and return their keys."""
    snapshot, cache = open_source(store, folder)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        gather((snapshot, cache), (snapshot, cache), cache.teachers, pool, redact=False, with_root=True)
    return snapshot.kept


def each(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, in order; the first failure cancels the calls that have not started."""
    futures = [pool.submit(function, item) for item in items]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [future.result() for future in futures]


def _entry_part(source: Snapshot, cache: LogitCache, name: str, redact: bool) -> Part:
    group = teacher_group(cache, name)
    entry, key = cache.teacher(name).entry, f"{group.folder}{ROOT_KEY}"
    _nothing_else(source, key)
    pairs = {
        "stream_sha256": (entry.stream_sha256, cache.record.corpus.stream_sha256),
        "tokenizer_fingerprint": (entry.tokenizer_fingerprint, cache.record.tokenizer.fingerprint),
    }
    differing = [f"{field}: the entry has {a}, the cache {b}" for field, (a, b) in pairs.items() if a != b]
    if differing:
        raise IdentityMismatch(source.where(key), differing, "Its targets belong to other tokens: leave it out")
    changed = without_label(entry) if redact else entry
    record = source.read(key) if changed == entry else _record_bytes(changed)
    part = Part(group, source.source, teacher_arrays(changed), digest(changed), record, changed)
    report = read_fidelity(source, group.folder, group.receipts.record_sha256)
    if report is not None:
        same = part.record_sha256 == report.record_sha256
        redacted = report_without_label(report, part.record_sha256)
        part.report = source.read(part.report_key) if same else sealed_bytes(redacted)
    return part


def _gather_receipts(part: Part, pool: ThreadPoolExecutor) -> None:
    receipts = part.source.receipts
    part.shards = np.flatnonzero(receipts.committed()).tolist()
    part.size = sum(each(pool, lambda shard: _checked_bytes(part, shard), part.shards))
    if len(part.shards) < receipts.shards:
        return
    if receipts.index is not None and part.record_sha256 == receipts.record_sha256:
        part.index = receipts.store.read(receipts.index_key)
    else:
        index: ReceiptIndex = index_of(part.record_sha256, (part.receipt(shard)[0] for shard in part.shards))
        part.index = sealed_bytes(index)


def _checked_bytes(part: Part, shard: int) -> int:
    """Bytes of a shard's objects. Raises CorruptCache for a length that such an object cannot have."""
    receipt, _ = part.receipt(shard)
    receipts = part.source.receipts
    for name, spec in part.specs.items():
        found = receipt.objects[name].bytes
        if not spec.index_bytes <= found <= spec.most_object_bytes:
            raise CorruptCache(
                f"{receipts.store.where(receipts.key(shard))}: states {found} bytes for {name}, where an object has "
                f"{spec.index_bytes} to {spec.most_object_bytes}"
            )
    return sum(item.bytes for item in receipt.objects.values())


def _check_metadata(part: Part) -> None:
    if not part.shards:
        return  # a job that was stopped at once may have left no more than a record
    store = part.source.receipts.store
    for key, expected in part.source.metadata().items():
        if not _same(store, key, expected):
            raise FormatError(f"{store.where(key)}: not the metadata that this cache's record implies")


def _same(store: Store, key: str, expected: bytes) -> bool:
    found = store.insist(key, "this cache's record implies it", lambda: store.read_json(key))
    return bool(found == parse_json(expected, key))


def _nothing_else(source: Snapshot, key: str) -> None:
    """Refuse a group whose zarr.json has more than the record: other Zarr readers would act on it."""
    found = source.read_json(key)
    if found != group_metadata({ATTRIBUTE: found["attributes"][ATTRIBUTE]}):
        raise FormatError(f"{source.where(key)}: holds more than the record of logit-cache, which nothing accounts for")


def _record_bytes(record: Record) -> bytes:
    return metadata_bytes(group_metadata({ATTRIBUTE: sealed(record)}))
