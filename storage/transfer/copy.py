"""Copying a cache between two stores: one engine for push and pull.

    with prepare(CopyJob(source=source, target=target)) as transfer:  # records and receipts, checked
        transfer.deliver(advance)                                     # the data follows, and becomes a cache last

A local target is *staged, verified, renamed*: everything goes into a staging folder first (`storage.transfer.staging`),
and one rename publishes a new cache, or a new entry of an existing cache; in an empty folder that exists, the root
record is renamed last. Shards that complete an entry are moved in under the lock that a commit holds, objects first.

An object store has no rename. It gets *objects, receipts, root*: a shard's objects are written first, then its receipt,
as in a caching job, and the root record of a new cache is last, so that nobody opens a partial one.

Killed at any instant, the same call resumes: objects with a receipt at the target are copied again only if missing or
of another length. Every object is compared with its receipt on the way, its sha256 included. Nothing committed is
replaced.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from storage.cache.inventory import ROOT_KEY
from storage.cache.reader import LogitCache
from storage.cache.records import read_record
from storage.config import Settings
from storage.errors import InputError
from storage.format.manifest.cache import CacheRecord
from storage.format.sealing import digest
from storage.progress import Advance
from storage.stores import open_store
from storage.transfer.compatibility import (
    check_apart,
    check_corpus,
    check_entries,
    check_sources,
    check_target,
    chosen_entries,
    existing_record,
)
from storage.transfer.contents import Contents, Part, Shard, fetch_rest, gather
from storage.transfer.destinations import Destination, FolderDestination, StoreDestination
from storage.transfer.redaction import without_tokens
from storage.transfer.source import Source, open_source
from storage.transfer.staging import StagingFolder

# Bytes of whole objects in memory at once, over all workers; one object is at most about as large.
_HELD_BYTES = 64 << 20


class CopyJob(Settings):
    """A copy that is asked for.

    source, target  paths or URLs
    teachers        the entries to copy; none: all
    corpus          a cache of the same text, whose token stream is copied instead of the source's
    without_tokens  leave out the token stream and `label_logprob`
    workers         objects that are copied in parallel
    link            into a new local folder: hard-link local objects instead of copying them
    """

    source: str
    target: str
    teachers: tuple[str, ...] = ()
    corpus: str | None = None
    without_tokens: bool = False
    workers: int = 8
    link: bool = False


@dataclass
class Delivery:
    """The outcome of a copy.

    copied, kept   objects that were copied, and that the target had; `copied_bytes` the bytes of the former
    missing        by group of arrays, ranges of positions that the source lacks
    """

    url: str
    teachers: list[str]
    tokens_included: bool
    copied: int = 0
    copied_bytes: int = 0
    kept: int = 0
    missing: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


@contextlib.contextmanager
def prepare(job: CopyJob) -> Iterator[Transfer]:
    """Fetch a cache's records and receipts, and check them against each other and against the target.

    Raises CacheNotFound, InputError, FormatError, CorruptCache, and IdentityMismatch for a target of other text, with
    another tokenizer, or with another entry of the same name. Nothing has been written at the target then.
    """
    origin, target = open_store(job.source), open_store(job.target)
    check_apart(origin, target)
    if job.corpus is not None and job.without_tokens:
        raise InputError("without tokens, and with a corpus, cannot both be")
    read_record(origin, ROOT_KEY, CacheRecord)  # before any folder is created for it
    existing = existing_record(target)
    new = existing is None
    with contextlib.ExitStack() as stack:
        destination: Destination
        if target.local_path is not None:
            staging = stack.enter_context(StagingFolder.of(Path(os.path.realpath(target.local_path))))
            folder = staging.manifest
            destination = FolderDestination(target, staging, new=new, link=job.link)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="logit-cache-")))
            destination = StoreDestination(target, new=new)
        pool = stack.enter_context(ThreadPoolExecutor(job.workers))
        source = text = open_source(origin, folder / "source")
        if job.corpus is not None:
            text = open_source(open_store(job.corpus), folder / "corpus")
            check_corpus(LogitCache.open(job.corpus), source.cache)
        record = without_tokens(text.cache.record) if job.without_tokens else text.cache.record
        if existing is not None:
            with_corpus = job.corpus is not None
            check_target(target, existing, record, with_corpus=with_corpus, without_tokens=job.without_tokens)
        same_root = existing is None or digest(existing) == digest(record)
        names = chosen_entries(job.teachers, source.cache)
        check_sources(target, existing or record, source.cache, names)
        contents = gather(text, source, names, pool, redact=job.without_tokens, with_root=same_root)
        if existing is not None:
            check_entries(target, contents.parts)
        yield Transfer(source, contents, existing, destination, pool)


@dataclass
class Transfer:
    """A copy whose records and receipts have been fetched and fit its target. Made by `prepare`."""

    source: Source
    contents: Contents
    existing: CacheRecord | None
    destination: Destination
    pool: ThreadPoolExecutor

    def signed_folder(self) -> Path:
        """A folder of the source's records and receipts, as it has them: a signature lists all of them."""
        fetch_rest(self.source, self.pool)
        return self.source.snapshot.local_path

    def deliver(self, advance: Advance | None = None, card_files: Mapping[str, bytes] | None = None) -> Delivery:
        """Copy the objects that the target lacks, and publish the cache.

        `advance` receives the bytes copied or found since its last call, `contents.size` in all; `card_files` are files
        without receipts (`inventory.CARD_FILES`) for a new target. Before a new local cache is published, the digest of
        its tokens, to which the targets are bound, is computed.
        """
        target = self.destination.target
        record = self.existing or self.contents.record
        folders = dict.fromkeys(part.group.prefix for part in self.contents.parts if part.group.record_key)
        names = [folder.split("/")[1] for folder in folders]
        done = Delivery(target.url, names, record.corpus.tokens_included)
        listing = target.walk()
        for part in self.contents.parts:
            self.destination.begin(part)
            copy = _PartCopy(part, listing, self.destination, advance or (lambda count: None))
            for copied in self.pool.map(copy.shard, part.shards):
                done.copied += len(copied)
                done.copied_bytes += sum(copied)
                done.kept += len(part.group.specs) - len(copied)
            if not part.complete:
                done.missing[part.group.name] = part.group.missing_ranges()
        self.destination.publish(self.contents, card_files or {})
        return done


class _PartCopy:
    """The copying of one part's shards, each in a thread of the pool."""

    def __init__(self, part: Part, listing: dict[str, int], destination: Destination, advance: Advance) -> None:
        self._part = part
        self._listing = listing
        self._destination = destination
        self._advance = advance
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._target = destination.target
        self._there = part.group.at(self._target)
        # Where the indexes are the same bytes, so are all receipts.
        key = self._there.index_key
        self._same = part.complete and key in listing and self._target.read(key) == part.manifest.read(key)

    def shard(self, number: int) -> list[int]:
        """Copy the objects of a shard that the target lacks, then its receipt; returns the lengths of the copied."""
        shard = self._part.shard(number)
        committed = self._committed(shard)
        copied = []
        for item in shard.objects():
            if not committed or self._length(item.key) != item.size:
                with self._held(item.size):
                    self._destination.put_object(item)
                copied.append(item.size)
            self._advance(item.size)
        if not committed:
            self._destination.put_receipt(shard)
        return copied

    def _length(self, key: str) -> int | None:
        # The listing may be hours old: shards that were committed since are in no listing.
        return self._listing[key] if key in self._listing else self._target.size(key)

    def _committed(self, shard: Shard) -> bool:
        """Whether the target has the shard's receipt; CorruptCache when it is damaged or commits other bytes."""
        length = self._length(shard.key)  # looked for: not every store honours a put that must not replace
        if length is None or (self._same and length == self._part.manifest.size(shard.key)):
            return length is not None
        found = shard.committed(self._there)
        if found is not None and found != shard.receipt:
            self._destination.mixed.add(self._part.group.name)
        return found is not None

    @contextlib.contextmanager
    def _held(self, size: int) -> Iterator[None]:
        """Wait until an object fits into `_HELD_BYTES`, and count it while the body runs. One alone always fits."""
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes == 0 or self._held_bytes + size <= _HELD_BYTES)
            self._held_bytes += size
        try:
            yield
        finally:
            with self._changed:
                self._held_bytes -= size
                self._changed.notify_all()
