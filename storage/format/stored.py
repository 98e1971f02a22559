"""StoredTargets: the arrays of an entry at a range of positions as they are stored, and what they mean.

Legend: `T` positions, `D` documents. `storage.format.version_1` and `version_2` know the arrays of either version.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format import version_1, version_2
from storage.format.encoding import ROUNDING_NATS
from storage.format.layout import field_array, teacher_arrays
from storage.format.manifest.entry import TeacherEntry
from storage.format.targets import SparseTargets

_VERSIONS: dict[int, ModuleType] = {1: version_1, 2: version_2}


@dataclass(frozen=True, repr=False)
class StoredTargets:
    """The arrays of the positions `start .. start + T`, by name, each [T, ...], of the `entry` that they belong to."""

    entry: TeacherEntry
    start: int
    arrays: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, entry: TeacherEntry, targets: SparseTargets) -> StoredTargets:
        specs, values = teacher_arrays(entry), _VERSIONS[entry.format_version].encode(entry, targets)
        return cls(
            entry, targets.start, {name: values[name].astype(spec.dtype, copy=False) for name, spec in specs.items()}
        )

    def decoded(self) -> SparseTargets:
        found: SparseTargets = _VERSIONS[self.entry.format_version].decode(self.entry, self.start, self.arrays)
        return found

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __repr__(self) -> str:
        return f"StoredTargets(positions {self.start}..{self.stop}: {', '.join(self.arrays)})"

    @property
    def stop(self) -> int:
        return self.start + len(self)

    def rows(self, start: int, stop: int) -> StoredTargets:
        """The arrays of the absolute positions `start .. stop`, views."""
        if not self.start <= start <= stop <= self.stop:
            raise IndexError(f"positions {start}..{stop} are not inside {self.start}..{self.stop}")
        cut = slice(start - self.start, stop - self.start)
        return StoredTargets(self.entry, start, {name: values[cut] for name, values in self.arrays.items()})

    def without(self, dropped: NDArray[np.bool_]) -> StoredTargets:
        """The same, where the rows that are `dropped` [T] have no targets."""
        none = {
            name: np.where(dropped, value, self.arrays[name]).astype(self.arrays[name].dtype)
            for name, value in no_targets(self.entry).items()
        }
        return StoredTargets(self.entry, self.start, self.arrays | none)

    def broken_rule(
        self, document_starts: NDArray[Any] | None = None, wanted: NDArray[np.bool_] | None = None
    ) -> str | None:
        """The first rule of the format that stored values break, or None; exposes fill values and foreign data.

        `document_starts` [D] gives, for entries with isolated documents, the positions that no token follows; `wanted`
        [T], for entries of some positions, which ones their record says. What is not given is not checked.
        """
        entry = self.entry
        broken: str | None = _VERSIONS[entry.format_version].broken_rule(entry, self.arrays)
        if broken is not None:
            return broken
        there = self.arrays["kept"] > 0 if entry.targets.k else self._said_to_be_there(wanted)
        others = "the rows with targets are not those of the record's positions and sources"
        if entry.targets.k and wanted is not None and not np.array_equal(there, wanted):
            return others
        if not entry.targets.has("label"):
            return None
        label = version_2.decoded_value(entry, "label", self.arrays[field_array(entry, "label")])
        if not entry.targets.k and wanted is not None and (~np.isnan(label) & ~wanted).any():
            return others
        return self._broken_label(label, there, document_starts)

    def _said_to_be_there(self, wanted: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """bool [T]: where, without ids, a label must be, by the record; nowhere where `wanted` does not say it."""
        if wanted is not None:
            return wanted
        return np.full(len(self), self.entry.targets.in_every_row)

    def _broken_label(
        self, label: NDArray[Any], there: NDArray[np.bool_], document_starts: NDArray[Any] | None
    ) -> str | None:
        entry, name = self.entry, field_array(self.entry, "label")
        unlabelled = np.isnan(label)
        at_end = np.arange(self.start, self.stop) == entry.positions - 1
        if entry.windowing.isolate_documents and document_starts is not None:
            inside = slice(*np.searchsorted(document_starts, [self.start + 1, self.stop + 1]))
            at_end[document_starts[inside].astype(np.int64) - 1 - self.start] = True
        if np.isinf(label).any() or not unlabelled[at_end].all():
            return f"{name} is infinite, or there where no token follows"
        if (label > ROUNDING_NATS).any():
            return "a log-prob is positive: no probability exceeds 1"
        known = not entry.windowing.isolate_documents or document_starts is not None
        if known and (unlabelled & ~at_end & there).any():
            return f"{name} is missing where a token follows"
        return None


def no_targets(entry: TeacherEntry) -> dict[str, int | float]:
    """The stored numbers by which a row says that it has no targets, by array."""
    if entry.targets.k:
        return {"kept": 0, "certain": 0}
    return {field_array(entry, "label"): version_2.NONE if entry.encoding.kind == "codes" else np.nan}


def joined(parts: list[StoredTargets]) -> StoredTargets:
    """Adjacent ranges of one entry, in order, as one range."""
    assert all(a.stop == b.start for a, b in pairwise(parts)), "ranges must touch"
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return StoredTargets(parts[0].entry, parts[0].start, arrays)
