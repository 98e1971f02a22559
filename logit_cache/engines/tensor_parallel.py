"""`cache-logits --tensor-parallel`: how rank 0 leads a job and the other ranks follow, and how all end together.

torchrun starts one process for each device. All of them check the job, load their part of the teacher and score the
same windows; rank 0 alone has the entry open for writing. It broadcasts the number of each shard, and at the end that
no shard is left; the other ranks follow, and discard their targets, which equal those of rank 0.

A rank that fails would leave the others waiting inside a collective operation. So the first rank to fail registers
itself in the store of the rendezvous, prints its error, and then stores its exit status there; a thread of every other
rank polls that status once a second, and ends its process with it. A rank that is killed is noticed by torchrun, which
ends the others, or by the timeout of the process group.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from logit_cache.caching.log import JobLog
from logit_cache.engines.worker_index import Rank, rank_of
from storage.errors import InputError, LogitCacheError, one_line_errors

if TYPE_CHECKING:
    from logit_cache.caching.job import CacheJob
    from logit_cache.caching.prepare import PreparedJob
    from logit_cache.engines.options import EngineOptions
    from teachers.ranks import Ranks

# How long a rank waits for another, which may load from a slow disk, or as rank 0 wait for a store.
_TIMEOUT = timedelta(minutes=30)
_SECONDS_TO_MEET = 60
_SECONDS_BETWEEN_POLLS = 1.0
_SECONDS_BETWEEN_LEASE_TRIES = 2.0
_SECONDS_TO_PRINT = 10.0
_END, _MEASURE = -1, -2  # broadcast instead of a shard number
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run(fields: dict[str, Any], options: EngineOptions) -> dict[str, Any] | None:
    """Run the job of these fields; returns the description of its entry on rank 0, None on the other ranks.

    The option `worker` numbers several such groups of ranks. A failure of any rank ends this process. Raises
    InputError where torchrun did not start it.
    """
    world = _World.of_this_process()
    with _together(world) as store:
        from logit_cache.caching.job import CacheJob
        from logit_cache.caching.prepare import load_teachers, prepare_job
        from storage.config import build_config

        if {"text", "out"} & fields.keys():
            raise InputError(
                "cache-logits: --tensor-parallel reads a token stream: make one first (logit-cache tokenize)"
            )
        if options.engine != "local" or options.workers is not None:
            raise InputError(
                "cache-logits: --tensor-parallel is started by torchrun: leave out --engine and --workers; several "
                "groups of ranks are numbered by --worker i/n"
            )
        job = build_config(CacheJob, fields, {}, "cache-logits")
        # The variables of torchrun number the ranks of a group; only the flag numbers the groups.
        group = rank_of(options.worker, {})
        log = JobLog(options.log_format, cache=job.cache, entry=job.name)
        with _process_group(world, store) as ranks:
            prepared = prepare_job(job, load_teachers(job, ranks))
            if ranks.rank == 0:
                return _lead(job, prepared, ranks, group, log)
            _follow(job, prepared, ranks)
    return None


def _lead(job: CacheJob, prepared: PreparedJob, ranks: Ranks, group: Rank, log: JobLog) -> dict[str, Any]:
    from logit_cache.caching.pipeline import Committer
    from logit_cache.caching.prepare import OpenJob, open_writer
    from logit_cache.caching.score_shard import score_shard
    from logit_cache.describe import describe_entry
    from logit_cache.engines.worker import positions_of
    from logit_cache.fidelity.measure import is_wanted, measure
    from storage.cache.reader import LogitCache
    from teachers.ranks import from_first

    opened = OpenJob(prepared.cache, prepared.teacher, open_writer(job, prepared.entry))
    writer, entry = opened.writer, opened.writer.entry
    from_first(ranks, entry.model_dump(mode="json"))
    mine = [shard for shard in writer.pending() if group.owns(shard)]
    left = positions_of(opened, mine)
    total = left if group.count > 1 else entry.positions
    with log.progress(f"cache {job.name}", total, "tokens", total - left) as advance, Committer(writer) as committer:

        def progress(count: int) -> None:
            advance(count)
            writer.leases.keep()

        committing: int | None = None
        todo, refused = deque(mine), 0
        while todo:
            shard = todo.popleft()
            if writer.is_committed(shard):
                continue
            if not writer.leases.take(shard):
                # Leased by another group, or by one that was killed, whose lease expires.
                todo.append(shard)
                refused += 1
                if refused >= len(todo):
                    time.sleep(_SECONDS_BETWEEN_LEASE_TRIES)
                continue
            refused = 0
            began = time.monotonic()
            from_first(ranks, shard)
            committer.put(shard, score_shard(opened, shard, progress), began)
            # `put` has returned, so the shard before is committed.
            if committing is not None:
                writer.leases.release(committing)
            committing = shard
    if committing is not None:
        writer.leases.release(committing)
    writer.finish()
    wanted = is_wanted(opened, job.fidelity_positions)
    from_first(ranks, _MEASURE if wanted else _END)
    if wanted:
        with log.progress(f"fidelity of {job.name}", None, "positions") as advance:
            writer.publish_fidelity(measure(opened, job.fidelity_positions, advance))
    return describe_entry(LogitCache.open(job.cache).teacher(job.name))


def _follow(job: CacheJob, prepared: PreparedJob, ranks: Ranks) -> None:
    from logit_cache.caching.score_shard import score_range
    from logit_cache.fidelity.measure import measure_entry
    from storage.cache.reader import LogitCache
    from storage.format.manifest import TeacherEntry
    from storage.format.sealing import differences
    from teachers.ranks import from_first

    entry = TeacherEntry.model_validate(from_first(ranks))
    # Rank 0 takes the batch size of an existing entry, which another worker may just have created.
    execution = prepared.entry.execution.model_copy(update={"batch_windows": entry.execution.batch_windows})
    own = prepared.entry.model_copy(update={"execution": execution})
    different = differences(entry, own, names=("rank 0", f"rank {ranks.rank}"))
    if different:
        raise InputError(
            f"{job.cache}: rank {ranks.rank} sees another cache or teacher than rank 0: {'; '.join(different)}: give "
            f"paths that are the same on every machine"
        )
    while (shard := from_first(ranks)) >= 0:
        score_range(prepared.cache, prepared.teacher, entry, *entry.layout.shard_range(shard, entry.positions))
    if shard == _MEASURE:
        cache = LogitCache.open(job.cache)
        measure_entry(cache, cache.teacher(job.name), prepared.teacher, job.fidelity_positions)


@dataclass(frozen=True)
class _World:
    """This process among those that torchrun started: its ranks, and the address of their store."""

    rank: int
    size: int
    local_rank: int
    host: str
    port: int
    attempt: str
    agent_has_store: bool

    @classmethod
    def of_this_process(cls) -> _World:
        absent = [name for name in _VARIABLES if not os.environ.get(name)]
        if absent:
            raise InputError(
                f"--tensor-parallel spreads a teacher over several processes, and there is no {absent[0]} here: start "
                f"it with torchrun --nproc-per-node N --no-python cache-logits ... --tensor-parallel"
            )
        rank, size, local_rank, port = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        )
        if size < 2:
            raise InputError(
                "--tensor-parallel needs two processes or more, and torchrun started one: give --nproc-per-node N, or "
                "leave --tensor-parallel out"
            )
        return cls(
            rank=rank,
            size=size,
            local_rank=local_rank,
            host=os.environ["MASTER_ADDR"],
            port=port,
            attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
            agent_has_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def store(self, may_serve: bool = False) -> Any:
        """A connection to the store, which rank 0 serves unless torchrun's agent does."""
        dist: Any = importlib.import_module("torch.distributed")  # which exports its stores without types
        serves = may_serve and self.rank == 0 and not self.agent_has_store
        try:
            connection = dist.TCPStore(
                self.host,
                self.port,
                is_master=serves,
                timeout=timedelta(seconds=_SECONDS_TO_MEET),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise InputError(
                f"rank {self.rank} cannot reach the others at {self.host}:{self.port} ({str(error).splitlines()[0]})"
            ) from None
        return dist.PrefixStore(f"logit-cache/{self.attempt}", connection)


class _Failure:
    """A failure of any rank, in the store: the first rank to fail and, once its error is printed, the exit status."""

    def __init__(self, world: _World) -> None:
        self._rank = world.rank
        self.store = world.store(may_serve=True)
        self._watched = world.store()  # of the watching thread alone: a connection serves one call at a time
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failure of a rank", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching for failures of other ranks."""
        self._over.set()
        self._thread.join()

    def end(self, error: BaseException) -> int:
        """The exit status, once the error of the first rank to fail is printed, by this rank if it is the first."""
        self.stop()
        status = 2 if isinstance(error, LogitCacheError) else 1
        try:
            mine = str(self._rank).encode()
            if self.store.compare_set("first", "", mine.decode()) != mine:
                return self._status(self.store, timedelta(seconds=_SECONDS_TO_PRINT)) or status
        except RuntimeError:  # the store is gone with rank 0, which served it
            print(f"rank {self._rank}: ends because rank 0 is gone", file=sys.stderr)
            return status
        status = _print_error(error)
        self.store.set("status", str(status))
        return status

    @staticmethod
    def _status(store: Any, timeout: timedelta) -> int | None:
        try:
            store.wait(["status"], timeout)
        except RuntimeError:
            return None
        return int(store.get("status"))

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_POLLS):
            try:
                if self._watched.check(["status"]):
                    _exit(int(self._watched.get("status")))
            except RuntimeError:  # the store is gone: collective operations fail by themselves
                return


def _print_error(error: BaseException) -> int:
    """Print an error as a command does; returns its exit status."""
    try:
        with one_line_errors():
            raise error
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _exit(status: int) -> None:
    """End this process at once: threads and communicators that wait for another rank would keep it alive."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _together(world: _World) -> Iterator[Any]:
    """End this process when any rank fails; the error is printed once. Yields the ranks' store."""
    failure = _Failure(world)
    try:
        yield failure.store
    except BaseException as error:
        _exit(failure.end(error))
    failure.stop()


@contextlib.contextmanager
def _process_group(world: _World, store: Any) -> Iterator[Ranks]:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    from teachers.ranks import DistributedRanks, all_true

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if world.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--tensor-parallel takes a GPU for each process, and this machine has {torch.cuda.device_count()}: "
                f"give torchrun --nproc-per-node {torch.cuda.device_count()} or less"
            )
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=_TIMEOUT,
    )
    ranks = DistributedRanks()
    yield ranks
    all_true(ranks, True)  # no rank leaves before all are done
    dist.destroy_process_group()
