"""S3 and stores with its protocol: listings page by page, and a client configured for the retry rule of `RemoteStore`.

fsspec's listings are not used: they take an empty answer for an empty folder, or for the last page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from storage.errors import StoreUnavailable, error_text
from storage.stores.remote import CONNECT_S, RemoteStore


class S3Store(RemoteStore):
    """The store of `s3://bucket/prefix`."""

    @property
    def s3(self) -> tuple[Any, str]:
        """The filesystem of s3fs and the root in it, for features that only S3 has."""
        return self._fs, self._root

    def _options(self) -> dict[str, Any]:
        """Time-outs, no retries and no cached listings."""
        config = {
            "connect_timeout": CONNECT_S,
            "read_timeout": self._timeout_s,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        return {"config_kwargs": config, "use_listings_cache": False}

    def names(self, prefix: str) -> list[str]:
        return sorted({name for name, _ in self.listing(prefix)} - {""})

    def folders(self, folder: str) -> list[str]:
        below = len(self._below_bucket(folder))
        prefixes = [item["Prefix"] for page in self._pages(folder, "/") for item in page.get("CommonPrefixes", ())]
        return sorted({prefix[below:].rstrip("/") for prefix in prefixes} - {""})

    def listing(self, folder: str) -> Iterator[tuple[str, float | None]]:
        below = len(self._below_bucket(folder))
        for page in self._pages(folder, "/"):
            for item in page.get("CommonPrefixes", ()):
                yield item["Prefix"][below:].rstrip("/"), None
            for item in page.get("Contents", ()):
                yield item["Key"][below:], item["LastModified"].timestamp()

    def walk(self, prefix: str = "") -> dict[str, int]:
        root = len(self._below_bucket(""))
        items = (item for page in self._pages(prefix, "") for item in page.get("Contents", ()))
        return dict(sorted((item["Key"][root:], int(item["Size"])) for item in items))

    def _below_bucket(self, prefix: str) -> str:
        folder = str(self._fs.split_path(self._path(prefix.rstrip("/")))[1])
        return folder + "/" if folder else ""

    def _pages(self, prefix: str, delimiter: str) -> Iterator[dict[str, Any]]:
        bucket = self._fs.split_path(self._path(prefix))[0]
        wanted = {"Bucket": bucket, "Prefix": self._below_bucket(prefix), "Delimiter": delimiter}

        def request() -> dict[str, Any]:
            try:
                page: dict[str, Any] = self._fs.call_s3("list_objects_v2", **wanted)
            except ValueError as error:  # a malformed date or number in the answer
                raise OSError(f"a listing that cannot be read: {error_text(error)}") from error
            if "IsTruncated" not in page:
                raise OSError("an empty answer instead of a listing")
            return page

        while True:
            try:
                page = self._ask(prefix, request)
            except FileNotFoundError as error:
                raise StoreUnavailable(f"{self.url}: {bucket} cannot be listed ({error_text(error)})") from None
            yield page
            if not page["IsTruncated"]:
                return
            wanted["ContinuationToken"] = page["NextContinuationToken"]
