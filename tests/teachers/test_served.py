"""Teachers behind servers: what an answer means, who is asked when, and which model it is."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.models.saved import own_logits, saver
from support.servers.engine import StandIn
from support.servers.recorded_traffic import (
    CAP,
    CONTEXT,
    IDS,
    OFFSETS,
    RECORDED,
    byte_tokenizer,
    form,
    questions,
    recording,
    replaying,
    within,
)
from support.servers.web import running
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config

from storage.errors import InputError
from teachers.reduction.reduce import reduce_topk
from teachers.served import fleet as fleets
from teachers.served import server as servers
from teachers.served.fleet import Fleet, ServersLost
from teachers.served.protocols import SGLANG, VLLM, Prompt, WrongAnswer, rows_of
from teachers.served.server import Busy, Server
from teachers.served.teacher import ServedTeacher, reduced_rows

V, K = 160, 24
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": V, "initializer_range": 0.3}
MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda: LlamaConfig(intermediate_size=48, num_key_value_heads=2, **SIZES),
    "qwen2": lambda: Qwen2Config(intermediate_size=48, num_key_value_heads=2, **SIZES),
    "gpt2": lambda: GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
}


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return saver(tmp_path_factory.mktemp("served"), MODELS)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_the_reducer_s(save: Callable[..., Path], name: str, kind: str) -> None:
    model, floor = save(name), -100.0
    ids = np.random.default_rng(3).integers(0, V, 41)
    offsets = np.arange(5, 40)
    with StandIn(kind, model, max_logprobs=K) as engine:
        teacher = ServedTeacher.connect([engine.url], None, K)
        teacher.identify(ids[:9], None)
        (answer,) = (item for item in teacher.rows([(Prompt(ids, offsets), "key")]) if item is not None)
    assert answer[0] == "key"
    has_label = np.arange(len(offsets)) != 7
    found = reduced_rows(answer[1], has_label, V, floor)
    labels = torch.from_numpy(np.where(has_label, ids[offsets + 1], -1))
    logits = own_logits(model, torch.from_numpy(ids[None]))[offsets]
    expected = reduce_topk(logits, V, K, labels, floor)
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.kept, expected.kept)
    assert torch.equal(found.certain, expected.certain)
    for field in ("logprobs", "log_tail", "label_logprob"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), atol=2e-5, rtol=0, equal_nan=True)
    assert found.entropy.isnan().all()
    assert found.log_tail_half.isnan().all()


PROMPT = Prompt(np.array([5, 3, 4]), np.array([0, 1]))


def vllm_answer() -> dict[str, Any]:
    def entry(**logprobs: float) -> dict[str, Any]:
        return {name[1:]: {"logprob": value, "rank": 1, "decoded_token": ""} for name, value in logprobs.items()}

    rows = [None, entry(_3=-4.0, _9=-1.0, _7=-1.0), entry(_4=-0.1, _2=-3.0)]
    return {"choices": [{"prompt_logprobs": rows, "prompt_token_ids": [5, 3, 4]}]}


def sglang_answer() -> dict[str, Any]:
    top = [None, [[-1.0, 9, None], [-1.0, 7, None]], [[-0.1, 4, None], [-3.0, 2, None]]]
    there = [[None, 5, None], [-4.0, 3, None], [-0.1, 4, None]]
    return {"meta_info": {"input_top_logprobs": top, "input_token_logprobs": there}}


def exchanges_of(file: Path) -> dict[tuple[str, int], Any]:
    """The answers in a recording by path and status; the last of each."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return {(each["path"], each["status"]): each["answer"] for each in found}


def test_recorded_answers_of_a_real_vllm() -> None:
    (file,) = RECORDED.glob("vllm-*.json")
    with replaying(file) as url:
        rows, said = questions(url)
    entries = exchanges_of(file)["/v1/completions", 200]["choices"][0]["prompt_logprobs"]
    for number, offset in enumerate(OFFSETS.tolist()):
        entry = {int(token): value for token, value in entries[offset + 1].items()}
        best = sorted(
            (value["rank"], token) for token, value in entry.items() if value["rank"] <= rows.token_ids.shape[1]
        )
        assert rows.token_ids[number].tolist() == [token for _, token in best]
        assert rows.logprobs[number].tolist() == [entry[token]["logprob"] for _, token in best]
        assert rows.label_logprob[number] == entry[int(IDS[offset + 1])]["logprob"]
    assert said[0].endswith(f"start it with --max-logprobs {CAP + 1}, or take a smaller -k")
    assert "maximum context length is 16 tokens" in said[1]
    assert said[1].endswith("start it with --max-model-len 25, or take shorter windows")


def test_the_stand_in_answers_in_the_recorded_form(tmp_path: Path) -> None:
    config = LlamaConfig(intermediate_size=48, num_key_value_heads=2, **SIZES | {"vocab_size": 256})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    caps = {"name": "m", "max_logprobs": CAP, "max_model_len": CONTEXT}
    with (
        StandIn("vllm", tmp_path / "model", tmp_path / "model", **caps) as engine,  # type: ignore[arg-type]
        recording(engine.url.removesuffix("/v1"), tmp_path / "own.json") as url,
    ):
        questions(url)
    (file,) = RECORDED.glob("vllm-*.json")
    recorded, own = exchanges_of(file), exchanges_of(tmp_path / "own.json")
    assert recorded.keys() == own.keys()
    for of, answer in own.items():
        assert within(form(answer), form(recorded[of])), of


@pytest.mark.parametrize(("protocol", "answer"), [(VLLM, vllm_answer), (SGLANG, sglang_answer)])
def test_rows_describe_the_token_after_their_position(protocol: Any, answer: Callable[[], Any]) -> None:
    """The label is apart where it is not among the best, and equal log-probs lie by ascending id."""
    rows = rows_of(protocol, answer(), PROMPT, 2)
    assert rows.token_ids.tolist() == [[7, 9], [4, 2]]
    assert rows.logprobs.tolist() == [[-1.0, -1.0], [-0.1, -3.0]]
    assert rows.label_logprob.tolist() == [-4.0, -0.1]


def _set(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(answer: Any) -> None:
        for key in path[:-1]:
            answer = answer[key]
        answer[path[-1]] = value

    return change


CHOICE, META = ("choices", 0), ("meta_info",)
WRONG: dict[str, tuple[Any, Callable[[Any], None], str]] = {
    "no rows": (VLLM, _set(None, *CHOICE, "prompt_logprobs"), "without prompt_logprobs"),
    "other ids": (VLLM, _set([1, 5, 3, 4], *CHOICE, "prompt_token_ids"), "read other ids"),
    "too short": (VLLM, _set([None], *CHOICE, "prompt_logprobs"), "1 tokens, 3 were sent"),
    "no label": (VLLM, _set({"9": {"logprob": -1.0}, "7": {"logprob": -2.0}}, *CHOICE, "prompt_logprobs", 1), "id 3"),
    "few ids": (VLLM, _set({"3": {"logprob": -1.0}}, *CHOICE, "prompt_logprobs", 1), "1 ids in a row, 2 were"),
    "logits": (VLLM, _set(7.5, *CHOICE, "prompt_logprobs", 1, "9", "logprob"), "the largest is 7.5"),
    "too much": (VLLM, _set(-0.01, *CHOICE, "prompt_logprobs", 1, "9", "logprob"), "a mass of 1.3"),
    "nan": (VLLM, _set(float("nan"), *CHOICE, "prompt_logprobs", 1, "9", "logprob"), "no number"),
    "huge": (VLLM, _set(10**400, *CHOICE, "prompt_logprobs", 1, "9", "logprob"), "no answer in the form of vllm"),
    "an id twice": (SGLANG, _set(9, *META, "input_top_logprobs", 1, 1, 1), "come twice"),
    "half an id": (SGLANG, _set(1.5, *META, "input_top_logprobs", 1, 1, 1), "that are no ids"),
    "an id below 0": (SGLANG, _set(-1, *META, "input_top_logprobs", 1, 1, 1), "that are no ids"),
    "a huge id": (SGLANG, _set(10**30, *META, "input_top_logprobs", 1, 1, 1), "that are no ids"),
    "an error": (VLLM, _set("busy", "choices"), "no answer in the form of vllm"),
    "sglang other ids": (SGLANG, _set([-4.0, 8, None], *META, "input_token_logprobs", 1), "read other ids"),
    "sglang no row": (SGLANG, _set(None, *META, "input_top_logprobs", 1), "0 ids in a row"),
    "sglang nothing": (SGLANG, _set(None, "meta_info"), "without meta_info"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_answer_in_another_form_is_none(case: str) -> None:
    protocol, change, said = WRONG[case]
    answer = copy.deepcopy(vllm_answer() if protocol is VLLM else sglang_answer())
    change(answer)
    with pytest.raises(WrongAnswer, match=said):
        rows_of(protocol, answer, PROMPT, 2)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    rows = rows_of(VLLM, vllm_answer(), PROMPT, 2)
    with pytest.raises(InputError, match="id 9 as a likely one"):
        reduced_rows(rows, np.array([True, True]), 9, -50.0)


def _servers(count: int) -> list[Server]:
    return [Server(f"http://server-{number}/v1", 4, 1.0) for number in range(count)]


def _all(answers: Iterator[Any]) -> list[Any]:
    return [item for item in answers if item is not None]


def test_requests_in_flight_are_bounded_and_each_prompt_is_answered_once() -> None:
    fleet, lock = Fleet(_servers(2), 3, 5.0), threading.Lock()
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def ask(server: Server, item: int) -> int:
        with lock:
            now[server.url] += 1
            most[server.url] = max(most[server.url], now[server.url])
        time.sleep(0.01)
        with lock:
            now[server.url] -= 1
        return 2 * item

    assert sorted(_all(fleet.answers(range(40), ask))) == [(item, 2 * item) for item in range(40)]
    assert set(most.values()) == {3}


def test_what_a_busy_server_did_not_take_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone as long as it asks for, and asked who it is before it is trusted again."""
    monkeypatch.setattr(fleets, "_LOOK_SECONDS", 0.02)
    first, second = _servers(2)
    fleet, failed, seen = Fleet([first, second], 2, 5.0), [0.0], []

    def ask(server: Server, item: int) -> str:
        time.sleep(0.02)
        if server is first and not failed[0]:
            failed[0] = time.monotonic()
            raise Busy("503", 0.3)
        return server.url

    def known_again(server: Server) -> None:
        seen.append((server, time.monotonic() - failed[0]))

    found = _all(fleet.answers(range(60), ask, known_again))
    assert sorted(item for item, _ in found) == list(range(60))
    assert {url for _, url in found} == {first.url, second.url}
    assert seen[0][0] is first
    assert seen[0][1] >= 0.3
    assert all(server is first for server, _ in seen)


def test_a_job_ends_where_no_server_answers_for_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleets, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(fleets, "_FIRST_PAUSE", 0.01)
    fleet = Fleet(_servers(2), 2, 0.3)

    def ask(server: Server, item: int) -> str:
        raise Busy("connection refused")

    began = time.monotonic()
    with pytest.raises(ServersLost, match=r"no answer for 0.3 s \(connection refused\): start the server") as caught:
        _all(fleet.answers(range(9), ask))
    assert 0.3 <= time.monotonic() - began < 3
    assert caught.value.exit_status == 1
    with pytest.raises(ServersLost):
        fleet.patiently(fleet.servers[0], lambda: ask(fleet.servers[0], 1))


def test_an_error_that_is_not_passing_is_raised_at_once() -> None:
    def ask(server: Server, item: int) -> str:
        if item == 3:
            raise InputError("wrong")
        return ""

    with pytest.raises(InputError, match="wrong"):
        _all(Fleet(_servers(1), 2, 60.0).answers(range(9), ask))


def test_servers_of_one_job_serve_one_model(save: Callable[..., Path], tmp_path: Path) -> None:
    with StandIn("vllm", save("llama"), name="m") as one, StandIn("vllm", save("qwen2"), name="m") as other:
        teacher = ServedTeacher.connect([one.url, other.url], None, 4)
        with pytest.raises(InputError, match=f"{other.url}: serves another model than this job's m"):
            teacher.identify(np.arange(40), None)
        other.name = "n"
        with pytest.raises(InputError, match=r"serves n by vllm, .* m by vllm"):
            ServedTeacher.connect([one.url, other.url], None, 4)
        with pytest.raises(InputError, match="serves no x: give --served-model one of: m"):
            ServedTeacher.connect([one.url], "x", 4)


def test_the_key_of_the_environment_is_sent(save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn("vllm", save("llama")) as engine:
        engine.key = "a key"
        with pytest.raises(InputError, match=r"refuses the request \(401: Unauthorized\)"):
            ServedTeacher.connect([engine.url], None, 4)
        monkeypatch.setenv("LOGIT_CACHE_API_KEY", "a key")
        ServedTeacher.connect([engine.url], None, 4)


class _Odd(BaseHTTPRequestHandler):
    """A server that answers by the path in ways that no engine does; `seen`: the paths, and the keys that came."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"]))
        name = self.path.rpartition("/")[2]
        self.send_response(307 if name == "moved" else 429 if name == "again" else 200)
        body = {"deep": b"[" * 100_000, "long": b" " * 4096}.get(name, b"{}")
        self.send_header("Content-Length", str(10**6 if name == "drops" else len(body)))
        self.send_header("Location" if name == "moved" else "Retry-After", "/elsewhere" if name == "moved" else "0")
        self.end_headers()
        with contextlib.suppress(OSError):
            while name == "drops":
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("path", "kind", "said"),
    [
        ("moved", InputError, r"307: it redirects to /elsewhere: give the address of the server"),
        ("drops", Busy, "no answer within 0.5 s"),
        ("long", InputError, "more than 1,000 bytes"),
        ("deep", Busy, "no JSON"),
        ("again", Busy, "429"),
    ],
)
def test_a_server_that_is_none(
    path: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No redirection is followed, and no key sent but LOGIT_CACHE_API_KEY; time and bytes of an answer are bounded."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(servers, "_MOST_BYTES", 200_000 if path == "deep" else 1000)
    _Odd.seen.clear()
    with running(ThreadingHTTPServer(("127.0.0.1", 0), _Odd)) as port:
        began = time.monotonic()
        with pytest.raises(kind, match=said) as caught:
            Server(f"http://127.0.0.1:{port}/v1", 1, 0.5).get(path)
        assert time.monotonic() - began < 3
    assert _Odd.seen == [(f"/{path}", None)]
    if path == "again":
        assert caught.value.seconds == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/v1/models", {"data": [{"id": 5}]}, "lists no models"),
        ("/v1/models", {"data": [{"id": "m", "owned_by": ["vllm"]}]}, "lists no models"),
        ("/v1/models", [], "lists no models"),
        ("/v1/models", {"data": [{"id": "m", "owned_by": "llamacpp"}]}, "is neither vLLM nor SGLang"),
        ("/tokenize", {"tokens": ["a"]}, "expected the ids of a text"),
        ("/tokenize", [], "expected the ids of a text"),
    ],
)
def test_what_a_server_says_of_itself_is_checked(
    path: str, answer: Any, said: str, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with StandIn("vllm", save("llama"), name="m") as engine:
        usual = engine.answer
        monkeypatch.setattr(
            engine, "answer", lambda asked, body: (200, answer) if asked == path else usual(asked, body)
        )
        with pytest.raises(InputError, match=said):
            ServedTeacher.connect([engine.url], None, 4).check_tokenizer(byte_tokenizer(), np.arange(9), "")


def test_records_hold_no_paths(save: Callable[..., Path]) -> None:
    with StandIn("vllm", save("llama")) as engine:
        (member,) = ServedTeacher.connect([engine.url], None, 4).identify(np.arange(9), None).members
    assert (member.name, member.model) == ("llama", "llama")  # type: ignore[union-attr]
    assert len(member.probe) == 8  # type: ignore[union-attr]


def test_a_model_is_known_again_by_its_answers(save: Callable[..., Path]) -> None:
    with StandIn("vllm", save("llama"), name="m") as engine:

        def identity(recorded: Any = None) -> Any:
            return ServedTeacher.connect([engine.url], None, 4).identify(np.arange(40), recorded).served

        first = identity()
        engine.shift = -1e-3  # noise: another batch, another kernel
        assert identity().probe != first.probe
        assert identity(first) == first
        engine.shift = 0.0
        engine.serve(save("qwen2"))
        engine.root = str(save("llama"))
        assert identity(first).probe != first.probe
