"""The order in which windows are read: random enough to train on, local enough to decode each chunk once.

Legend: `g` windows of a group (neighbours in the stream), `G` windows of an optimizer step over all processes,
`L` lanes, `B` groups held at a time over all lanes.

Groups are shuffled and dealt to the lanes. Each lane shuffles its windows within a shuffle buffer of B / L groups, and
every step takes G / L windows from each lane, one lane after the other::

    step 0 |lane 0 ........|lane 1 ........| ... |lane L-1 ......|
    step 1 |lane 0 ........|lane 1 ........| ... |lane L-1 ......|

A step cut into equal runs, over ranks and over micro-batches, is cut between lanes: with W ranks and A micro-batches,
W * A a divisor of L, a rank reads the same L / W lanes in every step, and no other rank decodes their chunks.
With other numbers of ranks the order is the same, and neighbouring ranks share some chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

GROUP_TOKENS = 8_192
"""Positions of a group: about a chunk of a cache in its default layout. A constant, so that the order is the same
for students of different teachers, and for a control that has none."""

LANES = 8
"""The largest number of lanes: up to as many processes decode no chunk twice. The number of lanes depends on the step
alone, never on the processes, so that the order is the same for any number of them."""

BUFFER_GROUPS = 16

_GROUPS, _BUFFER, _REST = 1, 2, 3


class ReadingOrder(Sampler[int]):
    """A permutation of the windows for every epoch, a function of (seed, epoch, windows_per_step) alone.

    windows            number of them
    group_windows      g
    windows_per_step   G; the lanes are its greatest divisor of the form 2**n up to `LANES`
    buffer_groups      B
    whole_steps        whether an epoch ends with its last whole step and drops the rest, other windows in each epoch.
                       Cut here, and not by batches or ranks, an epoch has the same steps for any number of these

    Two windows of one group, which share chunks of the cache, are less than ``B * g + G`` indices apart while all lanes
    have groups, and a reader that holds B decoded chunks decodes each about once per epoch. (With 16 groups of 8,192
    positions that is 131,072 positions and a step.) Where documents share windows, those of a group lie in two or three
    groups of the stream, and a chunk is decoded as often. Lanes end within two groups of each other; when the first one
    ends, the rest of the others is shuffled together and ends the epoch: there they can be farther apart.

    The order is independent of batches, processes and workers, which cut it up. It yields ``epoch * windows + window``,
    so that a worker process gets the epoch from the index; `set_epoch` chooses the epoch. An epoch's order is computed
    as it is read: memory is B groups, and one number per group of the corpus.
    """

    def __init__(
        self,
        windows: int,
        *,
        group_windows: int,
        seed: int,
        windows_per_step: int = LANES,
        buffer_groups: int = BUFFER_GROUPS,
        whole_steps: bool = False,
    ) -> None:
        self.windows = windows
        self.group_windows = group_windows
        self.lanes = math.gcd(windows_per_step, LANES)
        self.windows_per_step = windows_per_step
        self.buffer_groups = max(1, buffer_groups // self.lanes)
        self.seed = seed
        self.whole_steps = whole_steps
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.windows - self.windows % self.windows_per_step if self.whole_steps else self.windows

    def __iter__(self) -> Iterator[int]:
        base, left = self.epoch * self.windows, len(self)
        for some in self._pieces(self.epoch):
            yield from (some[:left] + base).tolist()
            left -= min(left, len(some))

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All windows of an epoch in order, int64 [windows], without the epoch in them."""
        return np.concatenate(list(self._pieces(epoch)) or [np.zeros(0, dtype=np.int64)])

    def _pieces(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """The order of an epoch, a step at a time, then the rest of the lanes."""
        groups = self._generator(epoch, _GROUPS, 0).permutation(-(-self.windows // self.group_windows))
        lanes = [_Lane(self, epoch, number, groups[number :: self.lanes]) for number in range(self.lanes)]
        share = self.windows_per_step // self.lanes
        for _ in range(min(len(lane) for lane in lanes) // share):
            yield np.concatenate([lane.take(share) for lane in lanes])
        rest = np.concatenate([lane.take(len(lane)) for lane in lanes])
        yield self._generator(epoch, _REST, 0).permutation(rest)

    def _generator(self, epoch: int, purpose: int, number: int, lane: int = 0) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, number, purpose, lane]))


class _Lane:
    """The windows of a lane's groups, shuffled buffer by buffer; `len` is the number not taken yet."""

    def __init__(self, order: ReadingOrder, epoch: int, number: int, groups: NDArray[np.int64]) -> None:
        self._order, self._epoch, self._number, self._groups = order, epoch, number, groups
        last_group = order.windows // order.group_windows
        self._left = len(groups) * order.group_windows
        if (groups == last_group).any():  # the stream's last group is shorter
            self._left -= order.group_windows - order.windows % order.group_windows
        self._held = np.zeros(0, dtype=np.int64)
        self._buffers = 0

    def __len__(self) -> int:
        return self._left

    def take(self, count: int) -> NDArray[np.int64]:
        """The next `count` windows."""
        while len(self._held) < count:
            self._held = np.concatenate([self._held, self._next_buffer()])
        taken, self._held = self._held[:count], self._held[count:]
        self._left -= count
        return taken

    def _next_buffer(self) -> NDArray[np.int64]:
        order, number = self._order, self._buffers
        self._buffers += 1
        some = self._groups[number * order.buffer_groups : (number + 1) * order.buffer_groups, None]
        windows = (some * order.group_windows + np.arange(order.group_windows)).ravel()
        generator = order._generator(self._epoch, _BUFFER, number, self._number)
        return generator.permutation(windows[windows < order.windows])
