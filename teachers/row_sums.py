"""Sums of rows whose bits depend on nothing but the row: not on the number of threads, nor on the rows beside it.

Torch adds up each row by itself, on one thread, where there are several. A single one it cuts into a run for each
thread, so that workers with other numbers of threads would store other bits of the same position.
"""

from __future__ import annotations

from torch import Tensor


def row_sums(values: Tensor) -> Tensor:
    """The sums [T] of [T, n]."""
    return values.sum(1) if len(values) != 1 else values.expand(2, -1).sum(1)[:1]


def row_nansums(values: Tensor) -> Tensor:
    """The sums [T] of [T, n], NaN taken for 0."""
    return values.nansum(1) if len(values) != 1 else values.expand(2, -1).nansum(1)[:1]
