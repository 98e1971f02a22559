"""Text → token stream: `logit-cache tokenize`.

Sources are read as a stream of documents (`logit_cache.corpus.sources`), tokenised piece by piece
(`logit_cache.corpus.pieces`) and spooled to raw temporary files, so that memory does not grow with the corpus; the
temporary folder (TMPDIR) needs 3 to 5 bytes per token. Nothing is written at the destination before all of that has
succeeded.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from logit_cache.corpus.conventions import Conventions
from logit_cache.corpus.conversations.renderer import Renderer
from logit_cache.corpus.conversations.replies import message_texts
from logit_cache.corpus.conversations.template import RESERVED
from logit_cache.corpus.documents import Chunk, Conversation, Document, Tokens, checked_text
from logit_cache.corpus.pieces import Encoder, cut, encode
from logit_cache.corpus.rows import Form, RowReader
from logit_cache.corpus.sources import Meter, Reading, Source, find_sources, read_sources
from logit_cache.corpus.spool import Spool
from logit_cache.corpus.tokenizer import BYTES, SPECIAL_TOKENS, stored_tokenizer, train_tokenizer
from storage import LogitCache
from storage.cache.corpus_writer import write_corpus
from storage.config import Settings, build_config, name_values
from storage.errors import InputError
from storage.files import PARTIAL, local_path
from storage.format.encoding import token_id_dtype
from storage.format.identity import stream_sha256, tokenizer_fingerprint, vocabulary_sha256, vocabulary_size
from storage.format.layout import stream_layout
from storage.format.manifest import MAX_SOURCES, CacheRecord, Corpus, CorpusSource, Tokenizer, Versions
from storage.progress import Log, silent
from storage.progress import progress as progress_bar
from storage.stores import open_store
from student.models.text_ids import text_suffix
from student.models.tokenizer import open_tokenizer

# Documents, tokens, and bytes of input so far.
Progress = Callable[[int, int, int], None]

# Forms of rows that are chosen by naming their field.
_NAMED: tuple[Form, ...] = ("text", "messages")


def _only_a_date(value: Any) -> Any:
    """A date, or one that is written YYYY-MM-DD: pydantic takes numbers of seconds, too."""
    if isinstance(value, datetime.date) or (isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value)):
        return value
    raise ValueError("expected a date as YYYY-MM-DD")


def _json_value(text: str) -> Any:
    """The JSON value that a text is, true and false also with a capital; any other text is itself."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


class CorpusConfig(Settings):
    """The fields of `logit-cache tokenize`.

    text: sources (see `logit_cache.corpus.sources`), read in this order.
    out: path or URL of the cache.
    tokenizer: a folder, a cache or a hub id; or train_tokenizer: the vocabulary size of a new one.
    special_tokens: further special tokens of a new one.
    chat_template: a file with a Jinja template, in place of the tokenizer's own, or the name of one of its own.
    template_variables: values for the template, a mapping or NAME=VALUE texts. date: that it may print.
    row_form: how rows are read that have the fields of several forms (`logit_cache.corpus.rows`).
    document_separator: plain text is cut into documents at this string, which is not tokenised; None: one document
    per file. append_token: a token of the vocabulary, appended to each document. bos: whether documents of text begin
    as the tokenizer begins a text; None: as the tokenizer does.
    """

    text: Annotated[tuple[str, ...], Field(min_length=1)]
    out: str
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    train_tokenizer: int | None = None
    special_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    chat_template: str | None = None
    document_separator: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    append_token: str | None = None
    bos: bool | None = None
    template_variables: dict[str, Any] = Field(default_factory=dict)
    date: Annotated[datetime.date, BeforeValidator(_only_a_date)] | None = None
    row_form: Form | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    split: str = "train"
    trust_remote_code: bool = False

    @field_validator("template_variables", mode="before")
    @classmethod
    def _parse_variables(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple, str)):
            pairs = name_values(value, "--template-variable enable_thinking=false")
            value = {name: _json_value(text) for name, text in pairs.items()}
        clash = sorted(RESERVED & value.keys()) if isinstance(value, dict) else []
        if clash:
            raise ValueError(f"{clash[0]!r} is an input of every template, and no variable of yours")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a template's variables are JSON values ({error})") from None
        return value

    @model_validator(mode="after")
    def _one_tokenizer(self) -> CorpusConfig:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("give either --tokenizer or --train-tokenizer, not both and not neither")
        least = BYTES + len(SPECIAL_TOKENS) + len(set(self.special_tokens) - set(SPECIAL_TOKENS))
        if self.train_tokenizer is not None and self.train_tokenizer < least:
            raise ValueError(
                f"--train-tokenizer {self.train_tokenizer}: a byte-level vocabulary has at least {least} ids, "
                f"256 bytes and {least - BYTES} special tokens"
            )
        if self.special_tokens and self.train_tokenizer is None:
            raise ValueError("--special-token goes with --train-tokenizer; a finished tokenizer has its own")
        return self


def total_bytes(config: CorpusConfig) -> int | None:
    """Bytes of input that `tokenize` will read, for a progress bar; None with a hub data set, whose size is unknown.

    The size of all files, and twice that when a tokenizer is trained on them first.
    """
    sizes = [source.file_bytes for source in find_sources(config.text)]
    known = [size for size in sizes if size is not None]
    passes = 1 if config.train_tokenizer is None else 2
    return passes * sum(known) if len(known) == len(sizes) else None


def tokenize(config: CorpusConfig, progress: Progress | None = None, log: Log | None = None) -> CacheRecord:
    """Make a cache's token stream from text; returns its record.

    `progress` receives documents, tokens and bytes of input so far, at least once per piece of text. A new tokenizer
    is trained in a first pass over the text, which adds to the bytes but not to documents and tokens. A destination
    that holds the same stream is left as it is, an interrupted one is finished. `log` receives a line for each thing
    about conversations and the tokenizer that a user should know.

    Raises InputError for input that cannot be read, IdentityMismatch when `out` holds another cache, StorageFull when
    the temporary folder is full. Nothing has been written at `out` then.
    """
    sources = find_sources(config.text)
    check_destination(config.out)
    conventions = Conventions.of(config.out, config.tokenizer, config.bos, config.template_variables, config.date)
    meter = Meter()
    if config.tokenizer is None:
        tokenizer, files = _new_tokenizer(config, sources, meter, progress)
    else:
        tokenizer, files = _given_tokenizer(config, config.tokenizer, conventions.tokenizer, log)
    vocabulary = tokenizer.get_vocab()
    append = _append_ids(config, vocabulary)
    prefix = conventions.prefix(tokenizer)
    old = conventions.version == 1
    renderer = Renderer(tokenizer, conventions, config.template_variables.keys(), config.date is not None)
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        with Spool(Path(folder), token_id_dtype(vocabulary_size(vocabulary)), len(sources), prefix, append) as spool:
            chunks = _chunks(read_sources(sources, _reading(config), meter), tokenizer, renderer)
            for piece, ids, trained in encode(cut(chunks), Encoder(tokenizer)):
                spool.add(piece, ids, trained)
                if progress is not None:
                    progress(spool.documents, spool.positions, meter.read_bytes)
        _check_trained(config, spool)
        arrays = spool.arrays()
        if old:
            del arrays["document_sources"]
        added = {"begins_with_bos": bool(prefix), "document_sources": True, **renderer.record}
        record = CacheRecord(
            format_version=1 if old else 2,
            corpus=Corpus(
                positions=spool.positions,
                documents=spool.documents,
                text_bytes=sum(spool.source_bytes),
                stream_sha256=stream_sha256(arrays["tokens"], arrays["document_starts"], arrays.get("loss_mask")),
                has_loss_mask="loss_mask" in arrays,
                document_separator=config.document_separator,
                sources=_source_records(sources, spool),
                **({} if old else added),
            ),
            tokenizer=Tokenizer(
                vocabulary_size=vocabulary_size(vocabulary),
                vocabulary_sha256=vocabulary_sha256(vocabulary),
                fingerprint=tokenizer_fingerprint(files, vocabulary),
            ),
            tokens_layout=stream_layout(spool.positions),
            documents_layout=stream_layout(spool.documents),
            created_with=Versions.of_this_process(),
        )
        write_corpus(config.out, record, files, arrays)
    if log is not None:
        for line in (*renderer.notes(), *_notes(config, tokenizer)):
            log(line)
    return record


def tokenize_text(config: Any, flags: dict[str, Any]) -> LogitCache:
    """`tokenize` with a config file, flags and a progress bar; returns the cache. Raises the errors of `tokenize`."""
    separator = flags.get("document_separator")
    if separator is not None:
        try:
            flags["document_separator"] = separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
        except ValueError as error:
            raise InputError(f"--document-separator {separator!r}: {error}; a backslash is written \\\\") from None
    settings = build_config(CorpusConfig, config, flags, "logit-cache tokenize")
    with progress_bar("tokenize", total_bytes(settings), "bytes") as advance:
        seen = 0

        def report(documents: int, tokens: int, text_bytes: int) -> None:
            nonlocal seen
            advance(text_bytes - seen)
            seen = text_bytes

        notes: list[str] = []
        tokenize(settings, report, notes.append)
    for line in notes:
        print(f"{settings.out}: {line}", file=sys.stderr)
    return LogitCache.open(settings.out)


def check_destination(out: str) -> None:
    """Refuse before the work a destination that the writer would refuse after it."""
    location = open_store(out)
    names = [name for name in location.names("") if not name.endswith(PARTIAL)]
    if names and "zarr.json" not in names:
        raise InputError(
            f"{location.url} holds {', '.join(names[:3])}{' …' if len(names) > 3 else ''} and is not a cache: "
            f"give an empty or new folder"
        )
    if not names:
        location.check_writable()


def _new_tokenizer(
    config: CorpusConfig, sources: list[Source], meter: Meter, progress: Progress | None
) -> tuple[Any, dict[str, bytes]]:
    assert config.train_tokenizer is not None
    lines = _lines(config, sources, meter, progress)
    first = next(lines, None)
    if first is None:
        raise _empty(config)
    tokenizer = train_tokenizer(_with_first(first, lines), config.train_tokenizer, config.special_tokens)
    if config.chat_template is not None:
        tokenizer.chat_template = _chat_template(config.chat_template, None)
    return stored_tokenizer(tokenizer)


def _given_tokenizer(
    config: CorpusConfig, name: str, recorded: str | None, log: Log | None
) -> tuple[Any, dict[str, bytes]]:
    """The tokenizer of a name and its stored files; with the recorded fingerprint, where it can have that."""
    said: list[str] = []

    def stored(own_rules: bool) -> tuple[Any, dict[str, bytes]]:
        tokenizer = open_tokenizer(name, config.tokenizer_revision, config.trust_remote_code, said.append, own_rules)
        if config.chat_template is not None:
            tokenizer.chat_template = _chat_template(config.chat_template, tokenizer.chat_template)
        return stored_tokenizer(tokenizer, config.trust_remote_code)

    made = stored(own_rules=True)
    if recorded is not None and _fingerprint(made) != recorded:
        # Streams were made with the rules that transformers' class put in place of the tokenizer's own.
        with contextlib.suppress(InputError):
            before = stored(own_rules=False)
            if _fingerprint(before) == recorded:
                said[:] = [f"{name}: {config.out} was made with the rules of its transformers class, which are kept"]
                made = before
    for line in said:
        (log or silent)(line)
    return made


def _fingerprint(made: tuple[Any, dict[str, bytes]]) -> str:
    tokenizer, files = made
    return tokenizer_fingerprint(files, tokenizer.get_vocab())


def _chat_template(given: str, own: Any) -> str:
    """The template in a file, or the tokenizer's own of that name."""
    if isinstance(own, dict) and given in own:
        return str(own[given])
    try:
        template = local_path(given).read_text(encoding="utf-8")
        if not template.strip():
            raise InputError(f"{given}: the chat template is empty; give another file")
        return template
    except (OSError, UnicodeDecodeError) as error:
        named = f"; the tokenizer has templates of the names {', '.join(sorted(own))}" if isinstance(own, dict) else ""
        raise InputError(f"{given}: cannot be read as a chat template ({error}){named}") from None


def _append_ids(config: CorpusConfig, vocabulary: dict[str, int]) -> tuple[int, ...]:
    if config.append_token is None:
        return ()
    if config.append_token not in vocabulary:
        raise InputError(
            f"--append-token {config.append_token!r} is not a token of this vocabulary; "
            f"give one that is, such as its end-of-text token"
        )
    return (vocabulary[config.append_token],)


def _reading(config: CorpusConfig) -> Reading:
    named: list[Form] = [name for name in _NAMED if f"{name}_field" in config.model_fields_set]
    form = config.row_form or (named[0] if len(named) == 1 else None)
    return Reading(RowReader(config.text_field, config.messages_field, form), config.split, config.document_separator)


def _chunks(items: Iterable[Document], tokenizer: Any, renderer: Renderer) -> Iterator[Chunk | Tokens]:
    size = vocabulary_size(tokenizer.get_vocab())
    for item in items:
        if isinstance(item, Conversation):
            yield renderer.chunk(item)
        elif isinstance(item, Tokens):
            if len(item.ids) and item.ids.max() >= size:
                raise InputError(
                    f"{item.where}: it holds the id {item.ids.max()}, and the tokenizer has {size} ids; give the "
                    f"tokenizer that made the rows"
                )
            yield replace(item, text=tokenizer.decode(item.ids.tolist()))
        else:
            if item.trained is not None and not tokenizer.is_fast:
                raise InputError(
                    f"{item.where}: what of a text is trained on is found by the character offsets of its tokens, and "
                    f"this tokenizer ({type(tokenizer).__name__}) has none; take one with a tokenizer.json"
                )
            yield item


def _check_trained(config: CorpusConfig, spool: Spool) -> None:
    if not spool.positions:
        raise _empty(config)
    if spool.has_mask and not spool.trained:
        raise InputError(
            f"{', '.join(config.text[:3])}: no token of it is trained on, so a student would learn nothing: there is "
            f"no reply of an assistant, or a mask that leaves out everything; check the roles of the messages"
        )


def _notes(config: CorpusConfig, tokenizer: Any) -> Iterator[str]:
    suffix = text_suffix(tokenizer)
    if suffix and config.append_token is None:
        token = tokenizer.convert_ids_to_tokens(suffix[-1])
        yield f"the tokenizer ends a text with {token!r}; documents here end so with --append-token {token!r}"


def _lines(config: CorpusConfig, sources: list[Source], meter: Meter, progress: Progress | None) -> Iterator[str]:
    """The text in lines, with their line feeds, for training a tokenizer."""

    def chunks() -> Iterator[Chunk]:
        for item in read_sources(sources, _reading(config), meter):
            if isinstance(item, Chunk):
                yield item
                continue
            if isinstance(item, Tokens):
                raise InputError(
                    f"{item.where}: the row holds tokens, which no tokenizer can be trained on; give the --tokenizer "
                    f"that made them"
                )
            if config.chat_template is None:
                raise InputError(
                    f"{item.where}: the row holds messages, and a new tokenizer has no chat template; give one with "
                    f"--chat-template FILE, or take --tokenizer of an instruction model"
                )
            for text in message_texts(item.messages):
                yield Chunk(item.source, checked_text(text, item.where), True)

    for piece in cut(chunks()):
        yield from re.findall(r"[^\n]*\n|[^\n]+", piece.own)
        if progress is not None:
            progress(0, 0, meter.read_bytes)


def _with_first(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _source_records(sources: list[Source], spool: Spool) -> tuple[CorpusSource, ...]:
    """The records of the sources; where there are more files than a record may list, the rest is one entry."""
    records = [
        CorpusSource(name=source.name, documents=documents, text_bytes=text_bytes)
        for source, documents, text_bytes in zip(sources, spool.source_documents, spool.source_bytes, strict=True)
    ]
    if len(records) <= MAX_SOURCES:
        return tuple(records)
    kept, rest = records[: MAX_SOURCES - 1], records[MAX_SOURCES - 1 :]
    others = CorpusSource(
        name=f"{len(rest)} more files",
        documents=sum(record.documents for record in rest),
        text_bytes=sum(record.text_bytes for record in rest),
    )
    return (*kept, others)


def _empty(config: CorpusConfig) -> InputError:
    return InputError(
        f"{', '.join(config.text[:3])}{' …' if len(config.text) > 3 else ''}: there is no text in it, "
        f"so there is nothing to tokenise; give other --text"
    )
