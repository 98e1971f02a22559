"""Copying a cache between two stores: one engine for push and pull.

    with prepare(source, target) as transfer:   # records and receipts, checked against each other and the target
        transfer.deliver(advance)               # the data follows, and becomes a cache last

A local target receives everything in a staging folder first (`storage.transfer.staging`). One atomic rename publishes a
new cache, or a new entry of an existing cache; shards that complete an entry are moved in under the lock that a commit
holds, objects first. An object store has no rename: there a shard's objects are written first, then its receipt, as in
a caching job, and the root record of a new cache is last, so that nobody opens a partial one. Killed at any instant,
the same call resumes: objects with a receipt at the target are copied again only if missing or of another length.

Every object is compared with its receipt on the way, its sha256 included. Nothing committed is replaced.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from storage.cache.inventory import CARD_FILES, ROOT_KEY, TEACHERS_KEY, TOKENIZER_RECEIPT_KEY
from storage.cache.reader import LogitCache, Stream
from storage.cache.records import read_record, teacher_folder
from storage.errors import CorruptCache, IdentityMismatch, InputError
from storage.files import PARTIAL
from storage.format.identity import stream_sha256
from storage.format.layout import PER_DOCUMENT
from storage.format.manifest import CacheRecord, ShardReceipt, TeacherEntry
from storage.format.sealing import differences, digest
from storage.progress import Advance
from storage.stores import Url, open_store
from storage.stores.base import Store
from storage.transfer.contents import Contents, Part, each, fetch_rest, gather, open_source
from storage.transfer.destinations import Destination, FolderDestination, StoreDestination, other_bytes
from storage.transfer.redaction import without_tokens as redacted
from storage.transfer.snapshot import Snapshot
from storage.transfer.staging import StagingFolder

_TOP_LEVEL = {
    ROOT_KEY,
    *CARD_FILES,
    *(key.split("/")[0] for key in (TEACHERS_KEY, TOKENIZER_RECEIPT_KEY)),
    *("tokens", *PER_DOCUMENT, "loss_mask", "tokenizer"),
}


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


class Transfer:
    """A copy whose records and receipts have been fetched and fit its target. Made by `prepare`."""

    def __init__(
        self,
        source: Snapshot,
        cache: LogitCache,
        contents: Contents,
        target: Store,
        existing: CacheRecord | None,
        destination: Destination,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.source = source
        self.contents = contents
        self.existing = existing
        self._cache = cache
        self._target = target
        self._destination = destination
        self._pool = pool
        self._listing: dict[str, int] = {}

    def manifest(self) -> tuple[Path, list[str]]:
        """The source's records and receipts, which a signature covers: a folder and the keys of the files in it."""
        fetch_rest(self.source, self._cache, self._pool)
        return self.source.folder, self.source.kept

    def write_manifest(self, folder: Path) -> list[str]:
        """Write the records and receipts that a new target will have into a folder, and return their keys."""
        keys = []
        for key, data in self.contents.manifest():
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)
            keys.append(key)
        return keys

    def check_fits(self, store: Store) -> None:
        """Refuse a store where the copy, records included, would overwrite another cache, entry or file."""
        existing = _existing(store)
        if existing is None:
            return
        if digest(existing) != digest(self.contents.record):
            raise IdentityMismatch(
                store.url,
                differences(existing, self.contents.record, ignore=(), names=("that cache", "this one")),
                "A data set is one cache: give another one",
            )
        for part in self.contents.parts:
            _check_entry(store, part)

    @property
    def kept_at(self) -> Path | None:
        """The staging folder of a local target, if it holds objects that another run can use."""
        return self._destination.kept_at

    def deliver(
        self,
        advance: Advance | None = None,
        card_files: Mapping[str, bytes] | None = None,
        *,
        check_stream: bool = False,
    ) -> Delivery:
        """Copy the objects that the target lacks, and publish the cache.

        `advance` receives the bytes copied or found since its last call, `contents.size` in all; `card_files` are files
        without receipts (`inventory.CARD_FILES`) for a new target. `check_stream`: before a new local cache is
        published, compute the digest of its tokens, to which the targets are bound.
        """
        if not self._destination.new or isinstance(self._destination, StoreDestination):
            self._listing = self._target.walk()
        record = self.existing or self.contents.record
        names = [part.name.partition("/")[2] for part in self.contents.parts if part.record is not None]
        done = Delivery(self._target.url, names, record.corpus.tokens_included)
        for part in self.contents.parts:
            self._destination.begin(part)
            copy = _PartCopy(part, self._target, self._listing, self._destination, advance or (lambda count: None))
            for copied, copied_bytes, kept in each(self._pool, copy.shard, part.shards):
                done.copied += copied
                done.copied_bytes += copied_bytes
                done.kept += kept
            missing = part.missing()
            if missing:
                done.missing[part.name] = missing
        streams = [part.name for part in self.contents.parts if part.record is None]
        check = check_stream and streams and not done.missing.keys() & set(streams)
        self._destination.finish(self.contents, card_files or {}, self._check_stream if check else None)
        return done

    def _check_stream(self, copy: LogitCache) -> None:
        found, expected = computed_stream_sha256(copy), copy.record.corpus.stream_sha256
        if found != expected:
            raise CorruptCache(
                f"{self.contents.corpus.where('tokens')}: these tokens have the digest {found}, the record states "
                f"{expected}: the targets were made from other text"
            )


class _PartCopy:
    """The copying of one part's shards, each in a thread of the pool."""

    def __init__(
        self, part: Part, target: Store, listing: dict[str, int], destination: Destination, advance: Advance
    ) -> None:
        self._part = part
        self._there = part.at(target)
        self._target = target
        self._listing = listing
        self._destination = destination
        self._advance = advance
        # Where the indexes are the same bytes, so are all receipts.
        self._same = (
            part.index is not None
            and listing.get(part.index_key) == len(part.index)
            and target.read(part.index_key) == part.index
        )

    def shard(self, shard: int) -> tuple[int, int, int]:
        """Copy the objects of a shard that the target lacks. Returns copied objects, their bytes, and kept objects."""
        receipt, data = self._part.receipt(shard)
        committed = self._committed(shard, receipt, data)
        # Shards that were committed since the target was listed are in no listing.
        length = self._listing.get if self._there.receipts.key(shard) in self._listing else self._target.size
        copied = copied_bytes = kept = 0
        for key, spec in self._there.objects(receipt):
            size = receipt.objects[spec.name].bytes
            if committed and length(key) == size:
                kept += 1
                self._advance(size)
                continue
            self._destination.put_object(self._part, shard, key, spec, receipt, committed, self._advance)
            copied += 1
            copied_bytes += size
        if not committed:
            self._destination.put_receipt(self._part, shard, receipt, data)
        return copied, copied_bytes, kept

    def _committed(self, shard: int, receipt: ShardReceipt, data: bytes) -> bool:
        """Whether the target has the shard's receipt; CorruptCache when it is damaged or commits other bytes."""
        key = self._there.receipts.key(shard)
        # The listing may be hours old, and not every store honours a put that must not replace.
        if key not in self._listing and self._target.size(key) is None:
            return False
        if self._same and self._listing.get(key) == len(data):
            return True
        found = self._there.receipts.read(shard)
        if found is None:
            return False
        if found.objects != receipt.objects:
            raise other_bytes(self._part, self._target, shard)
        if found != receipt:
            self._destination.mixed.add(self._part.name)
        return True


@contextlib.contextmanager
def prepare(
    source: Url,
    target: Url,
    *,
    teachers: Sequence[str] = (),
    corpus: Url | None = None,
    without_tokens: bool = False,
    workers: int = 8,
    link: bool = False,
) -> Iterator[Transfer]:
    """Fetch a cache's records and receipts, and check them against each other and against the target.

    teachers        the entries to copy; none: all
    corpus          a cache of the same text, whose token stream is copied instead of the source's
    without_tokens  leave out the token stream and `label_logprob`
    workers         objects that are copied in parallel
    link            into a new local folder: hard-link local objects instead of copying them

    Raises CacheNotFound, InputError, FormatError, CorruptCache, and IdentityMismatch for a target of other text, with
    another tokenizer, or with another entry of the same name. Nothing has been written at the target then.
    """
    origin, store = open_store(source), open_store(target)
    _check_apart(origin, store)
    if store.local_path is None:  # in a folder, the staging folder is made first
        store.check_writable()
    if corpus is not None and without_tokens:
        raise InputError("without tokens, and with a corpus, cannot both be")
    read_record(origin, ROOT_KEY, CacheRecord)  # before any folder is created for it
    existing = _existing(store)
    with contextlib.ExitStack() as stack:
        destination: Destination
        if store.local_path is not None:
            staging = stack.enter_context(StagingFolder.beside(Path(os.path.realpath(store.local_path))))
            folder = staging.manifest
            destination = FolderDestination(store, existing is None, staging, link)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="logit-cache-")))
            destination = StoreDestination(store, existing is None)
        pool = stack.enter_context(ThreadPoolExecutor(max(1, workers)))
        snapshot, cache = open_source(origin, folder / "source")
        text = (snapshot, cache)
        if corpus is not None:
            text = open_source(open_store(corpus), folder / "corpus")
            _check_corpus(LogitCache.open(corpus), cache)
        record = redacted(text[1].record) if without_tokens else text[1].record
        if existing is not None:
            _check_target(store, existing, record, with_corpus=corpus is not None, without_tokens=without_tokens)
        same_root = existing is None or digest(existing) == digest(record)
        names = _names(teachers, cache)
        contents = gather(text, (snapshot, cache), names, pool, redact=without_tokens, with_root=same_root)
        if existing is not None:
            for part in contents.parts:
                _check_entry(store, part)
        yield Transfer(snapshot, cache, contents, store, existing, destination, pool)


def _check_apart(source: Store, target: Store) -> None:
    locations = [
        store.url.rstrip("/") if store.local_path is None else os.path.realpath(store.local_path)
        for store in (source, target)
    ]
    a, b = (f"{location}/" for location in locations)
    if a.startswith(b) or b.startswith(a):
        raise InputError(f"{source.url} and {target.url}: one lies in the other, or they are the same location")


def _existing(target: Store) -> CacheRecord | None:
    """The record of the cache at the target, None where there is none yet. Raises InputError for something else."""
    names = [name for name in target.names("") if not name.endswith(PARTIAL)]
    if ROOT_KEY in names:
        return read_record(target, ROOT_KEY, CacheRecord)
    # A local cache appears whole; in an object store, an interrupted push leaves these.
    strangers = [name for name in names if target.local_path is not None or name not in _TOP_LEVEL]
    if strangers:
        raise InputError(
            f"{target.url} holds {', '.join(strangers[:3])}{' …' if len(strangers) > 3 else ''} and is not a cache: "
            f"give an empty or new location"
        )
    return None


def _names(teachers: Sequence[str], cache: LogitCache) -> list[str]:
    for name in teachers:
        teacher_folder(name)
    if teachers:
        return sorted(set(teachers))
    try:
        return list(cache.teachers)
    except InputError as error:
        raise InputError(f"{error}: --teacher NAME") from None


def _check_target(
    target: Store, existing: CacheRecord, record: CacheRecord, *, with_corpus: bool, without_tokens: bool
) -> None:
    """Refuse a target of other text or another tokenizer, one with tokens for a copy without them, and one without
    tokens for a copy with a corpus."""
    pairs = {
        "corpus.stream_sha256": (existing.corpus.stream_sha256, record.corpus.stream_sha256),
        "corpus.positions": (existing.corpus.positions, record.corpus.positions),
        "corpus.documents": (existing.corpus.documents, record.corpus.documents),
        "tokenizer.vocabulary_size": (existing.tokenizer.vocabulary_size, record.tokenizer.vocabulary_size),
        "tokenizer.fingerprint": (existing.tokenizer.fingerprint, record.tokenizer.fingerprint),
    }
    fields = [f"{name}: {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]
    if fields:
        raise IdentityMismatch(
            target.url, fields, "A cache holds one token stream of one tokenizer: give another target, or an empty one"
        )
    if without_tokens and existing.corpus.tokens_included:
        raise InputError(f"{target.url}: it has the tokens; to share without them, give another target")
    if with_corpus and not existing.corpus.tokens_included:
        raise InputError(
            f"{target.url}: it was made without its tokens and stays so; give a new target, or pull into the cache "
            f"that has the text"
        )


def _check_entry(target: Store, part: Part) -> None:
    """Raise IdentityMismatch if the target has another entry of the same name."""
    if part.entry is None or target.size(part.record_key) is None:
        return
    there = read_record(target, part.record_key, TeacherEntry)
    if digest(there) != part.record_sha256:
        raise IdentityMismatch(
            target.where(part.name),
            differences(there, part.entry, ignore=(), names=("that one", "this one")),
            "An entry is one teacher's targets made in one way: give another target, or remove the entry that is there",
        )


def _check_corpus(corpus: LogitCache, source: LogitCache) -> None:
    """Refuse a token stream that is not the one of the source's targets; its digest is computed from its tokens."""
    if not corpus.record.corpus.tokens_included:
        raise InputError(
            f"{corpus.url}: it has no tokens to attach; make a cache of the text with logit-cache tokenize"
        )
    missing = corpus.missing_tokens()
    if missing:
        raise InputError(f"{corpus.url}: its token stream is not complete: run logit-cache tokenize again first")
    wanted = source.record
    computed = computed_stream_sha256(corpus)
    if computed != corpus.record.corpus.stream_sha256:
        raise CorruptCache(f"{corpus.url}: its tokens have the digest {computed}, which is not the one in its record")
    found = {
        "corpus.stream_sha256": (computed, wanted.corpus.stream_sha256),
        "tokenizer.vocabulary_size": (corpus.vocabulary_size, wanted.tokenizer.vocabulary_size),
        "tokenizer.fingerprint": (corpus.record.tokenizer.fingerprint, wanted.tokenizer.fingerprint),
    }
    fields = [f"{name}: {a} in {corpus.url}, {b} in {source.url}" for name, (a, b) in found.items() if a != b]
    if fields:
        raise IdentityMismatch(
            corpus.url,
            fields,
            f"Make it of the same text and with --tokenizer {source.url}/tokenizer",
        )


def computed_stream_sha256(cache: LogitCache) -> str:
    """`stream_sha256` of a cache, computed from its tokens instead of read from its record."""
    mask: Any = None if cache.loss_mask is None else _Rows(cache.loss_mask)
    tokens: Any = _Rows(cache.tokens)
    return stream_sha256(tokens, cache.document_starts, mask)


class _Rows:
    """A stream with the slicing of an array."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        return self._stream.read(rows.start, min(rows.stop, len(self)))
