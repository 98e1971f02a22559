"""Processes that start with everything imported: children of one server that has imported it.

A console script spends three seconds of a processor on importing torch; a test that kills one ten times, thirty. Here a
process is forked from a server (`multiprocessing`'s forkserver) that has no thread but its own, and begins with the
command's work. All else is that of a process: its environment, its folder, its exit status, and the signals it gets.
What depends on the start itself, on arguments that others can read or on variables read at import is for the installed
scripts: the fixture `installed`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest.mock
import weakref
from collections.abc import Iterator, Mapping
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from support.commands import COMMANDS, PYTHONPATH, environment

_IMPORTED = (
    "support.processes", "torch", "torch.distributed", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "transformers.trainer", "accelerate", "zarr", "s3fs", "tokenizers",
    "logit_cache.engines.this_machine", "logit_cache.engines.tensor_parallel", "logit_cache.fidelity.measure",
    "logit_cache.sharing.push_pull", "student.training.run", "student.sweep.run", "teachers.live",
    "teachers.huggingface.teacher",
)  # fmt: skip
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(_IMPORTED))


class Process:
    """A running process, used as a `subprocess.Popen`; what it prints goes into two files without names."""

    def __init__(self, words: list[str], code: str | None, cwd: Path | None, variables: Mapping[str, str]) -> None:
        self.args = words
        self._printed = [_unnamed_file() for _ in range(2)]
        for descriptor in self._printed:
            weakref.finalize(self, os.close, descriptor)
        with unittest.mock.patch.dict(os.environ, {**environment(), "PYTHONPATH": PYTHONPATH}):
            # The server starts with the first process, and imports with these variables.
            self._process = _CONTEXT.Process(
                target=_run,
                args=(words, code, str(cwd or Path.cwd()), {**environment(), **variables}, _Outputs(self._printed)),
            )
            self._process.start()
        _STARTED.add(self)
        self.pid = int(self._process.pid or 0)
        # Its first act is a group of its own, so that all that it starts can be killed with it.
        while self.poll() is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self) -> int | None:
        """The exit status, minus the signal that ended it, or None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = 300) -> int:
        """Its exit status, at its end."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout, *self.output())
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill this process alone."""
        self.send_signal(signal.SIGKILL)

    def output(self) -> tuple[str, str]:
        """What it has printed so far: stdout, stderr."""
        out, error = (self._read(number, 0) for number in range(2))
        return out.decode(), error.decode()

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """What it printed and its exit status, at its end."""
        return subprocess.CompletedProcess(self.args, self.wait(timeout), *self.output())

    def error_lines(self) -> Iterator[str]:
        """The lines of stderr as they come, until its end."""
        at = 0
        while True:
            ended = self.poll() is not None
            data = self._read(1, at)
            whole = data if ended else data[: data.rfind(b"\n") + 1]
            at += len(whole)
            yield from whole.decode().splitlines(keepends=True)
            if ended:
                return
            if not whole:
                time.sleep(0.002)

    def _read(self, number: int, at: int) -> bytes:
        # The file's position is the writer's.
        descriptor = self._printed[number]
        return os.pread(descriptor, os.fstat(descriptor).st_size - at, at)


_STARTED: weakref.WeakSet[Process] = weakref.WeakSet()


@atexit.register
def _kill_what_is_left() -> None:
    """multiprocessing waits for its children at the end: for ever, for one that a failed test has left running."""
    for process in _STARTED:
        process.kill()


def start(*arguments: object, cwd: Path | None = None, **variables: str) -> Process:
    """Start a console script's command with its arguments."""
    return Process(list(map(str, arguments)), None, cwd, variables)


def start_code(code: str, *words: object, cwd: Path | None = None, **variables: str) -> Process:
    """Start Python code with these `sys.argv[1:]`."""
    return Process(["-c", *map(str, words)], code, cwd, variables)


class _Outputs:
    """Open files on their way to a new process."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        return (list, (tuple(map(DupFd, self._descriptors)),))


def _unnamed_file() -> int:
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    return descriptor


def _run(words: list[str], code: str | None, folder: str, variables: dict[str, str], outputs: list[Any]) -> None:
    """What a process does, from its first step to its exit."""
    os.setsid()
    for number, passed in enumerate(outputs, start=1):
        os.dup2(passed.detach(), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = words
    if code is None:
        COMMANDS[words[0]].main(words[1:], prog_name=words[0])
    else:
        exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
