"""`logit-cache plan` and `logit-cache status`: what a caching job will cost, and how far it is."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from logit_cache.options import EXAMPLE, JOB_OPTIONS, options
from storage.errors import one_line_errors

if TYPE_CHECKING:
    from logit_cache.status import EntryStatus

_INTERRUPTED = 130


@click.command(epilog=EXAMPLE + "logit-cache status run/train --watch")
@click.argument("url")
@click.option("--teacher", "teachers", multiple=True, metavar="NAME", help="Entry to show. Repeatable.  [default: all]")
@click.option(
    "--watch",
    type=click.FloatRange(min=0.1),
    is_flag=False,
    flag_value=10.0,
    metavar="[SECONDS]",
    help="Look again every 10 (or so many) seconds until all is complete; then status 0.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, one line of it each time.")
def status(url: str, teachers: tuple[str, ...], watch: float | None, as_json: bool) -> None:
    """Show how far the teacher entries of a cache are, how fast they grow, and who works on them.

    From the cache alone: its receipts. Works on any URL, beside any number of workers. Status 0 whether or not they
    are complete.
    """
    try:
        with one_line_errors():
            from logit_cache import show
            from logit_cache.status import as_json as data
            from logit_cache.status import status_of

            if watch is not None:
                _watch(url, teachers, watch, as_json)
                return
            found = status_of(url, teachers, time.time())
            click.echo(json.dumps(data(url, found), indent=2) if as_json else show.status_text(url, found))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _watch(url: str, teachers: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """Show the status again and again until all entries are complete."""
    from logit_cache import show
    from logit_cache.status import as_json as data
    from logit_cache.status import is_complete, status_of

    known: dict[str, Any] = {}

    def look() -> list[EntryStatus]:
        return status_of(url, teachers, time.time(), known)

    if sys.stdout.isatty() and not as_json:
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                found = look()
                live.update(Text(show.status_text(url, found)), refresh=True)
                if is_complete(found):
                    return
                time.sleep(seconds)
    while True:
        found = look()
        if as_json:
            click.echo(json.dumps(data(url, found)))
        else:
            for entry in found:
                click.echo(show.status_line(entry))
            if not found:
                click.echo(show.status_text(url, found))
        sys.stdout.flush()
        if is_complete(found):
            return
        time.sleep(seconds)


@click.command(epilog=EXAMPLE + "logit-cache plan --cache run/train --teacher run/llama -k 32 --student llama-tiny")
@options(JOB_OPTIONS)
@click.option("--tokens", type=click.IntRange(min=2), metavar="N", help="Plan for so many tokens of such text.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Such workers at once.")
@click.option("--runs", type=click.IntRange(min=1), default=1, show_default=True, help="Students to be trained.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Of each.")
@click.option("--student", metavar="PRESET|JSON|DIR", help="Also probe a step of this student, cached and live.")
@click.option(
    "--probe-windows",
    type=click.IntRange(min=1),
    metavar="M",
    help="Windows to score, at most.  [default: of four chunks]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    config: str | None,
    tokens: int | None,
    workers: int,
    runs: int,
    epochs: float,
    student: str | None,
    probe_windows: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Predict what cache-logits will take, and when it has paid for itself, from a short probe of the real teacher.

    Takes the options of cache-logits and refuses what it would refuse. Writes nothing anywhere.
    """
    with one_line_errors():
        from logit_cache import show
        from logit_cache.job import CacheJob
        from storage.config import build_config, given, read_yaml
        from storage.progress import progress

        fields = (read_yaml(config) if config else {}) | given(flags)
        named = "name" in fields
        job = build_config(CacheJob, {"name": "not-named-yet", **fields}, {}, "logit-cache plan")
        from logit_cache.forecast import Question, forecast

        question = Question(
            named=named,
            tokens=tokens,
            workers=workers,
            runs=runs,
            epochs=epochs,
            student=student,
            probe_windows=probe_windows,
        )
        found = forecast(job, question, progress)
        click.echo(json.dumps(found, indent=2) if as_json else show.forecast_text(found))
