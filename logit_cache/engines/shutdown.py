"""SIGTERM drains a worker: it finishes its current shard if the grace period allows, and drops it otherwise.

Batch systems and clouds send SIGTERM some time before SIGKILL: Slurm and Kubernetes 30 seconds, most spot markets 30
to 120. The process ends within `grace_seconds` of the signal, whatever it is doing: a shard whose commit is under way
is then either committed or built again later, as after any kill.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 25.0
# The part of the grace period that is reserved for committing a computed shard.
_COMMIT_SHARE = 0.3

EXIT_STATUS = 1
"""Exit status of a command that was asked to stop before its work was done."""


class Stopped(BaseException):
    """A stop was requested, and the shard would not be done in time. No `Exception`, so no error handler catches it."""


class Stopping:
    """Whether this process was asked to stop, and how long it may continue."""

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self.grace_seconds = grace_seconds
        self.wanted = False
        self.asked_at = 0.0
        self._began = time.monotonic()
        self._last_resort: threading.Timer | None = None

    def begin(self) -> float:
        """Start the clock of a shard, for `check`; returns the time (`time.monotonic`)."""
        self._began = time.monotonic()
        return self._began

    def check(self, share: float) -> None:
        """Raise `Stopped` if a stop was requested and a shard, of which `share` (0 to 1) is done, would be late."""
        if not self.wanted:
            return
        now = time.monotonic()
        left = (now - self._began) * (1.0 / share - 1.0) if share > 0 else float("inf")
        if now + left > self.asked_at + (1.0 - _COMMIT_SHARE) * self.grace_seconds:
            raise Stopped

    def ask(self) -> None:
        """Request a stop, as the signal does. The process ends in `grace_seconds` at the latest."""
        if self.wanted:
            return
        self.wanted, self.asked_at = True, time.monotonic()
        self._last_resort = threading.Timer(self.grace_seconds, self._end)
        self._last_resort.daemon = True
        self._last_resort.start()

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[Stopping]:
        """While the body runs, SIGTERM requests a stop. Does nothing outside a process's main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def handle(number: int, frame: FrameType | None) -> None:
            self.ask()

        before = signal.signal(signal.SIGTERM, handle)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._last_resort is not None:
                self._last_resort.cancel()

    def _end(self) -> None:
        print(f"error: not done {self.grace_seconds:g} seconds after SIGTERM: ended", file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)
