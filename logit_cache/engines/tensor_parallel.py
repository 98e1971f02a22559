"""`cache-logits --tensor-parallel`: rank 0 is a worker like any other, and the other ranks score along with it.

torchrun starts one process for each device. All of them check the job and load their part of the teacher; rank 0 alone
has the entry open for writing. It broadcasts the number of each shard that it takes, and at the end that it takes no
more; the others score the same windows, and discard their targets, which equal those of rank 0.

Ranks that wait for each other cannot try a shard again, so a rank that fails ends, and torchrun ends the rest, or the
collective operation that they wait in does. The first rank to fail, by the store of torchrun's rendezvous, prints its
error; the others end silently.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import (
    OpenJob,
    PreparedJob,
    in_order,
    load_teachers,
    open_writer,
    prepare_job,
    stored_order,
)
from logit_cache.describe import describe_entry
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import WorkersLost
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.worker_index import Rank, rank_of
from storage.cache.reader import LogitCache
from storage.config import build_config
from storage.errors import InputError, LogitCacheError, one_line_errors
from storage.format.manifest.entry import TeacherEntry
from storage.format.sealing import differences
from storage.format.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor

    from teachers.base import Teacher
    from teachers.ranks import Ranks

# How long a rank waits for another, which may load from a slow disk, or as rank 0 wait for a store.
_TIMEOUT = timedelta(minutes=30)
_TIME_TO_MEET = timedelta(seconds=60)
_END, _MEASURE = -1, -2  # broadcast instead of a shard number
_EMBEDDINGS = -3  # and instead of a sampling order, which is made from those of all ranks
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run(fields: dict[str, Any], options: EngineOptions) -> dict[str, Any] | None:
    """Run the job of these fields; returns the description of its entry on rank 0, None on the other ranks.

    The option `worker` numbers several such groups of ranks. A failure of any rank ends this process. Raises
    InputError where torchrun did not start it.
    """
    with _printed_once(_meet()) as store:
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
        with _process_group(store) as ranks:
            prepared = prepare_job(job, load_teachers(job, ranks))
            if ranks.rank == 0:
                return _lead(job, prepared, ranks, group, log)
            _follow(job, prepared, ranks)
    return None


def _lead(job: CacheJob, prepared: PreparedJob[Teacher], ranks: Ranks, group: Rank, log: JobLog) -> dict[str, Any]:
    from logit_cache.caching.score_shard import score_shard
    from logit_cache.engines.attempts import Attempts
    from logit_cache.engines.this_machine import take_turns
    from logit_cache.engines.worker import Worker, positions_of
    from logit_cache.fidelity.measure import is_wanted
    from teachers.ranks import from_first

    def score(opened: OpenJob, shard: int, progress: Callable[[int], None]) -> SparseTargets:
        from_first(ranks, shard)
        return score_shard(opened, shard, progress)

    writer = open_writer(job, prepared)
    entry = writer.entry
    from_first(ranks, entry.model_dump(mode="json"))

    def embeddings() -> Tensor:
        from_first(ranks, _EMBEDDINGS)
        return prepared.teacher.output_embeddings()

    order = from_first(ranks, stored_order(writer, embeddings))
    opened = OpenJob(prepared.cache, prepared.teacher, in_order(prepared.teacher, order), writer)
    missing = opened.writer.pending()
    left = positions_of(opened, missing)
    with (
        log.progress(f"cache {job.name}", entry.positions, "tokens", entry.positions - left) as advance,
        Worker(opened, None, advance, rank=group, missing=missing, score=score, try_again=False) as worker,
    ):
        take_turns(worker, Attempts(log, 1, advance), Stopping())
    opened.writer.finish()
    from_first(ranks, _MEASURE if is_wanted(opened, job.fidelity_positions) else _END)
    worker.conclude(job.fidelity_positions, log)
    return describe_entry(LogitCache.open(job.cache).teacher(job.name))


def _follow(job: CacheJob, prepared: PreparedJob[Teacher], ranks: Ranks) -> None:
    from logit_cache.caching.score_shard import score_range
    from logit_cache.fidelity.measure import measure_entry
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
    order = from_first(ranks)
    if isinstance(order, int) and order == _EMBEDDINGS:
        prepared.teacher.output_embeddings()
        order = from_first(ranks)
    scorer = in_order(prepared.teacher, order)
    while (shard := from_first(ranks)) >= 0:
        score_range(prepared.cache, scorer, entry, *entry.layout.shard_range(shard, entry.positions))
    if shard == _MEASURE:
        cache = LogitCache.open(job.cache)
        measure_entry(cache, cache.teacher(job.name), prepared.teacher, job.fidelity_positions)


def _meet() -> Any:
    """The store of the rendezvous, which torchrun or rank 0 serves. Raises InputError."""
    absent = [name for name in _VARIABLES if not os.environ.get(name)]
    if absent:
        raise InputError(
            f"--tensor-parallel spreads a teacher over several processes, and there is no {absent[0]} here: start it "
            f"with torchrun --nproc-per-node N --no-python cache-logits ... --tensor-parallel"
        )
    if int(os.environ["WORLD_SIZE"]) < 2:
        raise InputError(
            "--tensor-parallel needs two processes or more, and torchrun started one: give --nproc-per-node N, or "
            "leave --tensor-parallel out"
        )
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=_TIME_TO_MEET))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(
            f"rank {os.environ['RANK']} cannot reach the others at {where} ({str(error).splitlines()[0]})"
        ) from None
    return store


@contextlib.contextmanager
def _printed_once(store: Any) -> Iterator[Any]:
    """Yields the ranks' store. End this process when the body fails; the first rank to do so prints its error."""
    try:
        yield store
    except BaseException as error:
        rank = os.environ["RANK"]
        try:
            first = store.compare_set("logit-cache: first rank to fail", "", rank) == rank.encode()
        except RuntimeError:
            print(f"rank {rank}: ends because rank 0 is gone", file=sys.stderr)
            first = False
        status = _print_error(error) if first else 2 if isinstance(error, LogitCacheError) else 1
        # Threads and communicators that wait for another rank would keep the process alive.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _print_error(error: BaseException) -> int:
    """Print an error as a command does; returns its exit status."""
    try:
        with one_line_errors():
            raise error
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except WorkersLost:
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    return 1


@contextlib.contextmanager
def _process_group(store: Any) -> Iterator[Ranks]:
    import torch
    import torch.distributed as dist

    from teachers.ranks import Ranks, all_true

    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--tensor-parallel takes a GPU for each process, and this machine has {torch.cuda.device_count()}: "
                f"give torchrun --nproc-per-node {torch.cuda.device_count()} or less"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    ranks = Ranks()
    yield ranks
    all_true(ranks, True)  # no rank leaves before all are done
    dist.destroy_process_group()
