"""What `cache-logits` does: a job on the engine that was asked for. Every engine has `Worker` build the shards, so all
give the same cache.

local   this process (`this_machine`); or, with several workers, a process for each (`local_processes`)
ray     an actor for each device of a cluster (`ray`; extra `ray`)
slurm   a task of a job array for each worker (`slurm`; extra `slurm`)

And any scheduler that starts processes and tells each which one it is (`worker_index`): worker i of n does the
shards whose number leaves rest i by n, and then helps with what others have not begun, where the store keeps claims.
The receipts in the cache are the only state, so a job may go on with any other engine and number of workers.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import OpenJob, check_stream, load_teachers, open_job
from logit_cache.caching.status import survey
from logit_cache.corpus.tokenize import CorpusConfig, tokenize_text
from logit_cache.describe import describe_entry
from logit_cache.engines.driver import Outcome
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.this_machine import local_workers, run_job_here, run_pool, run_to_end
from logit_cache.engines.worker_index import rank_of
from storage import LogitCache
from storage.config import build_config
from storage.errors import InputError


@dataclass(frozen=True)
class FinishedEntry:
    """The entry that a job ended with, and what `logit_cache.describe` says of it."""

    cache: str
    name: str
    description: dict[str, Any]


def run_command(fields: dict[str, Any]) -> FinishedEntry | None:
    """Run `cache-logits` from its fields (flags, or a YAML file's): those of CacheJob, of EngineOptions, and with
    `text` those of CorpusConfig, whose token stream is made first.

    None where there is no entry to describe: on the other ranks of a tensor-parallel job, and for an array that was
    submitted and not waited for. Raises the errors of `storage.errors`, and NotDone as `run_job` does.
    """
    run = {name: fields.pop(name) for name in list(fields) if name in EngineOptions.model_fields}
    options = build_config(EngineOptions, run, {}, "cache-logits")
    if fields.get("tensor_parallel") is True:
        from logit_cache.engines import tensor_parallel

        described = tensor_parallel.run(fields, options)
        return None if described is None else FinishedEntry(fields["cache"], fields["name"], described)
    # What is no field of the job is for making the token stream; unknown names stay, and are refused with it.
    of_text = CorpusConfig.model_fields.keys() - CacheJob.model_fields.keys()
    text_fields = {name: fields.pop(name) for name in list(fields) if name in of_text}
    opened = None
    if "text" in text_fields:
        job, opened = _job_of_text(fields, text_fields, options)
    elif text_fields:
        raise InputError(f"cache-logits: --{min(text_fields).replace('_', '-')} goes with --text and --out")
    else:
        job = build_config(CacheJob, fields, {}, "cache-logits")
    outcome = run_job(job, options, JobLog(options.log_format, cache=job.cache, entry=job.name), opened)
    if outcome.submitted:
        return None
    return FinishedEntry(job.cache, job.name, describe_entry(LogitCache.open(job.cache).teacher(job.name)))


def _job_of_text(
    fields: dict[str, Any], text_fields: dict[str, Any], options: EngineOptions
) -> tuple[CacheJob, OpenJob | None]:
    """Make the token stream of a job that brings its text; the job, opened where one worker does it in this process."""
    if "out" not in text_fields or "cache" in fields:
        raise InputError("cache-logits: --text makes a new cache: give it with --out, and without --cache")
    job = build_config(CacheJob, {**fields, "cache": text_fields["out"]}, {}, "cache-logits")
    if rank_of(options.worker, os.environ).count > 1:
        raise InputError(
            "cache-logits: --text makes one token stream, and this is one of several processes: make it first "
            "(logit-cache tokenize), and give it with --cache"
        )
    # The teachers before the text, so that a wrong one costs no minutes and leaves no stream behind.
    teachers = load_teachers(job)
    text_fields.setdefault("trust_remote_code", job.trust_remote_code)
    if not {"tokenizer", "train_tokenizer"} & text_fields.keys():
        text_fields.update({"tokenizer": job.teacher[0], "tokenizer_revision": (*job.revision, None)[0] or None})
    tokenize_text(None, text_fields)
    # Several workers each load their own, and then these would lie beside them.
    opened = open_job(job, teachers) if options.engine == "local" and local_workers(job, options) == 1 else None
    del teachers
    _forget_devices()
    return job, opened


def _forget_devices() -> None:
    """Give back what a teacher that is not needed any more had on a GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_job(job: CacheJob, options: EngineOptions, log: JobLog, opened: OpenJob | None = None) -> Outcome:
    """Do what is missing of a job on the engine that was asked for, and conclude a complete entry.

    opened: the job, where this process has checked and opened it already. Raises the errors of `storage.errors`, and
    NotDone where shards were given up, workers were lost, or the job was stopped.
    """
    if options.engine == "local":
        return run_job_here(job, options, log, opened)
    run = _run_slurm if options.engine == "slurm" else _run_ray
    return run_to_end(job, options, log, lambda stopping: run(job, options, log, stopping))


def _run_slurm(job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping) -> Outcome:
    from logit_cache.engines.slurm.array import run_array

    return run_array(job, options, log, stopping)


def _run_ray(job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping) -> Outcome:
    from logit_cache.engines.ray.actors import RayPool
    from logit_cache.engines.ray.cluster import connect

    if job.device_map is not None:
        raise InputError(
            "--device-map spreads a teacher over the devices of a machine, and a worker of Ray has one: leave "
            "it out, or start cache-logits on each machine with --worker i/n"
        )
    check_stream(job)
    found = survey(job)
    with connect(options.ray_address) as alone, RayPool(job, options, log, found, alone) as pool:
        return run_pool(pool, job, options, log, stopping, found)
