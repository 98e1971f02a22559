"""`logit-cache plan` and `logit-cache status`: the cost of a caching job, and its progress."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from logit_cache.cli.options import JOB_OPTIONS, json_option
from storage.errors import one_line_errors
from storage.text import duration
from student.cli_command import applied, command, under

if TYPE_CHECKING:
    from logit_cache.caching.status import EntryStatus

_INTERRUPTED = 130
_plan = under("Plan")


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
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, one line of it each time.")
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


@command("logit-cache plan --cache run/train --teacher run/llama -k 32 --student llama-tiny")
@applied(JOB_OPTIONS)
@_plan("--tokens", type=click.IntRange(min=2), metavar="N", help="Plan for so many tokens of such text.")
@_plan("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Such workers at once.")
@_plan("--runs", type=click.IntRange(min=1), default=1, show_default=True, help="Students to be trained.")
@_plan("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Of each.")
@_plan("--student", metavar="PRESET|JSON|DIR", help="Also probe a step of this student, cached and live.")
@_plan(
    "--probe-windows",
    type=click.IntRange(min=1),
    metavar="M",
    help="Windows to score, at most.  [default: of four chunks]",
)
@json_option()
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
    """Predict the time, bytes and memory of cache-logits, and its break-even, from a short probe of the real teacher.

    Takes the options of cache-logits and refuses the same input. Writes nothing anywhere.
    """
    with one_line_errors():
        from logit_cache.caching.job import CacheJob
        from storage.config import build_config, given, read_yaml
        from storage.progress import progress

        fields = (read_yaml(config) if config else {}) | given(flags)
        named = "name" in fields
        job = build_config(CacheJob, {"name": "not-named-yet", **fields}, {}, "logit-cache plan")
        from logit_cache.caching.forecast import Question, forecast

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
        click.echo(json.dumps(found, indent=2) if as_json else forecast_text(found))


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
        hosts = [f"{_printable(item.host)} ({item.shards:,} shards)" for item in entry.hosts[:8]]
        more = f" and {len(entry.hosts) - 8} more" if len(entry.hosts) > 8 else ""
        lines += [
            f"  last shard  {ago} ago, {entry.last_commit}",
            f"  hosts       {', '.join(hosts)}{more}, of the last {entry.receipts_read:,} receipts",
        ]
        if entry.state == "stalled":
            lines.append(
                f"  stalled?    no shard for {ago}, where one takes {duration(entry.shard_seconds or 0)}: if its "
                f"workers have ended, run the same cache-logits command again"
            )
    if entry.shards_failed:
        lines.append(
            f"  failed      {entry.shards_failed:,} shards, permanently; the same cache-logits command retries them"
        )
        for note in entry.failed:
            last = (note.error.strip().splitlines() or ["?"])[-1]
            lines.append(
                f"    shard {note.shard:,} after {note.attempts:,} attempts on {_printable(note.host)}: "
                f"{_printable(last)[:300]}"
            )
    return lines


def status_line(entry: EntryStatus) -> str:
    """The status of an entry in one line."""
    text = f"{entry.name}: {_how_far(entry)}"
    if entry.shards_done is not None:
        text += f", {entry.shards_done:,} of {entry.shards:,} shards"
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


def _printable(text: str) -> str:
    """A name that another lab wrote, without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:64])


def forecast_text(found: dict[str, Any]) -> str:
    """The forecast of `plan`, as text."""
    speed, size, memory, probe = found["speed"], found["size"], found["memory"], found["probe"]
    time, opening, layout = found["time"], found["opening"], found["entry"]["layout"]
    workers = f"{time['workers']} worker" + ("s" if time["workers"] > 1 else "")
    device = "" if memory["device_bytes"] is None else f" and {_size(memory['device_bytes'])} on the device"
    lines = [
        f"{found['cache']}: {found['tokens']:,} tokens"
        + ("" if found["tokens"] == found["tokens_in_the_cache"] else f" (it has {found['tokens_in_the_cache']:,})"),
        f"  probe       {probe['positions']:,} positions ({probe['pieces']} x "
        f"{probe['positions'] // probe['pieces']:,}) on {probe['device']}, not kept",
        f"  speed       {speed['positions_per_second']:,.0f} positions/s a worker, "
        f"{1e6 * speed['cpu_seconds_per_token']:,.1f} µs of processor time per token",
        f"  time        {_hours(time['hours'])} with {workers}, each like this one and as free as it is now; "
        f"{_hours(time['cpu_hours'])} of processor time in all",
        f"  size        {_size(size['bytes'])}, {size['bytes_per_token']:.1f} bytes per token",
        f"  objects     {size['shards']:,} shards of {layout['shard']:,} positions: {size['objects']:,} objects and "
        f"{size['receipts']:,} receipts; the largest {_size(size['largest_object_bytes'])}, never above "
        f"{_size(size['largest_object_bound_bytes'])}",
        f"  opening     an index of {_size(opening['index_bytes'])}: about {opening['cpu_seconds']:.2g} s and "
        f"{_size(opening['memory_bytes'])} in Python; before it is complete, requests to "
        f"list it on S3: {opening['listing_requests_while_incomplete']:,}",
        f"  memory      {_size(memory['process_bytes'])} seen in the probe{device}; the rows of a shard are "
        f"{_size(memory['shard_rows_bytes'])}, and a worker holds a few times that",
    ]
    return "\n".join([*lines, "", *_break_even_lines(found["break_even"])])


def _break_even_lines(found: dict[str, Any]) -> list[str]:
    epochs = found["runs"] * found["epochs"]
    student, forward = found["student"], found["teacher_forward_seconds_per_token"]
    if student is None:
        compared = (
            f"the teachers' share alone, {1e6 * forward:,.1f} µs per token of a live step; the student itself "
            f"is not compared (--student does)"
        )
    else:
        compared = (
            f"a step of {student['model']} ({student['parameters']:,} parameters, {student['windows']} windows): "
            f"{1e6 * student['live']:,.1f} µs per token with the teachers beside it, {1e6 * student['cached']:,.1f} "
            f"from the cache"
        )
    paid = found["epochs_until_paid"]
    return [
        f"against live distillation, in {found['paid_for']}: {compared}",
        f"  caching     {_hours(found['caching_hours'])}",
        f"  {found['runs']} x {found['epochs']:g} epochs from the cache, caching included: "
        f"{_hours(found['cached_hours'])}; live: {_hours(found['live_hours'])}",
        "  the cache never pays for itself: its step is not cheaper than the live one"
        if paid is None
        else f"  the cache has paid for itself after {paid:.1f} epochs in all"
        + ("" if paid <= epochs else f", more than the {epochs:g} that are planned"),
    ]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def _hours(hours: float) -> str:
    return duration(3600 * hours) if hours < 48 else f"{hours / 24:,.1f} days"
