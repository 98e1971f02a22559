"""SIGTERM: a worker finishes the shard that it is at if that can be done in time, and lets go of it otherwise.

Batch systems and clouds send SIGTERM some time before they kill: Slurm and Kubernetes 30 seconds, most spot markets 30
to 120. Within `grace_seconds` of the signal the process has ended, whatever it was doing: what is being committed then
is either committed or will be done again, as after any kill.
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
# The part of the grace that is kept for committing what was computed.
_FOR_THE_COMMIT = 0.3

EXIT_STATUS = 1
"""Of a command that was asked to stop before its work was done."""


class Stopped(BaseException):
    """The work was asked to stop, and would not be done in time. No error, so nothing that handles errors sees it."""


class Stopping:
    """Whether this process was asked to stop, and until when it may go on."""

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self.grace_seconds = grace_seconds
        self.wanted = False
        self.asked_at = 0.0
        self._began = time.monotonic()
        self._last_resort: threading.Timer | None = None

    def begin(self) -> float:
        """The time, monotonic, at which a shard is begun; `check` judges by it."""
        self._began = time.monotonic()
        return self._began

    def check(self, share: float) -> None:
        """Raise `Stopped` if a stop was asked for and what is done to this share now will not be done in time."""
        if not self.wanted:
            return
        now = time.monotonic()
        left = (now - self._began) * (1.0 / share - 1.0) if share > 0 else float("inf")
        if now + left > self.asked_at + (1.0 - _FOR_THE_COMMIT) * self.grace_seconds:
            raise Stopped

    def ask(self) -> None:
        """Ask for a stop, as the signal does. The process ends in `grace_seconds` at the latest."""
        if self.wanted:
            return
        self.wanted, self.asked_at = True, time.monotonic()
        self._last_resort = threading.Timer(self.grace_seconds, self._end)
        self._last_resort.daemon = True
        self._last_resort.start()

    @contextlib.contextmanager
    def on_sigterm(self) -> Iterator[Stopping]:
        """While the body runs, SIGTERM asks for a stop. Does nothing outside a process's main thread."""
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
