"""The command `cache-logits`: parse, run the job, print the entry's description."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from logit_cache.cli.options import JOB_OPTIONS
from logit_cache.cli.tokenize import CORPUS_OPTIONS
from storage.errors import one_line_errors
from student.cli_command import Decorator, applied, command, json_option, under

if TYPE_CHECKING:
    from logit_cache.engines.command import FinishedEntry

_text, _workers, _ray, _slurm = under("Text"), under("Workers"), under("Ray"), under("Slurm")
_ENGINE_OPTIONS: tuple[Decorator, ...] = (
    _workers("--workers", type=int, help="Processes, actors or array tasks.  [default: one per GPU]"),
    _workers("--engine", help="local (this machine), ray or slurm.  [default: local]"),
    _workers("--worker", help="i/n: be the i-th of n processes that something else starts."),
    _workers(
        "--help-others/--no-help-others",
        default=None,
        help="With --worker: take all free shards, or its share only.  [default: help]",
    ),
    _workers("--attempts", type=int, help="How often a shard that fails is tried.  [default: 3]"),
    _workers("--grace-seconds", type=float, help="At most, from SIGTERM to the end of the process.  [default: 25]"),
    _workers("--log-format", help="text, or json: an object per line on stderr.  [default: text]"),
    _workers("--worker-cpus", type=int, help="CPUs that a Ray worker or array task asks for.  [default: 1]"),
    _ray("--ray-address", help="Of a running Ray cluster, such as auto.  [default: RAY_ADDRESS, or a new one]"),
    _slurm("--slurm", multiple=True, metavar="NAME=VALUE", help="Parameter of sbatch, such as partition=gpu."),
    _slurm("--slurm-folder", help="For logs, on a disk that all nodes see.  [default: slurm-logs]"),
    _slurm("--wait/--no-wait", default=None, help="Wait for the array's end.  [default: wait]"),
)


@command("cache-logits --cache run/train --teacher run/llama --name llama -k 64", resumes=True)
@applied(JOB_OPTIONS)
@applied(_ENGINE_OPTIONS)
@_text("--out", help="With --text: make the cache here first.")
@applied(CORPUS_OPTIONS)
@json_option("Print the entry's description as JSON.")
def cache_logits(config: str | None, as_json: bool, out: str | None, **flags: Any) -> None:
    """Run a teacher once over a token stream and store its targets. Run it again to resume after an interruption.

    From raw text in one step: give --text and --out instead of --cache; the tokenizer is the teacher's unless
    --tokenizer or --train-tokenizer names another.
    """
    with one_line_errors():
        from logit_cache.engines.command import run_command
        from logit_cache.engines.outcome import NotDone
        from storage.config import given, read_yaml

        fields = (read_yaml(config) if config else {}) | given({**flags, "out": out})
        try:
            found = run_command(fields)
        except NotDone as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        if found is not None:
            _print_entry(found, as_json)


def _print_entry(found: FinishedEntry, as_json: bool) -> None:
    described = found.description
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    click.echo(
        f"{found.cache}: {found.name} has {described['positions_cached']:,} of {described['positions']:,} positions, "
        f"{described['bytes_per_token'] or 0:.1f} bytes per token"
        + (f"; {described['padding']:.1%} of what its teacher read is padding" if "padding" in described else "")
    )
