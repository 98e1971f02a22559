"""The log of a running job: lines for people, or one JSON object per line for log collectors.

Both go to stderr; stdout belongs to a command's result. As text, normal progress is the bar or the lines of
`storage.progress`, and only problems are logged beside it. As JSON, every event is logged, progress included::

    {"time": "2026-01-02T03:04:05.678+00:00", "event": "shard", "entry": "llama", "shard": 7, "worker": "0", …}

Events: start, rank, worker, shard, progress, retry, given up, worker lost, waiting for others, waiting for room, queue,
stopping, end.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from storage.progress import Lines, progress

LogFormat = Literal["text", "json"]


class JobLog:
    """The log of a job; `fields` are part of every JSON line."""

    def __init__(self, form: LogFormat = "text", **fields: Any) -> None:
        self._form, self._fields = form, fields

    def event(self, name: str, text: str, **fields: Any) -> None:
        """Log an event. As text it is the line `text`, or nothing where that is empty."""
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
            lines = _JSONLines(self, description, total, unit, done)
            yield lines.advance
            lines.write(final=True)
        else:
            with progress(description, total, unit, done) as advance:
                yield advance


class _JSONLines(Lines):
    def __init__(self, log: JobLog, task: str, total: int | None, unit: str, done: int) -> None:
        super().__init__(task, total, unit, done)
        self._log = log

    def _emit(self, rate: float, final: bool) -> None:
        fields = {"task": self._description, "done": self._done, "total": self._total, "unit": self._unit}
        self._log.event("progress", "", **fields, per_second=round(rate, 1))
