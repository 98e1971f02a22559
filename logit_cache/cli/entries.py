"""`logit-cache list`, `remove`, `rename`, `recompress` and `project`: caches and their teacher entries."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from storage.errors import InputError, one_line_errors
from storage.text import columns, counted, printable, size
from student.cli_command import command, json_option

if TYPE_CHECKING:
    from storage.cache.listing import ListedCache, ListedEntry


@command("logit-cache list s3://bucket/runs", name="list")
@click.argument("url")
@json_option()
def list_caches(url: str, as_json: bool) -> None:
    """Show the caches below a folder or URL, with their teacher entries; a cache itself shows itself.

    What is damaged or cannot be read is shown with its error. Hidden folders and symbolic links are left aside.
    """
    with one_line_errors():
        from storage.cache.listing import caches_below

        found = caches_below(url)
        if as_json:
            click.echo(json.dumps([asdict(cache) for cache in found], indent=2))
            return
        none = True
        for cache in found:
            none = False
            click.echo(_listing_text(cache))
        if none:
            click.echo(f"{url}: no cache below it")


def _listing_text(cache: ListedCache) -> str:
    """A cache in a line, and a line for each of its entries."""
    if cache.tokens is None:
        return printable(f"{cache.url}: ERROR: {cache.error}")
    tokens = "tokens not included"
    if cache.tokens_missing is not None:
        tokens = f"INCOMPLETE: {cache.tokens_missing:,} missing" if cache.tokens_missing else "tokens included"
    parts = [counted(cache.tokens, "token"), f"vocabulary of {counted(cache.vocabulary_size or 0, 'id')}", tokens]
    if not cache.entries:
        parts.append("no teacher entry")
    rows = [(f"  {entry.name}", *_state(entry, cache.tokens)) for entry in cache.entries]
    return "\n".join(map(printable, [f"{cache.url}: {', '.join(parts)}", *(columns(rows, left=2) if rows else [])]))


def _state(entry: ListedEntry, positions: int) -> tuple[str, str]:
    if entry.positions is None or entry.bytes is None:
        return f"ERROR: {entry.error}", ""
    # 99.97 % is not all of it.
    share = f"{math.floor(1000 * entry.positions / positions) / 10:.1f} %"
    return "complete" if entry.positions == positions else share, size(entry.bytes)


@command("logit-cache remove run/train llama-k64 --yes", resumes=True)
@click.argument("url", metavar="CACHE")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove(url: str, name: str, yes: bool) -> None:
    """Remove a teacher entry for good. Run it again after an interruption.

    The token stream and other entries stay as they are. A signature of the cache no longer holds.
    """
    with one_line_errors():
        from storage.cache.entries import remove_entry
        from storage.progress import progress

        if not yes:
            if not sys.stdin.isatty():
                raise InputError(f"{url}: removing {name} cannot be undone: give --yes")
            if not click.confirm(f"Remove the entry {name} of {url} for good?", err=True):
                raise InputError(f"{url}: {name} is not removed")
        with progress(f"remove {name}", None, "bytes") as advance:
            removed = remove_entry(url, name, advance)
        click.echo(f"{url}: {name} is removed, {size(removed)}")


@command("logit-cache rename run/train llama llama-k64", resumes=True)
@click.argument("url", metavar="CACHE")
@click.argument("name")
@click.argument("new_name")
def rename(url: str, name: str, new_name: str) -> None:
    """Give a teacher entry another name. In an object store its objects are copied; run it again to resume.

    Scripts that name the entry need its new name. A signature of the cache no longer holds.
    """
    with one_line_errors():
        from storage.cache.entries import rename_entry
        from storage.progress import progress

        with progress(f"rename {name}", None, "bytes") as advance:
            rename_entry(url, name, new_name, advance)
        click.echo(f"{url}: {name} is now {new_name}")


@command(
    "logit-cache recompress run/train --name llama-fast --to llama-small --profile small\n"
    "logit-cache recompress run/train --name llama --to llama-lean -k 32 --fields lean",
    resumes=True,
)
@click.argument("url")
@click.option("--name", required=True, help="Entry to read.")
@click.option("--to", required=True, help="Name of the entry to make.")
@click.option("--out", help="Another cache of the same token stream to make it in.  [default: the same cache]")
@click.option("--format-version", type=int, help="2: of an entry of version 1.  [default: 1 stays 1 where it can]")
@click.option(
    "--fields",
    multiple=True,
    help="Keep these beside the ids: lean (none), all, or entropy, half-tail, label, sampled-logprobs. Repeatable.",
)
@click.option("--positions", help="trained: drop the targets of positions that the loss mask does not train.")
@click.option("-k", "--k", type=int, help="Keep at most this many ids per position; sampled ones are sampled again.")
@click.option("--seed", type=int, help="With -k: keys that sample.  [default: one more than the source's]")
@click.option("--top-p", type=float, help="Cut each position where its mass first reaches this, such as 0.98.")
@click.option("--encoding", type=click.Choice(["codes", "float32"]), help="codes for an entry of exact float32.")
@click.option("--step-nats", type=float, help="Unit of the codes: the source's, or at least twice that.")
@click.option("--sampled-step-nats", type=float, help="Unit of the log-probs of sampled ids, at least the source's.")
@click.option("--profile", type=click.Choice(["small", "fast"]), help="small (zstd) or fast to read (lz4).")
@click.option("--shard-tokens", type=int, help="Positions per shard.")
@click.option("--chunk-tokens", type=int, help="Positions per compressed chunk: the unit of reading.")
@json_option()
def recompress(url: str, as_json: bool, **flags: Any) -> None:
    """Rewrite an entry smaller, without its teacher; run it again to resume after an interruption.

    The mass of removed ids goes to the position's tail, exactly; ids that were sampled are sampled again, so that they
    stay unbiased. The source is not touched. The new entry has its version of the format, or 2 where --fields,
    --positions or --sampled-step-nats is given, or the values of sampled ids change.
    """
    with one_line_errors():
        from logit_cache.caching.recompress import RecompressJob
        from logit_cache.caching.recompress import recompress as rewrite
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
            f"{found['cache']}: {found['name']} from {job.name}, {before:.1f} → {after:.1f} bytes per token "
            f"({100 * after / before:.0f} %)"
        )


@command("logit-cache project run/teacher --name llama --to run/student", resumes=True)
@click.argument("source", metavar="SRC")
@click.option("--name", required=True, help="Entry of SRC to project.")
@click.option("--to", required=True, metavar="DST", help="A cache of the same text in other tokens.")
@click.option("--as", "as_name", metavar="NAME", help="Name of the new entry.  [default: that of the entry]")
@click.option(
    "--most-uncertain",
    type=float,
    help="Leave a row without targets where ids with more mass than this may begin with another token.  [default: 0.5]",
)
@click.option("--profile", help="small (zstd) or fast to read (lz4).  [default: small]")
@click.option("--shard-tokens", type=int, help="Positions per shard: a killed job loses at most one.")
@click.option("--chunk-tokens", type=int, help="Positions per compressed chunk: the unit of reading.")
@json_option()
def project(as_json: bool, **flags: Any) -> None:
    """Take an entry into a cache of another tokenizer, without the teacher: its students need not share its tokens.

    Targets go to the positions at which both tokenizers have a boundary. Ids that were sampled stay unbiased, for
    forward KL alone. Run it again to resume after an interruption.
    """
    with one_line_errors():
        from logit_cache.describe import projected_in_words
        from logit_cache.projection.job import ProjectJob
        from logit_cache.projection.run import project_entry
        from storage.config import build_config
        from storage.progress import progress

        done = project_entry(build_config(ProjectJob, None, flags, "logit-cache project"), progress)
        if as_json:
            click.echo(json.dumps({**vars(done), "entry": done.entry.model_dump(mode="json")}, indent=2))
            return
        click.echo(
            f"{done.cache}: {done.name}, {done.with_targets:,} of {counted(done.positions, 'position')} with targets "
            f"({100 * done.with_targets / done.positions:.1f} %)"
        )
        assert done.entry.projected_from is not None
        for line in projected_in_words(done.entry.projected_from.model_dump(), done.entry.positions):
            click.echo(f"  {line}")
