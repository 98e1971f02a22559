"""Which windows share a row: documents that must not see each other, one behind the other. Integers, and nothing else.

Legend: `C` tokens of the longest window. A row is what a teacher reads as one sequence; the windows in it are kept apart
by positions that restart at each of them (`teachers.huggingface.packed_rows`), or, where a model cannot do that, it
holds one window, and rows of about equal length are read together. Both follow from the windows of a shard alone, so
that its bytes do not depend on workers and restarts.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from logit_cache.caching.windows import Window

Row = tuple[Window, ...]

SHORTEST_ROW = 512
"""Attention costs the square of a row's length: short documents are packed into rows no longer than this."""
_SORTED_UNIT = 32


def row_lengths(longest: int) -> tuple[int, ...]:
    """The lengths of rows of an entry whose windows have at most so many tokens: doubling, up to that number."""
    lengths = [longest]
    while lengths[0] >= 2 * SHORTEST_ROW:
        lengths.insert(0, lengths[0] // 2)
    return tuple(lengths)


def packed(windows: Sequence[Window], lengths: Sequence[int], lead: int) -> Iterator[tuple[int, list[Row]]]:
    """(length, rows) of windows packed by best fit, the longest first; equal ones in the order of the stream.

    lengths: ascending, the last one no shorter than any window; lead: tokens put before each window. A window goes into
    the fullest row that has room for it, else into a new one of the least length that has.
    """
    rows: list[list[Window]] = []
    length_of: list[int] = []
    free: list[tuple[int, int]] = []  # (tokens that are free, number of the row), ascending
    for window in sorted(windows, key=lambda each: (each.start - each.stop, each.start)):
        needed = window.stop - window.start + lead
        at = bisect.bisect_left(free, (needed, 0))
        if at < len(free):
            room, number = free.pop(at)
        else:
            room, number = next(length for length in lengths if length >= needed), len(rows)
            rows.append([])
            length_of.append(room)
        rows[number].append(window)
        bisect.insort(free, (room - needed, number))
    for length in lengths:
        yield length, [tuple(row) for row, own in zip(rows, length_of, strict=True) if own == length]


def one_by_one(windows: Sequence[Window], lead: int, batch_tokens: int) -> Iterator[tuple[int, list[Row]]]:
    """(length, rows) of rows of one window each, those of about equal length together: as many as `batch_tokens` hold.

    The length is that of the longest of them, rounded up.
    """
    waiting = sorted(windows, key=lambda each: (each.start - each.stop, each.start))
    while waiting:
        longest = waiting[0].stop - waiting[0].start + lead
        length = -(-longest // _SORTED_UNIT) * _SORTED_UNIT
        count = max(1, batch_tokens // length)
        yield length, [(window,) for window in waiting[:count]]
        waiting = waiting[count:]
