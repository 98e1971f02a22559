"""Which documents share a row, one behind the other: integers, and nothing else.

A model reads a row as one sequence, and keeps its documents apart by positions that restart (`student.loss.documents`).
Which documents share a row follows from their lengths alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP_ROWS = 8
"""The least number of rows whose documents are packed together: with few to choose from, rows would stay emptier."""


# Rows of one item are padded to a multiple of this.
_UNIT = 32

SHORTEST_ROWS = (128, 256, 512)
"""Lengths that the shortest rows may have, where rows have several lengths."""


def doubled(shortest: int, longest: int) -> tuple[int, ...]:
    """Lengths of rows from `shortest` on, doubling, up to `longest`; one where that is no longer."""
    lengths = [shortest]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    return tuple(lengths)


class Rows:
    """Rows filled by best fit: an item goes into the fullest row with room for it, else into the shortest new one.

    lengths: those that rows can have, ascending. Rows are numbered as they were begun; `items` and `lengths` by row.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.items: list[list[int]] = []
        self.lengths: list[int] = []
        self._choices = lengths
        self._room: list[tuple[int, int]] = []  # (free, row), ascending, of the open rows

    @classmethod
    def of(cls, sizes: Sequence[int], lengths: Sequence[int]) -> Rows:
        """Rows of items of these sizes, numbered as they are given and put in by turns."""
        rows = cls(lengths)
        for item, size in enumerate(sizes):
            rows.add(item, size)
        return rows

    def add(self, item: int, size: int) -> None:
        """Put in an item, no larger than the longest row."""
        at = bisect.bisect_left(self._room, (size, 0))
        if at < len(self._room):
            room, row = self._room.pop(at)
        else:
            room, row = self._choices[bisect.bisect_left(self._choices, size)], len(self.items)
            self.items.append([])
            self.lengths.append(room)
        self.items[row].append(item)
        if room > size:
            bisect.insort(self._room, (room - size, row))

    def close(self) -> None:
        """Close all rows but the emptiest."""
        del self._room[:-1]


def alone(sizes: Sequence[int], longest: int, tokens: int) -> Iterator[tuple[int, slice]]:
    """Rows of one item each, those of about equal length together: (length of the rows, which items).

    sizes: descending. A length is that of the largest of its items, rounded up, at most `longest`; so many rows are
    read together that they have at most `tokens`, or one.
    """
    start = 0
    while start < len(sizes):
        length = min(-(-sizes[start] // _UNIT) * _UNIT, longest)
        stop = start + max(1, tokens // length)
        yield length, slice(start, stop)
        start = stop


@dataclass(frozen=True)
class Packing:
    """The windows of rows: row `r` has ``windows[first[r] : first[r + 1]]``, int64."""

    windows: NDArray[np.int64]
    first: NDArray[np.int64]

    @classmethod
    def of(cls, sizes: NDArray[np.int64], length: int, group_tokens: int) -> Packing:
        """Rows of `length` tokens of windows with `sizes` [W] tokens, none larger than a row.

        Groups of neighbours, `group_tokens` each, are packed by best fit, the largest window first. The emptiest row of
        a group stays open for the next one. So a row's windows are near each other in the stream.
        """
        rows = Rows((length,))
        group = (np.cumsum(sizes) - sizes) // group_tokens
        # By group, then the largest first, equal ones in the order of the stream.
        order = np.lexsort((-sizes, group))
        ends = np.searchsorted(group, np.unique(group), side="right").tolist()
        start = 0
        for end in ends:
            for window in order[start:end].tolist():
                rows.add(window, int(sizes[window]))
            rows.close()
            start = end
        counts = [len(row) for row in rows.items]
        windows = np.fromiter((window for row in rows.items for window in row), np.int64, len(sizes))
        return cls(windows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.first) - 1
