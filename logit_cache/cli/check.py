"""`logit-cache verify`, `audit` and `doctor`: are a cache's bytes and values right, and is a store fit for one?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from storage.errors import one_line_errors
from storage.text import columns, counted, ranges_in_words, size
from student.cli_command import command, json_option

if TYPE_CHECKING:
    from logit_cache.fidelity.audit import Audit


@command("logit-cache verify run/train --deep")
@click.argument("url")
@click.option("--deep", is_flag=True, help="Read every byte: hash it, and decode it twice, by zarr too.")
@click.option("--repair", is_flag=True, help="As --deep; then remove leftovers, and re-open damaged shards.")
@click.option("--workers", type=click.IntRange(min=1), default=8, show_default=True, help="Objects read at once.")
@json_option()
def verify(url: str, deep: bool, repair: bool, workers: int, as_json: bool) -> None:
    """Check every object of a cache against its receipt. Status 1 when something is damaged.

    Without --deep: records and receipts by their digests, and the length of every object; of one on a local disk also
    the seal and the size of its chunks, but not each byte.
    """
    with one_line_errors():
        from storage.cache.verify import verify as check
        from storage.progress import progress

        with progress("verify", None, "bytes") as advance:
            found = check(url, deep=deep, repair=repair, workers=workers, progress=advance)
        data = {**vars(found), "sound": found.sound}
        click.echo(json.dumps(data, indent=2) if as_json else verification_text(data, repair))
        if not found.sound:
            sys.exit(1)


@command("logit-cache audit run/train --teacher run/llama --name llama --windows 32")
@click.argument("url")
@click.option("--teacher", required=True, multiple=True, help="The model or adapter of the entry, or a server's URL.")
@click.option("--name", help="Entry to audit.  [default: the only one]")
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True, help="Windows to sample.")
@click.option("--seed", type=click.IntRange(min=0), help="Sample the same windows again.  [default: a fresh seed]")
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: CUDA where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: the recorded one]")
@click.option("--revision", multiple=True, help="Revision of a hub teacher; for each --teacher, in their order.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code from the hub.")
@click.option("--served-model", help="Name of the model behind --teacher http://HOST:PORT/v1, where there are several.")
@json_option()
def audit(url: str, as_json: bool, **flags: Any) -> None:
    """Run the teacher again on random windows and compare. Status 1 when the entry holds other targets.

    The tolerance is the encoding's stated error and the noise of the teacher against itself. Needs the tokens.
    """
    with one_line_errors():
        from dataclasses import asdict

        from logit_cache.fidelity.audit import AuditJob
        from logit_cache.fidelity.audit import audit as check
        from storage.progress import progress

        with progress("audit", None, "windows") as advance:
            found = check(AuditJob(url, **flags), advance)
        if as_json:
            escape = {str(fraction): found.escape(fraction) for fraction in (0.001, 0.01, 0.1)}
            click.echo(json.dumps({**asdict(found), "consistent": found.consistent, "escape": escape}, indent=2))
        else:
            click.echo(audit_text(found))
        if not found.consistent:
            sys.exit(1)


@command("logit-cache doctor s3://bucket/runs")
@click.argument("url")
@json_option()
def doctor(url: str, as_json: bool) -> None:
    """Measure the guarantees of a store. Status 1 when a cache cannot be written there safely.

    Small objects are written in a folder of their own below URL and removed again; no cache needs to be there.
    """
    with one_line_errors():
        from storage.stores.doctor import examine, safe_to_write

        found = examine(url)
        safe = safe_to_write(found)
        if as_json:
            click.echo(json.dumps({"url": url, "safe": safe, "findings": [vars(item) for item in found]}, indent=2))
        else:
            for item in found:
                if item.state != "not applicable":
                    click.echo(f"{item.state:3}  {item.name}: {item.meaning}")
            click.echo(f"{url}: a cache can {'' if safe else 'not '}be written here safely")
        if not safe:
            sys.exit(1)


def verification_text(found: dict[str, Any], repair: bool) -> str:
    """The findings of `verify`, most important first."""
    lines = [f"damaged: {problem}" for problem in found["problems"]]
    lines += [f"leftover, never read: {address}" for address in found["leftovers"]]
    for group, ranges in found["missing"].items():
        lines.append(f"not complete: {group} lacks {ranges_in_words(ranges)}")
    lines += [f"removed: {address}" for address in found["repaired"]]
    checked = f"{counted(found['objects'], 'object')}, {size(found['bytes'])}"
    if found["sound"] and found["deep"]:
        lines.append(f"sound: every byte of {checked}")
    elif found["sound"]:
        lines.append(f"no damage by records, receipts and lengths: {checked}; --deep checks every byte of them")
    elif repair:
        lines.append(
            f"{len(found['problems'])} damaged of {checked}, and re-opened; run the commands that made them again"
        )
    else:
        lines.append(f"{len(found['problems'])} damaged of {checked}; --repair re-opens damaged shards")
    return "\n".join(lines)


def audit_text(found: Audit) -> str:
    """The result on a screen, the verdict last."""
    lines = [f"{found.cache}: {found.name} against {found.teacher}, seed {found.seed}"]
    lines += [f"  wrong       {problem}" for problem in found.problems]
    lines += [f"  identity    {line}" for line in found.identity]
    lines += [f"  execution   {line}" for line in found.execution]
    lines += [
        f"  compared    {counted(found.positions, 'position')} in {counted(found.windows, 'window')}",
        *(f"  omitted     {line}" for line in found.uncompared),
        f"  noise       of the teacher against itself, {'; '.join(found.controls)}",
        "  nats beyond the encoding's error:",
    ]
    rows = [["field", "encoding", "explained", "worst window", "limit", "largest", "limit", "position", "windows off"]]
    for name, item in found.fields.items():
        beyond = (item.worst_mean, item.limit_mean, item.largest_beyond, item.limit_largest)
        row = [name, f"{item.encoding_error:.1e}", f"{100 * item.within:.2f} %", *map("{:.2e}".format, beyond)]
        rows.append([*row, str(item.position), str(item.windows_differing)])
    lines += [f"  {line}" for line in columns(rows)]
    if found.sampled is not None:
        drawn = found.sampled
        lines.append(
            f"  sampled     {counted(drawn.ids, 'id')} drawn again: {drawn.again:.2%} come again, at least "
            f"{drawn.limit:.2%} expected; of the teacher's own {drawn.teacher:.2%}, of an unrelated sample "
            f"{drawn.chance:.2%}; {counted(drawn.windows_differing, 'window')} off"
        )
    if found.differing:
        shown = ", ".join(f"{first}..{last}" for first, last in found.differing[:4])
        more = len(found.differing) - 4
        lines.append(f"  differing   positions {shown}" + (f" and {counted(more, 'more window')}" if more > 0 else ""))
    if found.consistent:
        lines.append(
            f"consistent: a corruption of 10 % of the positions had a chance of at most {found.escape(0.1):.1%} to "
            f"stay unseen, one of 1 % {found.escape(0.01):.1%}"
        )
    else:
        lines.append("NOT CONSISTENT: the entry does not hold this teacher's targets")
    return "\n".join(lines)
