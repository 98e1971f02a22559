"""The rows in which a teacher reads the windows of isolated documents: integers, and nothing else.

Windows share a row, kept apart by positions that restart, or, where a model cannot do that, a row holds one window, and
rows of about equal length are read together (`student.loss.documents`). Both follow from the windows of a shard alone,
so that its bytes do not depend on workers and restarts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from logit_cache.caching.windows import Window
from student.data.packing import SHORTEST_ROWS, Rows, alone, doubled

Row = tuple[Window, ...]

# Attention costs the square of a row's length, so the shortest rows are taken that leave no more padding than this;
# where none do, those that leave the least.
_MOST_PADDING = 0.03


def row_lengths(longest: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The lengths of rows of an entry whose windows have at most `longest` tokens: doubling, up to that number.

    sizes: tokens of some windows that are packed together, such as those of a shard.

    >>> row_lengths(100, [32] * 16), row_lengths(100, [70] * 14), row_lengths(1_500, [70])
    ((128,), (512,), (128, 256, 512, 1024, 1500))
    """
    found: list[tuple[int, tuple[int, ...]]] = []
    for shortest in SHORTEST_ROWS:
        lengths = doubled(shortest, longest)
        rows = Rows.of(sorted(sizes, reverse=True), lengths)
        if sum(sizes) >= (1 - _MOST_PADDING) * sum(rows.lengths):
            return lengths
        found.append((sum(rows.lengths), lengths))
    return min(found)[1]


def packed(windows: Sequence[Window], lengths: Sequence[int], lead: int) -> Iterator[tuple[int, list[Row]]]:
    """(length, rows) of windows packed by best fit, the longest first; equal ones in the order of the stream.

    lengths: of rows, ascending, the last one no shorter than any window; lead: tokens put before each window. Rows of
    one window come after the others of their length, so that few batches have both.
    """
    ordered = _longest_first(windows)
    rows = Rows.of([window.stop - window.start + lead for window in ordered], lengths)
    found = [tuple(ordered[number] for number in row) for row in rows.items]
    for length in lengths:
        of_length = [row for row, own in zip(found, rows.lengths, strict=True) if own == length]
        yield length, sorted(of_length, key=lambda row: len(row) == 1)


def one_by_one(
    windows: Sequence[Window], longest: int, lead: int, batch_tokens: int
) -> Iterator[tuple[int, list[Row]]]:
    """(length, rows) of rows of one window each, those of about equal length together: as many as `batch_tokens` hold.

    The length is that of the largest of them with its `lead`, rounded up, at most `longest`.
    """
    ordered = _longest_first(windows)
    sizes = [window.stop - window.start + lead for window in ordered]
    for length, some in alone(sizes, longest, batch_tokens):
        yield length, [(window,) for window in ordered[some]]


def _longest_first(windows: Sequence[Window]) -> list[Window]:
    return sorted(windows, key=lambda window: (window.start - window.stop, window.start))
