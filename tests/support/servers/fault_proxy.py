"""An HTTP proxy in front of a server that fails on purpose: what a network and an object store do on a bad day.

    with FaultProxy("http://127.0.0.1:5000") as proxy:
        proxy.faults.append(Fault("503", "GET", r"/kept/c/0", count=2))

A fault hits the requests of its method whose path and query match its pattern, from the `first`-th on, `count` times.
Requests go through with their headers as they came, so that signatures that cover the Host header stay valid. Every
request is written down in `requests`.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from support.servers.web import running

# Answers of the server's own; the text is what S3 says in the same case.
STATUSES = {
    "403": (403, "AccessDenied"),
    "404": (404, "NoSuchKey"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
}
Kind = Literal[
    "403", "404", "503", "expired",
    "reset",           # the connection is reset before the request is passed on
    "stall",           # no answer, ever
    "truncated",       # half of the body, then the connection ends: shorter than announced
    "short",           # half of the body, announced as all of it
    "empty",           # no body, announced as such
    "flipped",         # one bit of the answer's body
    "flipped upload",  # one bit of the request's body
    "unconditional",   # passed on without its If-None-Match, as to a server that ignores it
    "lost",            # the request is passed on and done; the answer is not
]  # fmt: skip
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Fault:
    """What to do to which requests."""

    kind: Kind
    method: str = "GET"
    pattern: str = ""
    first: int = 0
    count: int | None = None
    seen: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)

    def takes(self, method: str, target: str) -> bool:
        """Whether this request is one to fail; counts it."""
        if method != self.method or not re.search(self.pattern, target):
            return False
        self.seen += 1
        if self.seen <= self.first or (self.count is not None and self.hits >= self.count):
            return False
        self.hits += 1
        return True


@dataclass(frozen=True)
class Request:
    """One request that arrived: `target` is its path and query, unquoted."""

    method: str
    target: str
    range: str | None
    sent: int


class FaultProxy:
    """A proxy on a free port of this machine while the `with` body runs."""

    def __init__(self, upstream: str) -> None:
        address = urllib.parse.urlsplit(upstream)
        self.upstream = (address.hostname, address.port)
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._running = running(self._server)

    def __enter__(self) -> FaultProxy:
        self._running.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._running.__exit__(None, None, None)

    def reset(self) -> None:
        """Forget all faults and all requests."""
        with self._lock:
            self.faults.clear()
            self.requests.clear()

    def matching(self, method: str, pattern: str) -> list[Request]:
        """The requests so far of a method whose target matches."""
        return [r for r in list(self.requests) if r.method == method and re.search(pattern, r.target)]

    def note(self, request: Request) -> Kind | None:
        """Write a request down; the kind of fault that it meets."""
        with self._lock:
            self.requests.append(request)
            return next((f.kind for f in self.faults if f.takes(request.method, request.target)), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is what these tests provoke; it is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        proxy = self.server.proxy
        body = self._body()
        target = urllib.parse.unquote(self.path)
        kind = proxy.note(Request(self.command, target, self.headers.get("Range"), len(body)))
        if kind in STATUSES:
            self._refuse(*STATUSES[kind])
        elif kind == "reset":
            self._hang_up()
        elif kind == "stall":
            proxy.closing.wait()
            self._hang_up()
        else:
            if kind == "flipped upload":
                body = _flipped(body)
            without = _HOP_BY_HOP | ({"if-none-match"} if kind == "unconditional" else set())
            status, headers, answer = self._ask(body, without)
            if kind == "lost":
                self._hang_up()
            else:
                self._answer(status, headers, answer, kind)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _ask(self, body: bytes, without: set[str]) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=120)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in without:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, kind: str | None) -> None:
        announced = len(body)
        if kind == "flipped":
            body = _flipped(body)
        elif kind == "empty":
            body, announced = b"", 0
        elif kind in ("short", "truncated"):
            body = body[: len(body) // 2]
            announced = len(body) if kind == "short" else announced
        self.send_response_only(status)
        for name, value in headers:
            # The length of what a HEAD would have got is the server's to say.
            if name.lower() not in _HOP_BY_HOP or (self.command == "HEAD" and name.lower() == "content-length"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        self.wfile.write(body)
        if announced > len(body):
            self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>on purpose</Message></Error>'.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _hang_up(self) -> None:
        # Closing with nothing to linger for sends a reset instead of an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :] if data else data
