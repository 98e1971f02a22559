"""The keys that belong to a cache: all that its records and receipts account for.

Checking and copying share this list. It follows from the records, never from a listing: an object that is not in it
does not belong to the cache, even if it is stored there.
"""

from __future__ import annotations

from storage.cache.reader import LogitCache
from storage.cache.receipts import Receipts
from storage.format.layout import corpus_arrays, group_metadata, metadata_bytes

ROOT_KEY = "zarr.json"
TEACHERS_KEY = "teachers/zarr.json"
TOKENIZER_RECEIPT_KEY = "receipts/tokenizer.json"
# The card files: optional files beside the arrays, for people and for hubs; no receipt lists them.
CARD_KEY = "README.md"
SIGNATURE_KEY = "model.sig"
CARD_FILES = (CARD_KEY, ".gitattributes", SIGNATURE_KEY)
TEACHERS_METADATA = metadata_bytes(group_metadata({}))


def corpus_groups(cache: LogitCache) -> list[Receipts]:
    """Those of each array of the token stream; none when the cache was shared without it."""
    return [cache.receipts(name) for name in corpus_arrays(cache.record)]


def teacher_groups(cache: LogitCache, name: str) -> list[Receipts]:
    """Those of a teacher entry, in the order in which they are written: its sampling order, if it has one, its targets.

    Raises CacheNotFound, FormatError and CorruptCache, as `LogitCache.teacher` does.
    """
    teacher = cache.teacher(name)
    if teacher.order is None:
        return [teacher.receipts]
    teacher.order.receipts.needed_by = teacher.receipts
    return [teacher.order.receipts, teacher.receipts]
