"""Position ranges of training windows in the token stream: integers, and one random number per window and epoch.

Legend: `N` tokens of the stream, `D` documents, `T` positions of a window. Position `p` is *labelled* when the
token `p + 1` follows it in the same document (or in the stream, when documents are not isolated). Only labelled
positions are trained on; a window of length `n <= T` reads the positions `start .. start + n` and one more token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Offset = Literal["fixed", "random"]


@dataclass(frozen=True)
class Blocks:
    """The windows over some documents, numbered in stream order.

    starts     int64 [D]  first position of each document (or of the whole stream, D = 1)
    labelled   int64 [D]  labelled positions of each: its length - 1

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
    ) -> Blocks:
        """Windows over a stream of N positions; `document_starts` [D] where windows must not cross documents."""
        starts = np.zeros(1, dtype=np.int64) if document_starts is None else document_starts.astype(np.int64)
        labelled = np.diff(np.append(starts, positions)) - 1
        return cls(starts, labelled.astype(np.int64), window_tokens, offset, seed)

    def __len__(self) -> int:
        return int(self._first[-1])

    def span(self, window: int, epoch: int = 0) -> tuple[int, int]:
        """(first absolute position, number of positions) of a window in an epoch."""
        return self.spans([window + epoch * len(self)])[0]

    def spans(self, indices: Sequence[int] | NDArray[np.int64]) -> list[tuple[int, int]]:
        """(first absolute position, number of positions) by index, ``epoch * len(self) + window``."""
        epochs, windows = np.divmod(whole_numbers(indices), len(self))
        documents, blocks, lengths = self._locate(windows)
        inside = blocks * self.window_tokens
        if self.offset == "random":
            rooms = np.minimum(self.window_tokens, self.labelled[documents] - lengths - inside + 1)
            keys = zip(windows.tolist(), epochs.tolist(), rooms.tolist(), strict=True)
            inside += np.array([self._random_offset(*key) for key in keys], dtype=np.int64)
        return list(zip((self.starts[documents] + inside).tolist(), lengths.tolist(), strict=True))

    def lengths(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of positions of each of some windows, int64, the same in every epoch."""
        return self._locate(windows)[2]

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
