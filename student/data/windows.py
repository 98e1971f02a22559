"""A cache as a map-style dataset: windows of tokens with the targets of the same positions.

Legend: `T` positions of a window.

A window of T positions reads T + 1 tokens and T targets from one absolute range, so inputs, labels and targets
cannot get misaligned: ``input_ids[t] = tokens[s + t]``, ``labels[t] = tokens[s + t + 1]``, targets ``s + t``. All T
positions are trained on (labels that a model shifts itself would lose one of them).

Windows that begin with an id of their own, as their teachers' did, have T + 1 rows: that id and the T positions, or the
T positions and padding where the first token is that id already. Neither the id put before nor padding is trained on.

Where windows stay inside documents, several documents share one, as far as they fit (`student.data.packing`), each with
positions that begin at 0. A document longer than a window is cut into blocks (`student.data.blocks`).

Targets stay as stored and are decoded on the training device (`student.target_batch`).
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from storage import LogitCache
from storage.cache.positions import Positions, named_sources
from storage.errors import IncompleteCache, InputError
from storage.progress import Log
from student.data.available import Available, available_now, check_available
from student.data.batches import Piece, Window, as_read
from student.data.blocks import Blocks, Offset, whole_numbers
from student.data.entries import beginning, isolation, usable_entry, usable_sources
from student.data.order import GROUP_TOKENS, LANES, ReadingOrder
from student.data.packing import GROUP_ROWS, Packing
from student.labels import NOT_TRAINED
from student.models.vocabulary import check_vocabulary, ids_in_common

_READ_TOGETHER = 64  # windows that iterating reads at a time


class DistillationWindows(Dataset[Window]):
    """The windows of a cache, with the targets of some teachers (none: plain cross-entropy).

    cache_url            path or URL of a cache
    teachers             names of teacher entries, complete if not `available`, that agree on the isolation of documents
    window_tokens        T; may differ from the teachers' context length
    offset               "fixed" or "random", see `student.data.blocks`; take "fixed" for evaluation
    sources              by teacher: the sources in whose documents it teaches; of others it reads no targets. Teachers
                         that are not named teach wherever they have targets
    isolate_documents    whether windows stay inside documents; None follows the teachers (False without any)
    bos_each_window      whether BOS is put before windows that do not begin with it; None follows the teachers (False
                         without any)
    pack_documents       whether isolated documents share windows; else each is padded to a window
    available            whether to read of entries that are still being written what is committed of all when this is
                         made, which `available` then holds; or these ranges, from an earlier one. The windows are those
                         of the whole text that lie within it

    A sequence of the first epoch's windows (`student.data.batches.Window`): `windows[-1]`, `windows[:4]`, a `for` loop;
    `collate` makes a batch of some. A DataLoader reads by `__getitems__`, whose indices are ``epoch * len(self) +
    window``, as `student.data.order.ReadingOrder` yields them: its workers need no state, and resuming in the middle of
    an epoch depends on the index alone.

    Holds the URL and opens the cache in each process on first use (handles of remote stores do not survive a fork).

    Raises CacheNotFound, IncompleteCache (naming the missing ranges), IdentityMismatch (an entry of another stream
    or tokenizer), InputError (entries of different isolation or beginnings, sources without documents or targets, a
    window longer than the corpus, a tokenizer without BOS).
    """

    def __init__(
        self,
        cache_url: str | os.PathLike[str],
        teachers: Sequence[str] = (),
        window_tokens: int = 128,
        offset: Offset = "fixed",
        seed: int = 0,
        isolate_documents: bool | None = None,
        bos_each_window: bool | None = None,
        sources: Mapping[str, Sequence[str]] | None = None,
        pack_documents: bool = True,
        available: bool | Mapping[str, Sequence[tuple[int, int]]] = False,
    ) -> None:
        if window_tokens < 1:
            raise InputError(f"a window has at least one position; got {window_tokens}")
        if offset not in ("fixed", "random"):
            raise InputError(f"offset is 'fixed' or 'random'; got {offset!r}")
        self.cache_url = os.fspath(cache_url)
        cache = LogitCache.open(self.cache_url)
        _ = cache.tokens  # raises now if the cache was shared without them
        self.record = cache.record
        self.vocabulary_size = cache.vocabulary_size
        self.teachers = tuple(teachers)
        self.window_tokens = window_tokens
        self.seed = seed
        self.available: Available | None = None
        if available is True:
            self.available = available_now(cache, self.teachers)
        elif available is not False:
            self.available = {name: tuple((a, b) for a, b in ranges) for name, ranges in available.items()}
            check_available(self.available, self.teachers)
        read = self.available or {}
        self.entries = {name: usable_entry(cache, name, read.get(name)) for name in self.teachers}
        strangers = [name for name in sources or {} if name not in self.entries]
        if strangers:
            raise InputError(f"sources are given for {strangers[0]!r}, which is none of the teachers: leave them out")
        self.sources = {name: usable_sources(cache, name, given) for name, given in (sources or {}).items()}
        self.isolate_documents = isolation(self.entries, isolate_documents)
        self.begin_id = beginning(self.entries, bos_each_window, self.cache_url)
        self.packed = self.isolate_documents and pack_documents
        self._handle: tuple[int, LogitCache] | None = (os.getpid(), cache)
        self.blocks = self._blocks(offset)
        self._packing = self._packing_of(self.blocks)

    def cut(self, window_tokens: int, offset: Offset) -> DistillationWindows:
        """Other windows over the same tokens and targets; only the length is checked again, nothing is reopened."""
        if (window_tokens, offset) == (self.window_tokens, self.blocks.offset):
            return self
        other = self._with(window_tokens=window_tokens)
        other.blocks = other._blocks(offset)
        other._packing = other._packing_of(other.blocks)
        return other

    def within(
        self, columns: int | None, model: str, log: Log, vocabulary: Mapping[str, int] | None = None, named: int = 0
    ) -> DistillationWindows:
        """The same windows for a model of so many output columns (None: not known), V being what both have.

        vocabulary: token string → id of the model's tokenizer, where it has one; named: targets can name the ids below.
        Where sizes or tokenizers differ, the text is read, and the ids of teachers with more ids than columns; the ids
        left out are logged. Raises IdentityMismatch where the tokenizers differ at an id that matters, and InputError,
        with the first position, where the text, a window's beginning or a teacher's targets have an id without column.
        """
        cache = self._cache()
        named = named if columns is None else min(named, columns)
        remedy = f"Make a cache with this model's tokenizer: logit-cache tokenize --tokenizer {model}"
        check_vocabulary(cache, vocabulary, model, remedy, named, log, self.begin_id)
        if columns is None or columns >= self.vocabulary_size:
            return self
        column = "give the model a column for it (vocab_size of a new one, resize_token_embeddings of another)"
        advice = f"{column}, or take it out of the text"
        other = self._with(vocabulary_size=ids_in_common(cache, columns, model, advice, log, self.begin_id))
        for name in self.teachers:
            found = cache.teacher(name).first_beyond(columns, (self.available or {}).get(name))
            if found is not None:
                raise InputError(
                    f"{model}: its head has {columns} columns, and the targets of teacher {name} in {self.cache_url} "
                    f"name id {found[1]}, first at position {found[0]}: {column}, or cache a teacher without it"
                )
        return other

    @property
    def input_tokens(self) -> int:
        """Tokens that a model reads of a window: its positions, and the id put before it."""
        return self.window_tokens + (self.begin_id is not None)

    def _blocks(self, offset: Offset) -> Blocks:
        positions = self.record.corpus.positions
        if positions - 1 < self.window_tokens:
            raise InputError(
                f"{self.cache_url}: a window of {self.window_tokens} positions reads {self.window_tokens + 1} tokens, "
                f"the corpus has {positions}: take a smaller window, or more text"
            )
        starts = self._cache().document_starts if self.isolate_documents else None
        committed = (self.available or {}).values()
        blocks = Blocks.of(positions, starts, self.window_tokens, offset, self.seed, committed)
        if not len(blocks.whole):
            raise InputError(
                f"{self.cache_url}: every document has a single token, so no position has a next one to learn"
            )
        if not len(blocks):
            # Where something is committed, smaller windows may lie within it.
            error = InputError if all(committed) else IncompleteCache
            raise error(
                f"{self.cache_url}: no window of {self.window_tokens} positions lies within what is committed of "
                f"{' and '.join(self.available or {})}: wait for more shards, or take smaller windows"
            )
        return blocks

    @property
    def group_tokens(self) -> int:
        """Positions of neighbouring windows that are packed, and read, together."""
        return max(GROUP_TOKENS, GROUP_ROWS * self.window_tokens) if self.packed else GROUP_TOKENS

    def _packing_of(self, blocks: Blocks) -> Packing | None:
        if not self.packed:
            return None
        # Room for an id put before each, also where it is not needed: the text is not read for this.
        sizes = blocks.lengths(np.arange(len(blocks))) + (self.begin_id is not None)
        return Packing.of(sizes, self.input_tokens, self.group_tokens)

    def spans(self, indices: Sequence[int]) -> list[list[tuple[int, int]]]:
        """(first absolute position, number of positions) of each block in some windows, by index as `__getitems__`."""
        if self._packing is None:
            return [[span] for span in self.blocks.spans(indices)]
        packing = self._packing
        epochs, windows = np.divmod(whole_numbers(indices), len(self))
        first, last = packing.first[windows], packing.first[windows + 1]
        blocks = [
            packing.windows[start:stop] + epoch * len(self.blocks)
            for start, stop, epoch in zip(first, last, epochs, strict=True)
        ]
        spans = iter(self.blocks.spans(np.concatenate(blocks or [epochs])))
        return [list(islice(spans, len(some))) for some in blocks]

    def positions_read(self, indices: Sequence[int]) -> int:
        """How many positions some windows have."""
        return int(self._ranges(indices)[:, 1].sum())

    def trained_positions(self, indices: Sequence[int], sources: Sequence[str] | None = None) -> int:
        """How many positions of some windows are trained on, by the loss mask, which is read once; in documents of some
        sources, where they are given."""
        return self._count(indices, self._cache().positions(trained=True, sources=sources))

    def _count(self, indices: Sequence[int], positions: Positions) -> int:
        ranges = self._ranges(indices)
        first, last = positions.count_before(np.stack([ranges[:, 0], ranges.sum(axis=1)]))
        return int((last - first).sum())

    def _ranges(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """The spans of some windows, int64 [n, 2]."""
        return np.array([span for window in self.spans(indices) for span in window], dtype=np.int64).reshape(-1, 2)

    def taught_positions(self, indices: Sequence[int], teacher: str) -> int:
        """How many positions of some windows are trained on and have targets of a teacher."""
        targets = self.entries[teacher].targets
        long = targets.long_documents, targets.document_tokens
        return self._count(indices, self._cache().positions(True, self.taught_sources(teacher), *long))

    def taught_sources(self, teacher: str) -> tuple[str, ...] | None:
        """The sources in whose documents a teacher teaches, by what was asked or its entry; None: in all."""
        return self.sources.get(teacher, self.entries[teacher].targets.sources)

    def untaught_sources(self) -> list[str]:
        """The sources with documents in which no teacher teaches."""
        taught = [self.taught_sources(name) for name in self.teachers]
        if None in taught or not taught:
            return []
        return sorted(named_sources(self.record).difference(*(sources or () for sources in taught)))

    def without_targets(self) -> DistillationWindows:
        """The same windows of the same tokens, reading no targets."""
        return self._with(teachers=(), entries={}, sources={})

    def opening(self) -> tuple[int, Window, NDArray[np.int64]]:
        """The first block of the stream, which begins a document, in a window of its own.

        Its first position, the window, and the tokens that follow its positions, int64 [n], trained on or not.
        """
        ((start, length),) = self.blocks.spans([0])
        pieces = list(self._pieces([(start, length)]).values())
        following = self._cache().tokens.read(start + 1, start + length + 1).astype(np.int64)
        return start, as_read(pieces, self.window_tokens, self.begin_id, self.packed), following

    def __len__(self) -> int:
        return len(self.blocks if self._packing is None else self._packing)

    def __repr__(self) -> str:
        return (
            f"DistillationWindows({self.cache_url!r}, {list(self.teachers)}: {len(self):,} windows of "
            f"{self.window_tokens} tokens, {self.blocks.offset} offset)"
        )

    def __iter__(self) -> Iterator[Window]:
        for start in range(0, len(self), _READ_TOGETHER):
            yield from self[start : start + _READ_TOGETHER]

    @overload
    def __getitem__(self, index: SupportsIndex) -> Window: ...

    @overload
    def __getitem__(self, index: slice) -> list[Window]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Window | list[Window]:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        if isinstance(index, bool) or not isinstance(index, SupportsIndex):
            raise TypeError(f"a window is chosen by a whole number or a slice, not by {index!r}")
        number, size = operator.index(index), len(self)
        if not -size <= number < size:
            raise IndexError(
                f"there is no window {number} among {size}; indices of a later epoch, as a sampler yields them, are "
                "for __getitems__"
            )
        return self.__getitems__([number % size])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Window]:
        """The windows of a batch, in the order of the indices; adjacent or overlapping ranges share one read."""
        spans = self.spans(indices)
        pieces = self._pieces({span for window in spans for span in window})
        return [
            as_read([pieces[span] for span in window], self.window_tokens, self.begin_id, self.packed)
            for window in spans
        ]

    def _pieces(self, spans: Iterable[tuple[int, int]]) -> dict[tuple[int, int], Piece]:
        """What is read of some ranges, (first position, number of positions)."""
        found: dict[tuple[int, int], Piece] = {}
        waiting = sorted(spans)
        first = 0
        while first < len(waiting):
            start, stop, last = waiting[first][0], sum(waiting[first]), first + 1
            # A document's last position has no label, so that of its neighbour begins one later.
            while last < len(waiting) and waiting[last][0] <= stop + 1:
                stop = max(stop, sum(waiting[last]))
                last += 1
            merged = _Span(self._cache(), self.teachers, self.sources, start, stop)
            found.update({span: merged.piece(*span) for span in waiting[first:last]})
            first = last
        return found

    def _cache(self) -> LogitCache:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), LogitCache.open(self.cache_url))
        return self._handle[1]

    def _with(self, **changed: Any) -> DistillationWindows:
        """A copy with other attributes, over the cache that is open."""
        other = copy.copy(self)
        vars(other).update(changed, _handle=self._handle)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


class _Span:
    """Tokens, labels and targets of the positions `start .. stop`, read once and cut into pieces."""

    def __init__(
        self, cache: LogitCache, teachers: Sequence[str], sources: Mapping[str, Sequence[str]], start: int, stop: int
    ) -> None:
        self._start = start
        self._inputs = cache.tokens.read(start, stop + 1).astype(np.int64)
        trained = None if cache.loss_mask is None else cache.loss_mask.read(start, stop)
        following = self._inputs[1:]
        self._labels = following if trained is None else np.where(trained, following, NOT_TRAINED)
        self._targets = {name: cache.teacher(name).stored(start, stop) for name in teachers}
        for name, given in sources.items():
            others = ~cache.positions(trained=False, sources=given).read(start, stop)
            self._targets[name] = self._targets[name].without(others)

    def piece(self, start: int, length: int) -> Piece:
        cut = slice(start - self._start, start - self._start + length)
        targets = {name: each.rows(start, start + length) for name, each in self._targets.items()}
        return Piece(self._inputs[cut], self._labels[cut], targets)


def reading_order(
    windows: DistillationWindows, windows_per_step: int = LANES, whole_steps: bool = False
) -> ReadingOrder:
    """The sampler of windows for training: the same order for every student with their seed.

    windows_per_step: of an optimizer step, over all processes and micro-batches. Where it is a multiple of 8, up to
    eight processes decode no chunk of the cache twice. whole_steps: an epoch ends with its last whole step.
    """
    return ReadingOrder(
        len(windows),
        group_windows=max(1, windows.group_tokens // windows.window_tokens),
        seed=windows.seed,
        windows_per_step=windows_per_step,
        whole_steps=whole_steps,
    )
