"""A token stream as one sequence of symbols, which do not depend on the tokenizer, and how much of it each token ends.

Legend: `N` tokens of a stream, `n` of a block of it.

Symbols are the bytes of the text, and marks where documents begin, and replies. A token's key says how many symbols it
and those before it spell; keys ascend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from logit_cache.projection.spelling import Spelling
from storage.cache.reader import LogitCache

BLOCK_TOKENS = 1 << 18
DOCUMENT, REPLY = 256, 257  # the symbols of their beginnings
_NONE = NO_MARKER = -1
# What `str.strip` takes away, in UTF-8, by the number of bytes: each as one number.
_BLANKS = [character.encode() for character in map(chr, range(1 << 14)) if character.isspace()]
_WHITE_SPACE = {size: [int.from_bytes(each) for each in _BLANKS if len(each) == size] for size in (1, 2, 3)}
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

    A document that is trained from its first token on is all reply. Of what was read, block by block, for each reply:
    `blanks`, the bytes of white space that it begins with; `ends`, the special id that ends it, or `NO_MARKER`.
    """

    cache: LogitCache
    spelling: Spelling
    blanks: list[NDArray[np.int64]] = field(default_factory=list)
    ends: list[NDArray[np.int64]] = field(default_factory=list)

    def blocks(self) -> Iterator[Block]:
        symbols = 0
        for start, stop in self._ranges():
            tokens, _, begins = _read(self.cache, start, stop)
            trained, special = self._trained(start, stop), self.spelling.is_special[tokens]
            continues = np.append(False, trained[:-1]) & ~begins
            replied = trained & ~continues
            reply = replied.cumsum() - 1  # of each token, numbered in this block, which ends outside of replies
            marker = continues & ~trained & special
            ends = np.full(int(replied.sum()), NO_MARKER)
            ends[reply[marker]] = tokens[marker]
            of_reply = (continues & ~marker) | (trained & begins & ~special)
            lengths = np.where(of_reply, self.spelling.lengths[tokens], 0)
            spelled = self.spelling.flat[_places(self.spelling.offsets[tokens], lengths)]
            token = np.repeat(np.arange(len(tokens)), lengths)
            kept, blanks = _trimmed(spelled, reply[token], len(ends))
            self.blanks.append(blanks)
            self.ends.append(ends)
            lengths = np.bincount(token[kept], minlength=len(tokens))
            found = _with_marks(spelled[kept], lengths, begins, replied)
            yield found, 2 * (symbols + (begins + replied + lengths).cumsum()) + ~trained
            symbols += len(found)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Positions some at a time, cut outside of replies."""
        start, positions = 0, self.cache.record.corpus.positions
        for at in range(0, positions, BLOCK_TOKENS):
            stop = min(at + BLOCK_TOKENS, positions)
            outside = np.flatnonzero(~self._trained(at, stop))
            cut = positions if stop == positions else at + int(outside[-1]) + 1 if len(outside) else start
            if cut > start:
                yield start, cut
                start = cut

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
    """Bytes and marks in order: those of each token [n], and before them the marks of a document and of a reply."""
    counts = begins + replied + lengths
    first = counts.cumsum() - counts
    found = np.zeros(int(counts.sum()), dtype=np.uint16)
    found[first[begins]] = DOCUMENT
    found[(first + begins)[replied]] = REPLY
    found[found == 0] = spelled
    return found


def _trimmed(
    text: NDArray[np.uint8], reply: NDArray[np.int64], replies: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which bytes stand inside the text of their reply, and how many stand before that of each [replies]."""
    inside = np.flatnonzero(~_is_white_space(text))
    with_text, first = np.unique(reply[inside], return_index=True)
    begin, end = np.full(replies, len(text)), np.full(replies, _NONE)
    begin[with_text] = inside[first]
    end[with_text] = inside[np.append(first[1:], len(inside)) - 1] if len(inside) else _NONE
    index = np.arange(len(text))
    before = index < begin[reply]
    return ~before & (index <= end[reply]), np.bincount(reply[before], minlength=replies)


def _is_white_space(text: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which bytes are of white space."""
    found = np.zeros(len(text), dtype=bool)
    for size, codes in _WHITE_SPACE.items():
        starts = max(0, len(text) - size + 1)
        code = np.zeros(starts, dtype=np.int64)
        for at in range(size):
            code = code * 256 + text[at : at + starts]
        here = np.isin(code, codes)
        for at in range(size):
            found[at : at + starts] |= here
    return found
