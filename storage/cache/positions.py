"""Positions of a token stream: those of the documents of some sources, those that the loss mask trains, or both.

Legend: `N` tokens, `D` documents. A position belongs to the document of its own token, also where the next token, which
targets are about, begins another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.format.manifest.cache import CacheRecord
from storage.text import quoted

Mask = Callable[[int, int], NDArray[np.bool_]]
"""bool [stop - start], of the positions `start .. stop`."""

_BLOCK = 1 << 16


class Positions:
    """bool [N]: the positions where all of some masks are True; read by range, as an array of the stream."""

    def __init__(self, length: int, masks: Sequence[Mask]) -> None:
        self._length = length
        self._masks = tuple(masks)

    def read(self, start: int, stop: int) -> NDArray[np.bool_]:
        found = np.ones(stop - start, dtype=bool)
        for mask in self._masks:
            found &= mask(start, stop)
        return found

    def count_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of them come before each of some positions; the stream is read once, block by block."""
        if not self._masks:
            return positions
        edges, where = np.unique(positions, return_inverse=True)
        before, total = np.zeros(len(edges), dtype=np.int64), 0
        for start in range(0, self._length, _BLOCK):
            counts = np.cumsum(self.read(start, min(start + _BLOCK, self._length)), dtype=np.int64)
            inside = slice(*np.searchsorted(edges, [start, start + len(counts)], side="right"))
            before[inside] = total + counts[edges[inside] - start - 1]
            total += int(counts[-1])
        return before[where].reshape(positions.shape)


def in_documents(document_starts: NDArray[np.uint64], chosen: NDArray[np.bool_]) -> Mask:
    """The positions of the `chosen` documents, bool [D]; `document_starts` [D]."""
    starts = document_starts.astype(np.int64)

    def read(start: int, stop: int) -> NDArray[np.bool_]:
        first = int(np.searchsorted(starts, start, side="right"))
        last = max(first, int(np.searchsorted(starts, stop)))
        lengths = np.diff(np.concatenate([[start], starts[first:last], [stop]]))
        found: NDArray[np.bool_] = np.repeat(chosen[first - 1 : last], lengths)
        return found

    return read


def document_lengths(document_starts: NDArray[np.uint64], positions: int) -> NDArray[np.int64]:
    """Tokens of each document, int64 [D], of a stream of `positions` tokens."""
    return np.diff(np.append(document_starts.astype(np.int64), positions))


def first_of_documents(document_starts: NDArray[np.uint64], tokens: int) -> Mask:
    """The first `tokens` positions of each document; `document_starts` [D]."""
    starts = document_starts.astype(np.int64)

    def read(start: int, stop: int) -> NDArray[np.bool_]:
        at = np.arange(start, stop)
        found: NDArray[np.bool_] = at - starts[np.searchsorted(starts, at, side="right") - 1] < tokens
        return found

    return read


def named_sources(record: CacheRecord) -> set[str]:
    """The names of the sources that documents are from; none where a stream does not say so of each."""
    corpus = record.corpus
    return {source.name for source in corpus.sources if source.documents and corpus.document_sources}


def source_numbers(record: CacheRecord, names: Collection[str], url: str) -> list[int]:
    """The numbers of the sources of some names in a record; several may have one name.

    Raises InputError for a stream that does not say which documents are from where, and for a name without documents.
    """
    there = named_sources(record)
    if not there:
        raise InputError(
            f"{url}: its stream does not say where its documents are from, as one of version 1: make it again with "
            f"logit-cache tokenize, in a new folder"
        )
    for name in names:
        if name not in there:
            raise InputError(f"{url}: no document is from the source {name!r}; there is: {quoted(sorted(there))}")
    return [number for number, source in enumerate(record.corpus.sources) if source.name in names]
