"""Numbers and tables as people read them."""

from __future__ import annotations

import pytest

from storage.text import columns, counted, duration, labelled, ranges_in_words, size


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "document", "1 document"),
        (0, "document", "0 documents"),
        (2_000, "byte", "2,000 bytes"),
        (8, "process", "8 processes"),
        (3, "micro-batch", "3 micro-batches"),
        (2, "entry", "2 entries"),
        (2, "array", "2 arrays"),
        (2, "reply", "2 replies"),
    ],
)
def test_nouns_agree_with_their_number(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1 byte"),
        (999.4, "999 bytes"),
        (999.5, "1.0 kB"),
        (64_000, "64.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3.25e9, "3.2 GB"),
        (2.5e15, "2,500.0 TB"),
    ],
)
def test_sizes_have_units_of_a_thousand(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m 00s"),
        (75, "1m 15s"),
        (7300, "2h 01m"),
        (47.9 * 3600, "47h 54m"),
        (60 * 3600, "2.5 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ranges() -> None:
    assert ranges_in_words([(0, 64)]) == "1 range: 0..64"
    assert ranges_in_words([(0, 64), (128, 192)]) == "2 ranges, the first 0..64"


def test_columns_are_aligned() -> None:
    rows = [("name", "steps"), ("a", "1,000"), ("longer", "7")]
    assert columns(rows) == ["name    steps", "a       1,000", "longer      7"]
    assert labelled([("a", "one"), ("bcd", "two")]) == "a    one\nbcd  two"
