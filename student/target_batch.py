"""TargetBatch: one teacher's stored targets for a batch of positions, as tensors.

Legend: `B` windows of a batch, `T` positions of a window, `P` = B·T positions, `K` stored ids of a position (the
columns), `V` vocabulary of the teacher. Rows are [B, T] in a batch, and [P] once `flat`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from storage.format.targets import SparseTargets

_COUNTS = ("kept", "certain")
# Where SparseTargets has another name for a field.
_STORED_NAMES = {"logprobs": "exact_logprobs"}


@dataclass(frozen=True, eq=False, repr=False)
class TargetBatch:
    """The targets of some rows, [B, T] or [P], all on one device; log-probs and entropies in nats.

    token_ids       int32 (int64 for a cache of 32-bit ids) [rows, K]  most probable first; columns from `kept` on hold
                    anything, an id beyond the student's columns too
    kept            int32 [rows]   valid leading columns; 0 in a row without a target: padding, which no label trains on
    certain         int32 [rows]   so many leading ids are certain to be in the row, the others up to `kept` are sampled
    top_logprob     float32 [rows]   log-prob of column 0
    log_tail        float32 [rows]   log of the mass outside the certain ids; -inf where none is
    log_tail_half   float32 [rows]   log of the sum of p**0.5 outside the certain ids (temperature 2)
    entropy         float32 [rows]   of the full distribution
    codes           uint16 [rows, K]   differences of log-probs in steps of the entry's `step_nats`; None: `logprobs`
    logprobs        float32 [rows, K]   of the ids, normalised over all V; None: `codes`

    Codes are as stored, and decoded on the training device (`student.loss.teacher_targets`): there it is a scan over K
    numbers, on the loader's side it costs as much as the decompression. Float fields may be float64. A field that is
    None is absent, and stays so in what is made of the batch.

    It is no mapping, so that what casts or moves the floats of a batch by their type (FSDP, DeepSpeed) leaves it alone;
    data loaders and accelerate call `to` and `pin_memory`.
    """

    token_ids: Tensor
    kept: Tensor
    certain: Tensor
    top_logprob: Tensor
    log_tail: Tensor
    log_tail_half: Tensor
    entropy: Tensor
    codes: Tensor | None = None
    logprobs: Tensor | None = None

    @classmethod
    def of(cls, windows: Sequence[SparseTargets], rows: int, firsts: Sequence[int]) -> TargetBatch:
        """The targets of some windows as [B, rows], from row `firsts[b]` on; the other rows have none (kept = 0)."""
        found: dict[str, Tensor] = {}
        for field in fields(cls):
            name = _STORED_NAMES.get(field.name, field.name)
            values = [getattr(window, name) for window in windows]
            if values[0] is None:
                continue
            batch = np.zeros((len(values), rows, *values[0].shape[1:]), _batch_dtype(field.name, values[0].dtype))
            for row, first, stored in zip(batch, firsts, values, strict=True):
                row[first : first + len(stored)] = stored
            found[field.name] = torch.from_numpy(batch)
        return cls(**found)

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
        k, form = self.token_ids.shape[-1], "log-probs" if self.codes is None else "codes"
        return f"TargetBatch({list(self.kept.shape)} rows of {k} ids, {form}, {self.kept.device})"

    def _each(self, change: Callable[[Tensor], Tensor]) -> TargetBatch:
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        return TargetBatch(**{name: change(values) for name, values in present.items() if values is not None})


def _batch_dtype(name: str, stored: np.dtype) -> np.dtype:
    if name == "token_ids" and stored == np.uint32:
        # Unused columns hold the type's maximum, and torch cannot index with unsigned types.
        return np.dtype(np.int64)
    return np.dtype(np.int32) if name in ("token_ids", *_COUNTS) else stored
