"""Which documents share a row."""

from __future__ import annotations

import numpy as np
import pytest
from support.caches.streams import chat_lengths

from student.data.packing import Packing, Rows


def test_an_item_goes_into_the_fullest_row_with_room_for_it() -> None:
    rows = Rows((10, 20))
    for item, size in enumerate((7, 15, 4, 3, 20, 2)):
        rows.add(item, size)
    assert (rows.items, rows.lengths) == ([[0, 3], [1, 2], [4], [5]], [10, 20, 20, 10])


@pytest.mark.parametrize(("mean", "length"), [(104, 512), (104, 2_048), (400, 2_048), (30, 128)])
def test_rows_hold_each_window_once_and_are_nearly_full(mean: float, length: int) -> None:
    sizes = chat_lengths(3_000, mean, length)
    group = max(8_192, 8 * length)
    packing = Packing.of(sizes, length, group)
    assert sorted(packing.windows) == list(range(len(sizes)))
    rows = np.split(packing.windows, packing.first[1:-1])
    assert len(rows) == len(packing)
    assert all(0 < sizes[row].sum() <= length for row in rows)
    assert sizes.sum() / (len(rows) * length) > 0.97
    # A row's windows are of one group, but for the few rows that stay open.
    places = np.cumsum(sizes) - sizes
    assert sum(np.ptp(places[row]) > 2 * group for row in rows) <= 0.01 * len(rows)
