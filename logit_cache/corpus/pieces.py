"""Tokenising documents of any length piece by piece, with the tokens that the whole would have.

A document is cut into pieces of at most `PIECE_CHARACTERS`, which depend on its text alone, not on how it was read.
Tokens at a cut would differ: many tokenizers put a space before a text, and merges cross the cut. So each piece is
tokenised with a margin of its neighbours' text on both sides, and keeps the tokens that start in its own range. Within
half a margin of every cut, the two pieces that meet there must have the same tokens at the same offsets; then the cut
leaves no trace. Where they differ (a run of one character longer than the margin, or a tokenizer without offsets) the
two pieces are tokenised again without the margin between them: only at such a cut can tokens differ from those of the
whole document.

Legend: `n` tokens of a piece. Positions are characters (code points).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.corpus.documents import Chunk, Ids, Ranges, Tokens

PIECE_CHARACTERS = 1 << 17
MARGIN_CHARACTERS = 1 << 11
# One batch goes to the tokenizer's threads: 16 pieces, or as many short documents as come to the same length.
BATCH_CHARACTERS = 1 << 21
_BATCH_TEXTS = 8_192


@dataclass(frozen=True, slots=True)
class Piece:
    """`text[start:stop]` is the piece, the rest of `text` its margins. `opens` and `closes` a document; `trained` are
    the ranges of `text` that are trained on, or None for all of it. A piece with `tokens` is a document
    of those, with their text. begins, appended_trained: as of `Chunk`."""

    source: int
    text: str
    start: int
    stop: int
    opens: bool
    closes: bool
    trained: Ranges | None = None
    begins: bool = True
    appended_trained: bool = True
    tokens: Tokens | None = None

    @property
    def own(self) -> str:
        """The piece without its margins."""
        return self.text[self.start : self.stop]

    @property
    def whole(self) -> bool:
        return self.opens and self.closes


@dataclass(frozen=True, slots=True)
class Encoded:
    """ids uint32 [n]; offsets int64 [n, 2], the characters that each token stands for, or None if unknown."""

    ids: Ids
    offsets: NDArray[np.int64] | None


class Encoder:
    """A tokenizer that `student.models.tokenizer` read as a function of texts, without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None

    def __call__(self, texts: Sequence[str], offsets: Sequence[bool]) -> list[Encoded]:
        """Ids of each text, and its offsets where requested and known."""
        if not texts:
            return []
        if self._backend is None:
            lists = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            return [Encoded(np.asarray(ids, dtype=np.uint32), None) for ids in lists]
        # The backend, because it creates Python objects for the requested fields only.
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [
            Encoded(
                np.asarray(encoding.ids, dtype=np.uint32),
                np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2) if wanted else None,
            )
            for encoding, wanted in zip(encodings, offsets, strict=True)
        ]


def cut(chunks: Iterable[Chunk | Tokens]) -> Iterator[Piece]:
    """Documents as pieces. Those without any text are left out."""
    buffer, own, opens = "", 0, True
    for chunk in chunks:
        if isinstance(chunk, Tokens):
            last = chunk.trained is None or bool(chunk.trained[-1:].any())
            yield Piece(chunk.source, chunk.text, 0, len(chunk.text), True, True, None, False, last, chunk)
            continue
        buffer += chunk.text
        # The rest must be longer than the margin, so that the last piece is too.
        while len(buffer) - own > PIECE_CHARACTERS + MARGIN_CHARACTERS:
            stop = _cut_at(buffer, own)
            yield _piece(chunk, buffer, own, stop, opens, False)
            own, opens = stop, False
        if chunk.ends:
            if own < len(buffer):
                yield _piece(chunk, buffer, own, len(buffer), opens, True)
            buffer, own, opens = "", 0, True
        else:
            drop = max(0, own - MARGIN_CHARACTERS)
            buffer, own = buffer[drop:], own - drop


def encode(pieces: Iterable[Piece], encoder: Encoder) -> Iterator[tuple[Piece, Ids, NDArray[np.bool_] | None]]:
    """Each piece with its ids uint32 [n] and, where it has `trained` ranges, which of them lie in these, bool [n]."""
    held: tuple[Piece, Encoded, bool] | None = None
    for piece, encoded in _encode_batches(pieces, encoder):
        hard = False
        if held is not None:
            hard = not piece.opens and not _same_around_cut(held[0], held[1], piece, encoded)
            yield _finish(*held, hard, encoder)
        held = piece, encoded, hard
    if held is not None:
        yield _finish(*held, False, encoder)


def trained_tokens(offsets: NDArray[np.int64], ranges: Ranges) -> NDArray[np.bool_]:
    """Which tokens cover any character of the ranges (ascending, apart); offsets int64 [n, 2] to bool [n].

    A token reaches from the end of the one before it: offsets may leave out white space that belongs to the
    token, and a token of white space alone then has no width.
    """
    starts, stops = offsets[:, 0], offsets[:, 1]
    reach = np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])) if len(stops) else starts
    if not ranges:
        return np.zeros(len(offsets), dtype=bool)
    begins, ends = np.asarray(ranges, dtype=np.int64).T
    # The first range that ends after a token's start is the only one that it can be the first to reach into.
    first = np.searchsorted(ends, reach, side="right")
    inside = first < len(ends)
    inside[inside] = stops[inside] > begins[first[inside]]
    return inside


def _cut_at(buffer: str, own: int) -> int:
    """Where a piece that starts at `own` stops: after a line feed if there is one near its end, else at a space."""
    limit = own + PIECE_CHARACTERS
    near = limit - PIECE_CHARACTERS // 4
    line = buffer.rfind("\n", near, limit)
    if line >= 0:
        return line + 1
    space = buffer.rfind(" ", near + 1, limit)
    return space if space >= 0 else limit


def _piece(chunk: Chunk, buffer: str, start: int, stop: int, opens: bool, closes: bool) -> Piece:
    left = max(0, start - MARGIN_CHARACTERS)
    text = buffer[left : stop + MARGIN_CHARACTERS]
    trained = chunk.trained
    if trained is not None:
        # Such a document is one chunk, so that the buffer's positions are the document's.
        trained = tuple((a - left, b - left) for a, b in trained if b > left and a < left + len(text))
    own = start - left, stop - left
    return Piece(chunk.source, text, *own, opens, closes, trained, chunk.begins, chunk.appended_trained)


def _encode_batches(pieces: Iterable[Piece], encoder: Encoder) -> Iterator[tuple[Piece, Encoded]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        if batch and (characters + len(piece.text) > BATCH_CHARACTERS or len(batch) == _BATCH_TEXTS):
            yield from zip(batch, _encode_batch(batch, encoder), strict=True)
            batch, characters = [], 0
        batch.append(piece)
        characters += len(piece.text)
    if batch:
        yield from zip(batch, _encode_batch(batch, encoder), strict=True)


def _encode_batch(batch: Sequence[Piece], encoder: Encoder) -> list[Encoded]:
    texts = [p for p in batch if p.tokens is None]
    encoded = iter(encoder([p.text for p in texts], [not p.whole or p.trained is not None for p in texts]))
    return [next(encoded) if p.tokens is None else Encoded(p.tokens.ids, None) for p in batch]


def _same_around_cut(left: Piece, left_encoded: Encoded, right: Piece, right_encoded: Encoded) -> bool:
    """Whether both made the same tokens within half a margin of the cut between them, and some on either side."""
    half = MARGIN_CHARACTERS // 2
    ends = []
    for encoded, position in ((left_encoded, left.stop), (right_encoded, right.start)):
        if encoded.offsets is None:
            return False
        relative = encoded.offsets - position
        near = (relative[:, 0] >= -half) & (relative[:, 0] < half)
        ends.append((encoded.ids[near], relative[near]))
    (a_ids, a_offsets), (b_ids, b_offsets) = ends
    if not np.array_equal(a_ids, b_ids) or not np.array_equal(a_offsets, b_offsets) or not len(a_ids):
        return False
    return bool(a_offsets[0, 0] < 0 <= a_offsets[-1, 0])


def _finish(
    piece: Piece, encoded: Encoded, hard_left: bool, hard_right: bool, encoder: Encoder
) -> tuple[Piece, Ids, NDArray[np.bool_] | None]:
    """The piece's own tokens. A hard side is tokenised again without its margin."""
    if piece.tokens is not None:
        return piece, piece.tokens.ids, piece.tokens.trained
    start, stop, length = piece.start, piece.stop, len(piece.text)
    ranges = piece.trained
    if hard_left or hard_right:
        left, right = (start if hard_left else 0), (stop if hard_right else length)
        [encoded] = encoder([piece.text[left:right]], [True])
        start, stop, length = start - left, stop - left, right - left
        ranges = None if ranges is None else tuple((a - left, b - left) for a, b in ranges)
    ids, offsets = encoded.ids, encoded.offsets
    if offsets is None:
        return piece, ids, None
    trained = None if ranges is None else trained_tokens(offsets, ranges)
    # Tokens can have no width and stand at either end, so an end without a margin is no bound.
    mine = np.ones(len(ids), dtype=bool)
    if start > 0:
        mine &= offsets[:, 0] >= start
    if stop < length:
        mine &= offsets[:, 0] < stop
    return piece, ids[mine], None if trained is None else trained[mine]
