"""Text → token stream: `logit-cache tokenize`.

Sources are read as a stream of documents (`logit_cache.corpus.sources`), tokenised piece by piece
(`logit_cache.corpus.pieces`) and spooled to raw temporary files, so that memory does not grow with the corpus; the
temporary folder (TMPDIR) needs 3 to 5 bytes per token. Nothing is written at the destination before all of that has
succeeded.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.conventions import Conventions
from logit_cache.corpus.conversations.renderer import Renderer
from logit_cache.corpus.conversations.replies import message_texts
from logit_cache.corpus.documents import Chunk, Conversation, Document, Tokens, UnfitTokenizer, checked_text
from logit_cache.corpus.pieces import Encoder, cut, encode
from logit_cache.corpus.record import stream_record
from logit_cache.corpus.rollouts import StreamRollouts
from logit_cache.corpus.sources.find import Source, find_sources
from logit_cache.corpus.sources.names import SourceNames
from logit_cache.corpus.sources.reading import SkippedRows, check_column, read_sources
from logit_cache.corpus.spool import Spool
from logit_cache.corpus.tokenizer import stored_tokenizer, train_tokenizer
from storage import LogitCache
from storage.cache.corpus_writer import check_destination, write_corpus
from storage.config import build_config
from storage.errors import InputError
from storage.files import local_path
from storage.format.encoding import token_id_dtype
from storage.format.identity import tokenizer_fingerprint, vocabulary_size
from storage.format.manifest.cache import CacheRecord
from storage.progress import Advance, Log, Track, progress, silent, untracked
from storage.text import counted
from student.models.text_ids import text_suffix
from student.models.tokenizer import open_tokenizer


def tokenize(config: CorpusConfig, track: Track = untracked, log: Log = silent) -> CacheRecord:
    """Make a cache's token stream from text; returns its record.

    `track(name, total, unit)` opens a progress display, whose `advance` receives the bytes of input; a new tokenizer is
    trained in a first pass over them. A destination that holds the same stream is left as it is, an interrupted one is
    finished. `log` receives a line for each thing about the files, rows, conversations and tokenizer that a user should
    know.

    Raises InputError for input that cannot be read, IdentityMismatch when `out` holds another cache, StorageFull when
    the temporary folder is full. Nothing has been written at `out` then.
    """
    sources = find_sources(config.text, log)
    check_column(sources, config)
    sizes = [source.file_bytes for source in sources]
    known = [size for size in sizes if size is not None]  # that of a hub data set is not
    passes = 1 if config.train_tokenizer is None else 2
    with track("tokenize", passes * sum(known) if len(known) == len(sizes) else None, "bytes") as advance:
        return _tokenize(config, sources, advance, log)


def _tokenize(config: CorpusConfig, sources: list[Source], advance: Advance, log: Log) -> CacheRecord:
    check_destination(config.out)
    conventions, skipped, names = Conventions.of(config), SkippedRows(), SourceNames()
    old = conventions.version == 1
    if old and (config.source_column is not None or any(source.named for source in sources)):
        raise InputError(
            f"{config.out} holds a stream of version 1, which does not say where its documents are from: give another "
            f"--out, or leave the names of sources out"
        )
    if config.tokenizer is None:
        tokenizer, files = _new_tokenizer(config, sources, advance)
    else:
        tokenizer, files = _given_tokenizer(config, config.tokenizer, conventions.tokenizer, log)
    vocabulary = tokenizer.get_vocab()
    append = _append_ids(config, vocabulary)
    prefix = conventions.prefix(tokenizer)
    renderer = Renderer(tokenizer, conventions, config)
    ids = vocabulary_size(vocabulary)
    make = functools.partial(_tokenisable, tokenizer=tokenizer, ids=ids, renderer=renderer)
    rollouts = StreamRollouts()
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        with Spool(Path(folder), token_id_dtype(ids), prefix, append) as spool:
            chunks = read_sources(sources, config, make, advance, skipped, names)
            for piece, tokens, trained in encode(cut(chunks), Encoder(tokenizer)):
                rollouts.add(piece, names.names)
                spool.add(piece, tokens, trained)
        _check_trained(config, spool)
        arrays = spool.arrays()
        if old:
            rollouts.refuse(config.out)
            del arrays["document_sources"]
        added = {
            "begins_with_bos": bool(prefix),
            "document_sources": True,
            "skipped_rows": skipped.count or None,
            "rollouts": rollouts.made_by,
            **renderer.record,
        }
        separator = config.document_separator
        record = stream_record(spool, arrays, names.names, vocabulary, files, separator, None if old else added)
        write_corpus(config.out, record, files, arrays)
    for line in (
        *_notes_on_sources(names, spool, skipped),
        *renderer.notes(),
        *rollouts.notes(),
        *_notes(config, tokenizer),
    ):
        log(line)
    return LogitCache.open(config.out).record


def tokenize_text(config: Any, flags: dict[str, Any]) -> LogitCache:
    """`tokenize` with a config file, flags and a progress bar; returns the cache. Raises the errors of `tokenize`."""
    separator = flags.get("document_separator")
    if separator is not None:
        try:
            flags["document_separator"] = separator.encode("latin-1", "backslashreplace").decode("unicode_escape")
        except ValueError as error:
            raise InputError(f"--document-separator {separator!r}: {error}; a backslash is written \\\\") from None
    settings = build_config(CorpusConfig, config, flags, "logit-cache tokenize")
    notes: list[str] = []
    tokenize(settings, progress, notes.append)
    for line in notes:
        print(f"{settings.out}: {line}", file=sys.stderr)
    return LogitCache.open(settings.out)


def _new_tokenizer(config: CorpusConfig, sources: list[Source], advance: Advance) -> tuple[Any, dict[str, bytes]]:
    assert config.train_tokenizer is not None
    lines = _lines(config, sources, advance)
    first = next(lines, None)
    if first is None:
        raise _empty(config)
    lines = itertools.chain([first], lines)
    tokenizer = train_tokenizer(lines, config.train_tokenizer, config.special_tokens)
    if config.chat_template is not None:
        tokenizer.chat_template = _chat_template(config.chat_template, None)
    return stored_tokenizer(tokenizer)


def _given_tokenizer(config: CorpusConfig, name: str, recorded: str | None, log: Log) -> tuple[Any, dict[str, bytes]]:
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
        log(line)
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


def _tokenisable(item: Document, tokenizer: Any, ids: int, renderer: Renderer) -> Iterator[Chunk | Tokens]:
    """A document as text or tokens; ids: how many the tokenizer has."""
    if isinstance(item, Conversation):
        yield renderer.chunk(item)
    elif isinstance(item, Tokens):
        if len(item.ids) and item.ids.max() >= ids:
            raise UnfitTokenizer(
                f"{item.where}: it holds the id {item.ids.max()}, and the tokenizer has {ids} ids; give the "
                f"tokenizer that made the rows"
            )
        yield replace(item, text=tokenizer.decode(item.ids.tolist()))
    else:
        if item.trained is not None and not tokenizer.is_fast:
            raise UnfitTokenizer(
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


def _notes_on_sources(names: SourceNames, spool: Spool, skipped: SkippedRows) -> Iterator[str]:
    if skipped.count:
        yield f"left out, which the record says: {counted(skipped.count, 'row')} that cannot be read; the first:"
        yield from skipped.errors
    empty = [name for number, name in enumerate(names.names) if not spool.source_documents[number]]
    if empty:
        listed = ", ".join(empty[:3]) + " …" * (len(empty) > 3)
        yield f"without a document: {len(empty):,} of {counted(len(names.names), names.noun)}: {listed}"


def _notes(config: CorpusConfig, tokenizer: Any) -> Iterator[str]:
    suffix = text_suffix(tokenizer)
    if suffix and config.append_token is None:
        token = tokenizer.convert_ids_to_tokens(suffix[-1])
        yield f"the tokenizer ends a text with {token!r}; documents here end so with --append-token {token!r}"


def _lines(config: CorpusConfig, sources: list[Source], advance: Advance) -> Iterator[str]:
    """The text in lines, with their line feeds, for training a tokenizer."""
    make = functools.partial(_trainable, has_template=config.chat_template is not None)
    skipped = SkippedRows()  # counted when the text is tokenised
    for piece in cut(read_sources(sources, config, make, advance, skipped, SourceNames())):
        yield from re.findall(r"[^\n]*\n|[^\n]+", piece.own)


def _trainable(item: Document, has_template: bool) -> Iterator[Chunk]:
    if isinstance(item, Chunk):
        yield item
        return
    if isinstance(item, Tokens):
        raise UnfitTokenizer(
            f"{item.where}: the row holds tokens, which no tokenizer can be trained on; give the --tokenizer that made "
            f"them"
        )
    if not has_template:
        raise UnfitTokenizer(
            f"{item.where}: the row holds messages, and a new tokenizer has no chat template; give one with "
            f"--chat-template FILE, or take --tokenizer of an instruction model"
        )
    for text in message_texts(item.messages):
        yield Chunk(item.source, checked_text(text, item.where), True)


def _empty(config: CorpusConfig) -> InputError:
    return InputError(
        f"{', '.join(config.text[:3])}{' …' if len(config.text) > 3 else ''}: there is no text in it, "
        f"so there is nothing to tokenise; give other --text"
    )
