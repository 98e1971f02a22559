"""`logit-cache push`, `pull`, `import` and `export`: a cache copied, and entries from and for others."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from storage.errors import InputError, one_line_errors
from storage.text import counted, printable, ranges_in_words, size
from student.cli_command import applied, command, json_option

if TYPE_CHECKING:
    from storage.format.manifest.entry import TeacherEntry

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
    "logit-cache import logits/ --format distillkit --tokenizer org/teacher --out run/train --name teacher\n"
    "logit-cache import logits/ --guess",
    name="import",
    resumes=True,
)
@click.argument("source", metavar="SRC")
@click.option("--format", help="Of the files: see docs/sharing.md, or --guess.")
@click.option("--guess", is_flag=True, help="Find the format by the content; without --out, only say it.")
@click.option("--out", metavar="URL", help="A new cache, or one that holds the same tokens.")
@click.option("--name", help="Name of the entry.")
@click.option("--tokenizer", help="That of the teacher: a folder, a cache or a hub id.  [default: the cache's own]")
@click.option("--teacher", metavar="NAME", help="What the files' maker says the teacher is; recorded, not checked.")
@click.option("--compression-config", metavar="FILE", help="DistillKit: the settings.  [default: beside the data]")
@click.option("--column-suffix", help="Parquet: of the columns of one teacher, where files hold several.")
@click.option("--values", help="logprobs, probabilities or logits (no normaliser).  [default: the data decide]")
@click.option("--alignment", help="Rows are about the token after theirs, or of theirs.  [default: the data decide]")
@click.option("-k", "--k", type=int, help="Keep at most this many ids of a row.  [default: all; of whole ones, 64]")
@click.option("--targets", help="Of whole distributions: topk or varopt.  [default: topk]")
@click.option("--seed", type=int, help="With varopt: keys the sample.  [default: 0]")
@click.option("--encoding", help="codes (1/32 nat) or float32 (exact).  [default: codes]")
@click.option("--step-nats", type=float, help="Unit of the codes.  [default: 0.03125]")
@click.option("--profile", help="small (zstd) or fast to read (lz4).  [default: small]")
@click.option("--shard-tokens", type=int, help="Positions per shard: a killed import loses at most one.")
@click.option("--chunk-tokens", type=int, help="Positions per compressed chunk: the unit of reading.")
@json_option()
def import_files(guess: bool, as_json: bool, **flags: Any) -> None:
    """Take targets that somebody else computed into a cache: no teacher runs.

    Each row or packed segment becomes a document of its own. Whether rows are about the next token, and what their
    numbers are, is decided by the data and recorded; what is not clear is refused. Run it again to resume.
    """
    with one_line_errors():
        from logit_cache.importing.job import ImportJob
        from logit_cache.importing.registry import guessed
        from logit_cache.importing.run import import_entry
        from storage.config import build_config
        from storage.progress import progress

        if flags["format"] is None:
            if not guess:
                raise InputError("logit-cache import: --format is missing; --guess finds it by the content")
            found = guessed(flags["source"])
            if flags["out"] is None:
                click.echo(json.dumps({"format": found.name}) if as_json else f"{found.name}: {found.about}")
                return
            flags["format"] = found.name
        done = import_entry(build_config(ImportJob, None, flags, "logit-cache import"), progress)
        if as_json:
            click.echo(json.dumps({**vars(done), "entry": done.entry.model_dump(mode="json")}, indent=2))
            return
        click.echo(f"{done.cache}: {done.name} from {done.format}, {counted(done.positions, 'token')} in "
                   f"{counted(done.documents, 'document')}")  # fmt: skip
        click.echo("\n".join(printable(f"  {line}") for line in _decisions(done.entry)))


@command("logit-cache export run/train --name teacher --format parquet --out logits")
@click.argument("url")
@click.option("--name", required=True, help="Entry to read.")
@click.option("--format", required=True, help="parquet, axolotl or distillkit.")
@click.option("--out", required=True, metavar="FOLDER", help="A new folder on this machine.")
@json_option()
def export(url: str, name: str, format: str, out: str, as_json: bool) -> None:
    """Write an entry as files that other trainers read; `import` reads them again.

    Each window of the teacher becomes a row. What a format cannot say is refused, or counted.
    """
    with one_line_errors():
        from logit_cache.exporting.run import export_entry
        from storage.progress import progress

        done = export_entry(url, name, format, out, progress)
        if as_json:
            click.echo(json.dumps(vars(done), indent=2))
            return
        left = f"; {counted(done.left_out, 'target')} of a window's last token left out" if done.left_out else ""
        click.echo(
            f"{done.folder}: {done.name} as {done.format}, {counted(done.tokens, 'token')} in "
            f"{counted(done.windows, 'window')}, {counted(done.files, 'file')}{left}"
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


def _decisions(entry: TeacherEntry) -> list[str]:
    from logit_cache.describe import imported_in_words

    assert entry.imported_from is not None
    return imported_in_words(entry.imported_from.model_dump())
