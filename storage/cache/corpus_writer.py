"""Writing a token stream and its tokenizer as a new cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.cache.inventory import TEACHERS_KEY, TEACHERS_METADATA
from storage.cache.reader import LogitCache
from storage.cache.records import read_record, tokenizer_key
from storage.cache.writer import ShardWriter, publish_same
from storage.errors import IdentityMismatch, InputError
from storage.files import PARTIAL
from storage.format.layout import corpus_arrays, record_bytes
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.receipts import FileDigest, FilesReceipt
from storage.format.sealing import differences, sealed_bytes
from storage.stores import Url, open_store
from storage.stores.base import Store


def write_corpus(
    url: Url,
    record: CacheRecord,
    tokenizer_files: Mapping[str, bytes],
    arrays: Mapping[str, NDArray[Any]],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Create a cache from a token stream, or resume an interrupted one.

    arrays: those of the record by name (tokens [N], document_starts [D], …). They may be memory maps: one shard is held
    in memory at a time. `progress` receives the number of tokens written so far. Raises IdentityMismatch when `url`
    holds a cache of other text or another tokenizer, InputError when it holds something else; nothing is written then.
    """
    store = open_store(url)
    # Receipts hold the stored record's digest; that record may name other library versions than this process.
    cache = LogitCache(store, _create_root(store, record))
    _publish_tokenizer(store, cache, tokenizer_files)
    publish_same(store, TEACHERS_KEY, TEACHERS_METADATA)

    # Tokens are written last: a cache whose tokens are complete is complete.
    for name, spec in sorted(corpus_arrays(cache.record).items(), key=lambda item: item[0] == "tokens"):
        values = arrays[name]
        assert len(values) == spec.shape[0], f"{name} is as long as the record states"
        writer = ShardWriter(cache.receipts(name))
        writer.prepare()
        for shard in range(spec.shards):
            start, stop = spec.shard_range(shard)
            if not writer.is_committed(shard):
                writer.commit(shard, {name: np.asarray(values[start:stop]).astype(spec.dtype, copy=False)})
            if progress is not None and name == "tokens":
                progress(stop)
        writer.receipts.write_index()


def check_destination(url: Url) -> None:
    """Refuse before the work a store in which no token stream can be written, as `write_corpus` would after it."""
    store = open_store(url)
    if is_new(store):
        store.check_writable()


def is_new(store: Store) -> bool:
    """Whether a store is empty, and no cache yet; raises InputError where it holds something else."""
    names = [name for name in store.names("") if not name.endswith(PARTIAL)]
    if names and "zarr.json" not in names:
        raise InputError(
            f"{store.url} holds {', '.join(names[:3])}{' …' if len(names) > 3 else ''} and is not a cache: "
            f"give an empty or new folder"
        )
    return not names


def _publish_tokenizer(store: Store, cache: LogitCache, files: Mapping[str, bytes]) -> None:
    """Write the tokenizer's files and their receipt, unless the cache has them; CorruptCache if it has damaged ones.

    The root's fingerprint says that they are the same tokenizer; the settings beside it may be written otherwise by
    other versions.
    """
    key = "receipts/tokenizer.json"
    if store.size(key) is not None:
        cache.tokenizer_files()
        return
    for name, data in files.items():
        # Without a receipt, they are leftovers.
        if not store.publish(tokenizer_key(name), data):
            store.replace(tokenizer_key(name), data)
    digests = {n: FileDigest(bytes=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in files.items()}
    publish_same(store, key, sealed_bytes(FilesReceipt(files=digests)))


def _create_root(store: Store, record: CacheRecord) -> CacheRecord:
    """Write the root record if there is none; returns the stored one.

    They differ in library versions and the number of skipped rows at most.
    """
    if is_new(store):
        store.publish("zarr.json", record_bytes(record))
    stored = read_record(store, "zarr.json", CacheRecord)
    # How many rows the text had that are not in the stream does not make it another.
    skipped = {"skipped_rows": stored.corpus.skipped_rows}
    differing = differences(stored, record.model_copy(update={"corpus": record.corpus.model_copy(update=skipped)}))
    if differing:
        raise IdentityMismatch(
            store.url,
            differing,
            "A cache holds one token stream: give another --out, or the text and tokenizer that this one was made of",
        )
    return stored
