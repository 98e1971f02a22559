"""`logit-cache status`: the progress of a caching job."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from storage.errors import one_line_errors
from storage.text import counted, duration, printable
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
            from logit_cache.caching.status import status_of

            if watch is not None:
                _watch(url, teachers, watch, as_json)
                return
            found = status_of(url, teachers, time.time())
            click.echo(json.dumps(data(url, found), indent=2) if as_json else status_text(url, found))
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _watch(url: str, teachers: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """Show the status again and again until all entries are complete."""
    from logit_cache.caching.status import as_json as data
    from logit_cache.caching.status import is_complete, status_of

    known: dict[str, Any] = {}

    def look() -> list[EntryStatus]:
        return status_of(url, teachers, time.time(), known)

    if sys.stdout.isatty() and not as_json:
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                found = look()
                live.update(Text(status_text(url, found)), refresh=True)
                if is_complete(found):
                    return
                time.sleep(seconds)
    while True:
        found = look()
        if as_json:
            click.echo(json.dumps(data(url, found)))
        else:
            for entry in found:
                click.echo(status_line(entry))
            if not found:
                click.echo(status_text(url, found))
        sys.stdout.flush()
        if is_complete(found):
            return
        time.sleep(seconds)


def status_text(url: str, entries: Sequence[EntryStatus]) -> str:
    """The status of each entry of a cache."""
    if not entries:
        return f"{url}: no teacher entry yet"
    return "\n\n".join("\n".join(_status_lines(entry)) for entry in entries)


def _status_lines(entry: EntryStatus) -> list[str]:
    lines = [f"teacher {entry.name}: {_how_far(entry)}"]
    if entry.state == "not known":
        return [
            *lines,
            f"  shards      {entry.shards:,}; which ones are there is not known: the server cannot list them",
        ]
    started = (
        ""
        if entry.complete
        else "; started without a receipt: "
        + ("not known (too many objects to list)" if entry.shards_begun is None else f"{entry.shards_begun:,}")
    )
    lines += [
        f"  shards      {entry.shards_done:,} done, {entry.shards_missing:,} missing"
        + (f", {entry.shards_in_flight:,} in flight" if entry.shards_in_flight else "")
        + started,
        f"  positions   {entry.positions_done:,} of {entry.positions:,}",
    ]
    if entry.positions_per_second is not None:
        when = "at the end, " if entry.complete else ""
        own = entry.positions_per_second_per_worker
        lines.append(
            f"  rate        {when}{entry.positions_per_second:,.0f} positions/s, all workers together"
            + (f"; {own:,.0f} by the seconds of a worker" if own is not None else "")
        )
    if entry.seconds_left is not None:
        lines.append(f"  time left   {duration(entry.seconds_left)} at that rate")
    if entry.last_commit is not None and entry.seconds_since_last_commit is not None:
        ago = duration(entry.seconds_since_last_commit)
        hosts = [f"{printable(item.host[:64])} ({counted(item.shards, 'shard')})" for item in entry.hosts[:8]]
        more = f" and {len(entry.hosts) - 8} more" if len(entry.hosts) > 8 else ""
        lines += [
            f"  last shard  {ago} ago, {entry.last_commit}",
            f"  hosts       {', '.join(hosts)}{more}, of the last {counted(entry.receipts_read, 'receipt')}",
        ]
        if entry.state == "stalled":
            lines.append(
                f"  stalled?    no shard for {ago}, where one takes {duration(entry.shard_seconds or 0)}: if its "
                f"workers have ended, run the same cache-logits command again"
            )
    if entry.shards_failed:
        lines.append(
            f"  failed      {counted(entry.shards_failed, 'shard')}, permanently; the same cache-logits command "
            "retries them"
        )
        for note in entry.failed:
            last = (note.error.strip().splitlines() or ["?"])[-1]
            lines.append(
                f"    shard {note.shard:,} after {counted(note.attempts, 'attempt')} on {printable(note.host[:64])}: "
                f"{printable(last[:64])}"
            )
    return lines


def status_line(entry: EntryStatus) -> str:
    """The status of an entry in one line."""
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
