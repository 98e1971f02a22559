"""The caches below a URL, found by walking folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from storage.cache.reader import LogitCache
from storage.errors import CacheNotFound, LogitCacheError, StoreUnavailable
from storage.stores import open_store
from storage.stores.base import Store


@dataclass(frozen=True)
class ListedEntry:
    """A teacher entry: positions cached so far, and the bytes of their objects; None and the error if unreadable."""

    name: str
    positions: int | None = None
    bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class ListedCache:
    """A cache: tokens of its stream and how many of them are missing, ids of its vocabulary V, teacher entries.

    `tokens_missing` is None where the cache was shared without its tokens. One that cannot be read has an `error`
    and no numbers.
    """

    url: str
    tokens: int | None = None
    tokens_missing: int | None = None
    vocabulary_size: int | None = None
    entries: tuple[ListedEntry, ...] = ()
    error: str | None = None


def caches_below(url: str) -> Iterator[ListedCache]:
    """The cache at a URL, or those in the folders below it, by name; no folder of a cache is looked into.

    Hidden folders and symbolic links are left aside. Whatever cannot be read is yielded with its error. Raises
    CacheNotFound where there is no such folder, InputError where a store cannot list, StoreUnavailable where it does
    not answer.
    """
    store = open_store(url)
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        prefix = f"{folder}/" if folder else ""
        try:
            if store.size(f"{prefix}zarr.json") is not None:
                yield _listed(LogitCache.open(_address(store, folder)))
                continue
            names = store.folders(folder)
            if "receipts" in names:
                # A copy whose record, which comes last, is not there yet.
                LogitCache.open(_address(store, folder))
            waiting += [prefix + name for name in reversed(names) if not name.startswith(".")]
        except (LogitCacheError, OSError) as error:
            if not folder and isinstance(error, FileNotFoundError) and not isinstance(error, CacheNotFound):
                raise CacheNotFound(f"{url}: there is no such folder") from None
            if type(error) is StoreUnavailable or not (folder or store.size("zarr.json")):
                raise
            yield ListedCache(_address(store, folder), error=_in_words(error))


def _listed(cache: LogitCache) -> ListedCache:
    corpus = cache.record.corpus
    try:
        missing = _length(cache.missing_tokens()) if corpus.tokens_included else None
        entries = tuple(_listed_entry(cache, name) for name in cache.teachers)
    except (LogitCacheError, OSError) as error:
        return ListedCache(cache.url, error=_in_words(error))
    return ListedCache(cache.url, corpus.positions, missing, cache.vocabulary_size, entries)


def _listed_entry(cache: LogitCache, name: str) -> ListedEntry:
    try:
        targets = cache.teacher(name)
        return ListedEntry(name, len(targets) - _length(targets.missing()), targets.stored_bytes())
    except (LogitCacheError, OSError) as error:
        return ListedEntry(name, error=_in_words(error))


def _length(ranges: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _address(store: Store, folder: str) -> str:
    return store.where(folder) if folder else store.url


def _in_words(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())
