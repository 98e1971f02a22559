"""One teacher's targets for a batch of positions, as tensors: `StoredBatch`, as they are stored, and `TargetBatch`.

Legend: `B` windows of a batch, `T` positions of a window, `P` = B·T positions, `K` stored ids of a position (the
columns), `V` vocabulary of the teacher. Rows are [B, T] in a batch, and [P] once `flat`.

A data loader hands out what is stored: decoding it is a scan over K numbers on the training device, and costs as much
as the decompression on the loader's side. `storage.format.version_1` and `version_2` have the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from storage.format.layout import VALUES, field_array
from storage.format.manifest.entry import TeacherEntry
from storage.format.stored import StoredTargets, no_targets
from storage.format.version_2 import NONE, NOTHING_INSIDE, NOTHING_OUTSIDE


@dataclass(frozen=True, eq=False, repr=False)
class TargetBatch:
    """The targets of some rows, [B, T] or [P], all on one device; log-probs and entropies in nats.

    token_ids       int32 or int64 [rows, K]   the certain ids, most probable first, then the sampled ones; columns from
                    `kept` on hold anything, an id beyond the student's columns too
    kept            int32 [rows]   valid leading columns; 0 in a row without targets
    certain         int32 [rows]   so many leading ids are certain to be in the row, the others up to `kept` are sampled
    logprobs        float32 [rows, K]   of the ids, normalised over all V; NaN for sampled ids whose log-probs are not
                    stored, anything from `kept` on
    log_tail        float32 [rows]   log of the mass outside the certain ids; -inf where none is
    log_tail_half   float32 [rows]   log of the sum of p**0.5 outside the certain ids (temperature 2)
    entropy         float32 [rows]   of the full distribution
    label_logprob   float32 [rows]   of the token that follows in the text, NaN where none does
    sequence        int32 [rows]   rows with one number are one sequence, a document in a window

    Floats may be float64. The last five hold anything in a row without targets, and are None where the entry does not
    have them, `sequence` but for top-k entries. An entry without ids (K = 0) has the label alone. It is no mapping, so
    that what casts or moves the floats of a batch by their type (FSDP, DeepSpeed) leaves it alone; data loaders and
    accelerate call `to` and `pin_memory`.
    """

    token_ids: Tensor
    kept: Tensor
    certain: Tensor
    logprobs: Tensor
    log_tail: Tensor | None = None
    log_tail_half: Tensor | None = None
    entropy: Tensor | None = None
    label_logprob: Tensor | None = None
    sequence: Tensor | None = None

    @property
    def there(self) -> Tensor:
        """bool [rows]: those with targets."""
        if self.token_ids.shape[-1]:
            return self.kept > 0
        assert self.label_logprob is not None, "without ids there are labels"
        return ~self.label_logprob.isnan()

    def decoded(self) -> TargetBatch:
        """The batch itself; of a `StoredBatch`, what it means."""
        return self

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> TargetBatch:
        """The same targets on a device."""
        return self._each(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TargetBatch:
        """The same targets in page-locked memory, as a DataLoader asks for."""
        return self._each(Tensor.pin_memory)

    def flat(self) -> TargetBatch:
        """Rows [B, T] as [P]; rows [P] as they are."""
        return self._each(lambda values: values.flatten(0, self.kept.ndim - 1))

    def __getitem__(self, rows: slice | Tensor) -> TargetBatch:
        """Some rows, along their first axis."""
        return self._each(lambda values: values[rows])

    def __len__(self) -> int:
        return len(self.kept)

    def __repr__(self) -> str:
        return f"TargetBatch({list(self.kept.shape)} rows of {self.token_ids.shape[-1]} ids, {self.kept.device})"

    def _each(self, change: Callable[[Tensor], Tensor]) -> TargetBatch:
        present = {each.name: getattr(self, each.name) for each in fields(self)}
        return TargetBatch(**{name: change(values) for name, values in present.items() if values is not None})


@dataclass(frozen=True, eq=False, repr=False)
class StoredBatch:
    """The stored arrays of some rows, by name, each [B, T, ...] or [P, ...], of the `entry` that they belong to.

    `sequence` is that of `TargetBatch`, of these rows.
    Rows that no position of the entry belongs to, as padding, say that they have no targets, and are 0 in other arrays.
    As `TargetBatch`, it is no mapping, and moves and is cut alike.
    """

    entry: TeacherEntry
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    sequence: Tensor | None = None

    @classmethod
    def of(cls, windows: Sequence[Sequence[StoredTargets]], rows: int, firsts: Sequence[Sequence[int]]) -> StoredBatch:
        """What is stored of the documents of some windows as [B, rows], of document d from row `firsts[b][d]` on; the
        other rows are empty."""
        found: dict[str, Tensor] = {}
        example = windows[0][0]
        for name, values in example.arrays.items():
            empty = no_targets(example.entry).get(name, 0)
            batch = np.full((len(windows), rows, *values.shape[1:]), empty, values.dtype)
            for window, documents, starts in zip(batch, windows, firsts, strict=True):
                for stored, first in zip(documents, starts, strict=True):
                    window[first : first + len(stored)] = stored.arrays[name]
            found[name] = torch.from_numpy(batch)
        if example.entry.targets.method != "top-k":
            return cls(example.entry, found)
        sequence, number = np.zeros((len(windows), rows), np.int32), 0
        for numbers, documents, starts in zip(sequence, windows, firsts, strict=True):
            for stored, first in zip(documents, starts, strict=True):
                numbers[first : first + len(stored)] = number
                number += 1
        return cls(example.entry, found, torch.from_numpy(sequence))

    def decoded(self) -> TargetBatch:
        """What the arrays mean, on their device."""
        if not self.entry.targets.k:
            none = torch.zeros_like(self._per_row, dtype=torch.int32)
            no_ids = torch.empty((*none.shape, 0), dtype=torch.int32, device=none.device)
            return TargetBatch(no_ids, none, none, no_ids.to(torch.float32), label_logprob=self._value("label"))
        kept, certain = (self.arrays[name].to(torch.int32) for name in ("kept", "certain"))
        decoded = (self._decoded_1 if self.entry.format_version == 1 else self._decoded_2)(kept, certain)
        return replace(decoded, sequence=self.sequence)

    def _decoded_1(self, kept: Tensor, certain: Tensor) -> TargetBatch:
        if self.entry.encoding.step_nats is None:
            logprobs = self.arrays["logprobs"]
        else:
            # Whole numbers below 2**24 are exact in float32; valid rows sum to at most 2**16 (`logprob_floor`).
            steps = self.arrays["logprob_codes"].to(torch.float32).cumsum(-1)
            logprobs = self.arrays["top_logprob"][..., None] - self.entry.encoding.step_nats * steps
        values = {name: self.arrays.get(name) for name in ("log_tail", "log_tail_half", "entropy", "label_logprob")}
        return TargetBatch(_ids(self.arrays["token_ids"]), kept, certain, logprobs, **values)

    def _decoded_2(self, kept: Tensor, certain: Tensor) -> TargetBatch:
        raw = _ids(self.arrays["ids"])
        is_certain = leading_columns(certain, raw.shape[-1])
        ids = torch.where(is_certain, raw, raw.masked_fill(is_certain, 0).cumsum(-1, dtype=raw.dtype))
        values = {name: self._value(name) for name in VALUES}
        logprobs = self._logprobs_2(kept, certain, is_certain, values)
        return TargetBatch(ids, kept, certain, logprobs, **{VALUES[name]: value for name, value in values.items()})

    def _logprobs_2(
        self, kept: Tensor, certain: Tensor, is_certain: Tensor, values: Mapping[str, Tensor | None]
    ) -> Tensor:
        entry, heads = self.entry, self._array("certain")
        step = entry.encoding.step_nats
        if step is not None:
            below = heads.to(torch.float32).cumsum(-1).mul(-step)
            total = torch.logsumexp(below.masked_fill(~is_certain, -torch.inf), -1)
            heads = below + (self._log_head() - total)[..., None]
        if not entry.targets.has("sampled-logprobs"):
            return heads.masked_fill(leading_columns(kept, heads.shape[-1]) & ~is_certain, torch.nan)
        tails = self._array("sampled-logprobs")
        if step is not None:
            temperature = entry.targets.temperature
            outside = values["tail" if temperature == 1.0 else "half-tail"]
            assert outside is not None
            reference = temperature * (outside - (kept - certain).clamp(min=1).log()) + step
            tails = reference[..., None] - (entry.encoding.sampled_step_nats or 0.0) * tails.to(torch.float32)
        return torch.where(is_certain, heads, tails)

    @property
    def _per_row(self) -> Tensor:
        """One of the arrays of a number for each row."""
        return self.arrays["kept"] if self.entry.targets.k else self._array("label")

    def _array(self, name: str) -> Tensor:
        return self.arrays[field_array(self.entry, name)]

    def _value(self, name: str) -> Tensor | None:
        """A number per position from its codes."""
        if not self.entry.targets.has(name):
            return None
        stored, encoding = self._array(name), self.entry.encoding
        if encoding.step_nats is None:
            return stored
        step = encoding.step_nats if name == "tail" else encoding.value_step_nats
        values = stored.to(torch.float32) * step  # type: ignore[operator]
        if name == "tail":
            values = F.logsigmoid(values).masked_fill(stored == NOTHING_INSIDE, 0.0)
        values = values.masked_fill(stored == NOTHING_OUTSIDE, -torch.inf)
        return values.masked_fill(stored == NONE, torch.nan)

    def _log_head(self) -> Tensor:
        """Log of the mass of the certain ids; 0 where nothing is outside, or the tail is not known."""
        if not self.entry.targets.has("tail"):
            return torch.zeros_like(self.arrays["kept"], dtype=torch.float32)
        stored = self._array("tail")
        odds = stored.to(torch.float32) * (self.entry.encoding.step_nats or 0.0)
        return F.logsigmoid(-odds).masked_fill((stored == NOTHING_OUTSIDE) | (stored == NONE), 0.0)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> StoredBatch:
        return self._each(lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> StoredBatch:
        return self._each(Tensor.pin_memory)

    def flat(self) -> StoredBatch:
        axes = self._per_row.ndim
        return self._each(lambda values: values.flatten(0, axes - 1))

    def __getitem__(self, rows: slice | Tensor) -> StoredBatch:
        return self._each(lambda values: values[rows])

    def __len__(self) -> int:
        return len(self._per_row)

    def __repr__(self) -> str:
        rows = self._per_row
        return f"StoredBatch({list(rows.shape)} rows of {', '.join(self.arrays)}, {rows.device})"

    def _each(self, change: Callable[[Tensor], Tensor]) -> StoredBatch:
        arrays = {name: change(values) for name, values in self.arrays.items()}
        return replace(self, arrays=arrays, sequence=None if self.sequence is None else change(self.sequence))


def leading_columns(counts: Tensor, columns: int) -> Tensor:
    """bool [..., columns]: column i < counts [...]."""
    return torch.arange(columns, device=counts.device) < counts[..., None]


def _ids(stored: Tensor) -> Tensor:
    """Ids in a type that torch sums and indexes with."""
    return stored.to(torch.int64 if stored.dtype == torch.uint32 else torch.int32)
