"""Stages of a pipeline: each a public command in a process of its own, so that its memory is freed at its end.

No stage outlives the pipeline. Ctrl-C, SIGTERM or a closed terminal ends the stages first, which keep what they have
done; where the pipeline itself is killed, they end themselves (`student.lifeline`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from storage.errors import InputError
from student.lifeline import Lifeline

# `cache-logits` finishes the shard that it is at.
_GRACE_SECONDS = 30.0
_LAST_LINES_SECONDS = 5.0
_STOPPED = 1


@dataclass(frozen=True)
class Cost:
    """An estimate: `products` in multiply-adds (2 FLOPs each), text to read, peak memory, disk that stays in use."""

    products: float = 0.0
    text_bytes: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Stage:
    """A command and its purpose.

    cost     what it is estimated to take, besides the start of its process
    makes    a file that marks the stage as done, if the command does not detect that itself
    beside   neighbouring stages of one such name do not need each other and may run side by side
    """

    title: str
    command: tuple[str, ...]
    cost: Cost = Cost()
    makes: Path | None = None
    beside: str | None = None

    @property
    def line(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(self.command)


class Pipeline:
    """Stages to run in order.

    again    the remedy that the error of a failed stage ends with
    at_once  how many stages may run side by side
    threads  of each stage that may run beside others, unless OMP_NUM_THREADS is set
    held     descriptors that the stages inherit: locks that are released when the last of them has ended
    """

    def __init__(
        self, stages: Sequence[Stage], again: str, at_once: int = 1, threads: int = 1, held: tuple[int, ...] = ()
    ) -> None:
        self.stages, self.again, self._at_once, self._threads, self._held = stages, again, at_once, threads, held
        self._running: list[_Running] = []
        self._asked_to_stop = False

    def run(self) -> None:
        """Run the stages. The output of the last goes to stdout; that of the others is progress, and goes to stderr.

        Every command resumes where it stopped and repeats no finished work, so stages can be run again. No stage is
        left running. Raises InputError with the exit status of a stage that fails, which has printed the reason, and
        SystemExit with status 1 where a signal asked to stop.
        """
        groups = itertools.groupby(
            [(n, stage) for n, stage in enumerate(self.stages, 1) if stage.makes is None or not stage.makes.exists()],
            lambda item: item[1].beside or item[0],
        )
        with contextlib.closing(Lifeline()) as lifeline, self._signals(), contextlib.ExitStack() as at_the_end:
            at_the_end.callback(self._end_all)
            for _, group in groups:
                self._run_group(list(group), lifeline)

    def _run_group(self, waiting: list[tuple[int, Stage]], lifeline: Lifeline) -> None:
        shared = min(self._at_once, len(waiting)) > 1
        while waiting or self._running:
            while waiting and len(self._running) < self._at_once:
                self._start(*waiting.pop(0), lifeline, shared)
            time.sleep(0.02)
            # Before the stages, which Ctrl-C reaches as well, are found to have failed.
            if self._asked_to_stop:
                _say(f"error: interrupted: what is finished is kept; {self.again}")
                raise SystemExit(_STOPPED)
            for one in list(self._running):
                if (status := one.process.poll()) is not None:
                    self._running.remove(one)
                    one.finish()
                    if status:
                        raise InputError(f"{one.stage.line} ended with status {status}: see above, then {self.again}")

    def _start(self, number: int, stage: Stage, lifeline: Lifeline, shared: bool) -> None:
        name, *arguments = stage.command
        program = Path(sysconfig.get_path("scripts")) / name
        if not program.exists():
            raise InputError(f"{program} is not installed: install logit-cache in this environment")
        _say(f"[{number}/{len(self.stages)}] {stage.title}")
        variables = {**os.environ, **lifeline.variables()}
        if stage.beside is not None and self._at_once > 1:
            # Also where it is the last one left: the number of threads changes the last digits of a result.
            variables.setdefault("OMP_NUM_THREADS", str(self._threads))
        output: dict[str, Any] = {} if number == len(self.stages) else {"stdout": sys.stderr}
        if shared:
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            [str(program), *arguments], env=variables, pass_fds=(lifeline.descriptor, *self._held), **output
        )
        self._running.append(_Running(stage, process, f"[{number}] "))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP (a closed terminal) ask to stop, unless they are ignored (nohup)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._asked_to_stop:
                for one in self._running:
                    one.process.kill()
            self._asked_to_stop = True

        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {one: signal.signal(one, stop) for one in wanted if signal.getsignal(one) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _end_all(self) -> None:
        for running in self._running:
            running.process.terminate()
        latest = time.monotonic() + _GRACE_SECONDS
        for running in self._running:
            try:
                running.process.wait(max(0.0, latest - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            running.finish()
        self._running.clear()


class _Running:
    """A stage's process; where it has neighbours, its lines are marked with its number."""

    def __init__(self, stage: Stage, process: subprocess.Popen[bytes], mark: str) -> None:
        self.stage, self.process = stage, process
        self._copier: threading.Thread | None = None
        if process.stdout is not None:
            self._copier = threading.Thread(target=_copy_lines, args=(process.stdout, mark), daemon=True)
            self._copier.start()

    def finish(self) -> None:
        """Print the last lines of a process that has ended."""
        if self._copier is not None:
            self._copier.join(_LAST_LINES_SECONDS)


def _copy_lines(lines: IO[bytes], mark: str) -> None:
    with lines:
        for line in lines:
            _say(f"{mark}{line.decode(errors='replace').rstrip()}")


def _say(line: str) -> None:
    # One write, as the neighbours write to the same stream; a closed terminal takes none.
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
