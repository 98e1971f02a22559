"""VarOpt sampling: K ids per position whose weights have the teacher's distribution as their mean.

Legend: `T` rows of one tile, `V` vocabulary size, `K` kept ids, `W` width of a block of ids, `M` blocks.

The naive form, for a row of masses ``a = p ** (1 / temperature)``, the largest first, with the suffix sums
R_j = sum_{i > j} a_i::

    j = the least with j >= head_ids and a_{j+1} (K - j) < R_j; K where there is none
    the first j ids are certain: they weigh a_i
    of the others K - j distinct ids are sampled, id i with the inclusion probability (K - j) a_i / R_j: each weighs
    the threshold R_j / (K - j)

With `Sampling.threshold` a row holds fewer than K ids where fewer will do, K' in the place of K::

    n  = the number of ids with a_i >= R_0 / K
    K' = n + ceil(K R_n / R_0), rounded up to a multiple of 8, K at most

so that no sampled id weighs more than 1 / K of the row's mass. Of all ways of giving so many ids to the rows of a text,
one threshold for all of them has the least variance (Neyman's allocation): K ids in every row are more than a sure row
needs, and fewer than a flat one does. The multiples of 8 cost few ids, and rows of equal size compress better.

By either rule E[w] = a and sum w = sum a, with the least variance that so many ids allow (Cohen et al. 2011; Chao
1982). The others are laid end to end in the order of their ids, or another that is fixed beforehand (`Sampling.order`),
each as long as its mass: the line, of K - j intervals one threshold long. No id is longer than an interval, so none is
sampled twice. Where at most K ids have any mass, all are certain. Two methods sample the line, with the same inclusion
probabilities::

    systematic  one point in each interval, all equally far from its beginning, samples the id that it falls in
    pivotal     ids compete with their neighbours along the line (Deville and Tille 1998); in each interval one id wins
                and is sampled, so that it has no period, as the equal distances have

In interval i of the pivotal method (Chauvet 2012, On a characterization of ordered pivotal sampling; lengths here in
intervals), let B be the id on its end, with length a before the end and b beyond it. One of the other ids, W, is at a
uniform point of the 1 - a before B; where that point lies in an id that began before the interval, W is instead the one
that interval i - 1 left over. W is sampled with probability (1 - a - b) / (1 - b), otherwise B; the other one is left
over, for the b of interval i + 1 that belong to B.

Random numbers are pure functions of the seed and the absolute position, whatever the shard, batch or device.

Precision: lengths are whole numbers, 2**30 to an interval, so their sums are exact in any order, on any device; float
sums only choose the unit. The rule for j holds exactly for the whole numbers, where it makes ids distinct. Rounding
lengths down changes an inclusion probability by less than 2**-30, and by V / (K - j) * 2**-30 of its size. Nothing is
sampled from a rest under 2**-53 of a row's mass, which is less than float64 can add to it: then the K largest ids are
certain.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.format.chance import DRAWING, PIVOTAL, words
from storage.format.manifest.entry import Targets
from storage.format.pruning import SIZE_UNIT

_RANDOM_BITS = 32
_LOW_BITS = (1 << _RANDOM_BITS) - 1
_INTERVAL_BITS = 30  # times K <= 2**16 ids, or times the random bits, an interval fits int64; alone it fits int32
_LEAST_REST = 2.0**-53
_LEAST_BLOCK = 8


@dataclass(frozen=True)
class Sampling:
    """How R rows are sampled.

    temperature  the one at which the weights are unbiased: ids are sampled by p ** (1 / temperature)
    head_ids     the least number of certain ids, under K
    threshold    whether rows hold as many ids as their threshold asks for, else K
    random       int64 at the rows' positions, on the logits' device: [R] from `random_bits`, for the systematic method,
                 or [R, K] from `random_words`, for the pivotal one
    order        int64 [V], on that device: the ids in the order to draw in, which is that of the logits' columns; None
                 where columns are ids
    """

    temperature: float
    head_ids: int
    random: Tensor
    order: Tensor | None = None
    threshold: bool = False

    def rows(self, start: int, stop: int) -> Sampling:
        return replace(self, random=self.random[start:stop])


def random_bits(seed: int, start: int, stop: int) -> NDArray[np.int64]:
    """32 random bits for each of the absolute positions `start .. stop`, int64 in 0 .. 2**32 - 1.

    The upper half of word ``position % 4`` of block ``position // 4`` of Philox4x64-10 with the seed as its key, as
    NumPy counts the blocks.
    """
    return (words(seed, DRAWING, start, stop) >> np.uint64(64 - _RANDOM_BITS)).astype(np.int64)


def random_words(seed: int, start: int, stop: int, k: int) -> NDArray[np.int64]:
    """64 random bits for each interval of each of the absolute positions `start .. stop`, int64 [stop - start, K].

    Those of interval i, whatever K is, are the words of `random_bits` under a key with 2**32 + i in its upper half.
    """
    found = np.empty((stop - start, k), dtype=np.int64)
    for interval in range(k):
        found[:, interval] = words(seed, PIVOTAL + interval, start, stop).view(np.int64)
    return found


def random_numbers(targets: Targets, start: int, stop: int) -> NDArray[np.int64]:
    """Those by which ids are sampled at the positions `start .. stop`: [T], or [T, K] by the pivotal method."""
    seed = targets.seed or 0
    return (
        random_words(seed, start, stop, targets.k) if targets.sampling == "pivotal" else random_bits(seed, start, stop)
    )


def sampling_of(targets: Targets, random: Tensor, order: Tensor | None) -> Sampling:
    """How an entry's rows are sampled, by their random numbers, of `random_numbers`, and the entry's order of ids."""
    threshold = targets.sample_size == "threshold"
    return Sampling(targets.temperature, targets.head_ids or 0, random, order, threshold)


class Masses(Protocol):
    """The masses of T rows, not negative, in any unit of their row, of all ids but the K first.

    columns  V
    total    float32 [T], their sums

    Lengths are masses in another unit, rounded down. Ids laid end to end in their order, each as long as its length,
    form the line that is sampled.
    """

    columns: int
    total: Tensor

    def length(self, unit: Tensor, k: int) -> Tensor:
        """The sums of all lengths, int64 [T]; from this call on a length is mass times `unit` [T]."""

    def ids_at(self, points: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        """The ids int64 [T, K] at the points [T, K] of the line, with the K first ids `top_ids` on it as well, of the
        lengths `top_lengths`, int64 [T, K]. Beyond the end of the line the id is arbitrary."""

    def spans_at(self, points: Tensor, top_ids: Tensor, top_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The ids at the points, as `ids_at`, and where each of these begins and ends on the line; int64 [T, K]."""


class BlockMasses(ABC):
    """`Masses` with lengths that are summed by block of ids, and computed one by one inside a few blocks.

    Both must give an id the same length.
    """

    columns: int
    total: Tensor

    @abstractmethod
    def block_lengths(self, unit: Tensor, width: int) -> Tensor:
        """Lengths, mass times `unit` [T], summed over blocks of `width` ids, int64 [T, M]; the last may be shorter."""

    @abstractmethod
    def lengths(self, blocks: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        """The lengths int64 [T, n, W] of the ids in `blocks` [T, n], n of each row's that `block_lengths` last summed.

        The K first ids have the lengths `top_lengths`, int64 [T, K]; columns beyond the last id have length 0.
        """

    def length(self, unit: Tensor, k: int) -> Tensor:
        self._width_of_blocks = _block_width(self.columns, k)
        self._sums_of_blocks = self.block_lengths(unit, self._width_of_blocks)  # int64 [T, M]
        return self._sums_of_blocks.sum(1)

    def ids_at(self, points: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        first, _, ends = self._block_at(points, top_ids, top_lengths)
        return first + (ends <= points[:, :, None]).sum(2)

    def spans_at(self, points: Tensor, top_ids: Tensor, top_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, begin, ends = self._block_at(points, top_ids, top_lengths)
        passed = ends <= points[:, :, None]
        begins = torch.where(passed, ends, begin[:, :, None]).amax(2)
        return first + passed.sum(2), begins, torch.where(passed, ends[:, :, -1:], ends).amin(2)

    def _block_at(self, points: Tensor, top_ids: Tensor, top_lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the block that each point [T, K] is in: its first id and where it begins on the line, int64 [T, K], and
        where each of its ids ends, int64 [T, K, W]."""
        width, last = self._width_of_blocks, self.columns - 1
        blocks = self._sums_of_blocks.scatter_add(1, top_ids.clamp(0, last) // width, top_lengths)
        ends = blocks.cumsum(1)
        block = torch.searchsorted(ends, points, right=True).clamp_max_(blocks.shape[1] - 1)
        begin = (ends - blocks).gather(1, block)
        ends = self.lengths(block, top_ids, top_lengths).cumsum(2)  # [T, K, W]
        return block * width, begin, ends.add_(begin[:, :, None])


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


def with_top_lengths(lengths: Tensor, ids: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
    """`lengths` of `ids`, both int64 [T, n], but for ids among `top_ids` [T, K], which have `top_lengths` [T, K]."""
    # An id is among them if it equals the entry at its insertion index.
    sorted_ids, order = top_ids.sort(1)
    at = torch.searchsorted(sorted_ids, ids).clamp_max_(top_ids.shape[1] - 1)
    replaced = top_lengths.gather(1, order).gather(1, at)
    return torch.where(sorted_ids.gather(1, at) == ids, replaced, lengths)


def sample(masses: Masses, top: Tensor, top_ids: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """VarOpt samples of T rows: ids int64 [T, K]; the numbers of the valid and of the certain ones, both int64 [T].

    top: float32 [T, K], the masses of the K first ids, in order, in the unit of the others' `masses`; top_ids: int64
    [T, K]. The certain ids come first, in the order of `top_ids`; the sampled ones follow by ascending id. Columns
    beyond the valid ones hold any id.
    """
    k = top.shape[1]
    columns = torch.arange(k, device=top.device)
    rest = _suffix_sums(torch.cat([top, masses.total[:, None]], dim=1))  # [T, K + 1], R_j in column j
    least = torch.full_like(top_ids[:, 0], sampling.head_ids)
    kept = _sizes(top, rest, least) if sampling.threshold else torch.full_like(least, k)
    certain = _certain(top, rest, kept, least)
    left = rest.gather(1, certain[:, None]).squeeze(1)
    certain = torch.where(left < _LEAST_REST * rest[:, 0], kept, certain)

    # The unit: from here on all sums are exact.
    unit = ((kept - certain) * 2**_INTERVAL_BITS / left).masked_fill_(certain == kept, 0.0)
    top_lengths = (top * unit[:, None]).to(torch.int64).masked_fill_(columns < certain[:, None], 0)
    others = masses.length(unit, k)[:, None]
    rest = torch.cat([top_lengths, others], dim=1).flip(1).cumsum(1).flip(1)
    certain = _certain(top_lengths, rest, kept, certain)
    top_lengths.masked_fill_(columns < certain[:, None], 0)

    interval = rest.gather(1, certain[:, None]) // (kept - certain).clamp_min(1)[:, None]  # [T, 1], the threshold
    at = functools.partial(masses.ids_at, top_ids=top_ids, top_lengths=top_lengths)
    # [T, K]; the first of them, as many as ids are sampled, are used
    if sampling.random.ndim == 1:
        sampled = at(columns * interval + (sampling.random[:, None] * interval >> _RANDOM_BITS))
    else:
        last = masses.spans_at((columns + 1) * interval - 1, top_ids, top_lengths)
        sampled = _pivotal(interval, sampling.random, *last, at)
    sampled = sampled.gather(1, (columns - certain[:, None]).clamp_min(0))
    is_sampled = (columns >= certain[:, None]) & (columns < kept[:, None])
    return torch.where(is_sampled, sampled, top_ids), kept, certain


def _pivotal(
    interval: Tensor, random: Tensor, last: Tensor, begin: Tensor, end: Tensor, ids_at: Callable[[Tensor], Tensor]
) -> Tensor:
    """The id that wins each interval, int64 [T, K]; B, W, a and b are those of the module.

    interval: int64 [T, 1]. random: int64 [T, K], 64 bits each. last: B of each interval; begin, end: where it lies on
    the line; all int64 [T, K]. ids_at: the ids at points of the line.
    """
    columns = torch.arange(random.shape[1], device=random.device)
    first = columns * interval
    before = (begin - first).clamp_min(0)  # 1 - a, in whole numbers as the others
    beyond = end - first - interval  # b
    where, decides = (random >> _RANDOM_BITS) & _LOW_BITS, random & _LOW_BITS
    point = where * before >> _RANDOM_BITS
    other_wins = decides * (interval - beyond) < ((before - beyond).clamp_min(0) << _RANDOM_BITS)
    left_over_before = torch.nn.functional.pad(beyond, (1, -1))
    is_left_over = point < left_over_before
    other = ids_at(first + point)
    # The id left over by an interval is B, or W; and where that W was left over itself, the one of the interval before.
    left_over = torch.where(other_wins, last, other)
    source = torch.where(is_left_over & ~other_wins, 0, columns).cummax(1).values
    left_over = left_over.gather(1, source)
    other = torch.where(is_left_over, torch.nn.functional.pad(left_over, (1, -1)), other)
    return torch.where(other_wins, other, last)


def _sizes(top: Tensor, rest: Tensor, least: Tensor) -> Tensor:
    """How many ids each row holds by its threshold, int64 [T]; the module has the rule. Of them `least` [T] are certain
    at any rate."""
    k = top.shape[1]
    likely = (top * k >= rest[:, :1]).sum(1).maximum(least)
    left = rest.gather(1, likely[:, None]).squeeze(1)
    wanted = likely + (left * k / rest[:, 0]).ceil().to(torch.int64)
    return (-(-wanted // SIZE_UNIT) * SIZE_UNIT).clamp_max(k)


def _certain(values: Tensor, rest: Tensor, kept: Tensor, least: Tensor) -> Tensor:
    """The least j >= `least` [T] with a_{j+1} (k - j) < R_j, or k, with k = `kept` [T]; values [T, K] descend, rest
    [T, K + 1] is R.

    Once the rule holds, it holds for every larger j: removing an id of at most the mean leaves no smaller mean.
    """
    columns = torch.arange(values.shape[1], device=values.device)
    number = kept[:, None] - columns
    sampled = (values * number < rest[:, :-1]) & (columns >= least[:, None]) & (number > 0)
    return kept - sampled.sum(1)


def _suffix_sums(values: Tensor) -> Tensor:
    """The sums of each column [T, n] and those after it; pairwise, as a float cumsum on a GPU has no fixed order."""
    shift = 1
    while shift < values.shape[1]:
        values = values + torch.nn.functional.pad(values[:, shift:], (0, shift))
        shift *= 2
    return values


def _block_width(columns: int, k: int) -> int:
    """A width near sqrt(columns / k), which balances the blocks against the ids inside the searched ones."""
    return min(columns, max(_LEAST_BLOCK, 1 << max(0, round(math.log2(columns / k) / 2))))


def row_sums(values: Tensor) -> Tensor:
    """The sums [T] of [T, n], whose bits depend on the row alone, not on the number of threads or on the other rows.

    Torch sums each of several rows on one thread, but splits a single row over all threads: workers with other numbers
    of threads would store other bits of the same position.
    """
    return values.sum(1) if len(values) != 1 else values.expand(2, -1).sum(1)[:1]


def row_nansums(values: Tensor) -> Tensor:
    """`row_sums` with NaN as 0."""
    return values.nansum(1) if len(values) != 1 else values.expand(2, -1).nansum(1)[:1]
