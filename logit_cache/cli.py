"""The commands `cache-logits` and `logit-cache`: parse, call one function, print its result."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

import storage

# The name is generic: say so in one line if Python found another distribution's package.
if "LogitCache" not in getattr(storage, "__all__", ()):
    print(
        f"error: logit-cache needs its own package 'storage', but Python found another one "
        f"({', '.join(getattr(storage, '__path__', ['?']))}): install logit-cache in an environment of its own",
        file=sys.stderr,
    )
    raise SystemExit(2)

from logit_cache.cleaning_cli import clean
from logit_cache.evaluation_cli import evaluate
from logit_cache.options import JOB_OPTIONS, Options, options
from logit_cache.planning_cli import plan, status
from logit_cache.recipe_cli import recipe
from logit_cache.report_cli import report
from logit_cache.sharing_cli import COMMANDS, EXAMPLE
from storage.errors import one_line_errors

_CORPUS_OPTIONS: Options = (
    click.option("--text", multiple=True, help="Text file, glob, .jsonl, .parquet or hub data set. Repeatable."),
    click.option("--tokenizer", help="Directory or hub id of an existing tokenizer."),
    click.option("--train-tokenizer", type=int, metavar="SIZE", help="Train a byte-level BPE of SIZE ids on the text."),
    click.option("--tokenizer-revision", help="Revision of a hub tokenizer."),
    click.option("--special-token", "special_tokens", multiple=True, help="Further special token of a new tokenizer."),
    click.option("--chat-template", metavar="FILE", help="Jinja template for conversations."),
    click.option("--document-separator", help=r"Split text files into documents at this string, such as '\n\n'."),
    click.option("--append-token", help="Token to put after every document, such as '</s>'."),
    click.option("--text-field", help="Field of a row that holds its text.  [default: text]"),
    click.option("--messages-field", help="Field of a row that holds a conversation.  [default: messages]"),
    click.option("--split", help="Split of a hub data set.  [default: train]"),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logit-cache")
def main() -> None:
    """Make, look at, check and share caches of teachers' next-token distributions."""


for _command in (*COMMANDS, clean, evaluate, plan, recipe, report, status):
    main.add_command(_command)


@main.command(epilog=EXAMPLE + "logit-cache tokenize --text 'corpus/*.txt' --train-tokenizer 16000 --out run/train")
@options(_CORPUS_OPTIONS)
@click.option("--out", help="Path or URL of the cache to make.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run tokenizer code from the hub.")
@click.option("--config", type=str, help="YAML file with these fields; flags override it.")
@click.option("--json", "as_json", is_flag=True, help="Print the cache's record as JSON.")
def tokenize(config: str | None, as_json: bool, **flags: Any) -> None:
    """Turn text into a token stream: the start of every cache.

    A validation cache is the same command with the first cache's tokenizer: --tokenizer CACHE/tokenizer.
    """
    with one_line_errors():
        cache = _tokenize(config, flags)
        if as_json:
            click.echo(json.dumps(cache.record.model_dump(mode="json"), indent=2))
            return
        corpus = cache.record.corpus
        click.echo(
            f"{cache.url}: {corpus.positions:,} tokens in {corpus.documents:,} documents, "
            f"{corpus.text_bytes / corpus.positions:.2f} bytes of text per token, "
            f"vocabulary {cache.vocabulary_size:,}"
        )


def _tokenize(config: Any, flags: dict[str, Any]) -> Any:
    from logit_cache import corpus
    from logit_cache.progress import progress
    from storage import LogitCache
    from storage.config import build_config
    from storage.errors import InputError

    separator = flags.get("document_separator")
    if separator is not None:
        try:
            flags["document_separator"] = separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
        except ValueError as error:
            raise InputError(f"--document-separator {separator!r}: {error}; a backslash is written \\\\") from None
    settings = build_config(corpus.CorpusConfig, config, flags, "logit-cache tokenize")
    with progress("tokenize", corpus.total_bytes(settings), "bytes") as advance:
        seen = 0

        def report(documents: int, tokens: int, text_bytes: int) -> None:
            nonlocal seen
            advance(text_bytes - seen)
            seen = text_bytes

        corpus.tokenize(settings, report)
    return LogitCache.open(settings.out)


@main.command(epilog=EXAMPLE + "logit-cache inspect run/train --at 1234")
@click.argument("url")
@click.option("--at", type=int, metavar="POSITION", help="Show one position with its tokens as text.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(url: str, at: int | None, as_json: bool) -> None:
    """Show what is in a cache: sizes, coverage, provenance, summaries, or one position."""
    with one_line_errors():
        from logit_cache import inspect as inspection
        from logit_cache import show
        from storage import LogitCache

        cache = LogitCache.open(url)
        if at is not None:
            found = inspection.describe_position(cache, at)
            text = show.position_text(found)
        else:
            found = inspection.describe_cache(cache)
            text = show.cache_text(found)
        click.echo(json.dumps(found, indent=2) if as_json else text)


@main.command(epilog=EXAMPLE + "logit-cache demo --out demo-run")
@click.option("--out", default="demo-run", show_default=True, help="Folder of the run; an interrupted one goes on.")
@click.option("--text", multiple=True, help="Text to use instead of the Python standard library's source. Repeatable.")
def demo(out: str, text: tuple[str, ...]) -> None:
    """The whole road in minutes on a laptop: two teachers, their caches, a student, and what was gained."""
    with one_line_errors():
        from logit_cache.demo import run_demo

        click.echo(run_demo(out, text))


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXAMPLE + "cache-logits --cache run/train --teacher run/llama --name llama -k 64",
)
@options(JOB_OPTIONS)
@click.option("--worker", help="i/n: do the i-th of n shares, for several processes on one entry.")
@click.option("--json", "as_json", is_flag=True, help="Print the entry's description as JSON.")
@click.option("--out", help="With --text: make the cache here first.")
@options(_CORPUS_OPTIONS)
def cache_logits(config: str | None, worker: str | None, as_json: bool, out: str | None, **flags: Any) -> None:
    """Run a teacher once over a token stream and store its targets; run it again to go on after a stop.

    From raw text in one step: give --text and --out instead of --cache; the tokenizer is the teacher's unless
    --tokenizer or --train-tokenizer says otherwise.
    """
    with one_line_errors():
        from logit_cache.corpus import CorpusConfig
        from logit_cache.engines import parse_worker, run_local
        from logit_cache.fidelity import is_wanted, measure
        from logit_cache.inspect import describe_entry
        from logit_cache.job import CacheJob, load_teachers, open_job
        from logit_cache.progress import progress
        from storage.config import build_config, given, read_yaml
        from storage.errors import InputError
        from storage.reader import LogitCache

        fields = (read_yaml(config) if config else {}) | given({**flags, "out": out})
        if fields.get("tensor_parallel") is True:
            from logit_cache import tensor_parallel

            found = tensor_parallel.run(fields, worker)
            if found is not None:
                _print_entry(fields["cache"], fields["name"], found, as_json)
            return
        share = parse_worker(worker) if worker else (0, 1)
        # What is no field of the job is for making the token stream; unknown names stay, and are refused with it.
        of_text = CorpusConfig.model_fields.keys() - CacheJob.model_fields.keys()
        text_fields = {name: fields.pop(name) for name in list(fields) if name in of_text}
        if "text" in text_fields:
            if "out" not in text_fields or "cache" in fields:
                raise InputError("cache-logits: --text makes a new cache: give it with --out, and without --cache")
            job = build_config(CacheJob, {**fields, "cache": text_fields["out"]}, {}, "cache-logits")
            # The teachers before the text, so that a wrong one costs no minutes and leaves no stream behind.
            teachers = load_teachers(job)
            text_fields.setdefault("trust_remote_code", job.trust_remote_code)
            if not {"tokenizer", "train_tokenizer"} & text_fields.keys():
                text_fields.update(
                    {"tokenizer": job.teacher[0], "tokenizer_revision": (*job.revision, None)[0] or None}
                )
            _tokenize(None, text_fields)
            opened = open_job(job, teachers)
        elif text_fields:
            raise InputError(f"cache-logits: --{min(text_fields).replace('_', '-')} goes with --text and --out")
        else:
            job = build_config(CacheJob, fields, {}, "cache-logits")
            opened = open_job(job)
        entry = opened.writer.entry
        pending = opened.writer.pending()
        size = entry.layout.shard
        mine = [shard for shard in pending if shard % share[1] == share[0]]
        left = sum(min(size, entry.positions - shard * size) for shard in mine)
        total = left if share[1] > 1 else entry.positions
        with progress(f"cache {job.name}", total, "tokens", total - left) as advance:
            run_local(opened, pending, share, advance)
        if is_wanted(opened, job.fidelity_positions):
            with progress(f"fidelity of {job.name}", None, "positions") as advance:
                opened.writer.publish_fidelity(measure(opened, job.fidelity_positions, advance))
        found = describe_entry(LogitCache.open(job.cache).teacher(job.name))
        _print_entry(job.cache, job.name, found, as_json)


def _print_entry(cache: str, name: str, found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(
        f"{cache}: {name} has {found['positions_cached']:,} of {found['positions']:,} positions, "
        f"{found['bytes_per_token'] or 0:.1f} bytes per token"
    )


if __name__ == "__main__":
    sys.exit(main())
