"""Workers as actors of a Ray cluster: one for each GPU, wherever it is (extra `ray`).

Ray places the actors, and tells when one is lost; which shard comes next and what is tried again is for
`logit_cache.driver`. An actor holds its teacher as long as it lives. It is never restarted by Ray: one whose process or
node is gone, or whose device is broken, is replaced by a new one, which Ray may place elsewhere.

Payloads are the job's fields, numbers of shards and what became of them: no credentials, which every node has to have
by the usual ways. With RAY_AUTH_MODE=token only who holds the cluster's token can make it run code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from logit_cache.driver import Event, Gone, Heard, Ready
from logit_cache.engine_options import EngineOptions
from logit_cache.job import CacheJob
from storage.errors import InputError, LogitCacheError


@contextlib.contextmanager
def connect(options: EngineOptions) -> Iterator[None]:
    """Join the cluster at `ray_address`, or at RAY_ADDRESS; else start one on this machine for as long as the body
    runs.

    Raises InputError where that fails.
    """
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'logit-cache[ray]'") from None
    if ray.is_initialized():
        raise InputError("this process is connected to Ray already")
    address = options.ray_address or os.environ.get("RAY_ADDRESS") or None
    try:
        # A cluster that is there has its own dashboard.
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:  # the address, the token, the versions of both sides
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise InputError(f"{where} cannot be used: {reason[:400]}") from None
    try:
        yield
    finally:
        ray.shutdown()


class RayPool:
    """Actors that build shards of a job; a context manager, which ends them.

    As many as `options.workers`, else one for each GPU of the cluster, or for each node where there is none.
    """

    def __init__(self, job: CacheJob, options: EngineOptions) -> None:
        import ray

        self._ray: Any = ray
        self._job, self._options = job, options
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self._on_gpu = job.device.startswith("cuda") or (job.device == "auto" and gpus > 0)
        nodes = sum(bool(node["Alive"]) for node in self._ray.nodes())
        self.workers = options.workers or (gpus if self._on_gpu else nodes) or 1
        self._actors: dict[str, Any] = {}
        self._nodes: dict[str, str] = {}
        self._calls: dict[Any, tuple[str, str]] = {}
        self._unsettled: set[str] = set()
        self._made = 0

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        self._calls.clear()

    def start(self) -> str:
        """Ask for an actor; it is there when Ray has found room for it."""
        name = str(self._made)
        self._made += 1
        actor_class = self._ray.remote(_Actor)
        self._actors[name] = actor_class.options(
            num_cpus=self._options.worker_cpus,
            num_gpus=1 if self._on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"control": 1, "work": 1},
        ).remote(self._job.model_dump(mode="json"), self._options.grace_seconds)
        self._call(name, "open")
        return name

    def build(self, worker: str, shard: int) -> None:
        """Put a shard into an actor's queue."""
        self._call(worker, "build", shard)

    def conclude(self, worker: str, fidelity_positions: int) -> None:
        """Have an actor write the index of receipts and the fidelity report of a complete entry."""
        answer = self._ray.get(self._actors[worker].conclude.remote(fidelity_positions))
        if answer is not None:
            raise answer

    def stop(self) -> None:
        """Tell every actor; what it says of its shards is still to be heard."""
        for actor in self._actors.values():
            actor.stop.remote()

    def events(self, timeout: float) -> Sequence[Event]:
        """What the actors have answered."""
        told: list[Event] = []
        calls = list(self._calls)
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=timeout) if calls else ([], [])
        if ready:
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in ready:
            if call in self._calls:  # those of an actor that was found to be gone are forgotten
                worker, kind = self._calls.pop(call)
                told += self._heard(worker, kind, call)
        for worker in [name for name in self._unsettled if not self._has_work(name)]:
            self._unsettled.discard(worker)
            self._call(worker, "settle")
        return told

    def _heard(self, worker: str, kind: str, call: Any) -> list[Event]:
        try:
            answer = self._ray.get(call)
        except Exception as error:  # its process or its node is gone, or the actor could not be made
            return [self._lost(worker, error)]
        if kind == "open":
            if isinstance(answer, LogitCacheError):
                return [self._gone(worker, str(answer), answer)]
            pending, place = answer
            self._nodes[worker] = place["node"]
            return [Ready(worker, tuple(pending), place)]
        if kind == "build":
            self._unsettled.add(worker)
        told: list[Event] = [Heard(worker, tuple(answer))]
        ended = [item for item in answer if item.fate == "ended"]
        if ended:
            told.append(self._gone(worker, ended[0].error or "", ended[0].cause))
        return told

    def _lost(self, worker: str, error: Exception) -> Gone:
        node = self._nodes.get(worker)
        alive = {found["NodeID"] for found in self._ray.nodes() if found["Alive"]}
        # Ray hears of an actor's end before it knows that the whole node is gone, and says so in words only.
        node_is_gone = (node is not None and node not in alive) or "node" in str(error).lower().split("cause")[-1]
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return self._gone(worker, f"{type(error).__name__}: {why}", None, blame=not node_is_gone)

    def _gone(self, worker: str, why: str, refusal: LogitCacheError | None, blame: bool = True) -> Gone:
        with contextlib.suppress(Exception):
            self._ray.kill(self._actors[worker])
        del self._actors[worker]
        self._unsettled.discard(worker)
        self._calls = {call: item for call, item in self._calls.items() if item[0] != worker}
        return Gone(worker, why, refusal, blame)

    def _call(self, worker: str, method: str, *arguments: Any) -> None:
        self._calls[getattr(self._actors[worker], method).remote(*arguments)] = (worker, method)

    def _has_work(self, worker: str) -> bool:
        return any(name == worker for name, _ in self._calls.values())


class _Actor:
    """A worker in a process of its own, somewhere in the cluster."""

    def __init__(self, job: dict[str, Any], grace_seconds: float) -> None:
        self._job, self._grace = job, grace_seconds

    def open(self) -> Any:
        """Load the teacher and open the job: (shards that are missing, where this is), or the error to be raised."""
        import ray

        from logit_cache.job import open_job
        from logit_cache.stopping import Stopping
        from logit_cache.worker import Worker

        try:
            opened = open_job(CacheJob.model_validate(self._job))
            self._stopping = Stopping(self._grace)
            self._worker = Worker(opened, self._stopping)
            pending = self._worker.pending()
        except LogitCacheError as error:
            return error
        place = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": str(opened.teacher.device),
            "node": ray.get_runtime_context().get_node_id(),
        }
        return pending, place

    def build(self, shard: int) -> Any:
        """See `Worker.build`."""
        return self._worker.build(shard)

    def settle(self) -> Any:
        """See `Worker.settle`."""
        return self._worker.settle()

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
