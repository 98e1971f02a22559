"""`logit-cache push`, `pull` and `recompress`: a cache copied, or an entry made smaller."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from storage.errors import one_line_errors
from storage.text import counted, ranges_in_words, size
from student.cli_command import applied, command, json_option

_TRANSFER_OPTIONS = (
    click.argument("source"),
    click.argument("target"),
    click.option("--teacher", "teachers", multiple=True, help="Copy this entry only. Repeatable.  [default: all]"),
    click.option("--workers", type=click.IntRange(min=1), default=8, show_default=True, help="Objects copied at once."),
    json_option(),
)


@command("logit-cache push run/train s3://bucket/train --license cc-by-4.0", resumes=True)
@applied(_TRANSFER_OPTIONS)
@click.option("--without-tokens", is_flag=True, help="Leave the token stream and label_logprob behind.")
@click.option("--license", help="Licence for the card, such as cc-by-4.0.")
@click.option("--sign", metavar="KEY", help="PEM file of an elliptic-curve private key to sign the cache with.")
def push(license: str | None, sign: str | None, as_json: bool, **flags: Any) -> None:
    """Copy a cache to where others get it: a folder, an object store, or hf://datasets/ORG/NAME.

    Every byte is checked on the way, and objects that are there already are not copied again. Of an incomplete entry
    the committed shards are copied. Run the same command again to resume after an interruption.
    """
    with one_line_errors():
        from logit_cache.sharing.push_pull import push as send

        _copy(partial(send, license=license, sign=sign), as_json, flags)


@command("logit-cache pull s3://bucket/train run/train --teacher llama", resumes=True)
@applied(_TRANSFER_OPTIONS)
@click.option("--corpus", metavar="CACHE", help="A cache of the same text, for one shared without its tokens.")
@click.option("--verify-key", metavar="KEY", help="PEM file of the public key that must have signed the cache.")
def pull(verify_key: str | None, as_json: bool, **flags: Any) -> None:
    """Copy a cache that others made; nothing is at TARGET before all of it was checked.

    With an existing cache of the same text as TARGET, its teacher entries are added. Run the same command again to
    resume after an interruption.
    """
    with one_line_errors():
        from logit_cache.sharing.push_pull import pull as fetch

        _copy(partial(fetch, verify_key=verify_key), as_json, flags)


def _copy(function: Any, as_json: bool, flags: dict[str, Any]) -> None:
    from storage.progress import progress, to_stderr
    from storage.transfer.copy import CopyJob

    done = function(CopyJob(**flags), track=progress, log=to_stderr)
    click.echo(json.dumps(vars(done), indent=2) if as_json else delivery_text(vars(done)))


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


def delivery_text(found: dict[str, Any]) -> str:
    """The objects that `push` or `pull` copied, and the ranges that the source lacked."""
    teachers = ", ".join(found["teachers"]) or "no teacher"
    tokens = "with" if found["tokens_included"] else "without"
    lines = [
        f"{found['url']}: {teachers}, {tokens} tokens: {counted(found['copied'], 'object')} copied "
        f"({size(found['copied_bytes'])}), {found['kept']:,} were there"
    ]
    for group, ranges in found["missing"].items():
        lines.append(f"not complete at the source: {group} lacks {ranges_in_words(ranges)}")
    return "\n".join(lines)
