"""Work that overlaps the computation of a job: copies of rows to the host, and the commit of the previous shard.

::

    computation   | windows -> logits -> rows | windows -> logits -> rows | …     the caller's thread, the device
    HostCopies        rows to the host             rows to the host               a stream of its own, pinned memory
    Committer                     encode, compress, publish, receipt              a thread, and encoders

Both are bounded: a few batches of rows, and one shard. So a killed job loses the shard that it computes and, if it is
still being written, the one before it. The stored bytes do not depend on this overlap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent import futures
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from storage.cache.writer import EntryWriter
from storage.format.manifest.receipts import ShardReceipt
from storage.format.targets import SparseTargets
from teachers.reduction.reduce import ReducedRows

# Batches of rows between the device and the shard's arrays: enough for one to be computed, one copied, one stored.
_MOST_IN_FLIGHT = 4
_SECONDS_BETWEEN_RENEWALS = 10.0

Put = Callable[[NDArray[Any], ReducedRows], None]


class HostCopies:
    """Passes rows that were reduced on a device to `put`, on the host, in order; `finish` passes the last ones.

    On a CPU at once. On a CUDA device they are copied on a separate stream while the next ones are computed.
    """

    def __init__(self, device: torch.device, put: Put) -> None:
        self._put = put
        cuda: Any = torch.cuda  # parts of it have no types
        self._stream = cuda.Stream(device) if device.type == "cuda" else None
        self._event = cuda.Event
        self._waiting: deque[tuple[NDArray[Any], ReducedRows, Any]] = deque()

    def add(self, position: NDArray[np.int64], rows: ReducedRows) -> None:
        """Start the copy of the rows of some positions, int64 [R]."""
        if self._stream is None:
            self._put(position, rows.each(torch.Tensor.cpu))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            on_host = rows.each(partial(_pinned, stream=self._stream))
            copied = self._event()
            copied.record(self._stream)
        self._waiting.append((position, on_host, copied))
        while len(self._waiting) > _MOST_IN_FLIGHT:
            self._hand_over()

    def finish(self) -> None:
        """Wait for the copies in flight, and pass their rows on."""
        while self._waiting:
            self._hand_over()

    def _hand_over(self) -> None:
        position, rows, copied = self._waiting.popleft()
        copied.synchronize()
        self._put(position, rows)


def _pinned(value: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    """An asynchronous copy into pinned host memory, on the current stream."""
    if value.dtype == torch.int64:
        value = value.to(torch.int32)  # ids and counts: half the bytes to copy
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)  # torch reuses pinned memory
    copy.copy_(value, non_blocking=True)
    value.record_stream(stream)
    return copy


class Committer:
    """Commits shards in a background thread, one after the other.

    `put` returns when the previous shard has its receipt, so at most one commit is in flight. An error of a commit is
    raised by the next `put` or by `wait`. `close` finishes a commit in flight, whose shard is complete and worth
    keeping.
    """

    def __init__(self, writer: EntryWriter) -> None:
        self._writer = writer
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: futures.Future[ShardReceipt] | None = None

    def put(self, shard: int, targets: SparseTargets, began: float) -> None:
        """Start the commit of a shard (`EntryWriter.commit`) after waiting for the previous one."""
        self.wait()
        self._running = self._pool.submit(self._writer.commit, shard, targets, began)

    def wait(self) -> ShardReceipt | None:
        """Wait for the last commit; its receipt, or None if there is none or it was returned before.

        The writer's leases are renewed meanwhile: an upload may take longer than they last.
        """
        running, self._running = self._running, None
        if running is None:
            return None
        while not futures.wait([running], timeout=_SECONDS_BETWEEN_RENEWALS).done:
            self._writer.leases.keep()
        return running.result()

    def close(self) -> None:
        """End the thread after the commit in flight."""
        self._pool.shutdown(wait=True)
