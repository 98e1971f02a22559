"""The command `logit-cache tokenize`, and the options of text that `cache-logits` shares with it."""

from __future__ import annotations

import json
from typing import Any

import click

from storage.errors import one_line_errors
from storage.text import counted
from student.cli_command import Decorator, applied, command, json_option, under

_text = under("Text")
CORPUS_OPTIONS: tuple[Decorator, ...] = (
    _text("--text", multiple=True, help="[SOURCE=] file of text or rows, folder, glob, or hub:NAME. Repeatable."),
    _text("--tokenizer", help="Directory, cache or hub id of an existing tokenizer."),
    _text("--train-tokenizer", type=int, metavar="SIZE", help="Train a byte-level BPE of SIZE ids on the text."),
    _text("--tokenizer-revision", help="Revision of a hub tokenizer."),
    _text("--special-token", "special_tokens", multiple=True, help="Further special token of a new tokenizer."),
    _text("--chat-template", metavar="FILE", help="Jinja template for conversations, or the name of the tokenizer's."),
    _text(
        "--template-variable",
        "template_variables",
        multiple=True,
        metavar="NAME=VALUE",
        help="Variable of the chat template, such as enable_thinking=false. Repeatable.",
    ),
    _text("--date", metavar="YYYY-MM-DD", help="Date that a chat template prints.  [default: today; recorded]"),
    _text("--bos/--no-bos", default=None, help="Begin documents as the tokenizer begins a text.  [default: --bos]"),
    _text("--document-separator", help=r"Split text files into documents at this string, such as '\n\n'."),
    _text("--append-token", help="Token to put after every document, such as '</s>'."),
    _text("--text-field", help="Field of a row that holds its text.  [default: text]"),
    _text("--messages-field", help="Field of a row that holds a conversation.  [default: messages, conversations]"),
    _text("--source-column", metavar="FIELD", help="Field of a row that names its source.  [default: its file does]"),
    _text("--row-form", help="Of rows: text, messages, completion, instruction or input_ids.  [default: by fields]"),
    _text("--split", help="Split of a hub data set.  [default: train]"),
    _text("--skip-bad-rows", is_flag=True, default=None, help="Leave out rows that cannot be read; recorded."),
)


@command("logit-cache tokenize --text 'corpus/*.txt' --train-tokenizer 16000 --out run/train", resumes=True)
@click.option("--out", help="Path or URL of the cache to make.")
@applied(CORPUS_OPTIONS)
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run tokenizer code from the hub.")
@click.option("--config", type=str, help="YAML file with these fields; flags override it.")
@json_option("Print the cache's record as JSON.")
def tokenize(config: str | None, as_json: bool, **flags: Any) -> None:
    """Turn text into a token stream: the start of every cache.

    A validation cache is the same command with the first cache's tokenizer: --tokenizer CACHE/tokenizer.
    """
    with one_line_errors():
        from logit_cache.cli.inspect import source_lines, stream_lines
        from logit_cache.corpus.tokenize import tokenize_text
        from logit_cache.describe import describe_stream

        cache = tokenize_text(config, flags)
        if as_json:
            click.echo(json.dumps(cache.record.model_dump(mode="json"), indent=2))
            return
        corpus = cache.record.corpus
        click.echo(
            f"{cache.url}: {counted(corpus.positions, 'token')} in {counted(corpus.documents, 'document')}, "
            f"{corpus.text_bytes / corpus.positions:.2f} bytes of text per token, "
            f"vocabulary {cache.vocabulary_size:,}"
        )
        found = describe_stream(cache)
        sources = [source.model_dump() for source in corpus.sources]
        for line in (*source_lines(sources, found["source_tokens"]), *stream_lines(found)):
            click.echo(f"  {line}")
