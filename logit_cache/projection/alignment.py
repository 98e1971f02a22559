"""Which position of the teacher's stream ends where a position of the student's does.

Legend: `N` tokens of a stream, `D` documents.

Both streams are read as one sequence of symbols: the bytes of the text, and a mark where a document begins. A token's
key says how many symbols it and those before it spell, and whether it ends a document (eos), which spells none::

    key = 2 * symbols + (1 where it is eos and does not begin its document)

Keys ascend. Positions of equal keys have read the same text, so that the same may follow; where several tokens of a
stream have one key, the last one has read all of them. Keys lie in files, so memory does not grow with the streams.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.projection.spelling import Spelling
from storage.cache.reader import LogitCache
from storage.errors import InputError, StorageFull, is_out_of_space

_BLOCK_TOKENS = 1 << 18
_DOCUMENT = 256  # the symbol of its beginning
_SHOWN = 24  # bytes around a difference
NOWHERE = -1


@dataclass(frozen=True)
class Side:
    """A stream and its spelling. strip: leave out the spaces at the beginning of each document."""

    cache: LogitCache
    spelling: Spelling
    strip: bool

    @property
    def positions(self) -> int:
        return self.cache.record.corpus.positions

    def blocks(self) -> Iterator[tuple[NDArray[np.uint16], NDArray[np.int64]]]:
        """The symbols and the keys of some tokens at a time, in order."""
        starts = self.cache.document_starts.astype(np.int64)
        symbols, begun = 0, NOWHERE  # so far; the last document whose text has begun
        for start in range(0, self.positions, _BLOCK_TOKENS):
            tokens = self.cache.tokens.read(start, min(start + _BLOCK_TOKENS, self.positions)).astype(np.int64)
            document = np.searchsorted(starts, np.arange(start, start + len(tokens)), side="right") - 1
            begins = starts[document] == np.arange(start, start + len(tokens))
            spelled, lengths, begun = self._spelled(tokens, document, begun)
            counts = lengths + begins
            ends = symbols + counts.cumsum()
            found = np.full(int(counts.sum()), _DOCUMENT, dtype=np.uint16)
            inside = np.ones(len(found), dtype=bool)
            inside[(ends - counts - symbols)[begins]] = False
            found[inside] = spelled
            yield found, 2 * ends + (self._ends_document(tokens) & ~begins)
            symbols += len(found)

    def _ends_document(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = tokens == (-1 if self.spelling.eos is None else self.spelling.eos)
        return found

    def _spelled(
        self, tokens: NDArray[np.int64], document: NDArray[np.int64], begun: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
        """The bytes of some tokens, how many each spells, and the last document whose text has begun by then."""
        lengths, offsets = self.spelling.lengths[tokens], self.spelling.offsets[tokens]
        if self.strip:
            numbers, index = document - document[0], np.arange(len(tokens))
            blanks = self.spelling.blanks[tokens]
            text = np.flatnonzero(lengths > blanks)
            with_text, first = np.unique(numbers[text], return_index=True)
            begins = np.full(int(numbers[-1]) + 1, len(tokens))  # where the text of each document does
            begins[with_text] = text[first]
            if document[0] == begun:
                begins[0] = NOWHERE
            begun = int(document[-1]) if begins[-1] < len(tokens) else begun
            cut = np.where(index < begins[numbers], lengths, np.where(index == begins[numbers], blanks, 0))
            lengths, offsets = lengths - cut, offsets + cut
        at = np.repeat(offsets - (lengths.cumsum() - lengths), lengths) + np.arange(int(lengths.sum()))
        return self.spelling.flat[at], lengths, begun


@dataclass
class Alignment:
    """The keys of both streams, int64 [N] each, in files without names.

    unlike_starts: int64 [D], symbols before each document, where the streams do not put the same spaces before a text,
    so that what follows there is not spelled alike; None where they do.
    """

    teacher: NDArray[np.int64]
    student: NDArray[np.int64]
    unlike_starts: NDArray[np.int64] | None

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The teacher's position for each of the student's `start .. stop`; `NOWHERE` where no boundary is shared, and
        where what may follow differs: only one stream has a token that ends the document there, or a space before its
        first word."""
        keys = np.asarray(self.student[start : stop + 1])
        after = np.append(keys[1:], NOWHERE) if stop == len(self.student) else keys[1:]
        keys = keys[: stop - start]
        low, high = np.searchsorted(self.teacher, [keys[0], keys[-1] + 1]) if len(keys) else (0, 0)
        theirs = np.append(np.asarray(self.teacher[low : high + 1]), NOWHERE)
        found = np.searchsorted(theirs[: high - low], keys, side="right") - 1
        shared = (found >= 0) & (theirs[found.clip(0)] == keys) & (after != keys)
        shared &= (theirs[found.clip(0) + 1] & 1) == (after & 1)
        if self.unlike_starts is not None:
            symbols = keys >> 1
            at = np.searchsorted(self.unlike_starts, symbols).clip(max=len(self.unlike_starts) - 1)
            before = np.searchsorted(self.unlike_starts, symbols - 1).clip(max=len(self.unlike_starts) - 1)
            shared &= (self.unlike_starts[at] != symbols) & (self.unlike_starts[before] != symbols - 1)
        return np.where(shared, low + found, NOWHERE)


def align(
    teacher: LogitCache, student: LogitCache, spellings: tuple[Spelling, Spelling], advance: Callable[[int], None]
) -> Alignment:
    """Raises InputError where the texts, or the order of their documents, differ, naming the first byte that does."""
    unlike = spellings[0].beginning != spellings[1].beginning
    sides = [Side(c, s, unlike) for c, s in zip((teacher, student), spellings, strict=True)]
    keys = [_on_disk(side.positions) for side in sides]
    starts = _compared(sides, keys, advance)
    return Alignment(keys[0], keys[1], starts if unlike else None)


def _on_disk(size: int) -> NDArray[np.int64]:
    """int64 [size] in a file that goes with its last reader, however the process ends.

    Raises StorageFull where the temporary folder has no room for it: a page that cannot be written ends the process.
    """
    with tempfile.TemporaryFile(prefix="logit-cache-") as file:
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, 8 * size)
            else:
                file.truncate(8 * size)
        except OSError as error:
            if is_out_of_space(error):
                raise StorageFull(
                    f"{tempfile.gettempdir()}: no room for the {8 * size:,} bytes by which two texts are aligned: free "
                    f"some, or set TMPDIR to a folder with more"
                ) from None
            raise
        return np.memmap(file, dtype=np.int64, mode="r+", shape=(size,))


def _compared(sides: list[Side], keys: list[Any], advance: Callable[[int], None]) -> NDArray[np.int64]:
    """Write the keys of both streams, and return the symbols before each document."""
    streams = [side.blocks() for side in sides]
    left = [np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.uint16)]  # of each, what was not compared yet
    written, done = [0, 0], [False, False]
    symbols, before = 0, left[0]
    starts: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    while not all(done):
        behind = int(done[0]) if any(done) else int(len(left[0]) > len(left[1]))
        block = next(streams[behind], None)
        if block is None:
            done[behind] = True
        else:
            left[behind] = np.concatenate([left[behind], block[0]])
            keys[behind][written[behind] : written[behind] + len(block[1])] = block[1]
            written[behind] += len(block[1])
            advance(len(block[1]) * behind)
        both = min(len(each) for each in left)
        differing = np.flatnonzero(left[0][:both] != left[1][:both])
        ended = any(done[i] and len(left[i]) == both < len(left[1 - i]) for i in (0, 1))
        same = left[0][: int(differing[0]) if len(differing) else both]
        starts.append(symbols + np.flatnonzero(same == _DOCUMENT))
        if len(differing) or ended:
            rest = [each[len(same) : len(same) + _SHOWN] for each in left]
            before = np.concatenate([before, same])[-_SHOWN:]
            raise InputError(_difference(sides, before, rest, np.concatenate(starts), symbols + len(same)))
        symbols += both
        before = np.concatenate([before, same])[-_SHOWN:]
        left = [each[both:] for each in left]
    return np.concatenate(starts)


def _difference(
    sides: list[Side],
    before: NDArray[np.uint16],
    rest: list[NDArray[np.uint16]],
    starts: NDArray[np.int64],
    symbols: int,
) -> str:
    """The first byte at which two streams differ, after so many symbols."""
    byte = symbols - int(starts[-1]) - 1 if len(starts) else 0
    one, other = (_text(each) or "the end" for each in rest)
    return (
        f"{sides[0].cache.url} and {sides[1].cache.url} have other texts: they differ first at byte {byte:,} of "
        f"document {max(len(starts) - 1, 0):,}, after {_text(before)!r}: {one!r} and {other!r}. An entry can be "
        f"projected into a cache of the same documents in the same order, by tokenizers that keep their bytes (one "
        f"that normalises, to lower case or by NFKC, changes them)"
    )


def _text(symbols: NDArray[np.uint16]) -> str:
    parts = np.split(symbols, np.flatnonzero(symbols == _DOCUMENT))
    texts = [part[part < _DOCUMENT].astype(np.uint8).tobytes().decode(errors="backslashreplace") for part in parts]
    return "⟨next document⟩".join(texts)


def agreement(
    alignment: Alignment,
    teacher: LogitCache,
    student: LogitCache,
    first: NDArray[np.int64],
    uncertain: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """int64 [2, 2]: of the shared boundaries inside a document, where the teacher's next token is [certain, uncertain],
    how many there are and at how many its first token is the student's next one."""
    found = np.zeros((2, 2), dtype=np.int64)
    total = student.record.corpus.positions
    for start in range(0, total - 1, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, total - 1)
        at = alignment.rows(start, stop)
        here = (at != NOWHERE) & (at < teacher.record.corpus.positions - 1)
        if not here.any():
            continue
        low, high = int(at[here].min()) + 1, int(at[here].max()) + 2
        theirs = teacher.tokens.read(low, high).astype(np.int64)[at[here] + 1 - low]
        ours = student.tokens.read(start + 1, stop + 1).astype(np.int64)[here]
        kind = uncertain[theirs].astype(np.int64)
        found[:, 0] += np.bincount(kind, minlength=2)
        found[:, 1] += np.bincount(kind[first[theirs] == ours], minlength=2)
    return found
