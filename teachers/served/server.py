"""One server: its address, what a request to it costs in time at most, and which failures pass by themselves.

Passing: no connection, no answer in time, a body that ends early, 408, 425, 429 and every 5xx: `Busy`, with the time
that the server asked to be left alone (`Retry-After`). All else that is not an answer is a wrong request: `InputError`.
"""

from __future__ import annotations

import email.utils
import math
import os
import time
from typing import Any

import requests

from storage.errors import InputError

_PASSING = {408, 425, 429}
_CONNECT_SECONDS = 10.0
_MOST_SHOWN = 300


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
    sent, and no other: the URL may be anybody's.
    """

    def __init__(self, url: str, connections: int, seconds: float) -> None:
        self.url = url
        self.root = url.rstrip("/").removesuffix("/v1")
        self._seconds = seconds
        self._session = requests.Session()
        key = os.environ.get("LOGIT_CACHE_API_KEY")
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=connections)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def get(self, path: str) -> Any:
        return self._request("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of an answer. Raises Busy and Refused."""
        try:
            answer = self._session.request(
                method, f"{self.root}/{path}", json=body, timeout=(min(_CONNECT_SECONDS, self._seconds), self._seconds)
            )
        except requests.Timeout:
            raise Busy(f"no answer within {self._seconds:g} s") from None
        except (requests.exceptions.MissingSchema, requests.exceptions.InvalidURL) as error:
            raise InputError(f"{self.url}: no address of a server: {error}") from None
        except requests.RequestException as error:
            raise Busy(_in_words(error)) from None
        if answer.status_code in _PASSING or answer.status_code >= 500:
            reason = f"{answer.status_code} {answer.reason}: {_said(answer)}".rstrip(": ")
            raise Busy(reason, _seconds(answer.headers.get("Retry-After")))
        if not answer.ok:
            raise Refused(self.url, answer.status_code, _said(answer))
        try:
            return answer.json()
        except ValueError:
            raise Busy(f"its answer is no JSON, or was cut off after {len(answer.content)} bytes") from None


def _in_words(error: requests.RequestException) -> str:
    """The kind of a connection's failure: the text of these errors is a nest of other ones."""
    text = str(error)
    if "refused" in text:
        return "connection refused"
    if isinstance(error, requests.exceptions.ChunkedEncodingError) or "IncompleteRead" in text:
        return "its answer was cut off"
    if "resolve" in text or "Name or service" in text:
        return "no machine of that name is found"
    return f"{type(error).__name__}: {text:.100}"


def _said(answer: requests.Response) -> str:
    """What a server says of a failure, on one line: the message of its JSON, or the beginning of its text."""
    try:
        found = answer.json()
        found = found.get("error", found) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        found = answer.text
    return " ".join(str(found).split())[:_MOST_SHOWN]


def _seconds(header: str | None) -> float | None:
    """Retry-After, which is in seconds or a date, in seconds from now."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
