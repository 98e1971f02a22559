"""Stores: whole objects under a URL, on a local disk, in an object store or behind a web server.

Nothing here depends on the content of a cache; of its format, only on keys, strict JSON, digests and size limits.
"""

from __future__ import annotations

from pathlib import Path

from storage.errors import InputError
from storage.stores.base import Store


def open_store(url: str) -> Store:
    """The store of a URL: a path, `file://`, or any protocol of fsspec whose package is installed.

    Imports only the packages that this store needs. Raises InputError for a URL that names no store.
    """
    protocol, separator, rest = url.partition("://")
    if not url or "::" in url:
        raise InputError(f"{url!r} is not a location of a cache: give a path or a URL such as s3://bucket/folder")
    if not separator or protocol == "file":
        from storage.stores.local import LocalStore

        return LocalStore(Path(rest if separator else url).absolute())
    if protocol in ("s3", "s3a"):
        from storage.stores.s3 import S3Store

        return S3Store(url)
    from storage.stores.remote import RemoteStore

    return RemoteStore(url)
