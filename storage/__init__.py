"""The storage layer: the cache format, stores, and reading, writing, checking and copying of caches; no torch.

`from storage import LogitCache` opens a cache. The format is specified in `storage.format`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.cache.reader import LogitCache, TeacherTargets
    from storage.errors import (
        CacheNotFound,
        CorruptCache,
        FormatError,
        IdentityMismatch,
        IncompleteCache,
        InputError,
        LogitCacheError,
        MissingObject,
        StorageFull,
        StoreUnavailable,
    )
    from storage.format.targets import SparseTargets

_HOMES = {
    "LogitCache": "storage.cache.reader",
    "SparseTargets": "storage.format.targets",
    "TeacherTargets": "storage.cache.reader",
}
__all__ = [
    "CacheNotFound",
    "CorruptCache",
    "FormatError",
    "IdentityMismatch",
    "IncompleteCache",
    "InputError",
    "LogitCache",
    "LogitCacheError",
    "MissingObject",
    "SparseTargets",
    "StorageFull",
    "StoreUnavailable",
    "TeacherTargets",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that a command that imports one file of this package (for its `--help`) imports nothing else.
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "storage.errors")), name)
    raise AttributeError(f"module 'storage' has no attribute {name!r}")
