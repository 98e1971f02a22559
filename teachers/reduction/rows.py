"""The operations that the reducer's formulas need on rows of logits, at most `tile_rows` of them at a time.

Legend: `T` rows of one tile, `V` vocabulary size, `K` kept ids. Ids are columns of the logits throughout; where these
come in an order to draw in, `Rows.named` has the vocabulary's ids of columns, and `Rows.columns_with` the reverse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teachers.reduction.passes import Tail, make_passes
from teachers.reduction.top_k import first_columns

# The two buffers of a tile (2 MiB each) should stay in cache between torch's passes; on a GPU only memory matters.
_CPU_TILE_LOGITS_PER_THREAD = 1 << 19
_GPU_TILE_LOGITS = 1 << 26


class Rows:
    """Rows with all columns in one tensor. `columns`: V; `far_rows`: the largest number that `far_sums` takes.

    order: int64 [V], the vocabulary's ids in the order of the columns; None where it is ascending. far_rows, width:
    as above, and the columns of the buffers, where they do not follow from V.
    """

    _first_id = 0

    def __init__(
        self,
        rows: int,
        vocabulary_size: int,
        device: torch.device,
        order: Tensor | None = None,
        far_rows: int | None = None,
        width: int | None = None,
    ) -> None:
        self.columns = vocabulary_size
        self._order = order
        self._column_of = None
        if order is not None:
            self._column_of = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        self.far_rows = far_rows or max(1, _tile_logits(device) // vocabulary_size)
        self._passes = make_passes(rows, min(rows, self.far_rows), width or vocabulary_size, device)
        self.tile_rows = self._passes.tile_rows

    def named(self, columns: Tensor) -> Tensor:
        """The vocabulary's ids of columns, of any shape."""
        return columns if self._order is None else self._order[columns]

    def columns_with(self, ids: Tensor) -> Tensor:
        """The columns of the vocabulary's ids, of any shape."""
        return ids if self._column_of is None else self._column_of[ids]

    def columns_of(self, logits: Tensor) -> Tensor:
        """The vocabulary's columns of the teacher's logits, which are the `logits` of the other methods."""
        return logits[:, : self.columns]

    def first(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row maxima [T] (NaN where a row has one); ids and logits [T, K] of the K first columns, in order."""
        return first_columns(logits, k, self._passes.block_maxima)

    def at(self, logits: Tensor, ids: Tensor) -> Tensor:
        """The logits [T, n] of ids [T, n]."""
        return logits.gather(1, ids)

    def tail(self, logits: Tensor, row_max: Tensor, top: Tensor, ids: Tensor) -> Tail:
        return self._passes.tail(logits, row_max, top, ids)

    def row_sums(self, values: Tensor) -> Tensor:
        return self._passes.row_sums(values)

    def far_sums(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Over the columns outside the ids [T, K]: the largest logit m, -inf where there is none, and the sums [T] of
        e^(logit - m) and of e^((logit - m) / 2)."""
        tail = logits.scatter(1, ids, -math.inf)
        tail_max = tail.amax(1)
        return tail_max, *self._sums_below(tail, tail_max)

    def _sums_below(self, tail: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
        z = tail - most.masked_fill(most == -math.inf, 0.0)[:, None]
        return self.row_sums(z.exp()), self.row_sums((0.5 * z).exp())

    def describe(self, logits: Tensor, row: int) -> str:
        """The reason why a row has no softmax."""
        values = logits[row]
        nan, inf = values.isnan().nonzero(), (values == math.inf).nonzero()
        firsts = (int(self.named(at + self._first_id).min()) if len(at) else self.columns for at in (nan, inf))
        counts, first_nan, first_inf = zip(*self._of_every_rank((len(nan), *firsts)), strict=True)
        if sum(counts):
            return f"{sum(counts)} NaN, the first at id {min(first_nan)}"
        return f"+inf at id {min(first_inf)}" if min(first_inf) < self.columns else "-inf everywhere"

    def _of_every_rank(self, found: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [found]


def _tile_logits(device: torch.device) -> int:
    return _CPU_TILE_LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _GPU_TILE_LOGITS
