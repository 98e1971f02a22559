"""The contents of a copy, known and checked before any of its data moves.

Records and receipts are small and bind everything else, so they come first: each is fetched once and written, as the
target will have it, into the *manifest*, a folder that is the copy without its objects. Sizes are then known, a
signature is checked over the very bytes that are used, and objects are compared with the checked receipts, whatever
the source returns later. The receipts decide what is copied, not a listing: objects that no receipt lists are not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from storage.cache.checked_array import check_object, fetch_object
from storage.cache.inventory import (
    ROOT_KEY,
    TEACHERS_KEY,
    TEACHERS_METADATA,
    TOKENIZER_RECEIPT_KEY,
    corpus_groups,
    teacher_groups,
)
from storage.cache.reader import LogitCache
from storage.cache.receipts import Receipts
from storage.cache.records import check_metadata, read_fidelity, tokenizer_key
from storage.errors import CorruptCache, IdentityMismatch, InputError
from storage.format.identity import other_tokens
from storage.format.layout import ArraySpec, record_bytes
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.receipts import ShardReceipt
from storage.format.sealing import digest, sealed_bytes
from storage.stores.base import Store
from storage.stores.local import LocalStore
from storage.transfer.redaction import receipt_without_label, report_without_label, without_label, without_tokens
from storage.transfer.source import Source, check_record_alone, open_source, write_file


@dataclass(frozen=True)
class Part:
    """Arrays to copy that share their receipts: one of the token stream, a teacher entry's targets or sampling order.

    group    the group in the manifest
    origin   the store of the objects
    shards   those that the source has committed
    size     bytes of all objects
    """

    group: Receipts
    origin: Store
    shards: list[int]
    size: int

    @property
    def manifest(self) -> Store:
        """The store of all but the objects."""
        return self.group.store

    @property
    def complete(self) -> bool:
        """Whether all shards are there; the manifest has an index of receipts then."""
        return len(self.shards) == self.group.shards

    def shard(self, number: int) -> Shard:
        receipt = self.group.read(number)
        assert receipt is not None, "the manifest has the receipts of all shards"
        return Shard(self, receipt)


@dataclass(frozen=True)
class Shard:
    """A shard to copy, with its receipt as the target will have it."""

    part: Part
    receipt: ShardReceipt

    @property
    def key(self) -> str:
        return self.part.group.key(self.receipt.shard)

    def objects(self) -> Iterator[Object]:
        group = self.part.group
        for name in self.receipt.objects:
            yield Object(group.object_key(name, self.receipt.shard), group.specs[name], self)

    def committed(self, there: Receipts) -> ShardReceipt | None:
        """The receipt that the target has of this shard. Raises CorruptCache if it commits other bytes."""
        found = there.read(self.receipt.shard)
        if found is not None and found.objects != self.receipt.objects:
            raise CorruptCache(
                f"{there.store.where(self.key)}: this shard is there with other bytes than "
                f"{self.part.origin.where(self.key)} commits, and committed shards are never replaced; "
                f"logit-cache verify shows whether one of them is damaged"
            )
        return found


@dataclass(frozen=True)
class Object:
    key: str
    spec: ArraySpec
    shard: Shard

    @property
    def size(self) -> int:
        return self.shard.receipt.objects[self.spec.name].bytes

    def fetch(self) -> bytes:
        """All of its bytes, compared with its receipt. Raises CorruptCache."""
        return fetch_object(self.shard.part.origin, self.key, self.spec, self.shard.receipt)

    def is_whole(self, store: LocalStore) -> bool:
        """Whether a local store has all of its bytes, compared block by block."""
        receipt = self.shard.receipt
        try:
            check_object(store, self.key, self.spec, receipt)
            with store.opened(self.key) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == receipt.objects[self.spec.name].sha256
        except (CorruptCache, FileNotFoundError):
            return False


@dataclass(frozen=True)
class Contents:
    """The contents of a copy: everything that a target receives.

    manifest   all files but the objects
    record     the root record
    with_root  whether the target receives root, tokenizer and token stream too, or only entries
    """

    manifest: LocalStore
    record: CacheRecord
    parts: list[Part]
    with_root: bool

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)

    def root_files(self) -> list[str]:
        """Keys of the files that belong to no part, in the order in which a target receives them."""
        return [*self.manifest.walk("tokenizer"), TOKENIZER_RECEIPT_KEY, TEACHERS_KEY, ROOT_KEY]


def gather(
    text: Source, entries: Source, names: Sequence[str], pool: ThreadPoolExecutor, *, redact: bool, with_root: bool
) -> Contents:
    """Fetch and check all records and receipts of a token stream and of the named entries of the same stream.

    redact     leave out the token stream and `label_logprob`
    with_root  whether root, tokenizer and token stream are copied, or only entries
    """
    snapshot = text.snapshot
    folder = snapshot.local_path.with_name("target")  # beside the files as the source has them
    record = without_tokens(text.cache.record) if redact else text.cache.record
    root = snapshot.read(ROOT_KEY) if record == text.cache.record else record_bytes(record)
    write_file(folder, ROOT_KEY, root)
    for name, data in text.cache.tokenizer_files().items():
        write_file(folder, tokenizer_key(name), data)
    check_metadata(snapshot, TEACHERS_KEY, TEACHERS_METADATA)
    for key in (TOKENIZER_RECEIPT_KEY, TEACHERS_KEY):
        write_file(folder, key, snapshot.read(key))
    manifest = LocalStore(folder)
    cache = LogitCache(manifest, record)
    parts = []
    if with_root and not redact:
        for group, copied in zip(corpus_groups(text.cache), corpus_groups(cache), strict=True):
            parts.append(_part(group, copied, text, folder, pool))
    for name in names:
        groups = _entry(entries, name, folder, redact)
        for group, copied in zip(groups, teacher_groups(cache, name), strict=True):
            parts.append(_part(group, copied, entries, folder, pool))
    return Contents(manifest, record, parts, with_root)


def gather_whole(store: Store, folder: Path, workers: int) -> Contents:
    """All records and receipts of a cache, fetched and checked."""
    source = open_source(store, folder / "source")
    with ThreadPoolExecutor(workers) as pool:
        return gather(source, source, source.cache.teachers, pool, redact=False, with_root=True)


def fetch_rest(source: Source, pool: ThreadPoolExecutor) -> None:
    """Fetch the records and receipts besides those of entries: a signature lists all of them."""
    source.cache.tokenizer_files()
    source.snapshot.read(TEACHERS_KEY)
    for group in corpus_groups(source.cache):
        list(pool.map(group.read, np.flatnonzero(group.committed()).tolist()))


def _entry(source: Source, name: str, folder: Path, redact: bool) -> list[Receipts]:
    """The source's groups of an entry, whose record and fidelity report are written into the manifest."""
    snapshot, cache = source.snapshot, source.cache
    groups = teacher_groups(cache, name)
    group = groups[-1]
    entry, key = cache.teacher(name).entry, f"{group.prefix}{ROOT_KEY}"
    check_record_alone(snapshot, key)
    foreign = other_tokens(entry, cache.record)
    if foreign:
        differing = [f"{field}: the entry has {a}, the cache {b}" for field, (a, b) in foreign.items()]
        raise IdentityMismatch(snapshot.where(key), differing, "Its targets belong to other tokens: leave it out")
    # Nothing is taken from an entry of a cache that was shared without its text twice.
    if redact and not entry.targets.k:
        raise InputError(
            f"{snapshot.where(key)}: it holds the log-probs of the text's tokens alone, and a cache without its text "
            f"has nothing of them: leave the entry out, or share the tokens too"
        )
    changed = without_label(entry) if redact and cache.record.corpus.tokens_included else entry
    write_file(folder, key, snapshot.read(key) if changed == entry else record_bytes(changed))
    report = read_fidelity(snapshot, group.prefix, group.record_sha256)
    if report is not None and group.fidelity_key is not None:
        redacted = sealed_bytes(report_without_label(report, digest(changed)))
        write_file(folder, group.fidelity_key, snapshot.read(group.fidelity_key) if changed == entry else redacted)
    return groups


def _part(theirs: Receipts, ours: Receipts, source: Source, folder: Path, pool: ThreadPoolExecutor) -> Part:
    """Fetch and check the source's receipts, and write them into the manifest, where they are ours."""
    unchanged = theirs.record_sha256 == ours.record_sha256

    def gather_receipt(shard: int) -> int:
        """The bytes of a shard's objects."""
        key = ours.key(shard)
        receipt = theirs.read(shard)
        if receipt is None:
            raise CorruptCache(f"{theirs.store.where(key)}: gone since it was listed")
        if unchanged:
            # The stored bytes, white space included: a signature is of these bytes.
            data = theirs.store.read(key)
        else:
            receipt = receipt_without_label(receipt, ours.specs, ours.record_sha256)
            data = sealed_bytes(receipt)
        write_file(folder, key, data)
        return sum(item.bytes for item in receipt.objects.values())

    shards = np.flatnonzero(theirs.committed()).tolist()
    size = sum(pool.map(gather_receipt, shards))
    if theirs.index is not None and unchanged:
        write_file(folder, ours.index_key, theirs.store.read(theirs.index_key))
    elif len(shards) == ours.shards:
        ours.write_index()
    for key, data in ours.metadata().items():
        # A job that was stopped at once may have left no more than a record.
        if shards:
            check_metadata(theirs.store, key, data)
        write_file(folder, key, data)
    return Part(ours, source.snapshot.source, shards, size)
