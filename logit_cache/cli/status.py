"""`logit-cache status`: the progress of a caching job."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from storage.errors import one_line_errors
from storage.text import columns, counted, duration, printable
from student.cli_command import command, json_option

if TYPE_CHECKING:
    from logit_cache.caching.status import EntryStatus

_INTERRUPTED = 130


@command("logit-cache status run/train --watch")
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
@json_option("Print JSON; with --watch, one line of it each time.")
def status(url: str, teachers: tuple[str, ...], watch: float | None, as_json: bool) -> None:
    """Show how far the teacher entries of a cache are, how fast they grow, and who works on them.

    From the cache alone: its receipts. Works on any URL, beside any number of workers. Status 0 whether or not they
    are complete.
    """
    try:
        with one_line_errors():
            from logit_cache.caching.status import as_json as data
            from logit_cache.caching.status import is_complete, status_of

            known: dict[str, Any] = {}
            with _screen(watch is not None and sys.stdout.isatty() and not as_json) as show:
                while True:
                    found = status_of(url, teachers, time.time(), known)
                    if as_json:
                        click.echo(json.dumps(data(url, found), indent=2 if watch is None else None))
                    elif show is not None or watch is None or not found:
                        (show or click.echo)(status_text(url, found))
                    else:
                        click.echo("\n".join(map(status_line, found)))
                    sys.stdout.flush()
                    if watch is None or is_complete(found):
                        return
                    time.sleep(watch)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


@contextlib.contextmanager
def _screen(drawn: bool) -> Iterator[Callable[[str], None] | None]:
    """Shows a text in place of the one before, where it is drawn."""
    if not drawn:
        yield None
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, vertical_overflow="visible") as live:
        yield lambda text: live.update(Text(text), refresh=True)


def status_text(url: str, entries: Sequence[EntryStatus]) -> str:
    if not entries:
        return f"{url}: no teacher entry yet"
    return "\n\n".join("\n".join(_status_lines(entry)) for entry in entries)


def _status_lines(entry: EntryStatus) -> list[str]:
    rows = _status_rows(entry)
    lines = [f"teacher {entry.name}: {_how_far(entry)}", *columns(((f"  {name}", text) for name, text in rows), left=2)]
    for note in entry.failed:
        last = (note.error.strip().splitlines() or ["?"])[-1]
        lines.append(
            f"    shard {note.shard:,} after {counted(note.attempts, 'attempt')} on {printable(note.host[:64])}: "
            f"{printable(last[:64])}"
        )
    return lines


def _status_rows(entry: EntryStatus) -> Iterator[tuple[str, str]]:
    if entry.state == "not known":
        yield "shards", f"{entry.shards:,}; which ones are there is not known: the server cannot list them"
        return
    in_flight = f", {entry.shards_in_flight:,} in flight" if entry.shards_in_flight else ""
    begun = "not known (too many objects to list)" if entry.shards_begun is None else f"{entry.shards_begun:,}"
    started = "" if entry.complete else f"; started without a receipt: {begun}"
    yield "shards", f"{entry.shards_done:,} done, {entry.shards_missing:,} missing{in_flight}{started}"
    yield "positions", f"{entry.positions_done:,} of {entry.positions:,}"
    if entry.positions_per_second is not None:
        when = "at the end, " if entry.complete else ""
        own = entry.positions_per_second_per_worker
        each = "" if own is None else f"; {own:,.0f} by the seconds of a worker"
        yield "rate", f"{when}{entry.positions_per_second:,.0f} positions/s, all workers together{each}"
    if entry.seconds_left is not None:
        yield "time left", f"{duration(entry.seconds_left)} at that rate"
    if entry.last_commit is not None and entry.seconds_since_last_commit is not None:
        ago = duration(entry.seconds_since_last_commit)
        hosts = [f"{printable(item.host[:64])} ({counted(item.shards, 'shard')})" for item in entry.hosts[:8]]
        more = f" and {len(entry.hosts) - 8} more" if len(entry.hosts) > 8 else ""
        yield "last shard", f"{ago} ago, {entry.last_commit}"
        yield "hosts", f"{', '.join(hosts)}{more}, of the last {counted(entry.receipts_read, 'receipt')}"
        if entry.state == "stalled":
            yield (
                "stalled?",
                f"no shard for {ago}, where one takes {duration(entry.shard_seconds or 0)}: if its workers have "
                f"ended, run the same cache-logits command again",
            )
    if entry.shards_failed:
        failed = counted(entry.shards_failed, "shard")
        yield "failed", f"{failed}, permanently; the same cache-logits command retries them"


def status_line(entry: EntryStatus) -> str:
    text = f"{entry.name}: {_how_far(entry)}"
    if entry.shards_done is not None:
        text += f", {entry.shards_done:,} of {counted(entry.shards, 'shard')}"
    if not entry.complete and entry.positions_per_second is not None:
        text += f", {entry.positions_per_second:,.0f} positions/s"
    if entry.seconds_left is not None:
        text += f", {duration(entry.seconds_left)} left"
    if entry.shards_failed:
        text += f", {entry.shards_failed:,} failed permanently"
    if entry.state == "stalled" and entry.seconds_since_last_commit is not None:
        text += f", stalled? no shard for {duration(entry.seconds_since_last_commit)}"
    return text


def _how_far(entry: EntryStatus) -> str:
    if entry.share is None:
        return "not complete"
    # 99.97 % is not all of it.
    return "complete" if entry.complete else f"{math.floor(1000 * entry.share) / 10:.1f} %"
