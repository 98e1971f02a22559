"""TargetBatch: its rows, absent fields, and its way through data loaders and accelerate."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from support.caches.small import dense_targets
from support.references.dense_targets import dense, member, stored

from student.loss.teacher_targets import targets_of
from student.target_batch import TargetBatch

T, K = 4, 5


def tensors(batch: TargetBatch) -> dict[str, torch.Tensor]:
    return {name: values for name, values in vars(batch).items() if values is not None}


@pytest.fixture
def batch() -> TargetBatch:
    """Three windows of four rows: of all, of two at their end, of one in their middle."""
    whole = dense_targets(np.random.default_rng(0).normal(size=(7, 11)), K, np.arange(7))
    return TargetBatch.of([whole.rows(0, 4), whole.rows(4, 6), whole.rows(6, 7)], T, [0, 2, 1])


def test_rows_without_a_position_keep_no_id(batch: TargetBatch) -> None:
    assert batch.kept.tolist() == [[K] * 4, [0, 0, K, K], [0, K, 0, 0]]
    whole = dense_targets(np.random.default_rng(0).normal(size=(7, 11)), K, np.arange(7))
    present = batch[batch.kept > 0]
    assert torch.equal(present.token_ids, torch.from_numpy(whole.token_ids.astype(np.int32)))
    assert torch.equal(present.log_tail, torch.from_numpy(whole.log_tail))
    assert len(present) == 7


def test_what_is_absent_stays_absent_and_everything_else_follows(batch: TargetBatch) -> None:
    flat = batch.flat()
    assert flat.token_ids.shape == (3 * T, K)
    assert torch.equal(flat.flat().entropy, batch.entropy.flatten())
    assert torch.equal(batch[1:].flat()[:3].certain, batch.certain.flatten()[T : T + 3])
    for other in (flat, batch[:2], batch.to("meta"), pickle.loads(pickle.dumps(batch))):
        assert tensors(other).keys() == tensors(batch).keys()
        assert other.codes is None


def test_a_loss_takes_the_rows_of_windows_to_the_device_of_its_labels(batch: TargetBatch) -> None:
    found = targets_of(member(), {"t": batch}, torch.zeros(3 * T, device="meta"))
    assert (found.token_ids.shape, found.token_ids.device.type) == ((3 * T, K), "meta")


def test_accelerate_moves_it_and_casts_nothing() -> None:
    inputs = {"labels": torch.zeros(2), "targets": {"t": stored(dense(1, 3), K, step=1 / 32)}}
    moved = send_to_device(inputs, torch.device("meta"), non_blocking=True)["targets"]["t"]
    assert {values.device.type for values in tensors(moved).values()} == {"meta"}
    dtypes = {name: values.dtype for name, values in tensors(inputs["targets"]["t"]).items()}
    assert {name: values.dtype for name, values in tensors(moved).items()} == dtypes
    assert repr(moved) == "TargetBatch([3] rows of 5 ids, codes, meta)"
