"""Errors on their way from one process to another."""

from __future__ import annotations

import pickle

import pytest

from storage.errors import CorruptCache, IdentityMismatch, InputError, LogitCacheError, StorageFull


@pytest.mark.parametrize(
    "error",
    [
        InputError("job.yaml: k is missing"),
        CorruptCache("kept/c/1: its checksum differs"),
        StorageFull("no space left"),
        IdentityMismatch("teachers/a", ["k: 8 and 9", "seed: 1 and 2"], "Give another --name"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_it_was_raised(error: LogitCacheError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert (str(arrived), vars(arrived)) == (str(error), vars(error))
