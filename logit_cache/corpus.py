"""Text → token stream: what `logit-cache tokenize` does.

Sources are read as a stream of documents (`logit_cache.sources`), tokenised piece by piece (`logit_cache.pieces`)
and spooled to raw temporary files, so that memory does not grow with the corpus; the temporary folder (TMPDIR) needs
3 to 5 bytes per token. Only when all of it went well is anything written at the destination.

Legend: `N` tokens, `D` documents, `n` tokens of a piece.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from logit_cache.chat import message_texts, render
from logit_cache.pieces import Encoder, Ids, Piece, cut, encode
from logit_cache.sources import Chunk, Conversation, Meter, Reading, Source, checked_text, find_sources, read_sources
from logit_cache.tokenizer import (
    BYTES,
    SPECIAL_TOKENS,
    cache_vocabulary,
    open_tokenizer,
    stored_tokenizer,
    train_tokenizer,
)
from storage.cache.corpus_writer import write_corpus
from storage.errors import InputError, StorageFull, is_out_of_space
from storage.files import PARTIAL
from storage.format.encoding import token_id_dtype
from storage.format.identity import stream_sha256, tokenizer_fingerprint, vocabulary_sha256, vocabulary_size
from storage.format.layout import stream_layout
from storage.format.manifest import CacheRecord, Corpus, CorpusSource, Tokenizer, Versions
from storage.stores import open_store

__all__ = ["CorpusConfig", "cache_vocabulary", "tokenize", "total_bytes"]

# Documents, tokens, and bytes of input so far.
Progress = Callable[[int, int, int], None]

_MAX_SOURCES = 4_096


class CorpusConfig(BaseModel):
    """The fields of `logit-cache tokenize`.

    text: what `logit_cache.sources` reads, in this order.
    out: path or URL of the cache.
    tokenizer: a folder, a cache or a hub id; or train_tokenizer: the vocabulary size of a new one.
    special_tokens: further special tokens of a new one.
    chat_template: a file with a Jinja template, in place of the tokenizer's own.
    document_separator: plain text is cut into documents at this string, which is not tokenised; None: one document
    per file. append_token: a token of the vocabulary that is put after each document.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[tuple[str, ...], Field(min_length=1)]
    out: str
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    train_tokenizer: int | None = None
    special_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    chat_template: str | None = None
    document_separator: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    append_token: str | None = None
    text_field: str = "text"
    messages_field: str = "messages"
    split: str = "train"
    trust_remote_code: bool = False

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


def tokenize(config: CorpusConfig, progress: Progress | None = None) -> CacheRecord:
    """Make a cache's token stream out of text; returns the record of it.

    `progress` is given documents, tokens and bytes of input so far, at least once per piece of text. A new tokenizer
    is trained in a first pass over the text, which adds to the bytes but not to documents and tokens. A destination
    that holds the same stream is left as it is, an interrupted one is finished.

    Raises InputError for input that cannot be read, IdentityMismatch when `out` holds another cache. Nothing has
    been written at `out` then.
    """
    sources = find_sources(config.text)
    _check_destination(config.out)
    meter = Meter()
    tokenizer, files = _tokenizer(config, sources, meter, progress)
    vocabulary = tokenizer.get_vocab()
    size = vocabulary_size(vocabulary)
    append = _append_id(config, vocabulary)
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        with Spool(Path(folder), token_id_dtype(size), len(sources), append) as spool:
            chunks = _chunks(read_sources(sources, _reading(config), meter), tokenizer)
            for piece, ids, trained in encode(cut(chunks), Encoder(tokenizer)):
                spool.add(piece, ids, trained)
                if progress is not None:
                    progress(spool.documents, spool.positions, meter.read_bytes)
        if not spool.positions:
            raise _empty(config)
        tokens, starts, mask = spool.arrays()
        record = CacheRecord(
            corpus=Corpus(
                positions=spool.positions,
                documents=spool.documents,
                text_bytes=sum(spool.source_bytes),
                stream_sha256=stream_sha256(tokens, starts, mask),
                has_loss_mask=mask is not None,
                document_separator=config.document_separator,
                sources=_source_records(sources, spool),
            ),
            tokenizer=Tokenizer(
                vocabulary_size=size,
                vocabulary_sha256=vocabulary_sha256(vocabulary),
                fingerprint=tokenizer_fingerprint(files, vocabulary),
            ),
            tokens_layout=stream_layout(spool.positions),
            documents_layout=stream_layout(spool.documents),
            created_with=Versions.of_this_process(),
        )
        write_corpus(config.out, record, files, tokens, starts, mask)
    return record


class Spool:
    """The token stream on its way: raw files that grow, and the counts.

    The loss mask of a document is that of its tokens moved one to the left: position p is trained on if token p + 1
    is, and the last position never is. So for each document it is written from its second token on, and closed
    with a zero.
    """

    def __init__(self, folder: Path, token_dtype: str, sources: int, append_id: int | None) -> None:
        self.positions = 0
        self.documents = 0
        self.source_documents = [0] * sources
        self.source_bytes = [0] * sources
        self._folder = folder
        self._dtypes = {"tokens": token_dtype, "document_starts": "uint64", "loss_mask": "bool"}
        self._append = None if append_id is None else np.array([append_id], dtype=np.uint32)
        self._has_mask = False
        self._document_tokens = 0
        self._document_bytes = 0
        self._files: dict[str, IO[bytes]] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Spool:
        self._files = {name: self._open.enter_context((self._folder / name).open("wb")) for name in self._dtypes}
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._open.close()
        except OSError as error:
            raise self._explained(error) from error

    def add(self, piece: Piece, ids: Ids, trained: NDArray[np.bool_] | None) -> None:
        """Append a piece: ids uint32 [n]; trained bool [n], None where all are. A document without tokens is none."""
        self._document_bytes += len(piece.own.encode())
        self._has_mask |= trained is not None
        self._append_tokens(ids, np.ones(len(ids), dtype=bool) if trained is None else trained)
        if not piece.closes:
            return
        if self._document_tokens:
            if self._append is not None:
                # It ends a document of plain text like any other token; no assistant wrote it after a conversation.
                self._append_tokens(self._append, np.array([trained is None]))
            self._write("loss_mask", np.zeros(1, dtype=bool))
            self.documents += 1
            self.source_documents[piece.source] += 1
            self.source_bytes[piece.source] += self._document_bytes
        self._document_tokens = self._document_bytes = 0

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Memory maps: tokens [N], document_starts uint64 [D], loss_mask bool [N] if any conversation was added."""
        maps = {
            name: np.memmap(self._folder / name, dtype=dtype, mode="r")
            for name, dtype in self._dtypes.items()
            if name != "loss_mask" or self._has_mask
        }
        return maps["tokens"], maps["document_starts"], maps.get("loss_mask")

    def _append_tokens(self, ids: Ids, trained: NDArray[np.bool_]) -> None:
        if not len(ids):
            return
        if not self._document_tokens:
            self._write("document_starts", np.array([self.positions]))
        self._write("tokens", ids)
        self._write("loss_mask", trained if self._document_tokens else trained[1:])
        self._document_tokens += len(ids)
        self.positions += len(ids)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        try:
            self._files[name].write(values.astype(self._dtypes[name]).tobytes())
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        if not is_out_of_space(error):
            return error
        return StorageFull(
            f"no space left for the token stream in the temporary folder {self._folder.parent}: free some room, or "
            f"set TMPDIR to a folder with 5 bytes per token"
        )


def _check_destination(out: str) -> None:
    """Refuse before the work what the writer would refuse after it."""
    location = open_store(out)
    names = [name for name in location.names("") if not name.endswith(PARTIAL)]
    if names and "zarr.json" not in names:
        raise InputError(
            f"{location.url} holds {', '.join(names[:3])}{' …' if len(names) > 3 else ''} and is not a cache: "
            f"give an empty or new folder"
        )


def _tokenizer(
    config: CorpusConfig, sources: list[Source], meter: Meter, progress: Progress | None
) -> tuple[Any, dict[str, bytes]]:
    template = _chat_template(config)
    if config.tokenizer is not None:
        tokenizer = open_tokenizer(config.tokenizer, config.tokenizer_revision, config.trust_remote_code)
    else:
        assert config.train_tokenizer is not None
        lines = _lines(config, sources, meter, progress)
        first = next(lines, None)
        if first is None:
            raise _empty(config)
        tokenizer = train_tokenizer(_with_first(first, lines), config.train_tokenizer, config.special_tokens)
    if template is not None:
        tokenizer.chat_template = template
    return stored_tokenizer(tokenizer, config.trust_remote_code)


def _chat_template(config: CorpusConfig) -> str | None:
    if config.chat_template is None:
        return None
    try:
        return Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{config.chat_template}: cannot be read as a chat template ({error})") from None


def _append_id(config: CorpusConfig, vocabulary: dict[str, int]) -> int | None:
    if config.append_token is None:
        return None
    if config.append_token not in vocabulary:
        raise InputError(
            f"--append-token {config.append_token!r} is not a token of this vocabulary; "
            f"give one that is, such as its end-of-text token"
        )
    return vocabulary[config.append_token]


def _reading(config: CorpusConfig) -> Reading:
    return Reading(config.text_field, config.messages_field, config.split, config.document_separator)


def _chunks(items: Iterable[Chunk | Conversation], tokenizer: Any) -> Iterator[Chunk]:
    for item in items:
        if isinstance(item, Conversation):
            text, ranges = render(tokenizer, item.messages, item.where)
            yield Chunk(item.source, checked_text(text, item.where), True, ranges)
        else:
            yield item


def _lines(config: CorpusConfig, sources: list[Source], meter: Meter, progress: Progress | None) -> Iterator[str]:
    """The text in lines, with their line feeds, for training a tokenizer."""

    def chunks() -> Iterator[Chunk]:
        for item in read_sources(sources, _reading(config), meter):
            if isinstance(item, Chunk):
                yield item
                continue
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
    """What the text came from; where there are more files than a record may list, the rest is one entry."""
    records = [
        CorpusSource(name=source.name, documents=documents, text_bytes=text_bytes)
        for source, documents, text_bytes in zip(sources, spool.source_documents, spool.source_bytes, strict=True)
    ]
    if len(records) <= _MAX_SOURCES:
        return tuple(records)
    kept, rest = records[: _MAX_SOURCES - 1], records[_MAX_SOURCES - 1 :]
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
