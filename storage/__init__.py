"""On-disk truth: the cache format, its records, and how they are written and read.

`from storage import LogitCache` opens a cache; the format itself is specified in `storage.format`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.reader import LogitCache
    from storage.records import SparseTargets

__all__ = ["LogitCache", "SparseTargets"]


def __getattr__(name: str) -> Any:
    # Lazy, because zarr takes a third of a second to import and `--help` needs none of it.
    if name == "LogitCache":
        from storage.reader import LogitCache

        return LogitCache
    if name == "SparseTargets":
        from storage.records import SparseTargets

        return SparseTargets
    raise AttributeError(f"module 'storage' has no attribute {name!r}")
