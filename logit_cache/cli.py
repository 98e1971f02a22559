"""The commands `cache-logits` and `logit-cache`: parse, call one function, print its result."""

from __future__ import annotations

import json
import sys

import click

import storage

# The name is generic: say so in one line if Python found another distribution's package.
if "LogitCache" not in getattr(storage, "__all__", ()):
    print(
        f"error: logit-cache needs its own package 'storage', but Python found another one "
        f"({', '.join(getattr(storage, '__path__', ['?']))}): install logit-cache in an environment of its own",
        file=sys.stderr,
    )
    raise SystemExit(2)

from logit_cache.caching_cli import cache_logits
from logit_cache.cleaning_cli import clean
from logit_cache.corpus_cli import tokenize
from logit_cache.evaluation_cli import evaluate
from logit_cache.options import EXAMPLE
from logit_cache.planning_cli import plan, status
from logit_cache.recipe_cli import recipe
from logit_cache.report_cli import report
from logit_cache.sharing_cli import COMMANDS
from storage.errors import one_line_errors

__all__ = ["cache_logits", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logit-cache")
def main() -> None:
    """Make, look at, check and share caches of teachers' next-token distributions."""


for _command in (*COMMANDS, clean, evaluate, plan, recipe, report, status, tokenize):
    main.add_command(_command)


@main.command(epilog=EXAMPLE + "logit-cache inspect run/train --at 1234")
@click.argument("url")
@click.option("--at", type=int, metavar="POSITION", help="Show one position with its tokens as text.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(url: str, at: int | None, as_json: bool) -> None:
    """Show what is in a cache: sizes, coverage, provenance, summaries, or one position."""
    with one_line_errors():
        from logit_cache import inspect as inspection
        from logit_cache import show
        from storage import LogitCache

        cache = LogitCache.open(url)
        if at is not None:
            found = inspection.describe_position(cache, at)
            text = show.position_text(found)
        else:
            found = inspection.describe_cache(cache)
            text = show.cache_text(found)
        click.echo(json.dumps(found, indent=2) if as_json else text)


@main.command(epilog=EXAMPLE + "logit-cache demo --out demo-run")
@click.option("--out", default="demo-run", show_default=True, help="Folder of the run; an interrupted one goes on.")
@click.option("--text", multiple=True, help="Text to use instead of the Python standard library's source. Repeatable.")
def demo(out: str, text: tuple[str, ...]) -> None:
    """The whole road in minutes on a laptop: two teachers, their caches, a student, and what was gained."""
    with one_line_errors():
        from logit_cache.demo import run_demo

        click.echo(run_demo(out, text))


if __name__ == "__main__":
    sys.exit(main())
