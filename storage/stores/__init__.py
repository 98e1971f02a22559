"""Stores: whole objects under a URL, on a local disk, in an object store or behind a web server.

Nothing here depends on the content of a cache; of its format, only on keys, strict JSON, digests and size limits.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote_to_bytes

from storage.errors import InputError
from storage.files import local_path
from storage.stores.base import Store

Url = str | os.PathLike[str]
_ONE_SLASH = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


def open_store(url: Url) -> Store:
    """The store of a URL: a path, `file://`, or any protocol of fsspec whose package is installed.

    A path is taken as it is written but for `~`; a `file://` URL is percent-decoded. Imports only the packages that
    this store needs. Raises InputError for a URL that names no store.
    """
    text = os.fspath(url)
    protocol, separator, rest = text.partition("://")
    if not text or "::" in text:
        raise InputError(f"{text!r} is not a location of a cache: give a path or a URL such as s3://bucket/folder")
    if text[:5].lower() == "file:" or not separator:
        from storage.stores.local import LocalStore

        return LocalStore(_folder(text).absolute())
    text = f"{protocol.lower()}://{rest}"
    if protocol.lower() in ("s3", "s3a"):
        from storage.stores.s3 import S3Store

        return S3Store(text)
    if protocol.lower() in ("http", "https"):
        from storage.stores.web import WebStore

        return WebStore(text)
    from storage.stores.remote import RemoteStore

    return RemoteStore(text)


def _folder(text: str) -> Path:
    """The folder of a path or `file:` URL (RFC 8089)."""
    if text[:5].lower() == "file:":
        rest = text[5:]
        host, path = "", rest
        if rest.startswith("//"):
            host, slash, below = rest[2:].partition("/")
            path = slash + below
        if host not in ("", "localhost") or not path.startswith("/"):
            raise InputError(f"{text}: expected file:///absolute/path; give a path of this machine, or such a URL")
        return local_path(os.fsdecode(unquote_to_bytes(path)))
    found = _ONE_SLASH.match(text)
    if found:
        # Otherwise a folder of that name would be made: pathlib writes s3://bucket so.
        raise InputError(
            f"{text}: a URL with one slash, as pathlib makes it; give {found[1]}://… as text, or ./{text} for a folder"
        )
    return local_path(text)
