"""VarOpt sampling: K ids per position whose weights have the teacher's distribution as their mean.

Legend: `T` rows of one tile, `V` vocabulary size, `K` kept ids, `W` width of a block of ids, `M` blocks.

The naive form, for a row of masses ``a = p ** (1 / temperature)``, the largest first, with R_j = sum_{i > j} a_i::

    j = the least with j >= head_ids and a_{j+1} (K - j) < R_j; K where there is none
    the first j ids are certain: they weigh a_i
    of the others K - j different ids are drawn, id i with probability (K - j) a_i / R_j: they weigh R_j / (K - j) each

so that E[w] = a and sum w = sum a, with the least variance that K ids allow (Cohen et al. 2011; Chao 1982). Drawing
is systematic: the others lie in a row in the order of their ids, each as long as its mass, under a comb of K - j teeth
R_j / (K - j) apart, which one uniform number shifts; the ids under a tooth are drawn. No id is longer than the comb's
step, so none is drawn twice. Where at most K ids have any mass, all are certain.

What is random is a pure function of the seed and the absolute position, whatever the shard, the batch or the device.

Precision: lengths are whole numbers, 2**30 to a step of the comb, so their sums are exact in any order, on any
device; float sums only choose the unit. The rule for j holds exactly for the whole numbers, where it makes ids
distinct. Rounding lengths down moves an inclusion probability by less than 2**-30, and by V / (K - j) * 2**-30 of its
size. Nothing is drawn from a rest under 2**-53 of a row's mass, which is less than float64 can add to it: then the K
largest ids are certain.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RANDOM_BITS = 32
_STEP_BITS = 30  # times K <= 2**16 ids, or times the random bits, a step fits int64; alone it fits int32
_LEAST_REST = 2.0**-53
_LEAST_BLOCK = 8


@dataclass(frozen=True)
class Sampling:
    """How R rows are sampled.

    temperature  the one at which the weights are unbiased: ids are drawn by p ** (1 / temperature)
    head_ids     how many ids are certain at least, under K
    random       int64 [R], from `random_bits` at the rows' positions, on the logits' device
    """

    temperature: float
    head_ids: int
    random: Tensor

    def rows(self, start: int, stop: int) -> Sampling:
        """The same for the rows `start .. stop`."""
        return Sampling(self.temperature, self.head_ids, self.random[start:stop])


def random_bits(seed: int, start: int, stop: int) -> NDArray[np.int64]:
    """32 random bits for each of the absolute positions `start .. stop`, int64 in 0 .. 2**32 - 1.

    The upper half of word ``position % 4`` of block ``position // 4`` of Philox4x64-10 with the seed as its key, as
    NumPy counts the blocks.
    """
    # NumPy guarantees the stream of a bit generator, unlike those of the distributions on top of it.
    words = np.random.Philox(key=seed, counter=start // 4).random_raw(stop - start + start % 4)
    return (words[start % 4 :] >> np.uint64(64 - _RANDOM_BITS)).astype(np.int64)


class Masses(Protocol):
    """The masses of T rows, not negative, in any unit of their row, of all ids but the K that come first.

    columns  V
    total    float32 [T], their sums

    Lengths are masses in another unit, rounded down. The ids lie in a row in their order, each as long as its length.
    """

    columns: int
    total: Tensor

    def length(self, unit: Tensor, k: int) -> Tensor:
        """int64 [T]: the sums of all lengths, which are mass times `unit` [T] from here on."""
        ...

    def under(self, teeth: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        """int64 [T, K]: the ids in which the points `teeth` [T, K] lie, once the K first ids are in the row as well,
        with the lengths that are given here, int64 [T, K]. What lies beyond the row is of any id."""
        ...


class BlockMasses(ABC):
    """`Masses` whose lengths can be had summed by runs of ids, and singly inside a few of them.

    Whatever asks for an id's length is told the same number.
    """

    columns: int
    total: Tensor

    @abstractmethod
    def block_lengths(self, unit: Tensor, width: int) -> Tensor:
        """int64 [T, M]: lengths, mass times `unit` [T], summed over runs of `width` ids; the last may be shorter."""

    @abstractmethod
    def lengths(self, blocks: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        """int64 [T, n, W]: the lengths of the ids in n of each row's runs that `block_lengths` last summed.

        The K first ids have the lengths that are given here, int64 [T, K]; what lies beyond the last id has none.
        """

    def length(self, unit: Tensor, k: int) -> Tensor:
        self._width_of_blocks = _block_width(self.columns, k)
        self._sums_of_blocks = self.block_lengths(unit, self._width_of_blocks)  # int64 [T, M]
        return self._sums_of_blocks.sum(1)

    def under(self, teeth: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        width, last = self._width_of_blocks, self.columns - 1
        blocks = self._sums_of_blocks.scatter_add(1, top_ids.clamp(0, last) // width, top_lengths)
        ends = blocks.cumsum(1)
        block = torch.searchsorted(ends, teeth, right=True).clamp_max_(blocks.shape[1] - 1)
        inside = teeth - (ends - blocks).gather(1, block)
        passed = self.lengths(block, top_ids, top_lengths).cumsum(2) <= inside[:, :, None]  # [T, K, W]
        return block * width + passed.sum(2)


class TensorMasses(BlockMasses):
    """Masses in a tensor [T, V], 0 at the K first ids; it and `scratch`, of the same shape, are overwritten."""

    def __init__(self, mass: Tensor, scratch: Tensor) -> None:
        self.columns = mass.shape[1]
        self.total = row_sums(mass)
        self._mass = mass
        self._lengths = scratch.view(torch.int32)
        self._width = 0

    def block_lengths(self, unit: Tensor, width: int) -> Tensor:
        self._width = width
        self._lengths.copy_(self._mass.mul_(unit[:, None]))
        whole = self.columns // width * width
        blocks = self._lengths[:, :whole].view(len(unit), whole // width, width).sum(2)
        if whole < self.columns:
            blocks = torch.cat([blocks, self._lengths[:, whole:].sum(1, keepdim=True)], dim=1)
        return blocks

    def lengths(self, blocks: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        self._lengths.scatter_(1, top_ids, top_lengths.to(torch.int32))
        ids = blocks[:, :, None] * self._width + torch.arange(self._width, device=blocks.device)  # [T, n, W]
        last = self.columns - 1
        lengths = self._lengths.gather(1, ids.clamp_max(last).flatten(1)).view_as(ids).to(torch.int64)
        return lengths.masked_fill_(ids > last, 0)


def with_given(lengths: Tensor, ids: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
    """`lengths` of `ids`, both int64 [T, n], but for those among `top_ids` [T, K], which have `top_lengths` [T, K]."""
    # Those that lie where they would be put among them.
    sorted_ids, order = top_ids.sort(1)
    at = torch.searchsorted(sorted_ids, ids).clamp_max_(top_ids.shape[1] - 1)
    given = top_lengths.gather(1, order).gather(1, at)
    return torch.where(sorted_ids.gather(1, at) == ids, given, lengths)


def draw(masses: Masses, top: Tensor, top_ids: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """VarOpt samples of T rows: ids int64 [T, K] and how many of them are certain, int64 [T].

    top: float32 [T, K], the masses of the K ids that come first, in order, in the unit of the others' `masses`;
    top_ids: int64 [T, K]. The certain ids come first, in the order of `top_ids`; the drawn ones follow by ascending id.
    """
    k = top.shape[1]
    columns = torch.arange(k, device=top.device)
    rest = _suffix_sums(torch.cat([top, masses.total[:, None]], dim=1))  # [T, K + 1], R_j in column j
    certain = _certain(top, rest, torch.full_like(top_ids[:, 0], sampling.head_ids))
    left = rest.gather(1, certain[:, None]).squeeze(1)
    certain.masked_fill_(left < _LEAST_REST * rest[:, 0], k)

    # The unit: from here on all sums are exact.
    unit = ((k - certain) * 2**_STEP_BITS / left).masked_fill_(certain == k, 0.0)
    top_lengths = (top * unit[:, None]).to(torch.int64).masked_fill_(columns < certain[:, None], 0)
    others = masses.length(unit, k)[:, None]
    rest = torch.cat([top_lengths, others], dim=1).flip(1).cumsum(1).flip(1)
    certain = _certain(top_lengths, rest, certain)
    top_lengths.masked_fill_(columns < certain[:, None], 0)

    step = rest.gather(1, certain[:, None]) // (k - certain).clamp_min(1)[:, None]  # [T, 1]
    teeth = columns * step + (sampling.random[:, None] * step >> _RANDOM_BITS)  # [T, K]; the first K - certain count
    drawn = masses.under(teeth, top_ids, top_lengths)
    drawn = drawn.gather(1, (columns - certain[:, None]).clamp_min(0))
    return torch.where(columns < certain[:, None], top_ids, drawn), certain


def _certain(values: Tensor, rest: Tensor, least: Tensor) -> Tensor:
    """The least j >= `least` [T] with a_{j+1} (K - j) < R_j, or K; values [T, K] descend, rest [T, K + 1] is R.

    Once the rule holds it goes on holding: taking an id of at most the mean away leaves no smaller mean.
    """
    k = values.shape[1]
    columns = torch.arange(k, device=values.device)
    sampled = (values * (k - columns) < rest[:, :k]) & (columns >= least[:, None])
    return k - sampled.sum(1)


def _suffix_sums(values: Tensor) -> Tensor:
    """The sum of each column [T, n] and those after it; pairwise, since a float cumsum on a GPU has no fixed order."""
    shift = 1
    while shift < values.shape[1]:
        values = values + torch.nn.functional.pad(values[:, shift:], (0, shift))
        shift *= 2
    return values


def _block_width(columns: int, k: int) -> int:
    """Near sqrt(columns / k), which balances the blocks against the ids inside those that are looked into."""
    return min(columns, max(_LEAST_BLOCK, 1 << max(0, round(math.log2(columns / k) / 2))))


def row_sums(values: Tensor) -> Tensor:
    """The sums [T] of [T, n]."""
    return values.sum(1) if len(values) != 1 else values.expand(2, -1).sum(1)[:1]


def row_nansums(values: Tensor) -> Tensor:
    """The sums [T] of [T, n], NaN taken for 0."""
    return values.nansum(1) if len(values) != 1 else values.expand(2, -1).nansum(1)[:1]
