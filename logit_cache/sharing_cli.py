"""The commands that check a cache and share it: verify, doctor, push, pull, audit, recompress."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from logit_cache.options import EXAMPLE
from storage.errors import one_line_errors


@click.command(epilog=EXAMPLE + "logit-cache verify run/train --deep")
@click.argument("url")
@click.option("--deep", is_flag=True, help="Hash every byte again, not only lengths, indexes and checksums.")
@click.option("--repair", is_flag=True, help="Remove leftovers, and re-open damaged shards for cache-logits.")
@click.option("--workers", type=click.IntRange(min=1), default=8, show_default=True, help="Objects read at once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(url: str, deep: bool, repair: bool, workers: int, as_json: bool) -> None:
    """Check every object of a cache against its receipt. Status 1 when something is damaged."""
    with one_line_errors():
        from logit_cache import show
        from storage.cache.verify import verify as check
        from storage.progress import progress

        with progress("verify", None, "bytes") as advance:
            found = check(url, deep=deep, repair=repair, workers=workers, progress=advance)
        data = {**vars(found), "sound": found.sound}
        click.echo(json.dumps(data, indent=2) if as_json else show.verification_text(data, repair))
        if not found.sound:
            sys.exit(1)


@click.command(epilog=EXAMPLE + "logit-cache audit run/train --teacher run/llama --name llama --windows 32")
@click.argument("url")
@click.option(
    "--teacher", required=True, multiple=True, help="Model directory or hub id that the entry names. Repeatable."
)
@click.option("--name", help="Entry to audit.  [default: the only one]")
@click.option("--windows", type=click.IntRange(min=1), default=16, show_default=True, help="Positions to draw.")
@click.option("--seed", type=click.IntRange(min=0), help="Draw the same windows again.  [default: a fresh one]")
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: CUDA where there is one]")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: the recorded one]")
@click.option("--revision", multiple=True, help="Revision of a hub teacher; for each --teacher, in their order.")
@click.option("--trust-remote-code", is_flag=True, help="Run model code from the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def audit(url: str, as_json: bool, **flags: Any) -> None:
    """Run the teacher again on random windows and compare. Status 1 when the entry does not hold what it says.

    The tolerance is the encoding's stated error and the noise of the teacher against itself. Needs the tokens.
    """
    with one_line_errors():
        from dataclasses import asdict

        from logit_cache.audit import AuditJob, audit_text
        from logit_cache.audit import audit as check
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


_TRANSFER_OPTIONS = (
    click.argument("source"),
    click.argument("target"),
    click.option("--teacher", "teachers", multiple=True, help="Copy this entry only. Repeatable.  [default: all]"),
    click.option("--workers", type=click.IntRange(min=1), default=8, show_default=True, help="Objects copied at once."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)


def _transfer_options(function: Any) -> Any:
    for option in reversed(_TRANSFER_OPTIONS):
        function = option(function)
    return function


@click.command(epilog=EXAMPLE + "logit-cache push run/train s3://bucket/train --license cc-by-4.0")
@_transfer_options
@click.option("--without-tokens", is_flag=True, help="Leave the token stream and label_logprob behind.")
@click.option("--license", help="Licence for the card, such as cc-by-4.0.")
@click.option("--sign", metavar="KEY", help="PEM file of an elliptic-curve private key to sign the cache with.")
def push(source: str, target: str, as_json: bool, **flags: Any) -> None:
    """Copy a cache to where others get it: a folder, an object store, or hf://datasets/ORG/NAME.

    Every byte is checked on the way, and what is there already is not copied again. An entry that is not complete is
    copied as far as it goes. Run the same command again to go on after a stop.
    """
    with one_line_errors():
        from logit_cache.share import push as send

        _copy(send, source, target, as_json, flags)


@click.command(epilog=EXAMPLE + "logit-cache pull s3://bucket/train run/train --teacher llama")
@_transfer_options
@click.option("--corpus", metavar="CACHE", help="A cache of the same text, for one shared without its tokens.")
@click.option("--verify-key", metavar="KEY", help="PEM file of the public key that must have signed the cache.")
def pull(source: str, target: str, as_json: bool, **flags: Any) -> None:
    """Copy a cache that others made; nothing is at TARGET before all of it was checked.

    With an existing cache of the same text as TARGET, its teacher entries are added. Run the same command again to go
    on after a stop.
    """
    with one_line_errors():
        from logit_cache.share import pull as fetch

        _copy(fetch, source, target, as_json, flags)


def _copy(function: Any, source: str, target: str, as_json: bool, flags: dict[str, Any]) -> None:
    from logit_cache import show
    from storage.progress import progress

    done = function(
        source,
        target,
        **flags,
        track=lambda name, total: progress(name, total, "bytes"),
        say=lambda line: click.echo(line, err=True),
    )
    click.echo(json.dumps(vars(done), indent=2) if as_json else show.delivery_text(vars(done)))


@click.command(epilog=EXAMPLE + "logit-cache recompress run/train --name llama --to llama-16 -k 16 --top-p 0.98")
@click.argument("url")
@click.option("--name", required=True, help="Entry to read.")
@click.option("--to", required=True, help="Name of the entry to make.")
@click.option("--out", help="Another cache of the same token stream to make it in.  [default: the same cache]")
@click.option("-k", "--k", type=int, help="Keep at most this many ids per position.")
@click.option("--top-p", type=float, help="Cut each position where its mass first reaches this, such as 0.98.")
@click.option("--encoding", type=click.Choice(["codes", "float32"]), help="codes for an entry of exact float32.")
@click.option("--step-nats", type=float, help="Unit of the codes: the source's, or at least twice that.")
@click.option("--profile", type=click.Choice(["small", "fast"]), help="small (zstd) or fast to read (lz4).")
@click.option("--shard-tokens", type=int, help="Positions per shard.")
@click.option("--chunk-tokens", type=int, help="Positions per compressed chunk: the unit of reading.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recompress(url: str, as_json: bool, **flags: Any) -> None:
    """Rewrite an entry smaller, without its teacher; run it again to go on after a stop.

    What leaves a position goes to its tail, exactly: its mass is kept. The source is not touched.
    """
    with one_line_errors():
        from logit_cache.recompress import RecompressJob
        from logit_cache.recompress import recompress as rewrite
        from storage.config import build_config
        from storage.progress import progress

        job = build_config(RecompressJob, {"cache": url}, flags, "logit-cache recompress")
        with progress(f"recompress {job.name}", None, "positions") as advance:
            found = vars(rewrite(job, advance))
        if as_json:
            click.echo(json.dumps(found, indent=2))
            return
        before, after = found["bytes_before"] / found["positions"], found["bytes_after"] / found["positions"]
        click.echo(
            f"{found['cache']}: {found['name']} takes {after:.1f} bytes per token, {job.name} {before:.1f} "
            f"({100 * after / before:.0f} %)"
        )


@click.command(epilog=EXAMPLE + "logit-cache doctor s3://bucket/runs")
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(url: str, as_json: bool) -> None:
    """Measure what a place guarantees. Status 1 when a cache cannot be written there safely.

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


COMMANDS = (verify, doctor, push, pull, audit, recompress)
