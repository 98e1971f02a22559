"""Traffic with a server, written down and answered again: `recording` passes requests on, `replaying` answers them.

A file is a JSON list of exchanges: method, path, body, status, answer. A request that is not in it is answered by 404.
`questions` are what is asked of an engine in every recording; `form` is what answers to one of them share.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import requests
from support.servers.web import running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from storage.errors import InputError
from teachers.served.protocols import Prompt, ServedRows
from teachers.served.teacher import ServedTeacher

RECORDED = Path(__file__).parent / "recorded"
IDS, OFFSETS = np.array([84, 104, 101, 32, 99, 97, 116, 46]), np.array([2, 3, 6])
K, CAP, CONTEXT = 5, 8, 16


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 256 ids, one a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: number for number, each in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def questions(url: str) -> tuple[ServedRows, list[str]]:
    """The rows of a prompt, and what is said of too many ids and of too long a prompt, by a server of CAP ids a row
    that reads CONTEXT tokens."""
    teacher = ServedTeacher.connect([url], None, K, patience=0.0)
    teacher.check_tokenizer(byte_tokenizer(), IDS, "")
    teacher.identify(IDS, None)
    (rows,) = (item[1] for item in teacher.rows([(Prompt(IDS, OFFSETS), None)]) if item is not None)
    said = []
    for k, ids in ((CAP + 1, IDS), (K, np.tile(IDS, 3))):
        try:
            ServedTeacher.connect([url], None, k, patience=0.0).identify(ids, None)
        except InputError as error:
            said.append(str(error).replace(url, "URL"))
    return rows, said


def form(answer: Any) -> Any:
    """The names and kinds of an answer: of lists the kinds of their members, of rows of ids that of their values."""
    if isinstance(answer, dict):
        if answer and all(name.isdigit() for name in answer):
            return {"id": form(next(iter(answer.values())))}
        return {name: form(value) for name, value in answer.items()}
    if isinstance(answer, list):
        forms = {json.dumps(form(value), sort_keys=True) for value in answer}
        return [json.loads(each) for each in sorted(forms)]
    return "number" if isinstance(answer, int | float) else type(answer).__name__


def within(part: Any, whole: Any) -> bool:
    """Whether all of one form is in another."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(name in whole and within(value, whole[name]) for name, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return all(any(within(one, other) for other in whole) for one in part)
    return bool(part == whole)


@contextlib.contextmanager
def recording(root: str, file: Path) -> Iterator[str]:
    """The URL of a server that passes all on to the one at `root`; at the end the exchanges are written."""
    exchanges: list[dict[str, Any]] = []

    def passed_on(method: str, path: str, body: Any) -> tuple[int, Any]:
        answer = requests.request(method, f"{root}{path}", json=body, timeout=60)
        found = answer.json()
        exchanges.append({"method": method, "path": path, "body": body, "status": answer.status_code, "answer": found})
        return answer.status_code, found

    with _serving(passed_on) as url:
        yield url
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in exchanges)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


@contextlib.contextmanager
def replaying(file: Path) -> Iterator[str]:
    """The URL of a server that answers what is in a file, in whatever order it is asked."""
    exchanges = json.loads(file.read_text(encoding="utf-8"))

    def answered(method: str, path: str, body: Any) -> tuple[int, Any]:
        for each in exchanges:
            if (each["method"], each["path"], each["body"]) == (method, path, body):
                return each["status"], each["answer"]
        return 404, {"detail": "Not Found"}

    with _serving(answered) as url:
        yield url


@contextlib.contextmanager
def _serving(answer: Any) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _serve(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found = answer(self.command, self.path, json.loads(sent) if sent else None)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _serve

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        yield f"http://127.0.0.1:{port}/v1"
