"""Windows as a `datasets.IterableDataset`, for trainers that take no other kind and bring their own sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
from datasets.iterable_dataset import ExamplesIterable

from storage.errors import InputError
from storage.text import counted
from student.data.batches import collate
from student.data.order import ReadingOrder
from student.data.windows import DistillationWindows


class IterableWindows(datasets.IterableDataset):  # type: ignore[misc]
    """Windows in reading order, as items ``{"window": index}``, of which `collate` reads a batch at a time.

    windows, order   the order of these windows, best with `whole_steps`: several processes would fill up the last
                     step of an epoch with its first windows

    Items are indices, since each of several processes iterates over all items and needs the windows of its own alone.
    Not more than one worker process of a DataLoader reads: the order is one sequence.

    `set_epoch` chooses the epoch, as trainers do. An epoch has a length, so that a trainer that resumes finds the epoch
    and the batch to continue with; transformers' reads the batches of that epoch up to there again. `state_dict` has
    the epoch and the place in it, and after `load_state_dict` the next iteration begins there. What `map`, `take` or
    `skip` make of it is a data set of one epoch, and without a length.

    Raises InputError where an epoch has no whole step.
    """

    def __init__(self, windows: DistillationWindows, order: ReadingOrder) -> None:
        if not len(order):
            raise InputError(
                f"{windows.cache_url}: {counted(len(windows), 'window')} of {windows.window_tokens} tokens, fewer than "
                f"the {order.windows_per_step} of one step: take smaller steps or windows"
            )
        self.windows = windows
        self.order = order
        super().__init__(ExamplesIterable(self._examples, {}))

    def _examples(self) -> Iterator[tuple[int, dict[str, int]]]:
        # Only here, since a worker process that outlives an epoch is told of the next one by the base class alone.
        self.order.set_epoch(self.epoch)
        for index in self.order:
            yield index, {"window": index}

    def __len__(self) -> int:
        return len(self.order)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the next iteration where the state was taken, in its epoch."""
        self.set_epoch(state_dict["epoch"])
        super().load_state_dict(state_dict)

    def collate(self, items: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """The batch of some items, as `student.data.batches.collate` makes it; for a trainer's `data_collator`."""
        return collate(self.windows.__getitems__([item["window"] for item in items]))
