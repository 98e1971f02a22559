"""Where bytes lie: whole objects under a URL, on a disk, in an object store or behind a web server.

No idea of what a cache is belongs here, and nothing of the format but its keys.
"""

from __future__ import annotations

from pathlib import Path

from storage.errors import InputError
from storage.stores.base import Store


def open_store(url: str) -> Store:
    """The store of a URL: a path, `file://`, or any protocol of fsspec whose package is installed.

    Imports what that store needs and no other. Raises InputError for what names no store.
    """
    protocol, separator, rest = url.partition("://")
    if not url or "::" in url:
        raise InputError(f"{url!r} is not a place for a cache: give a path or a URL such as s3://bucket/folder")
    if not separator or protocol == "file":
        from storage.stores.local import LocalStore

        return LocalStore(Path(rest if separator else url).absolute())
    if protocol in ("s3", "s3a"):
        from storage.stores.s3 import S3Store

        return S3Store(url)
    from storage.stores.remote import RemoteStore

    return RemoteStore(url)
