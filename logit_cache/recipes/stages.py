"""Stages of a pipeline: each a public command in a process of its own, so that its memory is freed at its end.

No stage outlives the pipeline. Ctrl-C, SIGTERM or a closed terminal ends the stages first, which keep what they have
done; where the pipeline itself is killed, the kernel closes its end of a pipe, and the stages end themselves
(`student.cli_command`).
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
from student.cli_command import ENDS_WITH

# `cache-logits` finishes the shard that it is at.
_GRACE_SECONDS = 30.0
_LAST_LINES_SECONDS = 5.0
_STOPPED = 1


@dataclass(frozen=True)
class Stage:
    """A command and its purpose.

    makes    a file that marks the stage as done, if the command does not detect that itself
    beside   neighbouring stages of one such name do not need each other and may run side by side
    """

    title: str
    command: tuple[str, ...]
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
        # Nothing is written to the pipe: the stages wait for its end.
        lifeline, ours = os.pipe()
        try:
            with _signals_raise(), self._none_left_running():
                for _, group in groups:
                    self._run_group(list(group), lifeline)
        finally:
            os.close(lifeline)
            os.close(ours)

    def _run_group(self, waiting: list[tuple[int, Stage]], lifeline: int) -> None:
        shared = min(self._at_once, len(waiting)) > 1
        while waiting or self._running:
            while waiting and len(self._running) < self._at_once:
                self._start(*waiting.pop(0), lifeline, shared)
            for one in list(self._running):
                if (status := one.process.poll()) is not None:
                    self._running.remove(one)
                    one.finish()
                    if status:
                        raise InputError(f"{one.stage.line} ended with status {status}: see above, then {self.again}")
            time.sleep(0.02)

    def _start(self, number: int, stage: Stage, lifeline: int, shared: bool) -> None:
        name, *arguments = stage.command
        program = Path(sysconfig.get_path("scripts")) / name
        if not program.exists():
            raise InputError(f"{program} is not installed: install logit-cache in this environment")
        print(f"[{number}/{len(self.stages)}] {stage.title}", file=sys.stderr, flush=True)
        variables = {**os.environ, ENDS_WITH: str(lifeline)}
        if stage.beside is not None and self._at_once > 1:
            # Also where it is the last one left: the number of threads changes the last digits of a result.
            variables.setdefault("OMP_NUM_THREADS", str(self._threads))
        output: dict[str, Any] = {} if number == len(self.stages) else {"stdout": sys.stderr}
        if shared:
            output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            [str(program), *arguments], env=variables, pass_fds=(lifeline, *self._held), **output
        )
        self._running.append(_Running(stage, process, f"[{number}] "))

    @contextlib.contextmanager
    def _none_left_running(self) -> Iterator[None]:
        try:
            yield
        except SystemExit:
            print(f"asked to stop: what is done is kept; {self.again}", file=sys.stderr, flush=True)
            raise
        finally:
            for one in self._running:
                one.process.terminate()
            latest = time.monotonic() + _GRACE_SECONDS
            for one in self._running:
                try:
                    one.process.wait(max(0.0, latest - time.monotonic()))
                except subprocess.TimeoutExpired:
                    one.process.kill()
                    one.process.wait()
                one.finish()
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
            # One write, as the neighbours write to the same stream.
            sys.stderr.write(f"{mark}{line.decode(errors='replace').rstrip()}\n")


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """The first SIGTERM or SIGHUP (a closed terminal) raises SystemExit; not where it is ignored (nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for one in wanted:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(_STOPPED)

    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
