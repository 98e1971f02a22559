"""Numbers and tables as people read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from storage.text import columns, counted, duration, labelled, ranges_in_words, size

CASES: list[tuple[Callable[..., str], tuple[Any, ...], str]] = [
    (counted, (1, "document"), "1 document"),
    (counted, (0, "document"), "0 documents"),
    (counted, (2_000, "byte"), "2,000 bytes"),
    (counted, (8, "process"), "8 processes"),
    (counted, (3, "micro-batch"), "3 micro-batches"),
    (counted, (2, "entry"), "2 entries"),
    (counted, (2, "array"), "2 arrays"),
    (counted, (2, "reply"), "2 replies"),
    (size, (1,), "1 byte"),
    (size, (999.4,), "999 bytes"),
    (size, (999.5,), "1.0 kB"),
    (size, (64_000,), "64.0 kB"),
    (size, (999_949,), "999.9 kB"),
    (size, (999_950,), "1.0 MB"),
    (size, (3.25e9,), "3.2 GB"),
    (size, (2.5e15,), "2,500.0 TB"),
    (duration, (0.4,), "0s"),
    (duration, (59.6,), "1m 00s"),
    (duration, (75,), "1m 15s"),
    (duration, (7300,), "2h 01m"),
    (duration, (47.9 * 3600,), "47h 54m"),
    (duration, (60 * 3600,), "2.5 days"),
    (ranges_in_words, ([(0, 64)],), "1 range: 0..64"),
    (ranges_in_words, ([(0, 64), (128, 192)],), "2 ranges, the first 0..64"),
]


@pytest.mark.parametrize(("text_of", "given", "text"), CASES)
def test_numbers(text_of: Callable[..., str], given: tuple[Any, ...], text: str) -> None:
    assert text_of(*given) == text


def test_columns_are_aligned() -> None:
    rows = [("name", "steps"), ("a", "1,000"), ("longer", "7")]
    assert columns(rows) == ["name    steps", "a       1,000", "longer      7"]
    assert labelled([("a", "one"), ("bcd", "two")]) == "a    one\nbcd  two"
