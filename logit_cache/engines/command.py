"""`cache-logits` from its flags: the job and its engine options, checked before anything heavy is imported."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import OpenJob, check_stream, load_teachers, open_job
from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.tokenize import tokenize_text
from logit_cache.describe import describe_entry
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.worker_index import rank_of
from storage import LogitCache
from storage.cache.corpus_writer import check_destination as check_corpus_destination
from storage.cache.writer import check_destination
from storage.config import build_config
from storage.errors import InputError


@dataclass(frozen=True)
class FinishedEntry:
    """The entry that a job completed, and its description by `logit_cache.describe`."""

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
    # Fields of CorpusConfig alone make the token stream; unknown names stay, and are refused with the job's.
    of_text = CorpusConfig.model_fields.keys() - CacheJob.model_fields.keys()
    text_fields = {name: fields.pop(name) for name in list(fields) if name in of_text}
    opened = None
    if "text" in text_fields:
        job, opened = _job_of_text(fields, text_fields, options)
    elif text_fields:
        raise InputError(f"cache-logits: --{min(text_fields).replace('_', '-')} requires --text and --out")
    else:
        job = build_config(CacheJob, fields, {}, "cache-logits")
        check_stream(job)
        check_destination(job.cache, job.name)
    from logit_cache.engines.run import run_job

    outcome = run_job(job, options, JobLog(options.log_format, cache=job.cache, entry=job.name), opened)
    if outcome.submitted:
        return None
    from logit_cache.caching.score_shard import padding_share

    cache = LogitCache.open(job.cache)
    targets = cache.teacher(job.name)
    described = describe_entry(targets)
    if targets.entry.execution.rows is not None:
        described["padding"] = round(padding_share(cache, targets.entry), 4)
    return FinishedEntry(job.cache, job.name, described)


def _job_of_text(
    fields: dict[str, Any], text_fields: dict[str, Any], options: EngineOptions
) -> tuple[CacheJob, OpenJob | None]:
    """Tokenize the text of a job; returns the job, opened where one worker runs it in this process."""
    if "out" not in text_fields or "cache" in fields:
        raise InputError("cache-logits: --text makes a new cache: give it with --out, and without --cache")
    job = build_config(CacheJob, {**fields, "cache": text_fields["out"]}, {}, "cache-logits")
    if job.is_served:
        raise InputError(
            f"cache-logits: --text takes the tokenizer of a teacher in this process, and {job.teacher[0]} is a server: "
            f"make the token stream first (logit-cache tokenize), and give it with --cache"
        )
    if rank_of(options.worker, os.environ).count > 1:
        raise InputError(
            "cache-logits: --text makes one token stream, and this is one of several processes: make it first "
            "(logit-cache tokenize), and give it with --cache"
        )
    check_corpus_destination(job.cache)
    import torch

    from logit_cache.engines.this_machine import local_workers
    from teachers.vocabulary import check_members

    # Teachers are loaded before the text, so that a wrong one costs no minutes and leaves no stream behind.
    teachers = load_teachers(job)
    check_members([(source, each.vocabulary()) for source, each in zip(job.teacher, teachers, strict=True)])
    text_fields.setdefault("trust_remote_code", job.trust_remote_code)
    if not {"tokenizer", "train_tokenizer"} & text_fields.keys():
        text_fields.update({"tokenizer": job.teacher[0], "tokenizer_revision": (*job.revision, None)[0] or None})
    tokenize_text(None, text_fields)
    # Several workers each load their own, and these would take memory beside them.
    opened = open_job(job, teachers) if options.engine == "local" and local_workers(job, options) == 1 else None
    del teachers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return job, opened
