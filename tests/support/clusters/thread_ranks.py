"""Ranks that are threads of this process, for tests of sharded teachers without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from teachers.ranks import Ranks

Result = TypeVar("Result")


class ThreadRanks(Ranks):
    """One of `size` threads that exchange objects through a shared list, the board."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._board, self._barrier = board, barrier
        self.sent = 0  # bytes that this rank gave to collective operations

    def objects(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found

    def gather(self, value: Tensor) -> Tensor:
        self.sent += value.numel() * value.element_size()
        values = self.objects(value.clone())
        assert len({(each.shape, each.dtype) for each in values}) == 1, "ranks gather one shape and dtype"
        return torch.stack(values)

    def maximum(self, value: Tensor) -> Tensor:
        return self.gather(value).amax(0)


def on_ranks(size: int, work: Callable[[ThreadRanks], Result]) -> list[Result]:
    """The result of each rank; a rank that fails ends the others. Raises the first error that is no broken barrier."""
    board: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=60)

    def one(rank: int) -> Result:
        try:
            return work(ThreadRanks(rank, size, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        running = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for each in running if (error := each.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return [each.result() for each in running]
