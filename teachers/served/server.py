"""One server: its address, what a request to it costs in time at most, and which failures pass by themselves.

Passing: no connection, no whole answer in time, a body that ends early, 408, 425, 429 and every 5xx: `Busy`, with the
time that the server asked to be left alone (`Retry-After`). All else that is not an answer is a wrong request:
`InputError`. So is a redirection: prompts go nowhere but to the address that was given, and neither does the key.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import time
from typing import Any

import requests
import urllib3

from storage.errors import InputError
from storage.text import printable

_PASSING = {408, 425, 429}
_CONNECT_SECONDS = 10.0
_MOST_SHOWN = 300
_BLOCK = 1 << 18
_MOST_BYTES = 16 << 20  # of an answer without log-probs
_LEAST_PAUSE = 0.5  # else one that asks for none would be asked in a loop


class Busy(Exception):
    """A failure that may pass. `seconds`: how long the server asked to be left alone, None where it did not say."""

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Refused(InputError):
    """A request that a server refuses; `reason` is its own text."""

    def __init__(self, url: str, status: int, reason: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(f"{url}: the server refuses the request ({status}: {reason or 'no reason given'})")


class Server:
    """A server at the URL of its OpenAI API, with or without the /v1; `root` is above that.

    connections: held open at once. seconds: for one request, at most. A key in the environment's LOGIT_CACHE_API_KEY is
    sent, and no other, as of a netrc file: the URL may be anybody's.
    """

    def __init__(self, url: str, connections: int, seconds: float) -> None:
        self.url = url
        self.root = url.rstrip("/").removesuffix("/v1")
        self._seconds = seconds
        self._session = requests.Session()
        self._session.auth = _sign
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=connections)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def get(self, path: str) -> Any:
        return self._request("GET", path, None, _MOST_BYTES)

    def post(self, path: str, body: dict[str, Any], most_bytes: int = _MOST_BYTES) -> Any:
        return self._request("POST", path, body, most_bytes)

    def _request(self, method: str, path: str, body: dict[str, Any] | None, most_bytes: int) -> Any:
        """The JSON of an answer. Raises Busy and Refused, InputError for one of more bytes."""
        until = time.monotonic() + self._seconds
        timeout = (min(_CONNECT_SECONDS, self._seconds), self._seconds)
        try:
            with self._session.request(
                method, f"{self.root}/{path}", json=body, timeout=timeout, stream=True, allow_redirects=False
            ) as answer:
                content = self._content(answer.raw, most_bytes, until)
        except (requests.Timeout, urllib3.exceptions.TimeoutError):
            raise Busy(f"no answer within {self._seconds:g} s") from None
        except (requests.exceptions.MissingSchema, requests.exceptions.InvalidURL) as error:
            raise InputError(f"{self.url}: no address of a server: {error}") from None
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise Busy(_in_words(error)) from None
        if answer.status_code in _PASSING or answer.status_code >= 500:
            reason = f"{answer.status_code} {answer.reason}: {_said(content)}".rstrip(": ")
            raise Busy(printable(reason), _seconds(answer.headers.get("Retry-After")))
        if answer.is_redirect:
            moved = printable(answer.headers["Location"][:_MOST_SHOWN])
            raise Refused(self.url, answer.status_code, f"it redirects to {moved}: give the address of the server")
        if answer.status_code >= 300:
            raise Refused(self.url, answer.status_code, printable(_said(content)))
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Busy(f"its answer is no JSON, or was cut off after {len(content)} bytes") from None

    def _content(self, body: urllib3.BaseHTTPResponse, most: int, until: float) -> bytes:
        """The body, which may come in drops: each one is in time, and still all of them have to be."""
        parts, size = [], 0
        while part := body.read1(_BLOCK, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > most:
                raise InputError(f"{self.url}: its answer has more than {most:,} bytes, no answer to what was asked")
            if time.monotonic() > until:
                raise requests.Timeout
        return b"".join(parts)


def _sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
    key = os.environ.get("LOGIT_CACHE_API_KEY")
    if key:
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _in_words(error: Exception) -> str:
    """The kind of a connection's failure: the text of these errors is a nest of other ones."""
    text = str(error)
    if "refused" in text:
        return "connection refused"
    if isinstance(error, urllib3.exceptions.ProtocolError) or "IncompleteRead" in text:
        return "its answer was cut off"
    if "resolve" in text or "Name or service" in text:
        return "no machine of that name is found"
    return f"{type(error).__name__}: {text:.100}"


def _said(content: bytes) -> str:
    """What a server says of a failure, on one line: the message of its JSON, or the beginning of its text."""
    try:
        found = json.loads(content)
        found = found.get("error", found) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, RecursionError):
        found = content.decode(errors="replace")
    return " ".join(str(found).split())[:_MOST_SHOWN]


def _seconds(header: str | None) -> float | None:
    """Retry-After, which is in seconds or a date, in seconds from now; at least `_LEAST_PAUSE`."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(_LEAST_PAUSE, seconds) if math.isfinite(seconds) else None
