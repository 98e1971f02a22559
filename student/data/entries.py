"""The teacher entries that windows are read with: complete, of this text, and agreed on what windows are.

How a window is made of them belongs to `student.data.windows`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from storage import LogitCache
from storage.cache.positions import source_numbers
from storage.errors import IdentityMismatch, IncompleteCache, InputError
from storage.format.identity import other_tokens
from storage.format.manifest.entry import TeacherEntry
from storage.text import quoted
from student.models.tokenizer import begin_id


def usable_entry(cache: LogitCache, name: str, ranges: Sequence[tuple[int, int]] | None = None) -> TeacherEntry:
    """An entry of this cache's own stream and tokenizer, complete, or at least in some ranges of positions.

    Raises IdentityMismatch or IncompleteCache.
    """
    targets = cache.teacher(name)
    entry = targets.entry
    foreign = other_tokens(entry, cache.record)
    if foreign:
        differing = [f"{key}: the entry has {a}, the cache {b}" for key, (a, b) in foreign.items()]
        raise IdentityMismatch(
            f"{cache.url}: teacher {name}", differing, "Its targets belong to other tokens: cache this teacher again"
        )
    missing, remedy = targets.missing(), "run the same cache-logits command again to complete it"
    if ranges is None:
        remedy += ", or train on what is committed of it with --available"
    else:
        missing = _touched(missing, ranges)
    if missing:
        shown = ", ".join(f"{start}..{stop}" for start, stop in missing[:4])
        raise IncompleteCache(
            f"{cache.url}: teacher {name} lacks the positions {shown}"
            f"{f' and {len(missing) - 4} more ranges' if len(missing) > 4 else ''} of {entry.positions}: {remedy}"
        )
    return entry


def _touched(missing: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of some ranges that others overlap, all of them ascending and apart."""
    starts, stops = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
    first = np.searchsorted(stops, [start for start, _ in missing], side="right")
    return [
        (start, stop)
        for (start, stop), index in zip(missing, first, strict=True)
        if index < len(starts) and starts[index] < stop
    ]


def usable_sources(cache: LogitCache, name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Sources of this cache of which an entry has targets; raises InputError for another."""
    source_numbers(cache.record, given, cache.url)
    there = cache.teacher(name).entry.targets.sources
    missing = [] if there is None else [source for source in given if source not in there]
    if missing:
        raise InputError(
            f"{cache.url}: teacher {name} has targets of {quoted(there or ())} alone, and none of {missing[0]!r}: "
            f"leave that source out, or cache the teacher for it under another name"
        )
    return tuple(given)


def isolation(entries: dict[str, TeacherEntry], wanted: bool | None) -> bool:
    """Whether windows stay inside documents: as for the teachers, since the student must see no more context."""
    words = {True: "isolated documents", False: "the stream across documents"}
    found = {name: entry.windowing.isolate_documents for name, entry in entries.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {words[isolated]}" for name, isolated in found.items())
        raise InputError(f"these teachers cannot be mixed, as they saw different contexts: {listed}")
    for name, isolated in found.items():
        if wanted is not None and wanted != isolated:
            raise InputError(
                f"teacher {name} saw {words[isolated]}, the student was to see {words[wanted]}: leave the choice out "
                f"and the student follows its teachers"
            )
        return isolated
    return bool(wanted)


def beginning(entries: dict[str, TeacherEntry], wanted: bool | None, cache_url: str) -> int | None:
    """The id that windows begin with: as for the teachers, since the student must see what they saw."""
    found = {name: entry.windowing.begin_id for name, entry in entries.items()}
    words = {name: "none" if begin is None else f"id {begin}" for name, begin in found.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} {what}" for name, what in words.items())
        raise InputError(
            f"these teachers cannot be mixed, as their windows begin with different ids, or none: {listed}; cache them "
            f"alike (--bos-each-window)"
        )
    for name, begin in found.items():
        if wanted is not None and wanted != (begin is not None):
            raise InputError(
                f"the windows of teacher {name} begin with {words[name]} of their own, and the student's were to begin "
                f"with {'BOS' if wanted else 'none'}: leave the choice out and the student follows its teachers"
            )
        return begin
    return begin_id(cache_url) if wanted else None
