"""The interface of every store, and the check of object keys.

A `Store` reads, lists and publishes whole objects under one URL. `publish` never replaces: this is how objects become
committed. `storage.stores.local` is a folder on this machine, `storage.stores.s3` a store with the protocol of S3,
`storage.stores.remote` anything else that fsspec opens.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from storage.errors import InputError, MissingObject
from storage.format.layout import KEY
from storage.format.manifest.receipts import MAX_INDEX_BYTES
from storage.format.sealing import MAX_RECORD_BYTES, parse_json

# Upper bound of any object of a cache: the index of receipts is the largest.
MOST_BYTES = MAX_INDEX_BYTES

Result = TypeVar("Result")


class Store(ABC):
    """Objects under one URL, addressed by keys such as `teachers/a/kept/c/0`."""

    url: str

    @abstractmethod
    def read(self, key: str, at_most: int = MOST_BYTES) -> bytes:
        """The whole object. Raises FileNotFoundError, and CorruptCache for one longer than `at_most` bytes."""

    def read_json(self, key: str, at_most: int = MAX_RECORD_BYTES) -> Any:
        """A small JSON object, parsed strictly. Raises FileNotFoundError, CorruptCache, FormatError."""
        return parse_json(self.read(key, at_most), self.where(key), at_most)

    def insist(self, key: str, promise: str, request: Callable[[], Result]) -> Result:
        """The result of a request for an object that must exist; `promise` is the reason, such as "its receipt exists".

        A remote store retries FileNotFoundError and CorruptCache before it accepts them. Raises MissingObject
        ("missing, though its receipt exists") then, or the CorruptCache.
        """
        try:
            return request()
        except FileNotFoundError:
            raise MissingObject(f"{self.where(key)}: missing, though {promise}") from None

    @abstractmethod
    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes `start .. stop` of an object for each range; shorter past its end. Raises FileNotFoundError."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Length in bytes, or None where there is no object."""

    def known_size(self, key: str, promise: str) -> int:
        """Length in bytes of an object that must exist; see `insist`."""

        def request() -> int:
            found = self.size(key)
            if found is None:
                raise FileNotFoundError(key)
            return found

        return self.insist(key, promise, request)

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """Names of the objects and folders directly under a folder (`""` is the root), sorted."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly under a folder, sorted, whatever characters they have; links are none.

        Raises FileNotFoundError where a store knows that there is no such folder, InputError where it cannot list.
        """

    def listing(self, folder: str) -> Iterator[tuple[str, float | None]]:
        """Names directly under a folder, each with its time of modification, in any order.

        Yields them as they arrive, so that a folder of a million names needs no memory. Times are in seconds since
        1970, None where the store reports none. Raises InputError where a store cannot list.
        """
        for name in self.names(folder):
            yield name, None

    @abstractmethod
    def walk(self, prefix: str = "") -> dict[str, int]:
        """Keys of all objects under a folder, sorted, and their lengths in bytes.

        Raises InputError where a store cannot list, such as a plain web server.
        """

    def check_writable(self) -> None:
        """Raise InputError, before slow work, where it is known without writing an object that none can be written."""
        raise InputError(f"cannot write {self.url}: it is for reading only")

    @abstractmethod
    def remove(self, key: str) -> None:
        """Delete an object: only one that no receipt lists, or a receipt that will be written anew."""

    @abstractmethod
    def publish(self, key: str, data: bytes) -> bool:
        """Write a new object atomically; False if the key is taken."""

    def publish_new(self, key: str, data: bytes) -> bool:
        """`publish` for an object that most likely does not exist: without a check first where `create` works."""
        return self.publish(key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Like `publish`, by the store's own atomic create-if-absent and without a check first.

        Raises NotImplementedError where the store has none. Some stores accept the condition and ignore it.
        """
        raise NotImplementedError

    @abstractmethod
    def replace(self, key: str, data: bytes) -> None:
        """Write an object atomically, replacing one that no receipt covers."""

    @property
    def local_path(self) -> Path | None:
        """The folder of a store on this machine, None for any other."""
        return None

    def exclusive(self, folder: str) -> AbstractContextManager[None]:
        """Hold an exclusive lock on a folder while the body runs; without effect where the store has no locks."""
        return contextlib.nullcontext()

    def shared(self, folder: str) -> AbstractContextManager[None]:
        """Hold a lock on a folder that others may share, and that excludes `exclusive`."""
        return contextlib.nullcontext()

    def where(self, key: str) -> str:
        """The full address of an object, for messages."""
        return f"{self.url.rstrip('/')}/{key}"


def check_key(key: str, extra_names: frozenset[str] = frozenset()) -> str:
    """The key itself; raises InputError for one that could leave the cache or is not of the format."""
    parts = key.split("/")
    named = "/".join(part for part in parts if part not in extra_names)
    if any(part in ("", ".", "..") for part in parts) or (named and not KEY.match(named)):
        raise InputError(f"{key!r} is not a key of a cache: lower-case letters, digits, '.', '_', '-' and '/' only")
    return key
