"""The record of a cache whose token stream lies in a spool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from logit_cache.corpus.spool import Spool
from storage.format.identity import stream_sha256, tokenizer_fingerprint, vocabulary_sha256, vocabulary_size
from storage.format.layout import stream_layout
from storage.format.manifest.cache import MAX_SOURCES, CacheRecord, Corpus, CorpusSource, Tokenizer
from storage.format.manifest.shared import Versions


def stream_record(
    spool: Spool,
    arrays: Mapping[str, NDArray[Any]],
    sources: Sequence[str],
    vocabulary: dict[str, int],
    tokenizer_files: dict[str, bytes],
    separator: str | None = None,
    added: Mapping[str, Any] | None = None,
) -> CacheRecord:
    """The record of a closed spool and its arrays.

    sources: names, by the number of a source in the spool. vocabulary: of the tokenizer that has these files. added:
    the fields of `Corpus` since version 2 of the record; None for one of version 1.
    """
    return CacheRecord(
        format_version=1 if added is None else 2,
        corpus=Corpus(
            positions=spool.positions,
            documents=spool.documents,
            text_bytes=spool.source_bytes.total(),
            stream_sha256=stream_sha256(arrays["tokens"], arrays["document_starts"], arrays.get("loss_mask")),
            has_loss_mask="loss_mask" in arrays,
            document_separator=separator,
            sources=_source_records(sources, spool),
            **(added or {}),
        ),
        tokenizer=Tokenizer(
            vocabulary_size=vocabulary_size(vocabulary),
            vocabulary_sha256=vocabulary_sha256(vocabulary),
            fingerprint=tokenizer_fingerprint(tokenizer_files, vocabulary),
        ),
        tokens_layout=stream_layout(spool.positions),
        documents_layout=stream_layout(spool.documents),
        created_with=Versions.of_this_process(),
    )


def _source_records(names: Sequence[str], spool: Spool) -> tuple[CorpusSource, ...]:
    """The records of the sources; where there are more files than a record may list, the rest is one entry."""
    records = [
        CorpusSource(name=name, documents=spool.source_documents[number], text_bytes=spool.source_bytes[number])
        for number, name in enumerate(names)
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
