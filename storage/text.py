"""Numbers and tables as people read them on a terminal: counts with their nouns, sizes, durations, columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def counted(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`, `3 batches`, `4 entries`."""
    return f"{number:,} {noun if number == 1 else _plural(noun)}"


def _plural(noun: str) -> str:
    if noun.endswith(("s", "ch")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith(("ry", "ly")) else f"{noun}s"


def size(count: float) -> str:
    """`512 bytes`, `64.0 kB`, `3.2 GB`: units of powers of 1,000."""
    if round(count) < 1000:
        return counted(round(count), "byte")
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def duration(seconds: float) -> str:
    """`75` → `1m 15s`, `7300` → `2h 01m`; from two days on `2.5 days`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{seconds / 86400:,.1f} days"


def printable(text: str) -> str:
    """Text that somebody else wrote, in one line, without the characters that a terminal obeys."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def quoted(names: Collection[str], most: int = 8) -> str:
    """`'code', 'math'`: the first of some names that anybody may have given, ` …` behind them where there are more."""
    return ", ".join(map(repr, [*names][:most])) + " …" * (len(names) > most)


def ranges_in_words(ranges: Sequence[Sequence[int]]) -> str:
    """`1 range: 0..64`, `3 ranges, the first 0..64`; a range excludes its end."""
    start, stop = ranges[0]
    return f"{counted(len(ranges), 'range')}{':' if len(ranges) == 1 else ', the first'} {start}..{stop}"


def columns(rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A line for each row, in aligned columns: the first `left` to the left, the others to the right."""
    aligned = []
    for number, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        aligned.append([cell.ljust(width) if number < left else cell.rjust(width) for cell in cells])
    return ["  ".join(row).rstrip() for row in zip(*aligned, strict=True)]


def labelled(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and their values, a line each, the values aligned."""
    return "\n".join(columns(rows, left=2))
