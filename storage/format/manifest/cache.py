"""The record of a cache: its token stream, and the tokenizer that made it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from storage.format.manifest.shared import ADDED, ArrayLayout, Count, Positive, Sha256, Text, Versions
from storage.format.sealing import Record

MAX_SOURCES = 4_096


class CorpusSource(Record):
    """One file or data set that the text came from: its name only, never a path on somebody's machine."""

    name: Text
    documents: Count
    text_bytes: Count


class Rollouts(Record):
    """The model that sampled all trained tokens of a stream, and how.

    `source` is a hub id or the last part of a local path; the digests alone identify the model, those of an adapter
    with its base's. `top_p` 1 and `top_k` 0 leave no id out.
    """

    source: Text
    weights_sha256: Sha256
    config_sha256: Sha256
    adapter_sha256: Sha256 | None = ADDED
    adapter_config_sha256: Sha256 | None = ADDED
    temperature: Annotated[float, Field(gt=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: Count
    max_new_tokens: Positive
    seed: Count

    @property
    def digests(self) -> dict[str, str]:
        """The digests that there are, by name."""
        return {name: value for name, value in self.model_dump().items() if name.endswith("_sha256")}


class Corpus(Record):
    """The token stream. `stream_sha256` covers tokens (as uint32), document starts (uint64) and loss mask.

    Since version 2 of the CacheRecord, and None before: `begins_with_bos`: whether documents of text begin with the ids
    that the tokenizer puts before a text; `template_sha256`: of the chat templates that rendered conversations, joined
    by NUL characters; `template_variables` and `date`: what they were given; `skipped_rows`: rows left out because they
    cannot be read; `document_sources`: whether there is an array of that name; `rollouts`: the model that sampled the
    trained tokens.
    """

    positions: Positive
    documents: Positive
    text_bytes: Count
    stream_sha256: Sha256
    has_loss_mask: bool
    tokens_included: bool = True
    document_separator: Text | None
    sources: Annotated[tuple[CorpusSource, ...], Field(max_length=MAX_SOURCES)]
    begins_with_bos: bool | None = ADDED
    template_sha256: Sha256 | None = ADDED
    template_variables: Annotated[dict[Text, JsonValue], Field(max_length=256)] | None = ADDED
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = ADDED
    skipped_rows: Count | None = ADDED
    document_sources: bool | None = ADDED
    rollouts: Rollouts | None = ADDED

    def added(self) -> dict[str, Any]:
        """What a record of version 1 does not have."""
        return {name: value for name, value in self.model_dump().items() if Corpus.model_fields[name].exclude_if}


class Tokenizer(Record):
    """`vocabulary_size` is V: the largest id + 1, added tokens included. `fingerprint` covers behaviour
    (merges, normaliser, pre-tokenizer), `vocabulary_sha256` only which id is which string."""

    vocabulary_size: Annotated[int, Field(ge=1, le=1 << 31)]
    vocabulary_sha256: Sha256
    fingerprint: Sha256


class CacheRecord(Record):
    """attributes["logit_cache"] of the root group. Version 2 may have the fields that `Corpus` gained, 1 has none."""

    format_version: Literal[1, 2] = 1
    kind: Literal["cache"] = "cache"
    corpus: Corpus
    tokenizer: Tokenizer
    tokens_layout: ArrayLayout
    documents_layout: ArrayLayout
    created_with: Versions

    @model_validator(mode="after")
    def _bounded(self) -> CacheRecord:
        if self.corpus.documents > self.corpus.positions:
            raise ValueError(f"{self.corpus.documents} documents in {self.corpus.positions} tokens")
        if self.format_version == 1 and self.corpus.added():
            raise ValueError(f"a record of version 1 has no {min(self.corpus.added())}")
        self.tokens_layout.check_length(self.corpus.positions)
        self.documents_layout.check_length(self.corpus.documents)
        return self
