"""The first K columns of a row in the order (logit descending, id ascending), without sorting the row.

Legend: `T` rows, `V` columns, `K` wanted ones, `W` width of a block, `M` blocks.

`torch.topk` over a whole row costs more than all else that a reducer does, and leaves the order of equal logits
undefined. Instead, the row is cut into blocks of W columns. The K best columns lie in the K blocks with the best
maxima, as long as one order (value, then the smaller id) ranks both, so only K * W columns are sorted. That order is
an int64 key, which only block maxima and candidates get.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Under 32 columns torch's maximum over the last dimension is not vectorised and costs five times as much; among
# few columns that still pays.
_LEAST_FAST_BLOCK = 32
_LEAST_BLOCK = 8
_SHORT_ROW = 8192
_LAST_ID = (1 << 31) - 1
_BEFORE = 1 << 31  # the bit of a key between its value and its id

BlockMaxima = Callable[[Tensor, int], Tensor]


def first_columns(logits: Tensor, k: int, maxima: BlockMaxima) -> tuple[Tensor, Tensor, Tensor]:
    """Row maxima [T] (NaN where a row has one); ids and logits [T, K] of the K first columns, in order.

    logits: float32 [T, V], in rows of any stride. maxima: the function that computes block maxima.
    """
    width = _block_width(logits.shape[1], k)
    if width == 1:
        return logits.amax(1), *best(logits, torch.arange(logits.shape[1], device=logits.device), k)
    ids, row_max = _candidates(logits, None, k, width, maxima)  # [T, K * W + remainder], [T]
    values = logits.gather(1, ids)
    while (width := _block_width(values.shape[1], k)) > 1:
        positions, _ = _candidates(values, ids, k, width, block_maxima)
        values, ids = values.gather(1, positions), ids.gather(1, positions)
    return row_max, *best(values, ids, k)


def _candidates(
    values: Tensor, ids: Tensor | None, k: int, width: int, maxima_of: BlockMaxima
) -> tuple[Tensor, Tensor]:
    """The positions [T, <= n] among n columns that must contain the K best, and the row maxima [T].

    ids: int64 [T, n], or None where columns are ids. Each block of `width` columns has ascending ids, so of two
    blocks with equal maxima the one with the smaller first id holds the better column.
    """
    rows, columns = values.shape
    whole = columns // width * width
    maxima = maxima_of(values, width)  # [T, M]
    row_max = maxima.amax(1)
    first_ids = torch.arange(0, whole, width, device=values.device) if ids is None else ids[:, :whole:width]
    chosen = ordered_keys(maxima, first_ids).topk(k, sorted=False).indices  # [T, K]
    positions = torch.arange(width, device=values.device)
    positions = (chosen[:, :, None] * width + positions).flatten(1)  # [T, K * W]
    if whole < columns:  # a last, shorter block is always among the candidates
        remainder = torch.arange(whole, columns, device=values.device)
        positions = torch.cat([positions, remainder.expand(rows, -1)], dim=1)
        row_max = torch.maximum(row_max, values[:, whole:].amax(1))
    return positions, row_max


def block_maxima(values: Tensor, width: int) -> Tensor:
    """The maxima of blocks of `width` columns, [T, n // width]; a shorter last block is left out."""
    blocks = values.shape[1] // width
    return values[:, : blocks * width].reshape(len(values), blocks, width).amax(2)


def best(values: Tensor, ids: Tensor, k: int, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ids and values [T, K] of the K first of [T, n], in order; of equal values those first that are `before`,
    bool [T, n]."""
    keys = ordered_keys(values, ids)
    return best_of_keys(keys if before is None else keys | before * _BEFORE, k)


def best_of_keys(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids and values [T, K] of the K largest of the keys [T, n], in order."""
    return _unpack(keys.topk(k).values)


def _block_width(columns: int, k: int) -> int:
    """A power of two near sqrt(columns / k), which balances the blocks against the candidates; 1: no blocks."""
    least = _LEAST_BLOCK if columns <= _SHORT_ROW else _LEAST_FAST_BLOCK
    width = max(least, 1 << round(math.log2(columns / k) / 2))
    return width if 2 * k * width < columns else 1


def ordered_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys, all different within a row, that descend by (value descending, id ascending)."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into +0.0: they are equal logits
    # A negative float's pattern grows with its magnitude; flipping the magnitude makes integers order floats.
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return ordered.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(_LAST_ID - ids)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The ids and values that `ordered_keys` packed."""
    ordered = (keys >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return _LAST_ID - (keys & _LAST_ID), values
