"""The storage layer: the cache format, stores, and reading, writing, checking and copying of caches; no torch.

`from storage import LogitCache` opens a cache. The format is specified in `storage.format`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.lazy import public_names

if TYPE_CHECKING:
    from storage.cache.reader import LogitCache as LogitCache
    from storage.cache.reader import TeacherTargets as TeacherTargets
    from storage.errors import CacheNotFound as CacheNotFound
    from storage.errors import CorruptCache as CorruptCache
    from storage.errors import FormatError as FormatError
    from storage.errors import IdentityMismatch as IdentityMismatch
    from storage.errors import IncompleteCache as IncompleteCache
    from storage.errors import InputError as InputError
    from storage.errors import LogitCacheError as LogitCacheError
    from storage.errors import MissingObject as MissingObject
    from storage.errors import StorageFull as StorageFull
    from storage.errors import StoreUnavailable as StoreUnavailable
    from storage.format.targets import SparseTargets as SparseTargets

__all__, __getattr__ = public_names(__name__, {
    "storage.cache.reader": ("LogitCache", "TeacherTargets"),
    "storage.errors": (
        "CacheNotFound", "CorruptCache", "FormatError", "IdentityMismatch", "IncompleteCache", "InputError",
        "LogitCacheError", "MissingObject", "StorageFull", "StoreUnavailable",
    ),
    "storage.format.targets": ("SparseTargets",),
})  # fmt: skip
