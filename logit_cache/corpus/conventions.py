"""How a stream's documents begin and its conversations are rendered: as given, else as recorded, else by default.

What is recorded in the destination holds where a flag is not given, so that the same command makes the same stream
again; and a tokenizer that is taken from a cache comes with the conventions of that cache's stream.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from logit_cache.corpus.config import CorpusConfig
from storage import LogitCache
from storage.errors import CacheNotFound, InputError
from storage.format.manifest.cache import CacheRecord
from student.models.text_ids import text_prefix
from student.models.tokenizer import cache_of_tokenizer


@dataclass(frozen=True)
class Conventions:
    """version: of the stream's record. tokenizer: the fingerprint of that of the stream that is there already. bos:
    whether documents begin as the tokenizer begins a text, None for its own choice. variables, date: for chat
    templates; a date of None is today's."""

    version: int = 2
    tokenizer: str | None = None
    bos: bool | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    date: datetime.date | None = None

    @classmethod
    def of(cls, config: CorpusConfig) -> Conventions:
        """Those of a new or resumed stream, with what was given."""
        there = _record(config.out)
        # A tokenizer is taken from a cache by the cache's URL, or by its folder `tokenizer`.
        origin = None if config.tokenizer is None else cache_of_tokenizer(config.tokenizer)
        found = there or (None if origin is None else _record(origin))
        recorded = _recorded(found) if found is not None else cls()
        return cls(
            version=2 if there is None else there.format_version,
            tokenizer=None if there is None else there.tokenizer.fingerprint,
            bos=recorded.bos if config.bos is None else config.bos,
            variables={**recorded.variables, **config.template_variables},
            date=config.date or recorded.date,
        )

    def prefix(self, tokenizer: Any) -> tuple[int, ...]:
        """The ids put before a document of text. Raises InputError where they are asked for and there are none."""
        own = text_prefix(tokenizer)
        if self.bos is None or (own and self.bos):
            return own
        if not self.bos:
            return ()
        if tokenizer.bos_token_id is None:
            raise InputError("--bos: the tokenizer has no token that begins a text; leave the flag out")
        return (int(tokenizer.bos_token_id),)


def _recorded(record: CacheRecord) -> Conventions:
    corpus = record.corpus
    return Conventions(
        # Streams of version 1 were made without.
        bos=bool(corpus.begins_with_bos),
        variables=corpus.template_variables or {},
        date=None if corpus.date is None else datetime.date.fromisoformat(corpus.date),
    )


def _record(url: str) -> CacheRecord | None:
    try:
        return LogitCache.open(url).record
    except CacheNotFound:
        return None
