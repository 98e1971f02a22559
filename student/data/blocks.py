"""Position ranges of training windows in the token stream: integers, and one random number per window and epoch.

Legend: `N` tokens of the stream, `D` documents, `T` positions of a window. Position `p` is *labelled* when the
token `p + 1` follows it in the same document (or in the stream, when documents are not isolated). Only labelled
positions are trained on; a window of length `n <= T` reads the positions `start .. start + n` and one more token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Offset = Literal["fixed", "random"]

_CHOSEN_AT_ONCE = 1 << 18  # windows


@dataclass(frozen=True)
class Blocks:
    """The windows over some documents, numbered in stream order.

    starts     int64 [D]  first position of each document (or of the whole stream, D = 1)
    labelled   int64 [D]  labelled positions of each: its length - 1
    chosen     int64 [n]  those of the windows that there are, ascending, by their numbers among all; None: all

    fixed: window i of a document reads ``[i * T, min((i + 1) * T, labelled))``: every labelled position once, the
    last window of a document shorter.
    random: window i reads T positions from ``i * T + o`` on, with the offset o sampled for every epoch and window from
    ``0 .. T - 1``, as far as the window stays inside its document. A document shorter than T gives one short
    window. So an epoch reads about as much as with fixed windows, not each position exactly once.
    """

    starts: NDArray[np.int64]
    labelled: NDArray[np.int64]
    window_tokens: int
    offset: Offset
    seed: int
    chosen: NDArray[np.int64] | None = None
    _first: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        size = self.window_tokens
        if self.offset == "fixed":
            counts = -(-self.labelled // size)
        else:
            counts = np.where(self.labelled >= size, self.labelled // size, np.minimum(self.labelled, 1))
        object.__setattr__(self, "_first", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    @classmethod
    def of(
        cls,
        positions: int,
        document_starts: NDArray[np.uint64] | None,
        window_tokens: int,
        offset: Offset,
        seed: int,
        committed: Iterable[Sequence[tuple[int, int]]] = (),
    ) -> Blocks:
        """Windows over a stream of N positions; `document_starts` [D] where windows must not cross documents.

        committed: by teacher, the ranges of positions that windows have to be `inside`.
        """
        starts = np.zeros(1, dtype=np.int64) if document_starts is None else document_starts.astype(np.int64)
        labelled = np.diff(np.append(starts, positions)) - 1
        blocks = cls(starts, labelled.astype(np.int64), window_tokens, offset, seed)
        for ranges in committed:
            blocks = blocks.inside(ranges)
        return blocks

    def __len__(self) -> int:
        return int(self._first[-1]) if self.chosen is None else len(self.chosen)

    @property
    def whole(self) -> Blocks:
        """All windows over the documents."""
        return replace(self, chosen=None)

    def inside(self, ranges: Sequence[tuple[int, int]]) -> Blocks:
        """Those of the windows that lie in one of some ranges of positions, ascending and apart, at any offset.

        So an epoch has the same windows as every other, and each reads what it reads of the whole text.
        """
        begins, ends = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        found = [np.zeros(0, dtype=np.int64)]
        for at in range(0, len(self) if len(begins) else 0, _CHOSEN_AT_ONCE):
            numbers = self._numbers(np.arange(at, min(at + _CHOSEN_AT_ONCE, len(self))))
            documents, blocks, lengths = self._locate(numbers)
            first = self.starts[documents] + blocks * self.window_tokens
            last = first + lengths + self._rooms(documents, blocks, lengths) - 1
            holder = np.searchsorted(begins, first, side="right") - 1
            found.append(numbers[(holder >= 0) & (last <= ends[holder])])
        chosen = np.concatenate(found)
        return self if len(chosen) == len(self) else replace(self, chosen=chosen)

    def span(self, window: int, epoch: int = 0) -> tuple[int, int]:
        """(first absolute position, number of positions) of a window in an epoch."""
        return self.spans([window + epoch * len(self)])[0]

    def spans(self, indices: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
        """(first absolute position, number of positions) by index, ``epoch * len(self) + window``."""
        epochs, windows = np.divmod(whole_numbers(indices), len(self))
        windows = self._numbers(windows)
        documents, blocks, lengths = self._locate(windows)
        inside = blocks * self.window_tokens
        if self.offset == "random":
            rooms = self._rooms(documents, blocks, lengths)
            keys = zip(windows.tolist(), epochs.tolist(), rooms.tolist(), strict=True)
            inside += np.array([self._random_offset(*key) for key in keys], dtype=np.int64)
        return list(zip((self.starts[documents] + inside).tolist(), lengths.tolist(), strict=True))

    def lengths(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of positions of each of some windows, int64, the same in every epoch."""
        return self._locate(self._numbers(windows))[2]

    def positions(self) -> int:
        """Those of the windows of an epoch."""
        return int(self.lengths(np.arange(len(self))).sum())

    def _numbers(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of some windows among all windows over the documents."""
        return windows if self.chosen is None else self.chosen[windows]

    def _rooms(self, documents: NDArray[np.int64], blocks: NDArray[np.int64], lengths: NDArray[np.int64]) -> Any:
        """How many places each window may begin at, int64."""
        if self.offset == "fixed":
            return np.ones_like(lengths)
        left = self.labelled[documents] - lengths - blocks * self.window_tokens
        return np.minimum(self.window_tokens, left + 1)

    def _locate(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        document = np.searchsorted(self._first, windows, side="right") - 1
        block = windows - self._first[document]
        return document, block, np.minimum(self.window_tokens, self.labelled[document] - block * self.window_tokens)

    def _random_offset(self, window: int, epoch: int, room: int) -> int:
        # Keyed by seed, epoch and window, not sampled in sequence: any worker can compute any window of any epoch, and
        # a resumed run gets the same offsets. The window is the counter's second word, so that neighbouring windows do
        # not share blocks of the generator's output.
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, window, 0, 0]))
        return int(generator.integers(room))


def whole_numbers(indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of windows as int64. Raises TypeError for others."""
    numbers = np.asarray(indices, dtype=None if len(indices) else np.int64)
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"windows are chosen by whole numbers, not by {numbers.dtype}")
    return numbers.astype(np.int64)
