"""`logit-cache clean`: the text files of a corpus, cleaned family by family, for `logit-cache tokenize` to read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from storage.errors import one_line_errors
from storage.text import columns, counted
from student.cli_command import command, json_option

if TYPE_CHECKING:
    from logit_cache.corpus.cleaning import Outcome


@command("logit-cache clean --text 'babylm_10M/*.train' --out run/clean", resumes=True)
@click.option("--text", multiple=True, help="Text file, folder or pattern. Repeatable.")
@click.option("--out", metavar="DIR", help="Folder for the cleaned files, which keep their names.")
@click.option(
    "--family", multiple=True, metavar="NAME=GLOB", help="Family of the files that match. Repeatable.  [by their names]"
)
@click.option(
    "--limit-bytes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take about N bytes of each file at most, from its start to a line end.",
)
@json_option("Print the outcome of each file as JSON.")
def clean(as_json: bool, **flags: Any) -> None:
    """Clean text files as Baby Llama and BabyLlama-2 cleaned BabyLM's; docs/cleaning.md lists the rules of each family.

    A file's family is the longest family name in its own name; files of other names are plain text, whose spaces are
    tidied. Run it again to resume after an interruption: finished files are left alone.
    """
    with one_line_errors():
        from logit_cache.corpus.cleaning import CleaningJob
        from logit_cache.corpus.cleaning import clean as clean_files
        from storage.config import build_config
        from storage.progress import progress

        job = build_config(CleaningJob, None, flags, "logit-cache clean")
        outcomes = clean_files(job, progress)
        for outcome in outcomes:
            if not outcome.entry.bytes_out:
                click.echo(f"warning: {outcome.input}: nothing is left of it after cleaning", err=True)
        if as_json:
            found = {"out": job.out, "files": [outcome.model_dump(mode="json") for outcome in outcomes]}
            click.echo(json.dumps(found, indent=1))
        else:
            click.echo(_table(job.out, outcomes))


def _table(out: str, outcomes: list[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        entry = outcome.entry
        changes = [
            _change(entry.bytes_in, entry.bytes_out, "byte"),
            _change(entry.lines_in, entry.lines_out, "line"),
            *(["already there"] if outcome.already_there else []),
        ]
        rows.append((f"  {outcome.name}", f"{entry.family} ({outcome.chosen_by}): {', '.join(changes)}"))
    entries = [outcome.entry for outcome in outcomes]
    total = _change(sum(entry.bytes_in for entry in entries), sum(entry.bytes_out for entry in entries), "byte")
    return "\n".join([f"{out}: {counted(len(outcomes), 'file')}, {total}", *columns(rows, left=2)])


def _change(before: int, after: int, noun: str) -> str:
    return f"{before:,} → {counted(after, noun)}"
