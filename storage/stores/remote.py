"""Stores that fsspec reaches and that are not a local folder: object stores, hubs, memory.

One retry rule covers every request. A request that makes no progress for `LOGIT_CACHE_TIMEOUT_S` (15) seconds fails.
Transient failures (503, a reset, a truncated body, silence) are retried with exponential back-off and jitter until
`LOGIT_CACHE_PATIENCE_S` (40) seconds have passed; permanent ones (403, a missing bucket, a refused certificate) are
raised at once, and after 5 seconds those of a host without an address or route that has not answered this process
before. The libraries' own retries are switched off, or the two would multiply. A 404, or a body that cannot be right,
is an answer like any other, except for an object that must exist: `insist` requests it three times.

`publish` is a conditional PUT where the store has one: S3's `If-None-Match`, which not every server honours
(`logit-cache doctor` measures it). Without it, two writers of one object at the same instant can both succeed; the
receipt then exposes the one that lost. There are no locks. Credentials come from the standard chains only, and the
user's fsspec configuration holds, also inside options such as `client_kwargs` that are given here in part.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from storage.errors import CorruptCache, InputError, LogitCacheError, StoreNotFound, StoreUnavailable, error_text
from storage.stores.base import MOST_BYTES, Result, Store
from storage.stores.network_errors import code, final, is_unreachable, missing_store, refusal

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
READ_ONLY = ("http", "https", "hf")
CONNECT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
# Permanent errors that are the caller's to handle.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotImplementedError,
    TypeError,
    LogitCacheError,
)
# The body does not match the checksum that the store sent. After so many attempts, the object itself is damaged.
_DAMAGED_NAME, _DAMAGED_ATTEMPTS = "FlexibleChecksumError", 3
# Attempts for an object that must exist, before a 404, a short or a flipped body is accepted as its state.
_INSIST_ATTEMPTS, _INSIST_PAUSE_S = 3, 0.5


# Hosts, by protocol and name, that have answered this process: what fails there may pass.
_answered: set[str] = set()


class AccessRefused(StoreUnavailable):
    """The server answers, and not to this user."""


class _Damaged(CorruptCache):
    """Raised after the last attempt: `insist` does not retry it."""


class RemoteStore(Store):
    def __init__(self, url: str) -> None:
        self.url = url
        self._protocol, _, rest = url.partition("://")
        self._host = f"{self._protocol}://{rest.partition('/')[0]}"
        self._timeout_s = _seconds("LOGIT_CACHE_TIMEOUT_S", 15.0)
        self._patience_s = _seconds("LOGIT_CACHE_PATIENCE_S", 40.0)
        self._creates = True  # until the store reports that it has no conditional PUT
        self._process = -1
        self._connect()

    def _connect(self) -> None:
        # A connection, and the thread that serves it, do not survive a fork.
        import fsspec

        try:
            kind, options = fsspec.get_filesystem_class(self._protocol), self._options()
            given = fsspec.config.apply_config(kind, {})
            for name, value in options.items():
                if isinstance(value, dict):
                    options[name] = {**value, **given.get(name, {})}
            self._filesystem, root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            extra = _EXTRAS.get(self._protocol)
            remedy = f"pip install 'logit-cache[{extra}]'" if extra else str(error)
            raise InputError(f"{self._protocol}:// needs a package that is not installed: {remedy}") from None
        except ValueError as error:
            raise InputError(f"cannot open {self.url}: {error}") from None
        if hasattr(self._filesystem, "retries"):
            self._filesystem.retries = 1
        self._root = root.rstrip("/")
        self._process = os.getpid()

    def _options(self) -> dict[str, Any]:
        """The filesystem's options: time-outs for the retry rule, and no cached listings."""
        if self._protocol in ("gs", "gcs"):
            return {"use_listings_cache": False, "session_kwargs": {"trust_env": True}}
        return {}

    @property
    def _fs(self) -> Any:
        if self._process != os.getpid():
            self._connect()
        return self._filesystem

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _ask(self, key: str, request: Callable[[], Result]) -> Result:
        """Retry a request until it succeeds, fails permanently, or `LOGIT_CACHE_PATIENCE_S` is over."""
        began = time.monotonic()
        pause = _FIRST_PAUSE_S
        damaged = 0
        while True:
            try:
                result = request()
                _answered.add(self._host)
                return result
            except Exception as error:
                self._raise_final(key, error)
                damaged += type(error).__name__ == _DAMAGED_NAME
                if damaged == _DAMAGED_ATTEMPTS:
                    raise _Damaged(
                        f"{self.where(key)}: does not match the store's own checksum of it ({error_text(error)}; "
                        f"asked {damaged} times)"
                    ) from error
                unreachable = is_unreachable(error) and self._host not in _answered
                patience = min(self._patience_s, CONNECT_S) if unreachable else self._patience_s
                if time.monotonic() + pause > began + patience:
                    raise StoreUnavailable(
                        f"{self.where(key)}: {'offline, or no such host' if unreachable else 'no usable answer'} "
                        f"within {patience:.0f} s ({type(error).__name__}: {error_text(error)}); nothing was lost: "
                        f"check the address, the network and its proxy, and run the command again"
                    ) from error
            # Jitter: workers that failed together must not retry together.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _raise_final(self, key: str, error: Exception) -> None:
        """Raise what no retry changes: in the words of a user where the network or the store is the cause."""
        absent = missing_store(error)
        if absent is not None:
            raise StoreNotFound(f"{self.url}: {absent}") from None
        if isinstance(error, FileNotFoundError):
            _answered.add(self._host)
        if isinstance(error, _FINAL):
            raise error
        refused, reason = refusal(error), final(error)
        if refused is not None:
            raise AccessRefused(f"{self.where(key)}: {refused}") from None
        if reason is not None:
            raise StoreUnavailable(f"{self.where(key)}: {reason}") from None
        if isinstance(error, ValueError):
            raise InputError(f"{self.where(key)}: {error_text(error)}: check the URL and the proxy") from None

    def insist(self, key: str, promise: str, request: Callable[[], Result]) -> Result:
        attempt = 1
        while True:
            try:
                return super().insist(key, promise, request)
            except _Damaged:
                raise
            except CorruptCache as error:
                if attempt == _INSIST_ATTEMPTS:
                    raise type(error)(f"{error} (asked {attempt} times)") from None
            time.sleep(_INSIST_PAUSE_S * attempt)
            attempt += 1

    def read(self, key: str, at_most: int = MOST_BYTES) -> bytes:
        # One request, for one byte more than allowed, to detect a longer object.
        data = self._ask(key, lambda: self._beginning(key, at_most + 1))
        if len(data) > at_most:
            raise CorruptCache(f"{self.where(key)}: longer than the {at_most} bytes that belong there")
        return data

    def _beginning(self, key: str, most: int) -> bytes:
        """An object's first bytes, at most so many."""
        try:
            return bytes(self._fs.cat_file(self._path(key), start=0, end=most))
        except OSError as error:
            if code(error) in ("InvalidRange", "416"):  # the answer for an empty object
                return b""
            raise

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = self._path(key)

        def request() -> list[bytes]:
            found: list[bytes] = self._fs.cat_ranges(
                [path] * len(ranges), [start for start, _ in ranges], [stop for _, stop in ranges], on_error="raise"
            )
            return found

        return self._ask(key, request)

    def size(self, key: str) -> int | None:
        try:
            return self._ask(key, lambda: self._length(key))
        except FileNotFoundError:
            return None

    def _length(self, key: str) -> int | None:
        if self._protocol != "hf":  # a hub changes by whole commits, and each request lists a folder
            # A cached listing would hide objects that another worker has written since.
            self._fs.invalidate_cache()
        found = self._fs.info(self._path(key))
        return None if found["type"] != "file" or found["size"] is None else int(found["size"])

    def names(self, prefix: str) -> list[str]:
        try:
            return self._names(prefix)
        except FileNotFoundError:
            return []

    def _names(self, prefix: str) -> list[str]:
        def request() -> list[str]:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._path(prefix.rstrip("/")), detail=False)
            return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)

        return self._ask(prefix, request)

    def folders(self, folder: str) -> list[str]:
        path = self._path(folder)

        def request() -> list[str]:
            self._fs.invalidate_cache()
            found = {_below(path, str(item["name"])) for item in self._fs.ls(path) if item["type"] == "directory"}
            return sorted(name.rstrip("/") for name in found - {""})

        return self._ask(folder, request)

    def walk(self, prefix: str = "") -> dict[str, int]:
        def request() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(prefix), detail=True)
            return {_below(self._root, str(path)): int(info["size"]) for path, info in sorted(found.items())}

        return self._ask(prefix, request)

    def check_writable(self) -> None:
        if self._protocol in READ_ONLY:
            super().check_writable()

    def remove(self, key: str) -> None:
        self.check_writable()
        self._ask(key, lambda: self._fs.rm_file(self._path(key)))

    def publish(self, key: str, data: bytes) -> bool:
        # The check first spares the upload of an existing object; where puts are conditional it has no other purpose.
        if self.size(key) is not None:
            return False
        created = self._create(key, data)
        if created is None:
            self._put(key, data)
        return created is not False

    def publish_new(self, key: str, data: bytes) -> bool:
        created = self._create(key, data)
        return self.publish(key, data) if created is None else created

    def _create(self, key: str, data: bytes) -> bool | None:
        """`create`; None where the store has no conditional PUT, once it has reported so."""
        if self._creates:
            try:
                return self.create(key, data)
            except NotImplementedError:
                self._creates = False
        return None

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._put(key, data, mode="create")
        except FileExistsError:
            return False
        return True

    def replace(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def _put(self, key: str, data: bytes, **mode: str) -> None:
        def request() -> None:
            try:
                self._fs.pipe_file(self._path(key), data, **mode)
            except OSError as error:
                if mode and code(error) in ("PreconditionFailed", "412"):
                    raise FileExistsError(key) from None
                if mode and (code(error) in ("NotImplemented", "501") or error.errno == errno.ENOSYS):
                    raise NotImplementedError from None
                raise

        self.check_writable()
        try:
            self._ask(key, request)
        except FileNotFoundError as error:
            raise InputError(f"cannot write {self.where(key)}: {error_text(error)}") from None


def _below(root: str, path: str) -> str:
    return path[path.index(root) + len(root) :].lstrip("/")


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 86_400:
        raise InputError(f"{variable}={text}: expected a number of seconds, such as {default:.0f}")
    return value
