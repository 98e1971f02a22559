"""Reading a cache: `LogitCache.open(url)`, then tokens and targets by absolute position.

Everything is checked before it is handed out: records against their own digests, objects against their
receipts, decoded values against the rules of the format. A range that no receipt covers raises
`IncompleteCache`; it is never filled.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.arrays import CheckedArray, check_shards
from storage.errors import CacheNotFound, CorruptCache, FormatError, MissingObject
from storage.fidelity import FidelityReport, read_fidelity
from storage.format import PER_POSITION_FLOATS, corpus_arrays, teacher_arrays
from storage.location import Location, check_key, locate
from storage.manifest import (
    ATTRIBUTE,
    TEACHER_NAME,
    AnyRecord,
    CacheRecord,
    FileDigest,
    FilesReceipt,
    ShardStatistics,
    TeacherEntry,
    digest,
    unseal,
)
from storage.receipts import Receipts
from storage.records import SparseTargets, concatenate
from storage.rules import broken_rule

_TOKENIZER_FILE = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$")
_CHUNK_CACHE_BYTES = 192 << 20


class Stream:
    """A one-dimensional array of the token stream, read by absolute position."""

    def __init__(self, array: CheckedArray, check: Callable[[NDArray[Any], int], None] | None = None) -> None:
        self._array = array
        self._check = check
        self._chunks: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def __len__(self) -> int:
        return self._array.spec.shape[0]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The entries `start .. stop`. Raises IndexError outside the stream."""
        _check_range(start, stop, len(self))
        size = self._array.spec.layout.chunk
        parts = []
        for chunk in range(start // size, -(-stop // size)):
            values = self._chunk(chunk)
            parts.append(values[max(0, start - chunk * size) : stop - chunk * size])
        if not parts:
            return np.empty(0, dtype=self._array.spec.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _chunk(self, chunk: int) -> NDArray[Any]:
        if chunk not in self._chunks:
            values = self._array.read_chunk(chunk)
            if self._check is not None:
                self._check(values, chunk)
            _hold(self._chunks, chunk, values, most=64)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]


class TeacherTargets:
    """One teacher's entry. `document_starts` gives those of the cache, where it has them."""

    def __init__(
        self,
        location: Location,
        name: str,
        entry: TeacherEntry,
        document_starts: Callable[[], NDArray[Any]] | None = None,
    ) -> None:
        self.name = name
        self._document_starts = document_starts if entry.windowing.isolate_documents else None
        self.entry = entry
        self.record_sha256 = digest(entry)
        self.specs = teacher_arrays(entry)
        folder = teacher_folder(name)
        self.receipts = Receipts(location, folder + "receipts", self.specs, self.record_sha256)
        self._arrays = {n: CheckedArray(location, folder, spec, self.receipts) for n, spec in self.specs.items()}
        self._where = location.where(folder.rstrip("/"))
        row_bytes = sum(spec.itemsize * int(np.prod(spec.shape[1:])) for spec in self.specs.values())
        # Decoded log-probs come on top of what is stored, 4 bytes per id.
        chunk_bytes = (row_bytes + 4 * entry.targets.k) * entry.layout.chunk
        self._most_chunks = max(2, _CHUNK_CACHE_BYTES // chunk_bytes)
        self._chunks: OrderedDict[int, SparseTargets] = OrderedDict()

    def __len__(self) -> int:
        return self.entry.positions

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of positions that no receipt covers yet; empty when the entry is complete."""
        return self.receipts.missing_ranges()

    def statistics(self) -> tuple[ShardStatistics | None, float]:
        """Sums over all committed positions, and the seconds that computing them took."""
        index = self.receipts.index
        if index is not None:
            return index.statistics, index.seconds
        total: ShardStatistics | None = None
        seconds = 0.0
        for shard in np.flatnonzero(self.receipts.committed()):
            receipt = self.receipts.read(int(shard))
            if receipt is not None and receipt.statistics is not None:
                total = receipt.statistics if total is None else total + receipt.statistics
                seconds += receipt.seconds
        return total, seconds

    def stored_bytes(self) -> int:
        """Bytes of all committed objects, from their receipts."""
        if self.receipts.index is not None:
            return self.receipts.index.object_bytes
        found = (self.receipts.read(int(shard)) for shard in np.flatnonzero(self.receipts.committed()))
        return sum(item.bytes for receipt in found if receipt is not None for item in receipt.objects.values())

    def fidelity(self) -> FidelityReport | None:
        """How far these targets are from the full distributions, as measured when they were made; None if nobody did.

        Raises FormatError for what is no report, CorruptCache for one that was changed or is another entry's.
        """
        return read_fidelity(self.receipts.location, teacher_folder(self.name), self.record_sha256)

    def read(self, start: int, stop: int) -> SparseTargets:
        """The targets of the positions `start .. stop`.

        Raises IndexError outside the stream, IncompleteCache where a shard is missing, CorruptCache where
        stored bytes differ from their receipt or break the format's rules.
        """
        _check_range(start, stop, len(self))
        if start == stop:
            empty = {n: np.empty((0, *spec.shape[1:]), dtype=spec.dtype) for n, spec in self.specs.items()}
            return self._record(start, empty)
        size = self.entry.layout.chunk
        parts = []
        for chunk in range(start // size, -(-stop // size)):
            targets = self._chunk(chunk)
            parts.append(targets.rows(max(start, targets.start), min(stop, targets.stop)))
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def _chunk(self, chunk: int) -> SparseTargets:
        if chunk not in self._chunks:
            start = chunk * self.entry.layout.chunk
            check_shards(self._arrays.values(), start // self.entry.layout.shard)
            targets = self._record(start, {name: array.read_chunk(chunk) for name, array in self._arrays.items()})
            starts = None if self._document_starts is None else self._document_starts()
            broken = broken_rule(targets, self.entry, starts)
            if broken:
                raise CorruptCache(f"{self._where}: chunk {chunk} breaks the format: {broken}")
            _hold(self._chunks, chunk, targets, self._most_chunks)
        self._chunks.move_to_end(chunk)
        return self._chunks[chunk]

    def _record(self, start: int, values: dict[str, NDArray[Any]]) -> SparseTargets:
        no_label = np.full(len(values["kept"]), np.nan, dtype=np.float32)
        return SparseTargets(
            start=start,
            token_ids=values["token_ids"],
            kept=values["kept"],
            certain=values["certain"],
            codes=values.get("logprob_codes"),
            exact_logprobs=values.get("logprobs"),
            step_nats=self.entry.encoding.step_nats,
            **{name: values.get(name, no_label) for name in PER_POSITION_FLOATS},
        )


class LogitCache:
    """A cache at a URL; `open` reads two small files and nothing else."""

    def __init__(self, location: Location, record: CacheRecord) -> None:
        self.url = location.url
        self.record = record
        self.record_sha256 = digest(record)
        self._location = location
        self._specs = corpus_arrays(record)
        self._entries: dict[str, TeacherTargets] = {}

    @classmethod
    def open(cls, url: str) -> LogitCache:
        """Open the cache at a path or URL. Raises CacheNotFound, FormatError, CorruptCache."""
        location = locate(url)
        return cls(location, read_record(location, "zarr.json", CacheRecord))

    @property
    def vocabulary_size(self) -> int:
        """V: the largest token id + 1."""
        return self.record.tokenizer.vocabulary_size

    @cached_property
    def tokens(self) -> Stream:
        """The token stream, uint16 or uint32. Raises CacheNotFound when the cache was shared without it."""

        def check(values: NDArray[Any], chunk: int) -> None:
            if (values >= self.vocabulary_size).any():
                raise CorruptCache(f"{self._location.where('tokens')}: chunk {chunk} holds ids outside the vocabulary")

        return self._stream("tokens", check)

    def missing_tokens(self) -> list[tuple[int, int]]:
        """Ranges of the token stream that no receipt covers: an interrupted `logit-cache tokenize`."""
        return self._receipts("tokens").missing_ranges()

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
            raise CorruptCache(f"{self._location.where('document_starts')}: not ascending from 0 within the stream")
        return starts

    def _stream(self, name: str, check: Callable[[NDArray[Any], int], None] | None = None) -> Stream:
        receipts = self._receipts(name)
        return Stream(CheckedArray(self._location, "", self._specs[name], receipts), check)

    def _receipts(self, name: str) -> Receipts:
        if name not in self._specs:
            raise CacheNotFound(f"{self.url}: this cache was shared without its {name}; attach the corpus first")
        return Receipts(self._location, f"receipts/{name}", {name: self._specs[name]}, self.record_sha256)

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the teacher entries, sorted; complete or not."""
        names = self._location.names("teachers")
        return tuple(name for name in names if re.fullmatch(TEACHER_NAME, name) and self._has_record(name))

    def _has_record(self, name: str) -> bool:
        try:
            self._location.known_size(teacher_folder(name) + "zarr.json", "its folder is there")
        except MissingObject:
            return False  # a writer was killed before it had written it
        return True

    def teacher(self, name: str) -> TeacherTargets:
        """One teacher's entry. Raises CacheNotFound naming the entries that there are."""
        if name not in self._entries:
            key = teacher_folder(name) + "zarr.json"
            try:
                entry = read_record(self._location, key, TeacherEntry)
            except CacheNotFound:
                if self._location.size(key) is not None:
                    raise
                there = ", ".join(self.teachers) or "none"
                raise CacheNotFound(f"{self.url}: no teacher entry {name!r}; there is: {there}") from None
            if (entry.positions, entry.vocabulary_size) != (self.record.corpus.positions, self.vocabulary_size):
                raise FormatError(f"{self._location.where(key)}: its positions or vocabulary are not this cache's")
            documents = (lambda: self.document_starts) if self.record.corpus.tokens_included else None
            self._entries[name] = TeacherTargets(self._location, name, entry, documents)
        return self._entries[name]

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's files, each checked against its receipt, for AutoTokenizer.from_pretrained."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.tokenizer_files().items():
            (directory / name).write_bytes(data)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, each checked against its receipt."""
        receipt = read_tokenizer_receipt(self._location)
        return {name: self._tokenizer_file(name, expected) for name, expected in receipt.files.items()}

    def _tokenizer_file(self, name: str, expected: FileDigest) -> bytes:
        key = tokenizer_key(name)

        def request() -> bytes:
            data = self._location.read(key, expected.bytes)
            found = hashlib.sha256(data).hexdigest()
            if (len(data), found) != (expected.bytes, expected.sha256):
                raise CorruptCache(f"{self._location.where(key)}: expected sha256 {expected.sha256}, found {found}")
            return data

        return self._location.insist(key, "its receipt exists", request)


def read_record(location: Location, key: str, kind: type[AnyRecord]) -> AnyRecord:
    """The record in a group's attributes, checked against its own digest."""
    where = location.where(key)
    try:
        data = location.read_json(key)
    except (FileNotFoundError, NotADirectoryError):
        # Asked in another way before it is believed: a job must not end because one answer was wrong.
        if location.size(key) is None:
            raise CacheNotFound(
                f"{location.url}: no cache there (no {key}); make one with logit-cache tokenize"
            ) from None
        data = location.insist(key, "the store gives its length", lambda: location.read_json(key))
    except PermissionError as error:
        raise CacheNotFound(f"{where}: {error.strerror}") from None
    if (
        not isinstance(data, dict)
        or not isinstance(data.get("attributes"), dict)
        or ATTRIBUTE not in data["attributes"]
    ):
        raise FormatError(f"{where}: a Zarr group, but not one of logit-cache (no {ATTRIBUTE!r} attribute)")
    if data.get("zarr_format") != 3 or data.get("node_type") != "group":
        raise FormatError(f"{where}: expected a Zarr v3 group")
    return unseal(kind, data["attributes"][ATTRIBUTE], where)


def read_tokenizer_receipt(location: Location) -> FilesReceipt:
    """The receipt of the tokenizer's files."""
    key = "receipts/tokenizer.json"
    promise = "every cache has one: its tokenizer cannot be trusted"
    data = location.insist(key, promise, lambda: location.read_json(key))
    return unseal(FilesReceipt, data, location.where(key))


def teacher_folder(name: str) -> str:
    """Folder of a teacher entry, with a slash at the end. Raises FormatError for a name that cannot be one."""
    if not re.fullmatch(TEACHER_NAME, name):
        raise FormatError(
            f"{name!r} cannot name a teacher entry: lower-case letters, digits, '_' and '-', at most 64, "
            f"beginning with a letter or digit"
        )
    return f"teachers/{name}/"


def tokenizer_key(name: str) -> str:
    """Key of a tokenizer file. Raises FormatError for a name that could be anything but a plain file."""
    if not _TOKENIZER_FILE.match(name):
        raise FormatError(f"{name!r} cannot be a tokenizer file")
    return check_key(f"tokenizer/{name}", frozenset({name}))


def _check_range(start: int, stop: int, length: int) -> None:
    if not 0 <= start <= stop <= length:
        raise IndexError(f"positions {start}..{stop} are not inside 0..{length}")


def _hold(held: OrderedDict[int, Any], key: int, value: Any, most: int) -> None:
    held[key] = value
    while len(held) > most:
        held.popitem(last=False)
