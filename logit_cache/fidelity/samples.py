"""Random windows of an entry, with their tokens and stored targets: what an audit looks at, with a teacher or without.

Legend: `R` positions of a window that it scores, `C` context tokens.

`n` positions are sampled, one from each n-th part of the entry, and the windows that score them are read. A corruption
that touches a fraction f of the positions is missed with a probability of at most ``(1 - f)**n``; one in a single
stretch longer than two n-th parts is always hit.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from logit_cache.caching.windows import Window, windows
from storage.cache.reader import LogitCache, TeacherTargets
from storage.errors import CorruptCache, IncompleteCache, InputError
from storage.format.identity import other_tokens
from storage.format.layout import field_array
from storage.format.manifest.entry import TeacherEntry
from storage.format.targets import SparseTargets
from storage.format.version_2 import decoded_value


@dataclass(kw_only=True)
class Examination:
    """An entry of which windows were sampled, and the defects that were met on the way.

    drawn     positions sampled, n in the module's formula; `positions` with targets in `windows` windows were read
    problems  defects that make the entry wrong
    """

    cache: str
    name: str
    seed: int
    drawn: int = 0
    windows: int = 0
    positions: int = 0
    problems: list[str] = field(default_factory=list)

    def escape(self, fraction: float) -> float:
        """The largest probability with which a corruption of a fraction of the positions is missed."""
        return float((1.0 - fraction) ** self.drawn)


def fresh_seed(seed: int | None) -> int:
    """The seed, or one of which nobody knows the windows beforehand."""
    return secrets.randbits(32) if seed is None else seed


def entry_of(cache: LogitCache, name: str | None) -> TeacherTargets:
    """The entry of a name, or the only one. Raises InputError where there are several, CacheNotFound."""
    names = cache.teachers
    if name is None and len(names) != 1:
        raise InputError(f"{cache.url}: name the entry to audit with --name; there is: {', '.join(names) or 'none'}")
    return cache.teacher(name or names[0])


def read_samples(cache: LogitCache, targets: TeacherTargets, count: int, found: Examination) -> Iterator[Sample]:
    """The windows of `count` sampled positions, one in memory at a time; damaged ones become problems in `found`.

    Raises IncompleteCache (nothing cached yet), InputError (no targets at all), CacheNotFound (a cache that was shared
    without its tokens), and CorruptCache where no window can be read.
    """
    entry = targets.entry
    foreign = other_tokens(entry, cache.record)
    found.problems += [f"{name}: the entry has {a}, its cache {b}" for name, (a, b) in foreign.items()]
    if not targets.receipts.committed().any():
        raise IncompleteCache(f"{cache.url}: {targets.name} has no position yet: run the command that makes it first")
    _ = cache.tokens  # raises now, not after a teacher was loaded, if the cache was shared without them
    starts = cache.document_starts if entry.windowing.isolate_documents else None
    rows = TargetRows(targets)
    counts = rows.counts()
    if not counts.any():
        raise InputError(f"{cache.url}: no position of {targets.name} has targets: there is nothing to audit")

    def problem(error: CorruptCache) -> None:
        if str(error) not in found.problems:
            found.problems.append(str(error))

    def row(shard: int, number: int) -> int:
        try:
            return rows.row(shard, number)
        except CorruptCache as error:
            problem(error)
            return number  # of the windows of a damaged shard any will do

    found.drawn = count
    sampled = sample_windows(entry, counts, starts, count, np.random.default_rng(found.seed), row)
    for window in sampled:
        try:
            sample = take_sample(cache, targets.name, window)
        except CorruptCache as error:
            problem(error)
            continue
        found.windows += 1
        found.positions += int(np.count_nonzero(sample.stored.there))
        yield sample
    if not found.windows:
        raise CorruptCache(f"{found.problems[-1]}; none of {len(sampled)} windows can be read: run logit-cache verify")


@dataclass(frozen=True)
class Sample:
    """A window with its tokens int64 [<= C], the token after each scored position int64 [R] (-1: none), and targets."""

    window: Window
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    stored: SparseTargets


class TargetRows:
    """Which rows of the committed shards have targets."""

    def __init__(self, targets: TeacherTargets) -> None:
        self._targets = targets
        self._all = targets.entry.targets.in_every_row
        self._held: tuple[int, NDArray[np.int64]] | None = None  # windows are sampled shard after shard

    def counts(self) -> NDArray[np.int64]:
        """Of each shard [shards], the number of its rows with targets; 0 where it is not committed."""
        receipts = self._targets.receipts
        counts = shard_rows(self._targets.entry, receipts.committed())
        if not self._all:
            for shard in np.flatnonzero(counts).tolist():
                receipt = receipts.read(shard)
                if receipt is not None and receipt.statistics is not None:
                    counts[shard] = receipt.statistics.positions
        return counts

    def row(self, shard: int, number: int) -> int:
        """The position of the n-th row with targets of a shard, from the shard's start on. Raises CorruptCache."""
        if self._all:
            return number
        if self._held is None or self._held[0] != shard:
            self._held = shard, self._rows(shard)
        rows = self._held[1]
        if number >= len(rows):
            raise CorruptCache(
                f"{self._targets.name}: shard {shard} has {len(rows)} rows with targets, its receipt counts more"
            )
        return int(rows[number])

    def _rows(self, shard: int) -> NDArray[np.int64]:
        entry = self._targets.entry
        start, stop = entry.layout.shard_range(shard, entry.positions)
        chunks = range(start // entry.layout.chunk, -(-stop // entry.layout.chunk))
        array = self._targets.arrays["kept" if entry.targets.k else field_array(entry, "label")]
        stored = np.concatenate([array.read_chunk(chunk) for chunk in chunks])
        return np.flatnonzero(stored if entry.targets.k else ~np.isnan(decoded_value(entry, "label", stored)))


def shard_rows(entry: TeacherEntry, committed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of rows of each shard [shards]; 0 where it is not `committed` [shards]."""
    starts = np.arange(len(committed), dtype=np.int64) * entry.layout.shard
    lengths: NDArray[np.int64] = np.where(committed, np.minimum(entry.layout.shard, entry.positions - starts), 0)
    return lengths


def sample_windows(
    entry: TeacherEntry,
    counts: NDArray[np.int64],
    document_starts: NDArray[np.uint64] | None,
    count: int,
    rng: np.random.Generator,
    row: Callable[[int, int], int] = lambda shard, number: number,
) -> list[Window]:
    """The windows that score `count` random positions, of those that have targets, ascending, each window once.

    One position is sampled from each of `count` equal parts, so a stretch of two parts' length is always hit. A window
    has all positions that it scores within one shard. Fewer are returned where two positions share a window.

    counts, row: as `TargetRows` has them.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1])
    count = min(count, total)
    found: dict[int, Window] = {}
    for part in range(count):
        sampled = int(rng.integers(part * total // count, (part + 1) * total // count))
        shard = int(np.searchsorted(ends, sampled, side="right"))
        start, stop = entry.layout.shard_range(shard, entry.positions)
        position = start + row(shard, sampled - int(ends[shard] - counts[shard]))
        window = _window_of(position, start, stop, entry, document_starts)
        found[window.first] = window
    return [found[first] for first in sorted(found)]


def _window_of(
    position: int, start: int, stop: int, entry: TeacherEntry, document_starts: NDArray[np.uint64] | None
) -> Window:
    """The window that scores a position, with all positions that it scores of the shard `start .. stop`."""
    plan = (entry.positions, entry.windowing, document_starts)
    read = next(windows(position, position + 1, *plan))
    shares = windows(max(read.start, start), min(read.stop, stop), *plan)
    return next(share for share in shares if share.first <= position < share.last)


def take_sample(cache: LogitCache, name: str, window: Window) -> Sample:
    """The tokens and targets of a window.

    Raises CorruptCache for damage and for tokens outside the entry's vocabulary, IncompleteCache for a missing shard.
    """
    high = min(max(window.stop, window.last + 1), cache.record.corpus.positions)
    tokens = cache.tokens.read(window.start, high).astype(np.int64)
    size = cache.teacher(name).entry.vocabulary_size
    if tokens.max() >= size:
        raise CorruptCache(
            f"{cache.url}: the positions {window.start}..{high} have id {tokens.max()}, which teacher {name} with its "
            f"vocabulary of {size} ids cannot have scored"
        )
    following = np.arange(window.first, window.last) + 1
    labels = np.full(len(following), -1)
    inside = following < window.end
    labels[inside] = tokens[following[inside] - window.start]
    stored = cache.teacher(name).read(window.first, window.last)
    return Sample(window, tokens[: window.stop - window.start], labels, stored)
