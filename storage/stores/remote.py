"""Stores that fsspec reaches and that are not a local folder: object stores, hubs, web servers, memory.

One retry rule covers every request. A request that makes no progress for `LOGIT_CACHE_TIMEOUT_S` (15) seconds fails.
Transient failures (503, a reset, a truncated body, silence) are retried with exponential back-off and jitter until
`LOGIT_CACHE_PATIENCE_S` (40) seconds have passed; permanent ones (403, a missing bucket) are raised at once. The
libraries' own retries are switched off, or the two would multiply. A 404, or a body that cannot be right, is an answer
like any other, except for an object that must exist: `insist` requests it three times.

`publish` is a conditional PUT where the store has one: S3's `If-None-Match`, which not every server honours
(`logit-cache doctor` measures it). Without it, two writers of one object at the same instant can both succeed; the
receipt then exposes the one that lost. There are no locks. Credentials come from the standard chains only.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from storage.errors import CorruptCache, InputError, LogitCacheError, StoreUnavailable
from storage.stores.base import MOST_BYTES, Result, Store

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_WEB = ("http", "https")
CONNECT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
# Permanent errors, which no retry changes: no permission, no such object, a mistake in the request.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotImplementedError,
    TypeError,
    ValueError,
    LogitCacheError,
)
# The body does not match the checksum that the store sent. After so many attempts, the object itself is damaged.
_DAMAGED_NAME, _DAMAGED_ATTEMPTS = "FlexibleChecksumError", 3
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")
# Attempts for an object that must exist, before a 404, a short or a flipped body is accepted as its state.
_INSIST_ATTEMPTS, _INSIST_PAUSE_S = 3, 0.5


class _Damaged(CorruptCache):
    """Raised after the last attempt: `insist` does not retry it."""


class RemoteStore(Store):
    """The store of any URL that fsspec opens."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._protocol = url.partition("://")[0]
        self._timeout_s = _seconds("LOGIT_CACHE_TIMEOUT_S", 15.0)
        self._patience_s = _seconds("LOGIT_CACHE_PATIENCE_S", 40.0)
        self._creates = True  # until the store reports that it has no conditional PUT
        self._process = -1
        self._connect()

    def _connect(self) -> None:
        # A connection, and the thread that serves it, do not survive a fork.
        import fsspec

        try:
            self._filesystem, root = fsspec.core.url_to_fs(self.url, **self._options())
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
            return {"use_listings_cache": False}
        if self._protocol in _WEB:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._timeout_s)
            return {"client_kwargs": {"timeout": timeout}}
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
        deadline = time.monotonic() + self._patience_s
        pause = _FIRST_PAUSE_S
        damaged = 0
        while True:
            try:
                return request()
            except PermissionError as error:
                raise StoreUnavailable(
                    f"{self.where(key)}: access refused ({error_text(error)}); check the credentials that the standard "
                    f"chain finds (environment, profile, instance role) and their permissions"
                ) from None
            except _FINAL:
                raise
            except Exception as error:
                if type(error).__name__ in _FINAL_NAMES:
                    raise StoreUnavailable(f"{self.where(key)}: {error_text(error)}") from None
                damaged += type(error).__name__ == _DAMAGED_NAME
                if damaged == _DAMAGED_ATTEMPTS:
                    raise _Damaged(
                        f"{self.where(key)}: does not match the store's own checksum of it ({error_text(error)}; "
                        f"asked {damaged} times)"
                    ) from error
                if time.monotonic() + pause > deadline:
                    raise StoreUnavailable(
                        f"{self.where(key)}: no usable answer within {self._patience_s:.0f} s "
                        f"({type(error).__name__}: {error_text(error)}); nothing was lost: run the command again"
                    ) from error
            # Jitter: workers that failed together must not retry together.
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

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
        path = self._path(key)

        def request() -> bytes:
            if self._protocol in _WEB:
                # Some web servers ignore ranges; a stream is bounded whatever they send.
                with self._fs.open(path, "rb", block_size=0) as stream:
                    return b"".join(_pieces(stream, at_most + 1))
            try:
                # One request, for one byte more than allowed, to detect a longer object.
                return bytes(self._fs.cat_file(path, start=0, end=at_most + 1))
            except OSError as error:
                if _code(error) in ("InvalidRange", "416"):  # the answer for an empty object
                    return b""
                raise

        data = self._ask(key, request)
        if len(data) > at_most:
            raise CorruptCache(f"{self.where(key)}: longer than the {at_most} bytes that belong there")
        return data

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = self._path(key)

        def request() -> list[bytes]:
            found: list[bytes] = self._fs.cat_ranges(
                [path] * len(ranges), [start for start, _ in ranges], [stop for _, stop in ranges], on_error="raise"
            )
            return found

        return self._ask(key, request)

    def size(self, key: str) -> int | None:
        def request() -> int | None:
            if self._protocol != "hf":  # a hub changes by whole commits, and each request lists a folder
                # A cached listing would hide objects that another worker has written since.
                self._fs.invalidate_cache()
            try:
                found = self._fs.info(self._path(key))
            except FileNotFoundError:
                return None
            return None if found["type"] != "file" or found["size"] is None else int(found["size"])

        return self._ask(key, request)

    def names(self, prefix: str) -> list[str]:
        def request() -> list[str]:
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._path(prefix.rstrip("/")), detail=False)
            except FileNotFoundError:
                if self._protocol in _WEB:
                    raise self._cannot_list() from None
                return []
            return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)

        return self._ask(prefix, request)

    def walk(self, prefix: str = "") -> dict[str, int]:
        if self._protocol in _WEB:
            raise self._cannot_list()

        def request() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(prefix), detail=True)
            return {_below(self._root, str(path)): int(info["size"]) for path, info in sorted(found.items())}

        return self._ask(prefix, request)

    def _cannot_list(self) -> InputError:
        return InputError(
            f"{self.url}: this server cannot list its objects; name the teacher entry, "
            f"and read caches there that are complete"
        )

    def remove(self, key: str) -> None:
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
            except FileNotFoundError as error:
                raise InputError(f"cannot write {self.where(key)}: {error_text(error)}") from None
            except OSError as error:
                if mode and _code(error) in ("PreconditionFailed", "412"):
                    raise FileExistsError(key) from None
                if mode and (_code(error) in ("NotImplemented", "501") or error.errno == errno.ENOSYS):
                    raise NotImplementedError from None
                raise

        if self._protocol in _WEB:
            raise InputError(f"cannot write {self.where(key)}: {self._protocol}:// is for reading only")
        self._ask(key, request)


def _pieces(stream: Any, left: int) -> Iterator[bytes]:
    while left > 0:
        piece = stream.read(left)
        if not piece:
            return
        left -= len(piece)
        yield piece


def _below(root: str, path: str) -> str:
    return path[path.index(root) + len(root) :].lstrip("/")


def _code(error: BaseException) -> str | None:
    """The store's own error code, where the client library kept it as the cause."""
    cause = error.__cause__
    response = getattr(cause if cause is not None else error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return None if found is None else str(found)


def error_text(error: BaseException) -> str:
    """The message of an error on one line, at most 200 characters; its type's name where it has none."""
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 86_400:
        raise InputError(f"{variable}={text}: expected a number of seconds, such as {default:.0f}")
    return value
