"""StoredBatch and TargetBatch: rows, decoding, absent fields, and their way through data loaders and accelerate."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from support.caches.small import dense_targets, make_corpus, make_entry
from support.references.dense_targets import dense, member, stored

from storage.format.manifest.entry import TeacherEntry
from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets
from student.loss.teacher_targets import targets_of
from student.target_batch import StoredBatch, TargetBatch

T, K, V = 4, 5, 11


def whole() -> SparseTargets:
    return dense_targets(np.random.default_rng(0).normal(size=(7, V)), K, np.append(np.arange(6), -1))


@pytest.fixture(scope="module", params=["codes", "float32"])
def entry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TeacherEntry:
    record = make_corpus(str(tmp_path_factory.mktemp("cache")), np.arange(7).astype(np.uint16), V)
    return make_entry(record, K, encoding=request.param)


@pytest.fixture
def batch(entry: TeacherEntry) -> StoredBatch:
    """Three windows of four rows: of two documents, of one at their end, of one in their middle."""
    rows = StoredTargets.of(entry, whole())
    return StoredBatch.of(
        [[rows.rows(0, 3), rows.rows(3, 4)], [rows.rows(4, 6)], [rows.rows(6, 7)]], T, [[0, 3], [2], [1]]
    )


def tensors(batch: Any) -> dict[str, torch.Tensor]:
    return {name: values for name, values in vars(batch).items() if values is not None}


def test_decoded_as_by_the_reader_and_rows_without_a_position_keep_no_id(
    entry: TeacherEntry, batch: StoredBatch
) -> None:
    found = batch.decoded()
    assert found.kept.tolist() == [[K] * 4, [0, 0, K, K], [0, K, 0, 0]]
    expected = StoredTargets.of(entry, whole()).decoded()
    present = found[found.kept > 0]
    assert len(present) == 7
    assert present.sequence.tolist() == [0, 0, 0, 1, 2, 2, 3], "a number for each document"
    for name, values in tensors(replace(present, sequence=None)).items():
        np.testing.assert_allclose(values.numpy(), getattr(expected, name), rtol=1e-6)


def test_everything_follows_rows_and_devices(batch: StoredBatch) -> None:
    flat = batch.flat()
    assert flat.arrays["token_ids"].shape == (3 * T, K)
    assert torch.equal(flat.flat().arrays["entropy"], batch.arrays["entropy"].flatten())
    assert torch.equal(batch[1:].flat()[:3].arrays["certain"], batch.arrays["certain"].flatten()[T : T + 3])
    for other in (flat, batch[:2], batch.to("meta")):
        assert other.arrays.keys() == batch.arrays.keys()


def test_what_is_absent_stays_absent() -> None:
    lean = TargetBatch(torch.zeros(2, K), torch.zeros(2), torch.zeros(2), torch.zeros(2, K))
    for other in (lean.flat(), lean[:1], lean.to("meta"), pickle.loads(pickle.dumps(lean))):
        assert tensors(other).keys() == tensors(lean).keys()


def test_a_loss_takes_the_rows_of_windows_to_the_device_of_its_labels(batch: StoredBatch) -> None:
    found = targets_of(member(), {"t": batch}, torch.zeros(3 * T, device="meta"))
    assert (found.token_ids.shape, found.token_ids.device.type) == ((3 * T, K), "meta")


def test_accelerate_moves_them_and_casts_nothing(batch: StoredBatch) -> None:
    inputs = {"labels": torch.zeros(2), "targets": {"t": stored(dense(1, 3), K), "s": batch}}
    moved = send_to_device(inputs, torch.device("meta"), non_blocking=True)["targets"]
    for found, before in ((tensors(moved["t"]), tensors(inputs["targets"]["t"])), (moved["s"].arrays, batch.arrays)):
        assert {values.device.type for values in found.values()} == {"meta"}
        assert {name: values.dtype for name, values in found.items()} == {
            name: values.dtype for name, values in before.items()
        }
    assert repr(moved["t"]) == "TargetBatch([3] rows of 5 ids, meta)"
    assert repr(moved["s"]) == f"StoredBatch([3, 4] rows of {', '.join(batch.arrays)}, meta)"
