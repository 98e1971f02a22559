"""Workers as actors of a Ray cluster: one for each GPU, wherever it is (extra `ray`).

Ray places the actors, and tells when one is lost; which shard comes next and what is tried again is for
`logit_cache.engines.driver`. An actor holds its teacher as long as it lives. It is never restarted by Ray: one whose
process or node is gone, or whose device is broken, is replaced by a new one, which Ray may place elsewhere.

Payloads are the job's fields, numbers of shards and what became of them: no credentials, which every node has to have
by the usual ways. With RAY_AUTH_MODE=token only who holds the cluster's token can make it run code.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.status import Survey
from logit_cache.engines.driver import Event, Gone, Ready, Reported, WorkersLost
from logit_cache.engines.options import EngineOptions
from storage.errors import InputError, LogitCacheError

# After how long a wait for room it is told, and how often again. A process needs some of it to begin.
_ROOM_SECONDS = 30.0
_ROOM_AGAIN_SECONDS = 300.0
# The part of the grace that the actors have: the rest is for the way of their answers, and for leaving the cluster.
_OF_THE_ACTORS = 0.8
# How long an actor that did not come to open the job holds up the next one, at first and at most: of a node on which
# none can, there would be hundreds.
_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
# What an actor is asked when it is new.
_MAKING = ("begin", "open")


class RayPool:
    """Actors that build shards of a job; a context manager, which ends them.

    As many as `options.workers`, else one for each GPU of the cluster, or for each node where there is none; but no
    more than have something to do. alone: the cluster is this machine. Raises InputError where that can never have
    an actor.
    """

    def __init__(self, job: CacheJob, options: EngineOptions, log: JobLog, found: Survey, alone: bool = False) -> None:
        import ray

        self._ray: Any = ray
        self._job, self._options, self._log = job, options, log
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        self._on_gpu = job.device.startswith("cuda") or (job.device == "auto" and gpus > 0)
        if self._on_gpu:
            # Of the GPUs, an actor sees the one that Ray gave it, whatever its number.
            self._job = job.model_copy(update={"device": "cuda"})
        elif job.device == "auto":
            self._job = job.model_copy(update={"device": "cpu"})
        roomy = sum(self._fits(node) for node in nodes)
        if alone and not roomy:
            cpus = sum(int(node.get("CPU", 0)) for node in nodes)
            raise InputError(
                f"a worker needs {self._need()}, and Ray finds {cpus} CPU(s) and {gpus} GPU(s) on this machine: give "
                f"other --worker-cpus or --device, or with --ray-address a cluster that has them"
            )
        self.workers = found.workers(options.workers or (gpus if self._on_gpu else roomy) or 1)
        # So that an actor hears that it has to stop while it builds. All else is done one after the other.
        self._actor_class = self._ray.remote(concurrency_groups={"control": 1})(_Actor)
        self._actors: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}  # of actors that are there
        self._calls: dict[Any, tuple[str, str]] = {}
        self._unreported: set[str] = set()
        self._made = 0
        self._surveyed = False
        self._later: dict[str, float] = {}
        self._pause = 0.0
        self._tell_at = time.monotonic() + _ROOM_SECONDS

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        self._actors.clear()
        self._calls.clear()

    def start(self) -> str:
        """Ask for an actor; it is there when Ray has found room for it."""
        name = str(self._made)
        self._made += 1
        self._later[name] = time.monotonic() + self._pause
        if not self._pause:
            self._make_due()
        return name

    def build(self, worker: str, shard: int) -> None:
        """Put a shard into an actor's queue."""
        self._call(worker, "build", shard)

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        """Have an actor write the index of receipts and the fidelity report of a complete entry.

        Raises what goes wrong there, and WorkersLost where it is lost meanwhile.
        """
        try:
            answer = self._ray.get(self._actors[worker].conclude.remote(fidelity_positions))
        except self._ray.exceptions.RayError as error:
            raise WorkersLost(f"worker {worker} was lost before the entry was concluded: {_reason(error)}") from None
        if answer is not None:
            raise answer

    def stop(self) -> None:
        """Tell every actor; what it says of its shards is still to be heard."""
        self._later.clear()
        for actor in self._actors.values():
            actor.stop.options(concurrency_group="control").remote()

    def events(self, timeout: float) -> Sequence[Event]:
        """What the actors have answered."""
        self._make_due()
        self._tell_of_room()
        told: list[Event] = []
        calls = list(self._calls)
        if not calls:
            time.sleep(timeout)
            return told
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in ready:
            if call in self._calls:  # those of an actor that was found to be gone are forgotten
                worker, kind = self._calls.pop(call)
                told += self._received(worker, kind, call)
        for worker in [name for name in self._unreported if not self._has_work(name)]:
            self._unreported.discard(worker)
            self._call(worker, "finish")
        return told

    def _make_due(self) -> None:
        now = time.monotonic()
        for name in [name for name, due in self._later.items() if due <= now]:
            del self._later[name]
            self._make(name)

    def _make(self, name: str) -> None:
        self._actors[name] = self._actor_class.options(
            num_cpus=self._options.worker_cpus,
            num_gpus=1 if self._on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        ).remote(self._job.model_dump(mode="json"), self._options.grace_seconds * _OF_THE_ACTORS, os.getcwd())
        self._call(name, "begin")
        self._call(name, "open", not self._surveyed)

    def _received(self, worker: str, kind: str, call: Any) -> list[Event]:
        try:
            answer = self._ray.get(call)
        except Exception as error:  # its process or its node is gone, or what it did is a fault of ours
            return [self._lost(worker, error, unborn=kind in _MAKING)]
        if kind == "begin":
            self._nodes[worker] = answer
            return []
        if kind == "open":
            if isinstance(answer, LogitCacheError):
                return [self._gone(worker, str(answer), answer)]
            self._pause = 0.0
            pending, place = answer
            self._surveyed = True
            return [Ready(worker, tuple(pending), place)]
        if kind == "build":
            self._unreported.add(worker)
        told: list[Event] = [Reported(worker, tuple(answer))]
        ended = [item for item in answer if item.state == "ended"]
        if ended:
            told.append(self._gone(worker, ended[0].error or "", ended[0].cause))
        return told

    def _lost(self, worker: str, error: Exception, unborn: bool) -> Gone:
        reason = _reason(error)
        if unborn:
            self._pause = min(max(_PAUSE_SECONDS, 2 * self._pause), _LONGEST_PAUSE_SECONDS)
        # A process's end is told by its node, at once. When an actor is only "unavailable", the node says nothing.
        node = self._nodes.get(worker)
        alive = {found["NodeID"] for found in self._ray.nodes() if found["Alive"]}
        silent = isinstance(error, self._ray.exceptions.ActorUnavailableError) or "node has died" in str(error)
        if silent or (node is not None and node not in alive):
            return self._gone(worker, f"its node is gone, or cannot be reached: {reason}", None, blame=False)
        return self._gone(worker, reason, None)

    def _gone(self, worker: str, why: str, refusal: LogitCacheError | None, blame: bool = True) -> Gone:
        with contextlib.suppress(Exception):
            self._ray.kill(self._actors[worker])
        del self._actors[worker]
        self._nodes.pop(worker, None)
        self._unreported.discard(worker)
        self._calls = {call: item for call, item in self._calls.items() if item[0] != worker}
        return Gone(worker, why, refusal, blame)

    def _call(self, worker: str, method: str, *arguments: Any) -> None:
        self._calls[getattr(self._actors[worker], method).remote(*arguments)] = (worker, method)

    def _has_work(self, worker: str) -> bool:
        return any(name == worker for name, _ in self._calls.values())

    def _fits(self, resources: dict[str, float]) -> bool:
        """Whether an actor could be on a node with these."""
        gpus = 1 if self._on_gpu else 0
        return resources.get("CPU", 0) >= self._options.worker_cpus and resources.get("GPU", 0) >= gpus

    def _need(self) -> str:
        return f"{self._options.worker_cpus} CPU(s)" + (" and 1 GPU" if self._on_gpu else "")

    def _tell_of_room(self) -> None:
        """Say it when actors wait for room: the cluster may be busy, or grow; or it will never have what they need."""
        now, waiting = time.monotonic(), len(self._actors.keys() - self._nodes.keys())
        if not waiting:
            self._tell_at = now + _ROOM_SECONDS
        if now < self._tell_at:
            return
        self._tell_at = now + _ROOM_AGAIN_SECONDS
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        has = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s free" for kind in ("CPU", "GPU"))
        found = [self._fits(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]
        never = "" if any(found) else "; none of its nodes is large enough for one"
        text = f"{waiting} of {self.workers} workers wait for room: each needs {self._need()} of a node"
        text += f", the cluster has {has}{never}"
        self._log.event("waiting for room", text, workers=waiting, cluster=total, available=free)


class _Actor:
    """A worker in a process of its own, somewhere in the cluster."""

    def __init__(self, job: dict[str, Any], grace_seconds: float, folder: str) -> None:
        from logit_cache.engines.shutdown import Stopping

        self._job = job
        self._stopping = Stopping(grace_seconds)
        # Where there is such a folder here, on a shared disk, relative paths mean what they mean to who gave them.
        with contextlib.suppress(OSError):
            os.chdir(folder)

    def begin(self) -> str:
        """The node that this is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def open(self, survey: bool) -> Any:
        """Load the teacher and open the job: (shards that are missing, where this is), or the error to be raised.

        survey: whether to look which shards are missing, which is done once for a job.
        """
        from logit_cache.caching.prepare import open_job
        from logit_cache.engines.worker import Worker

        try:
            opened = open_job(CacheJob.model_validate(self._job))
            self._worker = Worker(opened, self._stopping)
            pending = self._worker.pending() if survey else []
        except LogitCacheError as error:
            return error
        place = {"host": socket.gethostname(), "pid": os.getpid(), "device": str(opened.teacher.device)}
        return pending, place | {"node": self.begin()}

    def build(self, shard: int) -> Any:
        """See `Worker.build`."""
        return self._worker.build(shard)

    def finish(self) -> Any:
        """See `Worker.finish`."""
        return self._worker.finish()

    def conclude(self, fidelity_positions: int) -> LogitCacheError | None:
        """See `Worker.conclude`; the error to be raised, if there is one."""
        try:
            self._worker.conclude(fidelity_positions)
        except LogitCacheError as error:
            return error
        return None

    def stop(self) -> None:
        """Ask the worker to stop, while it builds."""
        self._stopping.ask()


def _reason(error: Exception) -> str:
    """One line of what Ray says in many: the error of a task, or how a process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    told = [line for line in lines if line.startswith("The actor ") and line != lines[0]]
    return (told[0] if told else lines[-1])[:400]
