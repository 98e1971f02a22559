"""Workers as processes of this machine: one for each GPU, or as many as requested.

Each process has a replica of the teacher and a pipe to its parent, which carries requests for turns one way and what
became of them the other. One that is killed, or runs out of memory, is replaced; one whose parent is gone ends at the
next batch.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.engines.driver import Event, Gone, Ready, Reported
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import Worker, or_error, traceback_of
from logit_cache.engines.worker_index import Rank
from storage.errors import LogitCacheError

_Message = tuple[str, Any]
_GRACE_SHARE = 0.9


@dataclass
class _Child:
    process: Any  # a multiprocessing.Process of the spawn context
    pipe: Connection
    busy: bool = True  # from its start until it is ready, and while it takes a turn


class LocalPool:
    """`workers` processes that build shards of a job; a context manager, which ends them.

    devices: assigned to the workers in turn; fewer than workers are shared. threads: of torch, for each worker.
    """

    def __init__(
        self, job: CacheJob, workers: int, devices: Sequence[str], threads: int, options: EngineOptions
    ) -> None:
        self.workers = workers
        self._job, self._devices, self._threads, self._options = job, list(devices), threads, options
        self._grace = options.grace_seconds
        self._context = multiprocessing.get_context("spawn")
        self._children: dict[str, _Child] = {}
        self._checked = False
        self._made = 0
        self._concluded: dict[str, LogitCacheError | None] = {}

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        if kind is KeyboardInterrupt:
            self.stop()  # rather than killed: what multiprocessing holds for a process is then released without a word
        for child in self._children.values():
            child.pipe.close()
        # Idle workers end by themselves. Nobody needs what a busy one is doing, and one that hangs would not end.
        for child in self._children.values():
            if kind is not KeyboardInterrupt and (kind is not None or child.busy):
                child.process.kill()
            self._join(child)
        self._children.clear()

    def start(self, rank: int) -> str:
        name = str(rank) if self._made < self.workers else f"{rank}.{self._made}"
        self._made += 1
        ours, theirs = self._context.Pipe()
        device = self._devices[rank % len(self._devices)]
        job = self._job.model_copy(update={"device": device})
        process = self._context.Process(
            target=_serve,
            args=(theirs, job, self._threads, self._options, Rank(rank, self.workers), self._checked),
            daemon=True,
            name=f"worker-{name}",
        )
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(self._threads)
        # Ctrl-C reaches the whole process group; the parent decides whether to stop. What is blocked is inherited, and
        # ignored by `_serve`; the tracker, which the first process starts otherwise, unblocks it.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self._children[name] = _Child(process, ours)
        return name

    def turn(self, worker: str, given_up: Collection[int]) -> None:
        self._children[worker].busy = True
        self._send(worker, ("turn", given_up))

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        self._send(worker, ("conclude", fidelity_positions))
        while worker in self._children and worker not in self._concluded:
            for event in self.events(1.0):
                if isinstance(event, Gone) and event.worker == worker:
                    raise event.refusal or WorkersLost(f"worker {worker} is lost: {event.why.splitlines()[-1]}")
        error = self._concluded.pop(worker, None)
        if error is not None:
            raise error

    def events(self, timeout: float) -> Sequence[Event]:
        events: list[Event] = []
        by_pipe = {child.pipe: name for name, child in self._children.items()}
        for pipe in wait(list(by_pipe), timeout):
            name = by_pipe[pipe]  # type: ignore[index]
            child = self._children[name]
            try:
                kind, content = child.pipe.recv()
            except (EOFError, OSError):
                events.append(self._ended(name))
                continue
            child.busy = False
            if kind == "ready":
                self._checked = True
                events.append(Ready(name, *content))
            elif kind == "turn":
                events.append(Reported(name, content))
            elif kind == "concluded":
                self._concluded[name] = content
            else:
                events.append(self._ended(name, *content))
        return events

    def stop(self) -> None:
        """Pass SIGTERM on: each process knows how far its shard is."""
        for child in self._children.values():
            if child.process.is_alive():
                os.kill(child.process.pid, signal.SIGTERM)

    def _send(self, worker: str, message: _Message) -> None:
        with contextlib.suppress(OSError, ValueError):  # the worker is gone, and `events` finds its pipe closed
            self._children[worker].pipe.send(message)

    def _ended(self, name: str, why: str | None = None, refusal: LogitCacheError | None = None) -> Gone:
        child = self._children.pop(name)
        child.pipe.close()
        self._join(child)
        code = child.process.exitcode
        if why is None:
            signalled = code is not None and code < 0
            why = f"killed by {signal.Signals(-code).name}" if signalled else f"it ended with exit status {code}"
            if code == -signal.SIGKILL:
                why += " (out of memory, unless somebody killed it)"
        return Gone(name, why, refusal)

    def _join(self, child: _Child) -> None:
        child.process.join(self._grace)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()


def _serve(pipe: Connection, job: CacheJob, threads: int, options: EngineOptions, rank: Rank, checked: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if rank.index:
        # Warnings about the teacher are the same in all workers.
        logging.getLogger("teachers").setLevel(logging.ERROR)
    # A little less than the parent's, which has to receive the outcomes.
    stopping = Stopping(_GRACE_SHARE * options.grace_seconds)
    log = JobLog(options.log_format, cache=job.cache, entry=job.name)
    # A closed pipe means that the parent is gone, or needs nothing more.
    with stopping.on_sigterm(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        why, refusal = _answer(pipe, job, threads, stopping, log, rank, checked)
        pipe.send(("gone", (why, refusal)))


def _answer(
    pipe: Connection, job: CacheJob, threads: int, stopping: Stopping, log: JobLog, rank: Rank, checked: bool
) -> tuple[str, LogitCacheError | None]:
    """Open the job and answer requests until this worker ends; returns why it does, and the error for the user."""
    import torch

    torch.set_num_threads(threads)
    parent = os.getppid()

    def advance(count: int) -> None:
        if os.getppid() != parent:
            os._exit(1)

    try:
        with Worker.of_pool(job, rank, checked, stopping, advance) as worker:
            pipe.send(("ready", (worker.location, worker.has_share)))
            while True:
                while not (pipe.poll(0.2) or stopping.wanted):
                    pass
                if not stopping.wanted:
                    kind, content = pipe.recv()
                    if kind == "conclude":
                        pipe.send(("concluded", or_error(worker.conclude, content, log)))
                        continue
                # Asked to stop, it drops the shard that it has taken, and reports the one that is being committed.
                turn = worker.turn(() if stopping.wanted else content)
                pipe.send(("turn", turn))
                for item in turn.outcomes:
                    if item.state == "ended":
                        return item.error or "", item.cause
                if stopping.wanted and turn.taken is None:
                    return "it was asked to stop", None
    except LogitCacheError as error:
        return str(error), error
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        return traceback_of(error), None


def local_devices(job: CacheJob) -> list[str]:
    """Devices for the workers of this machine: each GPU, unless one device was requested.

    A teacher whose layers are spread over all devices is one worker.
    """
    device = job.device
    if device not in ("auto", "cuda") or job.device_map is not None:
        return [device]
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{number}" for number in range(count)] or (["cpu"] if device == "auto" else [device])


def threads_for(workers: int) -> int:
    """Torch threads of each of several workers on a CPU: OMP_NUM_THREADS, else an equal part of the cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)
