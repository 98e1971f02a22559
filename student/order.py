"""The order in which windows are read: random enough to train on, local enough to decode each chunk once.

Legend: `G` windows of a group (neighbours in the stream), `B` groups of a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

GROUP_TOKENS = 8_192
"""Positions of a group: about a chunk of a cache in its default layout. A constant, so that the order is the same
for students of different teachers, and for a control that has none."""

BUFFER_GROUPS = 16

_GROUPS, _BUFFER = 1, 2


class ReadingOrder(Sampler[int]):
    """A permutation of the windows for every epoch, a function of (seed, epoch) alone.

    Groups of `group_windows` neighbouring windows are shuffled; then each run of `buffer_groups` groups is shuffled
    window by window. So two windows of one group, which share chunks of the cache, are less than
    ``buffer_groups * group_windows`` places apart in the order, and a reader that holds `buffer_groups` decoded
    chunks decodes each about once per epoch. (With 16 groups of 8,192 positions that is 131,072 positions.)

    The order knows nothing of batches, processes or workers: they cut it up. It yields ``epoch * windows + window``,
    so that whoever loads a window knows the epoch without being told; `set_epoch` chooses the epoch.
    """

    def __init__(self, windows: int, *, group_windows: int, seed: int, buffer_groups: int = BUFFER_GROUPS) -> None:
        self.windows = windows
        self.group_windows = group_windows
        self.buffer_groups = buffer_groups
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.windows

    def __iter__(self) -> Iterator[int]:
        base = self.epoch * self.windows
        for buffer in self._buffers(self.epoch):
            yield from (buffer + base).tolist()

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The windows of an epoch in order, int64 [windows], without the epoch in them."""
        return np.concatenate(list(self._buffers(epoch)) or [np.zeros(0, dtype=np.int64)])

    def _buffers(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        groups = self._generator(epoch, _GROUPS, 0).permutation(-(-self.windows // self.group_windows))
        for number, first in enumerate(range(0, len(groups), self.buffer_groups)):
            some = groups[first : first + self.buffer_groups, None]
            windows = (some * self.group_windows + np.arange(self.group_windows)).ravel()
            yield self._generator(epoch, _BUFFER, number).permutation(windows[windows < self.windows])

    def _generator(self, epoch: int, purpose: int, number: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, number, purpose, 0]))
