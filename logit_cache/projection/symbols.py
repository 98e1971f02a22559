"""A token stream as one sequence of symbols, which do not depend on the tokenizer, and how much of it each token ends.

Legend: `N` tokens of a stream, `n` of a block of it.

Symbols are the bytes of the text, and marks where documents begin, and replies. A token's key says how many symbols it
and those before it spell; keys ascend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from logit_cache.projection.spelling import Spelling
from storage.cache.reader import LogitCache

BLOCK_TOKENS = 1 << 18
DOCUMENT, REPLY = 256, 257  # the symbols of their beginnings
_WHITE_SPACE = np.frombuffer(b" \t\n\v\f\r", dtype=np.uint8)
_NONE = -1
Block = tuple[NDArray[np.uint16], NDArray[np.int64]]


class Symbols(Protocol):
    """A stream that is read in this way."""

    cache: LogitCache

    def blocks(self) -> Iterator[Block]:
        """The symbols and the keys [n] of some tokens at a time, in order."""


@dataclass
class Documents:
    """All text of a stream. Its key says, too, whether a token ends a document (eos), which spells nothing::

        key = 2 * symbols + (1 where it is eos and does not begin its document)

    strip: leave out the spaces at the beginning of each document.
    """

    cache: LogitCache
    spelling: Spelling
    strip: bool

    def blocks(self) -> Iterator[Block]:
        symbols, begun = 0, _NONE  # so far; the last document whose text has begun
        eos = _NONE if self.spelling.eos is None else self.spelling.eos
        for start in range(0, self.cache.record.corpus.positions, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, self.cache.record.corpus.positions)
            tokens, document, begins = _read(self.cache, start, stop)
            spelled, lengths, begun = self._spelled(tokens, document, begun)
            found = _with_marks(spelled, lengths, begins, np.zeros(len(tokens), dtype=bool))
            yield found, 2 * (symbols + (begins + lengths).cumsum()) + ((tokens == eos) & ~begins)
            symbols += len(found)

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
                begins[0] = _NONE
            begun = int(document[-1]) if begins[-1] < len(tokens) else begun
            cut = np.where(index < begins[numbers], lengths, np.where(index == begins[numbers], blanks, 0))
            lengths, offsets = lengths - cut, offsets + cut
        return self.spelling.flat[_places(offsets, lengths)], lengths, begun


@dataclass
class Replies:
    """The replies of conversations alone: the tokens that the loss mask trains, without the marker that ends a reply,
    and without white space before and behind its text. All other tokens spell nothing::

        key = 2 * symbols + (1 where it is not trained, so that the next token belongs to no reply)

    Of what was read: `turn_ends`, how many replies each marker ends; `blanks`, the bytes of white space that each reply
    begins with, block by block.
    """

    cache: LogitCache
    spelling: Spelling
    turn_ends: Counter[int] = field(default_factory=Counter)
    blanks: list[NDArray[np.int64]] = field(default_factory=list)

    def blocks(self) -> Iterator[Block]:
        symbols = 0
        for start, stop in self._ranges():
            tokens, _, begins = _read(self.cache, start, stop)
            trained = self._trained(start, stop)
            of_reply = np.append(False, trained[:-1]) & ~begins
            replied = trained & ~of_reply
            marker = of_reply & ~trained & self.spelling.is_marker[tokens]
            self.turn_ends.update(tokens[marker].tolist())
            lengths = np.where(of_reply & ~marker, self.spelling.lengths[tokens], 0)
            spelled = self.spelling.flat[_places(self.spelling.offsets[tokens], lengths)]
            token = np.repeat(np.arange(len(tokens)), lengths)
            kept, blanks = _trimmed(spelled, (replied.cumsum() - 1)[token], int(replied.sum()))
            self.blanks.append(blanks)
            lengths = np.bincount(token[kept], minlength=len(tokens))
            found = _with_marks(spelled[kept], lengths, begins, replied)
            yield found, 2 * (symbols + (begins + lengths + replied).cumsum()) + ~trained
            symbols += len(found)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Positions some at a time, cut outside of replies."""
        start = stop = 0
        positions = self.cache.record.corpus.positions
        while start < positions:
            stop = min(stop + BLOCK_TOKENS, positions)
            outside = np.flatnonzero(~self._trained(start, stop))
            if stop == positions or len(outside):
                stop = positions if stop == positions else start + int(outside[-1]) + 1
                yield start, stop
                start = stop

    def _trained(self, start: int, stop: int) -> NDArray[np.bool_]:
        assert self.cache.loss_mask is not None, "conversations have a loss mask"
        return self.cache.loss_mask.read(start, stop)


def _read(cache: LogitCache, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Of some positions [n]: the tokens, the numbers of their documents, and which begin one."""
    starts = cache.document_starts.astype(np.int64)
    positions = np.arange(start, stop)
    document = np.searchsorted(starts, positions, side="right") - 1
    return cache.tokens.read(start, stop).astype(np.int64), document, starts[document] == positions


def _places(offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of as many bytes as each token spells, from its offset on."""
    before = lengths.cumsum() - lengths
    found: NDArray[np.int64] = np.arange(int(lengths.sum()), dtype=np.int64) + np.repeat(offsets - before, lengths)
    return found


def _with_marks(
    spelled: NDArray[np.uint8], lengths: NDArray[np.int64], begins: NDArray[np.bool_], replied: NDArray[np.bool_]
) -> NDArray[np.uint16]:
    """Bytes and marks in order: of each token [n] that of a document before its bytes, that of a reply behind them."""
    counts = begins + lengths + replied
    ends = counts.cumsum()
    found = np.zeros(int(counts.sum()), dtype=np.uint16)
    found[(ends - counts)[begins]] = DOCUMENT
    found[(ends - 1)[replied]] = REPLY
    found[found == 0] = spelled
    return found


def _trimmed(
    text: NDArray[np.uint8], reply: NDArray[np.int64], replies: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which bytes stand inside the text of their reply, and how many stand before that of each [replies]."""
    inside = np.flatnonzero(~np.isin(text, _WHITE_SPACE))
    with_text, first = np.unique(reply[inside], return_index=True)
    begin, end = np.full(replies, len(text)), np.full(replies, _NONE)
    begin[with_text] = inside[first]
    end[with_text] = inside[np.append(first[1:], len(inside)) - 1] if len(inside) else _NONE
    index = np.arange(len(text))
    before = index < begin[reply]
    return ~before & (index <= end[reply]), np.bincount(reply[before], minlength=replies)
