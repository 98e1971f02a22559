"""A hub of data sets on loopback: as much of the Hugging Face HTTP API as pushing and reading a cache take.

Files are kept in memory, one commit after the other. Large files go through the LFS batch protocol when the uploader
has its own store (Xet) switched off; the store itself is not imitated.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from support.servers.web import running

TOKEN = "hf_a-token-of-the-tests"


class FakeHub:
    """What the hub holds, what was asked of it, and when it is to fail.

    files     by data set and revision: bytes by path
    commits   in order: (data set, revision, paths)
    private   by data set
    lfs       whether files under `c/` take the way of large files
    refuse    status for a request (method and path), or None to answer it
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, str, list[str]]] = []
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.lfs = False
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.stored: dict[str, bytes] = {}
        self.url = ""

    @classmethod
    @contextmanager
    def serving(cls) -> Iterator[FakeHub]:
        """Run it on a free port until the body ends."""
        hub = cls()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        with running(server) as port:
            hub.url = f"http://127.0.0.1:{port}"
            yield hub

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes, host: str) -> tuple[int, Any]:
        """Status and answer (JSON data, or bytes) of a request."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match [method, *parts]:
            case ["POST", "api", "repos", "create"]:
                return self._create(json.loads(body), host)
            case ["POST", "api", "validate-yaml"]:
                card = json.loads(body)["content"]
                wrong = not isinstance(yaml.safe_load(card.split("---\n")[1]), dict)
                return (400, {"errors": [{"message": "not a mapping"}]}) if wrong else (200, {"warnings": []})
            case ["PUT", "lfs", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    return 400, {"error": "other bytes than announced"}
                self.stored[oid] = body
                self.uploads.append(oid)
                return 200, {}
            case ["POST", "datasets", owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(json.loads(body), host)
            case ["POST" | "GET", "api", "datasets", owner, name, *rest] if f"{owner}/{name}" in self.files:
                return self._of_data_set(f"{owner}/{name}", rest, query, body)
            case ["GET" | "HEAD", "datasets", owner, name, "resolve", revision, *rest]:
                data = self.files.get(f"{owner}/{name}", {}).get(revision, {}).get("/".join(rest))
                return (404, "EntryNotFound") if data is None else (200, data)
        return 404, "RepoNotFound"

    def _create(self, asked: dict[str, Any], host: str) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"http://{host}/datasets/{name}", "name": name, "id": name}
        if name in self.files:
            return 409, {**answer, "error": "You already created this dataset repo"}
        self.files[name] = {"main": {".gitattributes": b""}}
        self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return 200, answer

    def _batch(self, asked: dict[str, Any], host: str) -> tuple[int, Any]:
        objects = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"http://{host}/lfs/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.stored else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}

    def _of_data_set(self, name: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> tuple[int, Any]:
        revisions = self.files[name]
        match rest:
            case [] | ["revision", _]:
                revision = rest[1] if rest else "main"
                if revision not in revisions:
                    return 404, "RevisionNotFound"
                return 200, {"id": name, "sha": "f" * 40, "private": self.private[name], "siblings": [], "tags": []}
            case ["branch", branch]:
                if branch in revisions:
                    return 409, {"error": "Reference already exists"}
                revisions[branch] = dict(revisions["main"])
                return 200, {}
            case [_, revision, *_] if revision not in revisions:
                return 404, "RevisionNotFound"
            case ["preupload", revision]:
                return 200, {"files": [self._mode(item, revisions[revision]) for item in json.loads(body)["files"]]}
            case ["commit", revision]:
                return self._commit(name, revision, [json.loads(line) for line in body.splitlines()])
            case ["tree", revision, *folder]:
                return self._tree(revisions[revision], "/".join(folder), query.get("recursive") == ["True"])
            case ["paths-info", revision]:
                asked = parse_qs(body.decode())["paths"]
                return 200, [_entry(path, revisions[revision]) for path in asked if path in revisions[revision]]
        return 404, "EntryNotFound"

    def _mode(self, item: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        large = self.lfs and "/c/" in item["path"]
        found = {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if item["path"] in files:
            data = files[item["path"]]
            found["oid"] = hashlib.sha256(data).hexdigest() if large else _git_oid(data)
        return found

    def _commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        changed = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    return 400, {"error": "LFS pointer pointed to a file that does not exist"}
                changed[value["path"]] = self.stored[value["oid"]]
        self.files[name][revision].update(changed)
        self.commits.append((name, revision, sorted(changed)))
        oid = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.url}/datasets/{name}/commit/{oid}", "commitOid": oid, "success": True}

    def _tree(self, files: dict[str, bytes], folder: str, recursive: bool) -> tuple[int, Any]:
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path in files:
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                parent = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    found[parent] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": parent}
            if recursive or len(parts) == 1:
                found[path] = _entry(path, files)
        return (200, list(found.values())) if found else (404, "EntryNotFound")


def _entry(path: str, files: dict[str, bytes]) -> dict[str, Any]:
    return {"type": "file", "oid": _git_oid(files[path]), "size": len(files[path]), "path": path}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr: the tests read what the command wrote there."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = url.path.replace(".git/info", "/info")
        self.hub.requests.append(f"{self.command} {path}")
        status: int | None = self.hub.refuse(self.command, path)
        answer: Any = {"error": "refused by the test"}
        if status is None and self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            status, answer = 401, {"error": "Invalid username or password."}
        if status is None:
            status, answer = self.hub.answer(self.command, path, parse_qs(url.query), body, self.headers["Host"])
        self._reply(status, answer)

    def _reply(self, status: int, answer: Any) -> None:
        headers = {}
        if isinstance(answer, str):
            headers["X-Error-Code"] = answer
            answer = {"error": answer}
        data: bytes = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        wanted = self.headers.get("Range")
        if status == 200 and isinstance(answer, bytes) and wanted:
            start, stop = wanted.removeprefix("bytes=").split("-")
            if int(start) >= len(data):
                status, data = 416, b""
            else:
                status, data = 206, data[int(start) : int(stop) + 1 if stop else None]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = _serve
