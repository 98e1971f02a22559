"""The reducer over rows whose columns are sharded over ranks: each rank reads its own, and the results are merged.

Legend: `W` ranks, `T` rows of one tile, `V` vocabulary size, `K` kept ids, `n` columns of this rank below V.

The formulas are those of `teachers.reduction.reduce` and `teachers.reduction.varopt`; this module has their operations
over all V columns. Per row, each rank sends the others::

    first     its min(K, n) first columns, as keys that order (logit, id), and its maximum     8 (K + 1) bytes
    at        the logits of the requested ids that it has, -inf for the others                 4 bytes an id
    tail      its three sums                                                                   12 bytes
    masses    for VarOpt: its mass, its length, the sampled ids that it has                    12 + 8 K bytes
              for its pivotal method also the ids on the intervals' ends, and their spans      24 K bytes

so that with K = 64 a VarOpt row takes about 1.3 kB of each rank, whatever V is, and its logits 4 V bytes.

The result is the same on every rank, bit for bit: it is computed from the gathered values, in rank order. From the
unsharded reducer on the same logits it differs by the order of additions alone. Ids and their logits are compared and
never computed, so the K first ids are equal. Lengths of VarOpt are whole numbers, and under one unit equal ids are
sampled on any number of ranks; but float sums choose the unit and, between equals, the number of certain ids. Another
last bit of the unit moves the borders of ids by about one part in 2**30 of the sampling interval each, so another id is
sampled where a point falls that near to one: in 1 of 89,200 rows of a trial with V from 1,000 to 131,072 and K = 64.

A rank without a column of the vocabulary takes part with a masked one, which is never chosen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teachers.ranks import ColumnShard, Ranks, summed
from teachers.reduction.passes import Tail, has_kernels
from teachers.reduction.rows import Rows
from teachers.reduction.top_k import best_of_keys, first_columns, ordered_keys
from teachers.reduction.varopt import BlockMasses, Masses, TensorMasses, with_top_lengths

# Of the widest rank. Every rank must tile its rows alike, so this depends on nothing that could differ between two
# machines, such as their number of threads; and the fewer tiles there are, the fewer messages are sent.
_CPU_TILE_LOGITS = 1 << 21
_GPU_TILE_LOGITS = 1 << 26
_NO_KEY = -(1 << 63)  # sorts after the key of any column


class ShardedRows(Rows):
    """`Rows` of all ranks, which make every call together."""

    def __init__(
        self, rows: int, vocabulary_size: int, device: torch.device, order: Tensor | None, shard: ColumnShard
    ) -> None:
        self._ranks = shard.ranks
        self._first_id = min(shard.own.start, vocabulary_size)
        self._own = max(1, min(shard.own.stop, vocabulary_size) - self._first_id)
        self._is_empty = shard.own.start >= vocabulary_size or shard.own.start == shard.own.stop
        self._in_tensors = not has_kernels(device)
        most = _CPU_TILE_LOGITS if device.type == "cpu" else _GPU_TILE_LOGITS
        # One column more than there are, for the ids of other ranks.
        super().__init__(rows, vocabulary_size, device, order, max(1, most // max(1, shard.widest)), self._own + 1)

    def columns_of(self, logits: Tensor) -> Tensor:
        if self._is_empty:
            return logits.new_full((len(logits), 1), -math.inf)
        return logits[:, : self._own]

    def first(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        row_max, ids, values = first_columns(logits, min(k, self._own), self._passes.block_maxima)
        keys = ordered_keys(values, ids + self._first_id)
        keys = torch.nn.functional.pad(keys, (0, k - keys.shape[1]), value=_NO_KEY)
        message = torch.cat([keys, row_max.view(torch.int32).to(torch.int64)[:, None]], dim=1)
        gathered = self._ranks.gather(message)  # [W, T, K + 1]
        maxima = gathered[:, :, k].to(torch.int32).view(torch.float32)
        return maxima.amax(0), *best_of_keys(gathered[:, :, :k].transpose(0, 1).flatten(1), k)

    def at(self, logits: Tensor, ids: Tensor) -> Tensor:
        local = ids - self._first_id
        here = (local >= 0) & (local < self._own)
        found = logits.gather(1, local.clamp(0, self._own - 1)).masked_fill(~here, -math.inf)
        return self._ranks.maximum(found)

    def tail(self, logits: Tensor, row_max: Tensor, top: Tensor, ids: Tensor) -> Tail:
        ids = ids - self._first_id
        # Kernels test whether a column comes after the last of `top`, and need no list of those that do not.
        own = self._passes.tail(logits, row_max, top, _or_beyond(ids, self._own) if self._in_tensors else ids)
        return _ShardedTail(own, self._ranks, self.columns, self._first_id, self._own)

    def far_sums(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ids = _or_beyond(ids - self._first_id, self._own)
        tail = torch.nn.functional.pad(logits, (0, 1), value=-math.inf).scatter(1, ids, -math.inf)
        tail_max = self._ranks.gather(tail.amax(1)).amax(0)
        mass, half = summed(self._ranks.gather(torch.stack(self._sums_below(tail, tail_max))))
        return tail_max, mass, half

    def _of_every_rank(self, found: tuple[int, ...]) -> list[tuple[int, ...]]:
        return self._ranks.objects(found)


class _ShardedTail:
    """`teachers.reduction.passes.Tail` of all ranks."""

    def __init__(self, own: Tail, ranks: Ranks, columns: int, first_id: int, own_columns: int) -> None:
        self.mass, self.half, self.weighted = summed(ranks.gather(torch.stack([own.mass, own.half, own.weighted])))
        self._own, self._ranks = own, ranks
        self._extent = columns, first_id, own_columns

    def masses(self, beta: float) -> Masses:
        own = self._own.masses(beta)
        assert isinstance(own, BlockMasses)
        return ShardedMasses(_LocalMasses(own) if isinstance(own, TensorMasses) else own, self._ranks, *self._extent)


class ShardedMasses:
    """`teachers.reduction.varopt.Masses` of all ranks; `own` are those of this rank's columns, from `first_id` on."""

    def __init__(self, own: BlockMasses, ranks: Ranks, columns: int, first_id: int, own_columns: int) -> None:
        self.columns = columns
        self.total = summed(ranks.gather(own.total))
        self._own, self._ranks = own, ranks
        self._first_id, self._own_columns = first_id, own_columns

    def length(self, unit: Tensor, k: int) -> Tensor:
        self._lengths = self._ranks.gather(self._own.length(unit, k))  # int64 [W, T]
        return self._lengths.sum(0)

    def ids_at(self, points: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        inside, mine, _, own = self._own_line(points, top_ids, top_lengths)
        found = self._own.ids_at(inside, *own) + self._first_id
        return self._ranks.maximum(found.masked_fill(~mine, -1))

    def spans_at(self, points: Tensor, top_ids: Tensor, top_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside, mine, before, own = self._own_line(points, top_ids, top_lengths)
        ids, begins, ends = self._own.spans_at(inside, *own)
        found = torch.stack([ids + self._first_id, begins + before, ends + before])
        ids, begins, ends = self._ranks.maximum(found.masked_fill(~mine, -1))
        return ids, begins, ends

    def _own_line(
        self, points: Tensor, top_ids: Tensor, top_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The points [T, K] on this rank's part of the line, whether they are there, where it begins [T, 1], and the K
        first ids and their lengths there."""
        local = top_ids - self._first_id
        here = (local >= 0) & (local < self._own_columns)
        own_lengths = top_lengths.masked_fill(~here, 0)
        # The ids of this rank follow all ids of lower ranks on the line, the K first and the others.
        before = self._lengths[: self._ranks.rank].sum(0) + top_lengths.masked_fill(local >= 0, 0).sum(1)
        length = self._lengths[self._ranks.rank] + own_lengths.sum(1)
        inside = points - before[:, None]
        mine = (inside >= 0) & (inside < length[:, None])
        return inside.clamp_min(0), mine, before[:, None], (local, own_lengths)


class _LocalMasses(BlockMasses):
    """`TensorMasses` with K first ids of which some are other ranks', which `TensorMasses.lengths` does not take."""

    def __init__(self, masses: TensorMasses) -> None:
        self._masses = masses
        self.columns, self.total = masses.columns, masses.total

    def block_lengths(self, unit: Tensor, width: int) -> Tensor:
        self._width = width
        return self._masses.block_lengths(unit, width)

    def lengths(self, blocks: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        lengths = self._masses.lengths(blocks, top_ids[:, :0], top_lengths[:, :0])  # [T, n, W]
        ids = blocks[:, :, None] * self._width + torch.arange(self._width, device=blocks.device)
        return with_top_lengths(lengths.flatten(1), ids.flatten(1), top_ids, top_lengths).view_as(lengths)


def _or_beyond(ids: Tensor, columns: int) -> Tensor:
    """The ids, with `columns` in place of those outside 0 .. columns - 1."""
    return torch.where((ids >= 0) & (ids < columns), ids, columns)
