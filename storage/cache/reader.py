"""Reading a cache: `LogitCache.open(url)`, then tokens and targets by absolute position.

Everything is checked before it is returned: records against their own digests, objects against their receipts, decoded
values against the rules of the format. A range that no receipt covers raises `IncompleteCache`; it is never filled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from storage.cache.checked_array import CheckedArray, Stream, check_range, check_shards
from storage.cache.positions import (
    Mask,
    Positions,
    document_lengths,
    first_of_documents,
    in_documents,
    named_sources,
    source_numbers,
)
from storage.cache.receipts import Receipts
from storage.cache.records import (
    read_fidelity,
    read_record,
    read_tokenizer_file,
    read_tokenizer_receipt,
    teacher_folder,
)
from storage.errors import CacheNotFound, CorruptCache, FormatError, MissingObject
from storage.files import local_path
from storage.format.fidelity import FidelityReport
from storage.format.layout import corpus_arrays, order_array, teacher_arrays
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import LongDocuments, Targets, TeacherEntry
from storage.format.manifest.receipts import ShardStatistics
from storage.format.manifest.shared import ATTRIBUTE, TEACHER_NAME
from storage.format.sealing import digest, sealed
from storage.format.stored import StoredTargets, joined
from storage.format.targets import SparseTargets, is_order
from storage.stores import Url, open_store
from storage.stores.base import Store

if TYPE_CHECKING:
    from xarray import Dataset
    from zarr import Group

    from storage.cache.zarr_store import CheckedStore

ORDER_IS_GONE = (
    "missing, though ids were sampled in this order, and no other may take its place: get it from another copy of the "
    "cache with logit-cache pull, or remove the entry"
)
_CHUNK_CACHE_BYTES = 192 << 20


class TeacherTargets:
    """One teacher's entry of a cache."""

    def __init__(self, store: Store, name: str, entry: TeacherEntry, cache: LogitCache) -> None:
        self.name = name
        self.entry = entry
        self._cache = cache
        self.record_sha256 = digest(entry)
        self.specs = teacher_arrays(entry)
        folder = teacher_folder(name)
        self.receipts = Receipts(store, folder + "receipts", self.specs, self.record_sha256)
        self.arrays = {n: CheckedArray(n, self.receipts) for n in self.specs}
        self.order = checked_order(store, name, entry)
        self._where = store.where(folder.rstrip("/"))
        row_bytes = sum(spec.itemsize * int(np.prod(spec.shape[1:])) for spec in self.specs.values())
        self._chunk = lru_cache(max(2, _CHUNK_CACHE_BYTES // (row_bytes * entry.layout.chunk)))(self._read_chunk)

    def __len__(self) -> int:
        return self.entry.positions

    @cached_property
    def rows_with_targets(self) -> Positions | None:
        """`LogitCache.rows_with_targets` of the entry's record."""
        return self._cache.rows_with_targets(self.entry.targets)

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of positions that no receipt covers yet; empty when the entry is complete."""
        return self.receipts.missing_ranges()

    def committed(self) -> list[tuple[int, int]]:
        """Ranges of positions that receipts cover: more of them later, while the entry is being written."""
        return self.receipts.committed_ranges()

    def statistics(self) -> tuple[ShardStatistics | None, float]:
        """Sums over all committed positions, and the seconds that computing them took."""
        totals = self.receipts.totals()
        return totals.statistics, totals.seconds

    def stored_bytes(self) -> int:
        """Bytes of all committed objects, from their receipts."""
        order = 0 if self.order is None else self.order.receipts.totals().object_bytes
        return self.receipts.totals().object_bytes + order

    def sampling_order(self) -> NDArray[np.uint32] | None:
        """uint32 [V]: the ids in the order in which they lie when some are sampled; None where that is theirs.

        Raises IncompleteCache where it is missing, CorruptCache where it is damaged, or does not hold each id once.
        """
        return None if self.order is None else read_order(self.order)

    def fidelity(self) -> FidelityReport | None:
        """How far these targets are from the full distributions, as measured when they were made; None if not measured.

        Raises FormatError for a file that is not a report, CorruptCache for a changed one or that of another entry.
        """
        return read_fidelity(self.receipts.store, teacher_folder(self.name), self.record_sha256)

    def read(self, start: int, stop: int) -> SparseTargets:
        """The targets of the positions `start .. stop` (exclusive).

        Raises IndexError outside the stream, IncompleteCache where a shard is missing, CorruptCache where stored bytes
        differ from their receipt or break the format's rules.
        """
        return self.stored(start, stop).decoded()

    def stored(self, start: int, stop: int) -> StoredTargets:
        """What is stored of the positions `start .. stop`, checked as for `read` and not decoded."""
        check_range(start, stop, len(self))
        if start == stop:
            empty = {n: np.empty((0, *spec.shape[1:]), dtype=spec.dtype) for n, spec in self.specs.items()}
            return StoredTargets(self.entry, start, empty)
        size = self.entry.layout.chunk
        parts = []
        for chunk in range(start // size, -(-stop // size)):
            targets = self._chunk(chunk)
            parts.append(targets.rows(max(start, targets.start), min(stop, targets.stop)))
        return parts[0] if len(parts) == 1 else joined(parts)

    def first_beyond(self, columns: int, ranges: Sequence[tuple[int, int]] | None = None) -> tuple[int, int] | None:
        """(position, id) of the first row that names an id from `columns` on, read chunk by chunk; None if none does.

        A row that keeps every id below `columns`, and not all of its vocabulary, names the others: its tail is theirs.
        ranges: of positions, ascending; only the chunks that they touch are read.
        """
        if self.entry.vocabulary_size <= columns:
            return None
        size = self.entry.layout.chunk
        touched = [(start // size, -(-stop // size)) for start, stop in ranges or [(0, len(self))]]
        for chunk in (chunk for first, last in touched for chunk in range(first, last)):
            start, targets = chunk * size, self._chunk(chunk).decoded()
            named = targets.largest_ids
            named = np.where(targets.kept >= columns, np.maximum(named, columns), named)
            found = np.flatnonzero(named >= columns)
            if len(found):
                return start + int(found[0]), int(named[found[0]])
        return None

    def _read_chunk(self, chunk: int) -> StoredTargets:
        start = chunk * self.entry.layout.chunk
        check_shards(self.arrays.values(), start // self.entry.layout.shard)
        arrays = {name: array.read_chunk(chunk) for name, array in self.arrays.items()}
        targets = StoredTargets(self.entry, start, arrays)
        broken = self._broken_rule(targets)
        if broken:
            raise CorruptCache(f"{self._where}: chunk {chunk} breaks the format: {broken}")
        return targets

    def _broken_rule(self, targets: StoredTargets) -> str | None:
        starts = rows = None
        if self._cache.record.corpus.tokens_included:
            starts = self._cache.document_starts if self.entry.windowing.isolate_documents else None
            rows = self.rows_with_targets
        return targets.broken_rule(starts, None if rows is None else rows.read(targets.start, targets.stop))


def checked_order(store: Store, name: str, entry: TeacherEntry) -> CheckedArray | None:
    """The array of an entry's sampling order; None where it has none."""
    spec = order_array(entry)
    if spec is None:
        return None
    receipts = Receipts(store, f"{teacher_folder(name)}receipts/{spec.name}", {spec.name: spec}, digest(entry))
    return CheckedArray(spec.name, receipts)


def read_order(array: CheckedArray) -> NDArray[np.uint32]:
    """A sampling order, uint32 [V]. Raises IncompleteCache, CorruptCache."""
    array.check_shard(0)  # first: before it is written there is no metadata either
    order = Stream(array).read(0, array.spec.shape[0])
    if not is_order(order):
        raise CorruptCache(f"{array.where}: it does not hold each of the {len(order)} ids once")
    return order


class LogitCache:
    """A cache at a URL; `open` reads its record, one small file, and nothing else."""

    def __init__(self, store: Store, record: CacheRecord) -> None:
        self.url = store.url
        self.record = record
        self.record_sha256 = digest(record)
        self._store = store
        self._specs = corpus_arrays(record)
        self._entries: dict[str, TeacherTargets] = {}
        self._positions: dict[tuple[Any, ...], Positions] = {}

    @classmethod
    def open(cls, url: Url) -> LogitCache:
        """Open the cache at a path or URL. Raises CacheNotFound, FormatError, CorruptCache."""
        store = open_store(url)
        return cls(store, read_record(store, "zarr.json", CacheRecord))

    def __repr__(self) -> str:
        return f"LogitCache({self.url!r}: {self.record.corpus.positions:,} tokens, {self.vocabulary_size:,} ids)"

    @property
    def vocabulary_size(self) -> int:
        """V: the largest token id + 1."""
        return self.record.tokenizer.vocabulary_size

    @cached_property
    def tokens(self) -> Stream:
        """The token stream, uint16 or uint32. Raises CacheNotFound when the cache was shared without it."""

        def check(values: NDArray[Any], chunk: int) -> None:
            if (values >= self.vocabulary_size).any():
                raise CorruptCache(f"{self._store.where('tokens')}: chunk {chunk} holds ids outside the vocabulary")

        return self._stream("tokens", check)

    def missing_tokens(self) -> list[tuple[int, int]]:
        """Ranges of the token stream that no receipt covers, as an interrupted `logit-cache tokenize` leaves them."""
        return self.receipts("tokens").missing_ranges()

    @cached_property
    def loss_mask(self) -> Stream | None:
        """bool: whether the token after a position is trained on; None when all are."""
        return self._stream("loss_mask") if self.record.corpus.has_loss_mask else None

    @cached_property
    def document_starts(self) -> NDArray[np.uint64]:
        """uint64 [D], ascending: the first position of every document."""
        stream = self._stream("document_starts")
        starts = stream.read(0, len(stream))
        steps = np.diff(starts.astype(np.int64))
        if starts[0] != 0 or (steps <= 0).any() or int(starts[-1]) >= self.record.corpus.positions:
            raise CorruptCache(f"{self._store.where('document_starts')}: not ascending from 0 within the stream")
        return starts

    @cached_property
    def document_sources(self) -> NDArray[np.uint16] | None:
        """uint16 [D]: the number of every document's source in the record; None in streams of version 1."""
        if not self.record.corpus.document_sources:
            return None
        stream = self._stream("document_sources")
        numbers = stream.read(0, len(stream))
        if int(numbers.max()) >= len(self.record.corpus.sources):
            raise CorruptCache(f"{self._store.where('document_sources')}: it names a source that the record lacks")
        return numbers

    def positions(
        self,
        trained: bool,
        sources: Collection[str] | None = None,
        long_documents: LongDocuments | None = None,
        document_tokens: int | None = None,
    ) -> Positions:
        """The positions that the loss mask trains (`trained`; all without a mask), in documents of some sources.

        long_documents: of documents of more than `document_tokens` tokens only so many first positions (truncate), or
        none (drop). Raises InputError for a source that no document is from.
        """
        key = trained, None if sources is None else frozenset(sources), long_documents, document_tokens
        if key not in self._positions:
            masks = self._masks(trained, sources)
            if document_tokens is not None:
                masks.append(self._short(long_documents, document_tokens))
            self._positions[key] = Positions(self.record.corpus.positions, masks)
        return self._positions[key]

    def _short(self, long_documents: LongDocuments | None, tokens: int) -> Mask:
        starts = self.document_starts
        if long_documents == "truncate":
            return first_of_documents(starts, tokens)
        return in_documents(starts, document_lengths(starts, self.record.corpus.positions) <= tokens)

    def _masks(self, trained: bool, sources: Collection[str] | None) -> list[Mask]:
        masks: list[Mask] = [self.loss_mask.read] if trained and self.loss_mask is not None else []
        if sources is not None:
            numbers = source_numbers(self.record, sources, self.url)
            masks.append(in_documents(self.document_starts, np.isin(np.asarray(self.document_sources), numbers)))
        return masks

    def rows_with_targets(self, targets: Targets) -> Positions | None:
        """The positions that have targets by an entry's record; None where all have, or it does not say which."""
        if targets.sources is None and targets.positions != "trained" and targets.long_documents is None:
            return None
        return self.positions(
            targets.positions == "trained", targets.sources, targets.long_documents, targets.document_tokens
        )

    def _stream(self, name: str, check: Callable[[NDArray[Any], int], None] | None = None) -> Stream:
        return Stream(CheckedArray(name, self.receipts(name)), check)

    def receipts(self, name: str) -> Receipts:
        """Those of an array of the token stream. Raises CacheNotFound when the cache was shared without it."""
        if name not in self._specs:
            raise CacheNotFound(f"{self.url}: this cache was shared without its {name}; attach the corpus first")
        return Receipts(self._store, f"receipts/{name}", {name: self._specs[name]}, self.record_sha256)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teacher entries, sorted; complete or not."""
        names = self._store.names("teachers")
        return tuple(name for name in names if re.fullmatch(TEACHER_NAME, name) and self._has_record(name))

    def _has_record(self, name: str) -> bool:
        try:
            self._store.known_size(teacher_folder(name) + "zarr.json", "its folder is there")
        except MissingObject:
            return False  # a writer was killed before it had written the record
        return True

    def teacher(self, name: str) -> TeacherTargets:
        """One teacher's entry. Raises CacheNotFound, which lists this cache's entries; FormatError, CorruptCache."""
        if name not in self._entries:
            key = teacher_folder(name) + "zarr.json"
            try:
                entry = read_record(self._store, key, TeacherEntry)
            except CacheNotFound:
                if self._store.size(key) is not None:
                    raise
                there = ", ".join(self.teachers) or "none"
                raise CacheNotFound(f"{self.url}: no teacher entry {name!r}; there is: {there}") from None
            if entry.positions != self.record.corpus.positions or entry.vocabulary_size > self.vocabulary_size:
                raise FormatError(f"{self._store.where(key)}: its positions or vocabulary are not this cache's")
            if entry.targets.positions == "trained" and not self.record.corpus.has_loss_mask:
                raise FormatError(f"{self._store.where(key)}: it is of trained positions, and no loss mask says which")
            strange = set(entry.targets.sources or ()) - named_sources(self.record)
            if strange:
                raise FormatError(f"{self._store.where(key)}: no document here is from its source {min(strange)!r}")
            self._entries[name] = TeacherTargets(self._store, name, entry, self)
        return self._entries[name]

    def zarr(self) -> Group:
        """The cache as zarr's own group, read-only, on the same store, local or remote.

        Holds the arrays as they are stored (`storage.format` has their meaning). Each object is checked against its
        receipt before zarr reads it; a read that touches positions without a receipt raises IncompleteCache, one of a
        damaged object CorruptCache, or zarr's ValueError for a chunk's own checksum.
        """
        import zarr

        return zarr.open_group(self._zarr_store(self.teachers), mode="r", zarr_format=3, use_consolidated=False)

    def xarray(self, name: str) -> Dataset:
        """One teacher's entry as an xarray Dataset, with the token stream's arrays beside its own.

        Dimensions are `position`, `rank` (of the kept ids), `document` and `place` (in the sampling order); `attrs`
        hold the entry's record. Values are those of `zarr()`, read and checked when they are used. Raises as `teacher`
        does, InputError without xarray.
        """
        from storage.cache.zarr_store import open_dataset

        return open_dataset(self._zarr_store((name,)), f"teachers/{name}")

    def _zarr_store(self, names: Iterable[str]) -> CheckedStore:
        from storage.cache.zarr_store import CheckedStore

        groups: dict[str, dict[str, Any]] = {"": {ATTRIBUTE: sealed(self.record)}, "teachers": {}}
        arrays = {name: CheckedArray(name, self.receipts(name)) for name in self._specs}
        for name in names:
            entry = self.teacher(name)
            groups[f"teachers/{name}"] = {ATTRIBUTE: sealed(entry.entry)}
            checked = [*entry.arrays.values(), *([] if entry.order is None else [entry.order])]
            arrays |= {f"teachers/{name}/{array.spec.name}": array for array in checked}
        return CheckedStore(self.url, groups, arrays)

    def save_tokenizer(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files, each checked against its receipt, for AutoTokenizer.from_pretrained."""
        directory = local_path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.tokenizer_files().items():
            (directory / name).write_bytes(data)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, each checked against its receipt."""
        receipt = read_tokenizer_receipt(self._store)
        return {name: read_tokenizer_file(self._store, name, expected) for name, expected in receipt.files.items()}
