"""Whether source, target and token stream go together, found out before any data moves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from storage.cache.inventory import CARD_FILES, ROOT_KEY
from storage.cache.reader import LogitCache
from storage.cache.records import read_record, teacher_folder
from storage.errors import CorruptCache, IdentityMismatch, InputError
from storage.files import PARTIAL, STAGING
from storage.format.identity import same_sources, stream_sha256
from storage.format.layout import PER_DOCUMENT
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import TeacherEntry
from storage.format.sealing import differences, digest
from storage.stores.base import Store
from storage.text import quoted
from storage.transfer.contents import Contents, Part

_TOP_LEVEL = {
    ROOT_KEY,
    *CARD_FILES,
    *("tokens", *PER_DOCUMENT, "loss_mask", "tokenizer", "receipts", "teachers"),
}


def check_apart(source: Store, target: Store) -> None:
    """Raise InputError if one location lies in the other."""
    locations = [
        store.url.rstrip("/") if store.local_path is None else os.path.realpath(store.local_path)
        for store in (source, target)
    ]
    a, b = (f"{location}/" for location in locations)
    if a.startswith(b) or b.startswith(a):
        raise InputError(f"{source.url} and {target.url}: one lies in the other, or they are the same location")


def existing_record(target: Store) -> CacheRecord | None:
    """The record of the cache at the target, None where there is none yet. Raises InputError for something else."""
    names = [name for name in target.names("") if not name.endswith(PARTIAL)]
    if ROOT_KEY in names:
        return read_record(target, ROOT_KEY, CacheRecord)
    # An interrupted push leaves these in an object store; in a folder, so does a pull, beside what it has staged.
    ours = {STAGING, *_TOP_LEVEL} if target.local_path is None or STAGING in names else set()
    strangers = [name for name in names if name not in ours]
    if strangers:
        raise InputError(
            f"{target.url} holds {', '.join(strangers[:3])}{' …' if len(strangers) > 3 else ''} and is not a cache: "
            f"give an empty or new location"
        )
    return None


def chosen_entries(teachers: Sequence[str], cache: LogitCache) -> list[str]:
    """The named entries, or all; InputError where they cannot be listed."""
    for name in teachers:
        teacher_folder(name)
    if teachers:
        return sorted(set(teachers))
    try:
        return list(cache.teachers)
    except InputError as error:
        raise InputError(f"{error}: --teacher NAME") from None


def check_target(
    target: Store, existing: CacheRecord, record: CacheRecord, *, with_corpus: bool, without_tokens: bool
) -> None:
    """Refuse a target of other text or another tokenizer, one with tokens for a copy without them, and one without
    tokens for a copy with a corpus."""
    pairs = {
        "corpus.stream_sha256": (existing.corpus.stream_sha256, record.corpus.stream_sha256),
        "corpus.positions": (existing.corpus.positions, record.corpus.positions),
        "corpus.documents": (existing.corpus.documents, record.corpus.documents),
        "tokenizer.vocabulary_size": (existing.tokenizer.vocabulary_size, record.tokenizer.vocabulary_size),
        "tokenizer.fingerprint": (existing.tokenizer.fingerprint, record.tokenizer.fingerprint),
    }
    fields = [f"{name}: {a} there, {b} here" for name, (a, b) in pairs.items() if a != b]
    if fields:
        raise IdentityMismatch(
            target.url, fields, "A cache holds one token stream of one tokenizer: give another target, or an empty one"
        )
    if without_tokens and existing.corpus.tokens_included:
        raise InputError(f"{target.url}: it has the tokens; to share without them, give another target")
    if with_corpus and not existing.corpus.tokens_included:
        raise InputError(
            f"{target.url}: it was made without its tokens and stays so; give a new target, or pull into the cache "
            f"that has the text"
        )


def check_entries(target: Store, parts: Sequence[Part]) -> None:
    """Raise IdentityMismatch if the target has another entry of the same name."""
    for part in parts:
        key = part.group.record_key
        if key is None or target.size(key) is None:
            continue
        there, here = (read_record(store, key, TeacherEntry) for store in (target, part.manifest))
        if digest(there) != digest(here):
            raise IdentityMismatch(
                target.where(part.group.name),
                differences(there, here, ignore=(), names=("that one", "this one")),
                "An entry is one teacher's targets made in one way: give another target, or remove the entry that is "
                "there",
            )


def check_sources(target: Store, record: CacheRecord, source: LogitCache, names: Sequence[str]) -> None:
    """Raise IdentityMismatch where an entry is of the documents of some sources, and the record that the target has, or
    will have, names others."""
    for name in names:
        entry = source.teacher(name).entry
        if not same_sources(entry, source.record, record):
            raise IdentityMismatch(
                target.url,
                [f"sources of documents: teacher {name} has targets of {quoted(entry.targets.sources or ())}"],
                f"Its stream has other sources than that of {source.url}: give another target, or leave the entry out",
            )


def check_overwrites(target: Store, contents: Contents) -> None:
    """Refuse a store where the copy, records included, would overwrite another cache, entry or file."""
    existing = existing_record(target)
    if existing is None:
        return
    if digest(existing) != digest(contents.record):
        raise IdentityMismatch(
            target.url,
            differences(existing, contents.record, ignore=(), names=("that cache", "this one")),
            "A data set is one cache: give another one",
        )
    check_entries(target, contents.parts)


def check_corpus(corpus: LogitCache, source: LogitCache) -> None:
    """Refuse a token stream that is not the one of the source's targets; its digest is computed from its tokens."""
    if not corpus.record.corpus.tokens_included:
        raise InputError(
            f"{corpus.url}: it has no tokens to attach; make a cache of the text with logit-cache tokenize"
        )
    if corpus.missing_tokens():
        raise InputError(f"{corpus.url}: its token stream is not complete: run logit-cache tokenize again first")
    wanted = source.record
    computed = computed_stream_sha256(corpus)
    if computed != corpus.record.corpus.stream_sha256:
        raise CorruptCache(f"{corpus.url}: its tokens have the digest {computed}, which is not the one in its record")
    found = {
        "corpus.stream_sha256": (computed, wanted.corpus.stream_sha256),
        "tokenizer.vocabulary_size": (corpus.vocabulary_size, wanted.tokenizer.vocabulary_size),
        "tokenizer.fingerprint": (corpus.record.tokenizer.fingerprint, wanted.tokenizer.fingerprint),
    }
    fields = [f"{name}: {a} in {corpus.url}, {b} in {source.url}" for name, (a, b) in found.items() if a != b]
    if fields:
        raise IdentityMismatch(
            corpus.url, fields, f"Make it of the same text and with --tokenizer {source.url}/tokenizer"
        )


def check_stream(copy: LogitCache, parts: Sequence[Part]) -> None:
    """Raise CorruptCache if a copy has all of its tokens, and not the digest to which its targets are bound."""
    streams = [part for part in parts if part.group.record_key is None]
    if not streams or not all(part.complete for part in streams):
        return
    found, expected = computed_stream_sha256(copy), copy.record.corpus.stream_sha256
    if found != expected:
        raise CorruptCache(
            f"{streams[0].origin.where('tokens')}: these tokens have the digest {found}, the record states {expected}: "
            f"the targets were made from other text"
        )


def computed_stream_sha256(cache: LogitCache) -> str:
    """`stream_sha256` of a cache, computed from its tokens instead of read from its record."""
    tokens: Any = cache.tokens
    mask: Any = cache.loss_mask
    return stream_sha256(tokens, cache.document_starts, mask)
