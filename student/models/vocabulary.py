"""Whether a model and a cache agree on which id is which string."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from storage import LogitCache
from storage.errors import IdentityMismatch
from storage.format.identity import differing_entries, vocabulary_sha256
from student.models.tokenizer import read_tokenizer


def cache_vocabulary(cache: LogitCache) -> dict[str, int]:
    """Token string → id in a cache's tokenizer, added tokens included."""
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        cache.save_tokenizer(Path(folder))
        return dict(read_tokenizer(Path(folder), cache.url).get_vocab())


def check_vocabulary(cache: LogitCache, theirs: Mapping[str, int] | None, source: str, remedy: str) -> None:
    """Raise IdentityMismatch, with the ids that differ, for a model of another vocabulary; None is not checked."""
    if theirs is None or vocabulary_sha256(theirs) == cache.record.tokenizer.vocabulary_sha256:
        return
    ours = cache_vocabulary(cache)
    if ours != theirs:
        raise IdentityMismatch(
            f"{source}: its tokenizer is not the one of {cache.url}", differing_entries(ours, theirs), remedy
        )
