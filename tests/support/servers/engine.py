"""A stand-in for vLLM and SGLang on loopback, which answers as they do from a small transformers model on the CPU.

    with StandIn("vllm", model_folder, tokenizer_folder) as engine:
        engine.url                   # http://127.0.0.1:PORT/v1
        engine.busy = [(503, "1")]   # the next requests for log-probs: a status, and Retry-After or None
        engine.stop(); engine.start()

Answers have the form of vLLM 0.32 and of SGLang's /generate: rows of the token in whose place they are, the first one
null, the label among vLLM's ids with its rank, the ids in no order; float32 log-softmax over all columns. Requests that
ask for more than the caps are refused in vLLM's words. As a program: a server of its own, until it is killed.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from support.servers.web import running
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

_CPU = threading.Lock()  # one forward pass at a time


class StandIn:
    """A server while the `with` body runs. name: under which the model is served, by default its folder.

    asked: the prompts that were answered, as tuples of ids. seconds: that each answer takes at least.
    """

    def __init__(
        self,
        kind: str,
        model: Path,
        tokenizer: Path | None = None,
        name: str | None = None,
        max_logprobs: int = 20,
        max_model_len: int | None = None,
    ) -> None:
        self.kind, self.max_logprobs, self.max_model_len = kind, max_logprobs, max_model_len
        self.name = name or str(model)
        self.tokenizer = None
        if tokenizer is not None:
            self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
        self.serve(model)
        self.asked: list[tuple[int, ...]] = []
        self.busy: list[tuple[int, str | None]] = []
        self.seconds = 0.0
        self.shift = 0.0  # added to all log-probs: what an engine with other settings may answer
        self.port = 0
        self.key: str | None = None

    def serve(self, model: Path) -> None:
        """Take another model, under the same name."""
        self.root = str(model)
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, port: int = 0, host: str = "127.0.0.1") -> None:
        """Start, or start again, where clients know it."""
        self._server = _Server((host, port or self.port), _Handler)
        self._server.engine = self
        self._running = running(self._server)
        self.port = self._running.__enter__()

    def stop(self) -> None:
        """End at once: connections that are open are closed by the next request on them."""
        self._server.dead = True
        self._running.__exit__(None, None, None)

    def __enter__(self) -> StandIn:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._server.dead:
            self.stop()

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """float32 [n, columns], of the token behind each."""
        with _CPU, torch.inference_mode():
            logits = self._model(torch.tensor([ids])).logits[0].float()
        return torch.log_softmax(logits, -1) + self.shift

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            card = {"id": self.name, "owned_by": self.kind, "root": self.root, "max_model_len": self.max_model_len}
            return 200, {"data": [card]}
        if path == {"vllm": "/version", "sglang": "/get_server_info"}[self.kind]:
            return 200, {"version": "0.0-stand-in"}
        if path == "/tokenize" and self.tokenizer is not None:
            ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return 200, {"tokens": ids, "count": len(ids)}
        asked = {"vllm": ("/v1/completions", "prompt"), "sglang": ("/generate", "input_ids")}[self.kind]
        if path != asked[0]:
            return 404, {"detail": "Not Found"}
        time.sleep(self.seconds)
        ids = body[asked[1]]
        k = body["prompt_logprobs" if self.kind == "vllm" else "top_logprobs_num"]
        if self.kind == "vllm" and k > self.max_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        if self.max_model_len is not None and len(ids) + 1 > self.max_model_len:
            said = f"This model's maximum context length is {self.max_model_len} tokens. However, you requested more"
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        self.asked.append(tuple(ids))
        return 200, (self._vllm if self.kind == "vllm" else self._sglang)(ids, k)

    def _vllm(self, ids: list[int], k: int) -> dict[str, Any]:
        rows: list[Any] = [None]
        for row, there in zip(self.logprobs(ids)[:-1], ids[1:], strict=True):
            best = row.topk(k).indices.tolist()
            rank = int((row > row[there]).sum()) + 1
            entry = {there: {"logprob": float(row[there]), "rank": rank, "decoded_token": "?"}}
            for number, token in enumerate(best):
                if token != there:
                    entry[token] = {"logprob": float(row[token]), "rank": number + 1, "decoded_token": "?"}
            rows.append({str(token): value for token, value in entry.items()})
        choice = {"index": 0, "text": "?", "prompt_logprobs": rows, "prompt_token_ids": ids}
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def _sglang(self, ids: list[int], k: int) -> dict[str, Any]:
        top: list[Any] = [None]
        there: list[Any] = [[None, ids[0], None]]
        for row, token in zip(self.logprobs(ids)[:-1], ids[1:], strict=True):
            best = row.topk(k)
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            top.append([[value, index, None] for value, index in pairs])
            there.append([float(row[token]), token, None])
        return {"text": "?", "meta_info": {"input_top_logprobs": top, "input_token_logprobs": there}}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True
    engine: StandIn
    dead = False

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are what tests provoke."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        engine = self.server.engine
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        generates = self.path in ("/v1/completions", "/generate")
        refused = engine.busy.pop(0) if generates and engine.busy else None
        if refused is not None:
            self._send(refused[0], {"error": {"message": "overloaded"}}, refused[1])
            return
        if engine.key is not None and self.headers.get("Authorization") != f"Bearer {engine.key}":
            self._send(401, {"error": "Unauthorized"})
            return
        found = engine.answer(self.path, json.loads(sent) if sent else {})
        if self.server.dead:
            self.close_connection = True
            return
        self._send(*found)

    def _send(self, status: int, answer: Any, retry_after: str | None = None) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("vllm", "sglang"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--max-logprobs", type=int, default=64)
    given = parser.parse_args()
    engine = StandIn(given.kind, given.model, given.tokenizer, max_logprobs=given.max_logprobs)
    engine.start(given.port, given.host)
    print(engine.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
