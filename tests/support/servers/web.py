"""Web servers on loopback: a folder that is served as a plain web server does, and a proxy that counts.

`serving(folder)` answers GET and HEAD; `refusals` are statuses by path. `Proxy` takes requests with absolute URLs,
whatever their host, to one server, and CONNECT to any port of this machine.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Folder(ThreadingHTTPServer):
    """What was asked (method, path), with which headers, and which paths are refused."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(FolderHandler, directory=str(folder)))
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.refusals: dict[str, int] = {}

    def handle_error(self, *_: Any) -> None:
        """A client that does not trust the certificate goes away; it is nothing to print."""


class FolderHandler(SimpleHTTPRequestHandler):
    server: Folder

    def send_head(self) -> Any:
        self.server.asked.append((self.command, self.path))
        self.server.headers.append(dict(self.headers.items()))
        refused = next((status for path, status in self.server.refusals.items() if path in self.path), None)
        if refused is not None:
            self.send_error(refused)
            return None
        return super().send_head()

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[int]:
    """Run a server until the body ends; its port."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def serving(folder: Path, certificate: Path | None = None) -> Iterator[tuple[str, Folder]]:
    """The URL of a folder, and its server; https with a PEM file of key and certificate."""
    server = Folder(folder)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server) as port:
        yield f"{'http' if certificate is None else 'https'}://localhost:{port}", server


class Proxy(ThreadingHTTPServer):
    """A proxy to the server at a port; `asked` are the methods and URLs that it received."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _ProxyHandler)
        self.port = port
        self.asked: list[tuple[str, str]] = []


class _ProxyHandler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.server.asked.append(("CONNECT", self.path))
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as upstream:
            self.send_response(200)
            self.end_headers()
            ends = {self.connection: upstream, upstream: self.connection}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(1 << 16)
                    if not data:
                        self.close_connection = True
                        return
                    ends[end].sendall(data)

    def _forward(self) -> None:
        self.server.asked.append((self.command, self.path))
        url = urllib.parse.urlsplit(self.path)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.port)) as upstream:
            upstream.putrequest(self.command, url._replace(scheme="", netloc="").geturl(), skip_host=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            response = upstream.getresponse()
            body = response.read()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward
