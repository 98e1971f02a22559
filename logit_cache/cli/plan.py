"""`logit-cache plan`: the cost of a caching job, forecast."""

from __future__ import annotations

import json
from typing import Any

import click

from logit_cache.cli.options import JOB_OPTIONS
from storage.errors import one_line_errors
from storage.text import counted, duration, size
from student.cli_command import applied, command, json_option, under

_plan = under("Plan")


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
def plan(config: str | None, as_json: bool, **flags: Any) -> None:
    """Predict the time, bytes and memory of cache-logits, and its break-even, from a short probe of the real teacher.

    Takes the options of cache-logits and refuses the same input. Writes nothing anywhere.
    """
    with one_line_errors():
        from logit_cache.caching.job import CacheJob
        from storage.config import build_config, given, read_yaml
        from storage.progress import progress

        asked = {name: flags.pop(name) for name in ("tokens", "workers", "runs", "epochs", "student", "probe_windows")}
        fields = (read_yaml(config) if config else {}) | given(flags)
        job = build_config(CacheJob, {"name": "not-named-yet", **fields}, {}, "logit-cache plan")
        from logit_cache.caching.forecast import Question, forecast

        found = forecast(job, Question(named="name" in fields, **asked), progress)
        click.echo(json.dumps(found, indent=2) if as_json else forecast_text(found))


def forecast_text(found: dict[str, Any]) -> str:
    speed, sizes, memory, probe = found["speed"], found["size"], found["memory"], found["probe"]
    time, opening, layout = found["time"], found["opening"], found["entry"]["layout"]
    workers = counted(time["workers"], "worker")
    device = "" if memory["device_bytes"] is None else f" and {size(memory['device_bytes'])} on the device"
    per_target = f", {sizes['bytes_per_target']:.1f} per position with targets"
    if sizes["positions_with_targets"] == found["tokens"]:
        per_target = ""
    by_array = ", ".join(f"{name} {count / found['tokens']:.2f}" for name, count in sizes["array_bytes"].items())
    lines = [
        f"{found['cache']}: {found['tokens']:,} tokens"
        + ("" if found["tokens"] == found["tokens_in_the_cache"] else f" (it has {found['tokens_in_the_cache']:,})"),
        f"  probe       {probe['positions']:,} positions ({probe['pieces']} x "
        f"{probe['positions'] // probe['pieces']:,}; {counted(probe['windows'], 'window')}) on {probe['device']}, "
        f"not kept",
        f"  speed       {speed['positions_per_second']:,.0f} positions/s a worker, "
        f"{1e6 * speed['cpu_seconds_per_token']:,.1f} µs of processor time per token",
        f"  time        {duration(3600 * time['hours'])} with {workers}, each like this one and as free as it is now; "
        f"{duration(3600 * time['cpu_hours'])} of processor time in all",
        f"  size        {size(sizes['bytes'])}, {sizes['bytes_per_token']:.1f} bytes per token{per_target}",
        f"  by array    {by_array}",
        f"  objects     {counted(sizes['shards'], 'shard')} of {layout['shard']:,} positions: "
        f"{counted(sizes['objects'], 'object')} and {counted(sizes['receipts'], 'receipt')}; "
        f"the largest {size(sizes['largest_object_bytes'])}, never above "
        f"{size(sizes['largest_object_bound_bytes'])}",
        f"  opening     an index of {size(opening['index_bytes'])}: about {opening['cpu_seconds']:.2g} s and "
        f"{size(opening['memory_bytes'])} in Python; before it is complete, requests to "
        f"list it on S3: {opening['listing_requests_while_incomplete']:,}",
        f"  memory      {size(memory['process_bytes'])} seen in the probe{device}; the rows of a shard are "
        f"{size(memory['shard_rows_bytes'])}, and a worker holds a few times that",
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
            f"a step of {student['model']} ({student['parameters']:,} parameters, "
            f"{counted(student['windows'], 'window')}): "
            f"{1e6 * student['live']:,.1f} µs per token with the teachers beside it, {1e6 * student['cached']:,.1f} "
            f"from the cache"
        )
    paid = found["epochs_until_paid"]
    return [
        f"against live distillation, in {found['paid_for']}: {compared}",
        f"  caching     {duration(3600 * found['caching_hours'])}",
        f"  {found['runs']} x {found['epochs']:g} epochs from the cache, caching included: "
        f"{duration(3600 * found['cached_hours'])}; live: {duration(3600 * found['live_hours'])}",
        "  the cache never pays for itself: its step is not cheaper than the live one"
        if paid is None
        else f"  the cache has paid for itself after {paid:.1f} epochs in all"
        + ("" if paid <= epochs else f", more than the {epochs:g} that are planned"),
    ]
