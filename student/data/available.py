"""What is committed of entries that are still being written, and is trained on."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import TYPE_CHECKING

from storage.errors import InputError

if TYPE_CHECKING:
    from storage import LogitCache

Available = dict[str, tuple[tuple[int, int], ...]]
"""By teacher, the ranges of positions that are read of an entry that is being written, ascending and apart."""


def available_now(cache: LogitCache, names: Collection[str]) -> Available:
    """What is committed of some entries. It grows while they are written: whoever continues later has to keep it."""
    return {name: tuple(cache.teacher(name).committed()) for name in names}


def check_available(available: Available, teachers: Collection[str]) -> None:
    """Raise InputError unless it has ranges of each teacher and no other, ascending and apart."""
    if available.keys() != set(teachers):
        raise InputError(f"available has ranges of {_listed(available)}; the teachers are {_listed(teachers)}")
    for name, ranges in available.items():
        edges = [edge for start_and_stop in ranges for edge in start_and_stop]
        if any(one >= other for one, other in pairwise(edges)):
            raise InputError(f"available: the ranges of {name} do not ascend, or do not lie apart")


def _listed(names: Collection[str]) -> str:
    return ", ".join(names) or "no teacher"
