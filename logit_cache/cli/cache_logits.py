"""The command `cache-logits`: parse, run the job, print what the entry is."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from logit_cache.cli.options import EXAMPLE, JOB_OPTIONS, Options, options
from logit_cache.cli.tokenize import CORPUS_OPTIONS
from storage.errors import one_line_errors

if TYPE_CHECKING:
    from logit_cache.engines.run import FinishedEntry

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
        from logit_cache.engines.driver import NotDone
        from logit_cache.engines.run import run_command
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
    )
