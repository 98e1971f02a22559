"""A web server, which is read only and mostly lists nothing.

fsspec answers "not found" for whatever goes wrong when it looks for the length of an object, and asks for it before
each read. Here each object is one request, whose failure keeps its cause.
"""

from __future__ import annotations

import contextlib
from typing import Any

from storage.errors import InputError
from storage.stores.remote import CONNECT_S, AccessRefused, RemoteStore

_GONE = (404, 410)


class WebStore(RemoteStore):
    """The store of `https://host/folder`."""

    def __init__(self, url: str) -> None:
        if "?" in url or "#" in url:
            raise InputError(f"{url}: the names of objects are put at the end of the URL: give one without ? and #")
        super().__init__(url)

    def _options(self) -> dict[str, Any]:
        """Time-outs, and what the environment says: HTTPS_PROXY, HTTP_PROXY, NO_PROXY, ~/.netrc."""
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._timeout_s)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}

    def _beginning(self, key: str, most: int) -> bytes:
        # A stream is bounded, whatever the server sends: some ignore ranges.
        async def fetch(response: Any) -> bytes:
            pieces, left = [], most
            while left > 0 and (piece := await response.content.read(left)):
                pieces.append(piece)
                left -= len(piece)
            return b"".join(pieces)

        return bytes(self._request("GET", key, fetch))

    def _length(self, key: str) -> int:
        import aiohttp

        async def length(response: Any) -> int:
            stated = response.headers.get("Content-Length")
            return len(await response.read()) if stated is None else int(stated)

        # Not every server has HEAD; the answer to GET says what is wrong.
        with contextlib.suppress(aiohttp.ClientResponseError):
            return int(self._request("HEAD", key, length))
        return int(self._request("GET", key, length))

    def _request(self, method: str, key: str, use: Any) -> Any:
        """The result of `use` on a response. Raises FileNotFoundError where the server says that there is no object."""
        from fsspec.asyn import sync

        filesystem, path = self._fs, self._path(key)

        async def request() -> Any:
            session = await filesystem.set_session()
            options = {**filesystem.kwargs, "allow_redirects": True}
            # A compressed answer would have another length.
            options["headers"] = {"Accept-Encoding": "identity", **options.get("headers", {})}
            async with session.request(method, filesystem.encode_url(path), **options) as response:
                if response.status in _GONE:
                    raise FileNotFoundError(path)
                response.raise_for_status()
                return await use(response)

        return sync(filesystem.loop, request)

    def names(self, prefix: str) -> list[str]:
        try:
            return self._names(prefix)
        except (FileNotFoundError, AccessRefused):
            raise self._cannot_list() from None

    def folders(self, folder: str) -> list[str]:
        raise self._cannot_list()

    def walk(self, prefix: str = "") -> dict[str, int]:
        raise self._cannot_list()

    def _cannot_list(self) -> InputError:
        return InputError(
            f"{self.url}: this server cannot list its objects; name the teacher entry, "
            f"and read caches there that are complete"
        )
