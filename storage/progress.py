"""Progress for people: a bar on a terminal, a log line every 10 seconds elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from storage.text import duration, size

Advance = Callable[[int], None]  # number of units done since the last call
Log = Callable[[str], None]  # receives one line for a person
Track = Callable[[str, int | None, str], AbstractContextManager[Advance]]  # description, total, unit → advance

_SECONDS_BETWEEN_LINES = 10.0


def silent(line: str) -> None:
    """A `Log` that drops its lines: nobody asked for them, or another process writes them."""
    del line


def to_stderr(line: str) -> None:
    """A `Log` that prints its lines on stderr, as commands do."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def untracked(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A `Track` that shows nothing."""
    del description, total, unit
    yield lambda count: None


@contextmanager
def progress(description: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Yields `advance(count)`. Shows the part done, `unit`/s of this run, and the time left."""
    if sys.stderr.isatty():
        with _bar(description, total, unit, done) as advance:
            yield advance
    else:
        lines = TextLines(description, total, unit, done)
        yield lines.advance
        lines.write(final=True)


@contextmanager
def _bar(description: str, total: int | None, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(TextColumn):
        def __init__(self) -> None:
            super().__init__("")

        def render(self, task: Task) -> Text:
            return Text(f"{_amount(task.speed, unit)}/s" if task.speed else f"… {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class Lines(ABC):
    """Progress of a job that runs without a terminal, written every 10 seconds by a subclass."""

    def __init__(self, description: str, total: int | None, unit: str, done: int) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._since = done, 0
        self._began = self._last = time.monotonic()

    def advance(self, count: int) -> None:
        """Count more units as done, and write if 10 seconds have passed since the last line."""
        self._done += count
        self._since += count
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self.write()

    def write(self, *, final: bool = False) -> None:
        """Write the progress so far; `final` at the end."""
        self._last = time.monotonic()
        self._emit(self._since / max(self._last - self._began, 1e-9), final)

    @abstractmethod
    def _emit(self, rate: float, final: bool) -> None:
        """Write the progress so far, at `rate` units per second of this run."""


class TextLines(Lines):
    def _emit(self, rate: float, final: bool) -> None:
        line = f"{self._description}: "
        if self._total:
            done = _amount(self._done, self._unit).removesuffix(f" {self._unit}")
            line += f"{done} of {_amount(self._total, self._unit)} ({100 * self._done / self._total:.0f} %)"
        else:
            line += _amount(self._done, self._unit)
        if self._since:
            line += f", {_amount(rate, self._unit)}/s"
            if self._total and not final:
                line += f", {duration((self._total - self._done) / rate)} left"
        print(line, file=sys.stderr, flush=True)


def _amount(count: float, unit: str) -> str:
    return size(count) if unit == "bytes" else f"{count:,.0f} {unit}"
