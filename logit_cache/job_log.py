"""What a job tells while it runs: lines for people, or one JSON object per line for whatever gathers logs.

Both go to stderr; stdout belongs to a command's result. As text, what goes well is the bar or the lines of
`logit_cache.progress`, and only what does not is told beside it. As JSON, all of it is, progress included::

    {"time": "2026-01-02T03:04:05.678+00:00", "event": "shard", "entry": "llama", "shard": 7, "worker": "0", …}

Events: start, worker, waiting for room, shard, progress, retry, given up, worker lost, stopping, end.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from logit_cache.progress import progress

LogFormat = Literal["text", "json"]

_SECONDS_BETWEEN_LINES = 10.0


class JobLog:
    """The log of a job; `fields` are part of every JSON line."""

    def __init__(self, form: LogFormat = "text", **fields: Any) -> None:
        self._form, self._fields = form, fields

    def event(self, name: str, text: str, **fields: Any) -> None:
        """Tell something. As text it is the line `text`, or nothing where that is empty."""
        if self._form == "json":
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = json.dumps({"time": now, "event": name, **self._fields, **fields}, default=str)
        elif text:
            line = text
        else:
            return
        print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(
        self, description: str, total: int | None, unit: str, done: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """Yields `advance(count)`, which shows the part done, the rate and the time left."""
        if self._form == "json":
            lines = _Lines(self, description, total, unit, done)
            yield lines.advance
            lines.write()
        else:
            with progress(description, total, unit, done) as advance:
                yield advance


class _Lines:
    def __init__(self, log: JobLog, task: str, total: int | None, unit: str, done: int) -> None:
        self._log, self._task, self._total, self._unit = log, task, total, unit
        self._done, self._since = done, 0
        self._began = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        self._since += count
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self.write()

    def write(self) -> None:
        self._last = time.monotonic()
        self._log.event(
            "progress",
            "",
            task=self._task,
            done=self._done,
            total=self._total,
            unit=self._unit,
            per_second=round(self._since / max(self._last - self._began, 1e-9), 1),
        )
