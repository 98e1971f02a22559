"""The command `cache-logits`: parse, run the job, print what the entry is."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from logit_cache.corpus_cli import CORPUS_OPTIONS, tokenize_text
from logit_cache.options import EXAMPLE, JOB_OPTIONS, Options, options
from storage.errors import one_line_errors

_ENGINE_OPTIONS: Options = (
    click.option("--engine", help="local (this machine), ray or slurm.  [default: local]"),
    click.option("--workers", type=int, help="Processes, actors or array tasks.  [default: one per GPU]"),
    click.option("--worker", help="i/n: be the i-th of n processes that something else starts."),
    click.option(
        "--help-others/--no-help-others", default=None, help="After its share, take others' shards.  [default: help]"
    ),
    click.option("--attempts", type=int, help="How often a shard that fails is tried.  [default: 3]"),
    click.option(
        "--grace-seconds", type=float, help="Time from SIGTERM to the end of the process, at most.  [default: 25]"
    ),
    click.option("--log-format", help="text, or json: an object per line on stderr.  [default: text]"),
    click.option("--ray-address", help="Of a running Ray cluster, such as auto.  [default: RAY_ADDRESS, or a new one]"),
    click.option("--worker-cpus", type=int, help="CPUs that a Ray worker or array task asks for.  [default: 1]"),
    click.option("--slurm", multiple=True, metavar="NAME=VALUE", help="Parameter of sbatch, such as partition=gpu."),
    click.option("--slurm-folder", help="For logs, on a disk that all nodes see.  [default: slurm-logs]"),
    click.option("--wait/--no-wait", default=None, help="Slurm: wait for the array's end.  [default: wait]"),
)


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXAMPLE + "cache-logits --cache run/train --teacher run/llama --name llama -k 64",
)
@options(JOB_OPTIONS)
@options(_ENGINE_OPTIONS)
@click.option("--json", "as_json", is_flag=True, help="Print the entry's description as JSON.")
@click.option("--out", help="With --text: make the cache here first.")
@options(CORPUS_OPTIONS)
def cache_logits(config: str | None, as_json: bool, out: str | None, **flags: Any) -> None:
    """Run a teacher once over a token stream and store its targets; run it again to go on after a stop.

    From raw text in one step: give --text and --out instead of --cache; the tokenizer is the teacher's unless
    --tokenizer or --train-tokenizer says otherwise.
    """
    with one_line_errors():
        from logit_cache.corpus import CorpusConfig
        from logit_cache.engine_options import EngineOptions
        from logit_cache.engines import NotDone, local_workers, run_job
        from logit_cache.inspect import describe_entry
        from logit_cache.job import CacheJob, load_teachers, open_job
        from logit_cache.job_log import JobLog
        from logit_cache.ranks import rank_of
        from storage.cache.reader import LogitCache
        from storage.config import build_config, given, read_yaml
        from storage.errors import InputError

        fields = (read_yaml(config) if config else {}) | given({**flags, "out": out})
        run = {name: fields.pop(name) for name in list(fields) if name in EngineOptions.model_fields}
        how = build_config(EngineOptions, run, {}, "cache-logits")
        if fields.get("tensor_parallel") is True:
            from logit_cache import tensor_parallel

            described = tensor_parallel.run(fields, how)
            if described is not None:
                _print_entry(fields["cache"], fields["name"], described, as_json)
            return
        # What is no field of the job is for making the token stream; unknown names stay, and are refused with it.
        of_text = CorpusConfig.model_fields.keys() - CacheJob.model_fields.keys()
        text_fields = {name: fields.pop(name) for name in list(fields) if name in of_text}
        opened = None
        if "text" in text_fields:
            if "out" not in text_fields or "cache" in fields:
                raise InputError("cache-logits: --text makes a new cache: give it with --out, and without --cache")
            job = build_config(CacheJob, {**fields, "cache": text_fields["out"]}, {}, "cache-logits")
            if rank_of(how.worker, os.environ).count > 1:
                raise InputError(
                    "cache-logits: --text makes one token stream, and this is one of several processes: make it first "
                    "(logit-cache tokenize), and give it with --cache"
                )
            # The teachers before the text, so that a wrong one costs no minutes and leaves no stream behind.
            teachers = load_teachers(job)
            text_fields.setdefault("trust_remote_code", job.trust_remote_code)
            if not {"tokenizer", "train_tokenizer"} & text_fields.keys():
                text_fields.update(
                    {"tokenizer": job.teacher[0], "tokenizer_revision": (*job.revision, None)[0] or None}
                )
            tokenize_text(None, text_fields)
            # Several workers each load their own, and then these would lie beside them.
            if how.engine == "local" and local_workers(job, how) == 1:
                opened = open_job(job, teachers)
            del teachers
            _forget_devices()
        elif text_fields:
            raise InputError(f"cache-logits: --{min(text_fields).replace('_', '-')} goes with --text and --out")
        else:
            job = build_config(CacheJob, fields, {}, "cache-logits")
        try:
            outcome = run_job(job, how, JobLog(how.log_format, cache=job.cache, entry=job.name), opened)
        except NotDone as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if outcome.submitted:
            return
        _print_entry(job.cache, job.name, describe_entry(LogitCache.open(job.cache).teacher(job.name)), as_json)


def _forget_devices() -> None:
    """Give back what a teacher that is not needed any more had on a GPU."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _print_entry(cache: str, name: str, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(
        f"{cache}: {name} has {found['positions_cached']:,} of {found['positions']:,} positions, "
        f"{found['bytes_per_token'] or 0:.1f} bytes per token"
    )
