"""`logit-cache verify`, `audit` and `doctor`: are a cache's bytes and values right, and is a store fit for one?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from storage.errors import one_line_errors
from storage.text import columns, counted, ranges_in_words, size
from student.cli_command import command, json_option

if TYPE_CHECKING:
    from logit_cache.fidelity.audit import Audit
    from logit_cache.fidelity.plausibility import Plausibility
    from logit_cache.fidelity.samples import Examination


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


@command(
    "logit-cache audit run/train --teacher run/llama --name llama --windows 32\n"
    "logit-cache audit run/theirs --windows 256"
)
@click.argument("url")
@click.option("--teacher", multiple=True, help="The model or adapter of the entry, or a server's URL.")
@click.option("--name", help="Entry to audit.  [default: the only one]")
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True, help="Windows to sample.")
@click.option("--seed", type=click.IntRange(min=0), help="Sample the same windows again.  [default: a fresh seed]")
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: CUDA where there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="[default: the recorded one; float32 where none is]",
)
@click.option("--revision", multiple=True, help="Revision of a hub teacher; for each --teacher, in their order.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code from the hub.")
@click.option("--served-model", help="Name of the model behind --teacher http://HOST:PORT/v1, where there are several.")
@json_option()
def audit(
    url: str, teacher: tuple[str, ...], name: str | None, windows: int, seed: int | None, as_json: bool, **live: Any
) -> None:
    """Run the teacher again on random windows and compare. Status 1 when the entry holds other targets.

    The tolerance is the encoding's stated error and the noise of the teacher against itself. Needs the tokens.

    Without --teacher: check what targets must satisfy whoever made them, among themselves and with the text. Status 1
    when that is impossible. It shows that they are plausible, not whose they are.
    """
    with one_line_errors():
        from storage.errors import InputError
        from storage.progress import progress

        if not teacher and any(live.values()):
            given = ", ".join(f"--{each.replace('_', '-')}" for each, value in live.items() if value)
            raise InputError(f"{given}: says how a teacher is run, and none is given: add --teacher, or leave it out")
        if teacher:
            from logit_cache.fidelity.audit import AuditJob
            from logit_cache.fidelity.audit import audit as compare

            with progress("audit", None, "windows") as advance:
                audited = compare(AuditJob(url, teacher, name, windows, seed, **live), advance)
            _print(audited, "consistent", audited.consistent, audit_text(audited), as_json)
        else:
            from logit_cache.fidelity.plausibility import plausibility

            with progress("audit", None, "windows") as advance:
                found = plausibility(url, name, windows, seed, advance)
            _print(found, "plausible", found.plausible, plausibility_text(found), as_json)


def _print(found: Examination, verdict: str, passes: bool, text: str, as_json: bool) -> None:
    """The result of an audit as data or text; status 1 where the entry does not pass."""
    if as_json:
        escape = {str(fraction): found.escape(fraction) for fraction in (0.001, 0.01, 0.1)}
        text = json.dumps({**asdict(found), verdict: passes, "escape": escape}, indent=2)
    click.echo(text)
    if not passes:
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
        lines.append(f"consistent: {_unseen(found)}")
    else:
        lines.append("NOT CONSISTENT: the entry does not hold this teacher's targets")
    return "\n".join(lines)


def _unseen(found: Examination) -> str:
    return (
        f"a corruption of 10 % of the positions had a chance of at most {found.escape(0.1):.1%} to stay unseen, one of "
        f"1 % {found.escape(0.01):.1%}"
    )


_RULES = {
    "distinct": "no id of a row comes twice",
    "masses": "the masses of a row add up to 1",
    "sampled": "sampled ids have no more than the mass outside the certain ones",
    "outside": "each other id has no more than the row's least",
    "label": "the next token has its row's log-prob, or what the row leaves to it",
    "entropy": "the entropy is within its row's bounds",
}


def plausibility_text(found: Plausibility) -> str:
    """The result on a screen, the verdict last."""
    lines = [
        f"{found.cache}: {found.name} without a teacher, seed {found.seed}",
        *(f"  wrong       {problem}" for problem in found.problems),
        *(f"  unlikely    {line}" for line in found.unlikely),
        f"  read        {counted(found.positions, 'position')} in {counted(found.windows, 'window')}",
        *(f"  not checked {line}" for line in found.unchecked),
    ]
    rows = [["what targets must satisfy", "rows", "impossible", "first at"]]
    for name, check in found.checks.items():
        first = "" if check.position is None else str(check.position)
        rows.append([_RULES[name], f"{check.rows:,}", f"{check.broken:,}", first])
    lines += [f"  {line}" for line in columns(rows)]
    text = found.text
    if text is not None and text.rows:
        lines.append(f"  text        mean log-prob {text.after:.3f} of the next token, {text.of:.3f} of the row's own")
    if text is not None and text.cross_entropy is not None and text.entropy is not None:
        more = " or more" if text.at_least else ""
        low, high = text.entropy
        between = f"of {low:.3f}" if low == high else f"between {low:.3f} and {high:.3f}"
        lines.append(f"              mean cross-entropy {text.cross_entropy:.3f} nats{more}, mean entropy {between}")
    if found.plausible:
        lines.append("this shows that a teacher could have said it; that one did, only --teacher shows")
        lines.append(f"plausible: {_unseen(found)}")
    else:
        lines.append("NOT PLAUSIBLE: no teacher of this text has these targets")
    return "\n".join(lines)
