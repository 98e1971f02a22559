"""Windows as a data set of `datasets`: the reading order, whoever cuts it up and wherever it resumes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from support.runs import fill
from torch.utils.data import DataLoader

from storage.errors import InputError
from student.data.batches import collate
from student.data.iterable import IterableWindows
from student.data.windows import DistillationWindows, reading_order


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> DistillationWindows:
    url = str(tmp_path_factory.mktemp("iterable") / "cache")
    fill(url, 700, 0, ("a",))
    return DistillationWindows(url, ["a"], 16, "random", 3)


def items(windows: DistillationWindows) -> IterableWindows:
    return IterableWindows(windows, reading_order(windows, 8, whole_steps=True))


def in_epoch(windows: DistillationWindows, epoch: int) -> list[int]:
    order = reading_order(windows, 8, whole_steps=True)
    order.set_epoch(epoch)
    return list(order)


def test_an_epoch_is_the_reading_order_and_resumes_in_its_middle(windows: DistillationWindows) -> None:
    data, expected = items(windows), in_epoch(windows, 1)
    assert len(data) == len(expected) == 40
    data.set_epoch(1)
    reading, found = iter(data), []
    for _ in range(11):
        found.append(next(reading)["window"])
    resumed = items(windows)
    resumed.load_state_dict(data.state_dict())
    assert found + [item["window"] for item in resumed] == expected
    resumed.set_epoch(2)
    assert [item["window"] for item in resumed] == in_epoch(windows, 2)


@pytest.mark.parametrize("done", [0, 3])
@pytest.mark.parametrize("workers", [0, 1])
def test_processes_share_steps_and_skip_batches(windows: DistillationWindows, done: int, workers: int) -> None:
    """As a Trainer does that resumes: two processes of two windows each, after so many batches of the second epoch."""
    shares: list[list[dict[str, Any]]] = []
    for rank in range(2):
        data = items(windows)
        loader = DataLoader(data, batch_size=2, collate_fn=data.collate, num_workers=workers)
        loader = prepare_data_loader(loader, num_processes=2, process_index=rank, dispatch_batches=False)
        if done:
            loader = skip_first_batches(loader, done)
        loader.set_epoch(1)
        shares.append(list(loader))
    indices = in_epoch(windows, 1)[4 * done :]
    batches = [batch for together in zip(*shares, strict=True) for batch in together]
    assert len(batches) == len(indices) // 2
    for batch, pair in zip(batches, np.reshape(indices, (-1, 2)).tolist(), strict=True):
        expected = collate(windows.__getitems__(pair))
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["targets"]["a"].decoded().logprobs, expected["targets"]["a"].decoded().logprobs)


def test_an_epoch_without_a_whole_step_is_refused(windows: DistillationWindows) -> None:
    with pytest.raises(InputError, match="43 windows of 16 tokens, fewer than the 64 of one step"):
        IterableWindows(windows, reading_order(windows, 64, whole_steps=True))
