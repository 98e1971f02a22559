"""Workers as actors of a Ray cluster: one for each GPU, on any node (extra `ray`).

Ray schedules the actors and reports when one is lost; replacements and retries are up to
`logit_cache.engines.driver`. An actor keeps its teacher loaded until it ends. It is never restarted by Ray: one whose
process or node is gone, or whose device is broken, is replaced by a new one, which Ray may put on another node.

Payloads are the job's fields, shard numbers and outcomes, without credentials, which every node must get in the usual
ways. With RAY_AUTH_MODE=token only holders of the cluster's token can make it run code.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Sequence
from typing import Any

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.survey import Survey
from logit_cache.engines.driver import Event, Gone, Ready, Reported
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker import Worker, or_error
from logit_cache.engines.worker_index import Rank
from storage.errors import InputError, LogitCacheError
from storage.text import counted

# A wait for room is logged after so many seconds, some of which a process needs to start, then at this interval.
_ROOM_SECONDS = 30.0
_ROOM_AGAIN_SECONDS = 300.0
# The actors' part of the grace period: the rest is for returning their outcomes and for leaving the cluster.
_GRACE_SHARE = 0.8
# Back-off after an actor that was lost before it had opened the job, at first and at most: on a node where none can,
# hundreds would be started.
_BACKOFF_SECONDS = 1.0
_LONGEST_BACKOFF_SECONDS = 60.0
# The first calls to a new actor.
_STARTUP = ("begin", "open")


class RayPool:
    """Actors that build shards of a job; a context manager, which ends them.

    As many as `options.workers`, else one for each GPU of the cluster, or for each node where it has no GPU; but no
    more than there are shards to build. alone: the cluster is this machine. Raises InputError where that can never
    run an actor.
    """

    def __init__(self, job: CacheJob, options: EngineOptions, log: JobLog, found: Survey, alone: bool = False) -> None:
        import ray

        self._ray: Any = ray
        self._job, self._options, self._log = job, options, log
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        self._on_gpu = job.device.startswith("cuda") or (job.device == "auto" and gpus > 0)
        if self._on_gpu:
            # An actor sees only the GPU that Ray assigned to it, whatever its number.
            self._job = job.model_copy(update={"device": "cuda"})
        elif job.device == "auto":
            self._job = job.model_copy(update={"device": "cpu"})
        roomy = sum(self._fits(node) for node in nodes)
        if alone and not roomy:
            cpus = sum(int(node.get("CPU", 0)) for node in nodes)
            raise InputError(
                f"a worker needs {self._need()}, and Ray finds {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')} on "
                f"this machine: give other --worker-cpus or --device, or with --ray-address a cluster that has them"
            )
        self.workers = found.workers(options.workers or (gpus if self._on_gpu else roomy) or 1)
        # A group of its own, so that `stop` reaches an actor that builds. All other calls run one after the other.
        self._actor_class = self._ray.remote(concurrency_groups={"control": 1})(_Actor)
        self._actors: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}  # of actors that have started
        self._calls: dict[Any, tuple[str, str]] = {}
        self._made = 0
        self._checked = False
        self._due: dict[str, tuple[float, int]] = {}  # when to make an actor, and its rank
        self._backoff = 0.0
        self._log_room_at = time.monotonic() + _ROOM_SECONDS

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                self._ray.kill(actor)
        self._actors.clear()
        self._calls.clear()

    def start(self, rank: int) -> str:
        """Request an actor, which starts when Ray has room for it."""
        name = str(self._made)
        self._made += 1
        self._due[name] = time.monotonic() + self._backoff, rank
        if not self._backoff:
            self._make_due()
        return name

    def turn(self, worker: str, given_up: Collection[int]) -> None:
        self._call(worker, "turn", given_up)

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        try:
            answer = self._ray.get(self._actors[worker].conclude.remote(fidelity_positions))
        except self._ray.exceptions.RayError as error:
            raise WorkersLost(f"worker {worker} was lost before writing index and report: {_reason(error)}") from None
        if answer is not None:
            raise answer

    def stop(self) -> None:
        self._due.clear()
        for actor in self._actors.values():
            actor.stop.options(concurrency_group="control").remote()

    def events(self, timeout: float) -> Sequence[Event]:
        self._make_due()
        self._log_wait_for_room()
        events: list[Event] = []
        calls = list(self._calls)
        if not calls:
            time.sleep(timeout)
            return events
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=timeout)
        if ready:
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in ready:
            if call in self._calls:  # calls of an actor that turned out to be gone are removed
                worker, kind = self._calls.pop(call)
                events += self._received(worker, kind, call)
        return events

    def _make_due(self) -> None:
        now = time.monotonic()
        for name in [name for name, (due, _) in self._due.items() if due <= now]:
            self._make(name, self._due.pop(name)[1])

    def _make(self, name: str, rank: int) -> None:
        self._actors[name] = self._actor_class.options(
            num_cpus=self._options.worker_cpus,
            num_gpus=1 if self._on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        ).remote(self._job.model_dump(mode="json"), self._options.grace_seconds * _GRACE_SHARE, os.getcwd())
        self._call(name, "begin")
        self._call(name, "open", rank, self.workers, self._checked)

    def _received(self, worker: str, kind: str, call: Any) -> list[Event]:
        try:
            answer = self._ray.get(call)
        except Exception as error:  # its process or its node is gone, or its method has a bug
            return [self._lost(worker, error, starting=kind in _STARTUP)]
        if kind == "begin":
            self._nodes[worker] = answer
            return []
        if isinstance(answer, LogitCacheError):
            return [self._gone(worker, str(answer), answer)]
        if kind == "open":
            self._backoff = 0.0
            self._checked = True
            return [Ready(worker, *answer)]
        events: list[Event] = [Reported(worker, answer)]
        ended = [item for item in answer.outcomes if item.state == "ended"]
        if ended:
            events.append(self._gone(worker, ended[0].error or "", ended[0].cause))
        return events

    def _lost(self, worker: str, error: Exception, starting: bool) -> Gone:
        reason = _reason(error)
        if starting:
            self._backoff = min(max(_BACKOFF_SECONDS, 2 * self._backoff), _LONGEST_BACKOFF_SECONDS)
        # A node reports the end of a process at once. When an actor is only "unavailable", the node does not answer.
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
        self._calls = {call: item for call, item in self._calls.items() if item[0] != worker}
        return Gone(worker, why, refusal, blame)

    def _call(self, worker: str, method: str, *arguments: Any) -> None:
        self._calls[getattr(self._actors[worker], method).remote(*arguments)] = (worker, method)

    def _fits(self, resources: dict[str, float]) -> bool:
        gpus = 1 if self._on_gpu else 0
        return resources.get("CPU", 0) >= self._options.worker_cpus and resources.get("GPU", 0) >= gpus

    def _need(self) -> str:
        return counted(self._options.worker_cpus, "CPU") + (" and 1 GPU" if self._on_gpu else "")

    def _log_wait_for_room(self) -> None:
        """Log that actors wait for room: the cluster may be busy, or about to grow, or never have enough for one."""
        now, waiting = time.monotonic(), len(self._actors.keys() - self._nodes.keys())
        if not waiting:
            self._log_room_at = now + _ROOM_SECONDS
        if now < self._log_room_at:
            return
        self._log_room_at = now + _ROOM_AGAIN_SECONDS
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        has = ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s free" for kind in ("CPU", "GPU"))
        found = [self._fits(node["Resources"]) for node in self._ray.nodes() if node["Alive"]]
        never = "" if any(found) else "; none of its nodes is large enough for one"
        text = f"{waiting} of {self.workers} workers wait for room: each needs {self._need()} of a node"
        text += f", the cluster has {has}{never}"
        self._log.event("waiting for room", text, workers=waiting, cluster=total, available=free)


class _Actor:
    """A worker in a process of its own, on any node of the cluster."""

    def __init__(self, job: dict[str, Any], grace_seconds: float, folder: str) -> None:
        self._job = job
        self._stopping = Stopping(grace_seconds)
        # Where the folder exists here, on a shared disk, relative paths mean the same as for the command.
        with contextlib.suppress(OSError):
            os.chdir(folder)

    def begin(self) -> str:
        """The ID of the node that this actor runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def open(self, rank: int, workers: int, checked: bool) -> Any:
        """Load the teacher and open the job; returns (location, whether it has a share), or the error to raise."""
        job = CacheJob.model_validate(self._job)
        made = or_error(Worker.of_pool, job, Rank(rank, workers), checked, self._stopping)
        if isinstance(made, LogitCacheError):
            return made
        self._worker = made
        return made.location | {"node": self.begin()}, made.has_share

    def turn(self, given_up: Collection[int]) -> Any:
        return or_error(self._worker.turn, given_up)

    def conclude(self, fidelity_positions: int) -> Any:
        return or_error(self._worker.conclude, fidelity_positions)

    def stop(self) -> None:
        self._stopping.ask()


def _reason(error: Exception) -> str:
    """One line of Ray's message of many: the error of a task, or how a process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    of_actor = [line for line in lines if line.startswith("The actor ") and line != lines[0]]
    return (of_actor[0] if of_actor else lines[-1])[:400]
