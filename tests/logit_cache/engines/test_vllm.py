"""A real vLLM on the CPU (`make test-vllm`): the same targets as the model in process, through kills of either side.

The figures that docs/served-teachers.md states are printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from support.commands import ROOT, Run, succeeded
from support.jobs import Job, cache_logits, committed, contents, copy_of, shards_of, start, whole
from support.servers.recorded_traffic import CAP, CONTEXT, RECORDED, byte_tokenizer, form, questions, recording
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from logit_cache.caching.score_shard import prompt_of
from logit_cache.caching.windows import windows
from storage import LogitCache
from storage.cache.verify import verify
from storage.format.targets import SparseTargets
from teachers.served.protocols import VLLM, Prompt

SCRIPT = ROOT / "tests" / "support" / "scripts" / "vllm.sh"
INSTALLED = Path(os.environ.get("VLLM_DIR") or ROOT / "build" / "vllm") / ".installed"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not INSTALLED.exists(), reason=f"no vLLM in {INSTALLED.parent}: {SCRIPT.name} install"),
]

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "initializer_range": 0.1, "vocab_size": 400}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gpt2": lambda: GPT2Config(vocab_size=400, n_embd=128, n_layer=2, n_head=2, n_positions=256, initializer_range=0.1),
}
K = 16
FIELDS = {"k": K, "targets": "topk", "encoding": "float32", "shard_tokens": 512, "fidelity_positions": 0}
TOLERANCE = 2e-5


class Engine:
    """A vLLM that serves a folder; `kill` ends it and all that it started with SIGKILL."""

    def __init__(self, model: Path, cap: int = 64, context: int = 256) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.url = model, f"http://127.0.0.1:{self.port}/v1"
        self._options = ("--max-model-len", str(context), "--max-logprobs", str(cap), "--served-model-name", "m")
        self.start()

    def start(self) -> None:
        command = [SCRIPT, "serve", self.model, str(self.port), *self._options]
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.model / "vllm.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=own)

    def wait(self) -> None:
        until = time.monotonic() + 600
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{self.url}/models", timeout=5).ok:
                    return
            time.sleep(1)
        raise AssertionError((self.model / "vllm.log").read_text(errors="replace")[-3_000:])

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory, text_file: Path, run: Run) -> Path:
    """A stream of some 4,000 tokens, with a tokenizer of 400 ids: 8 shards."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "text.txt").write_text(text_file.read_text(encoding="utf-8")[:7_500], encoding="utf-8")
    line = ("--text", folder / "text.txt", "--train-tokenizer", 400, "--out", folder / "cache")
    succeeded(run("logit-cache", "tokenize", *line))
    return folder / "cache"


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    return copy_of(small_cache, tmp_path / "cache")


def save(folder: Path, name: str, tokenizer: Path) -> Path:
    torch.manual_seed(4)
    path = folder / name
    AutoModelForCausalLM.from_config(MODELS[name]()).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json")).save_pretrained(path)
    return path


@contextlib.contextmanager
def running(model: Path, **caps: int) -> Iterator[Engine]:
    engine = Engine(model, **caps)
    try:
        engine.wait()
        yield engine
    finally:
        engine.kill()


def largest_differences(found: SparseTargets, expected: SparseTargets) -> dict[str, float]:
    """By field, in nats; ids count where they are not near ties."""
    apart = found.token_ids != expected.token_ids
    near = np.abs(found.logprobs - expected.logprobs)
    assert (near[apart] < TOLERANCE).all(), "ids differ that are no ties"
    return {
        "logprobs": float(near.max()),
        "log_tail": float(np.abs(found.log_tail - expected.log_tail).max()),  # type: ignore[operator]
        "label_logprob": float(np.nanmax(np.abs(found.label_logprob - expected.label_logprob))),  # type: ignore[operator]
    }


@pytest.mark.parametrize("name", MODELS)
def test_targets_are_those_of_the_model_in_process(cache: Path, tmp_path: Path, run: Run, name: str) -> None:
    model = save(tmp_path, name, cache / "tokenizer")
    _, expected = cache_logits(cache, "l", model, **FIELDS, fields=("label",))
    with running(model) as engine:
        entry, found = cache_logits(cache, "s", engine.url, **FIELDS)  # type: ignore[arg-type]
        again = run("logit-cache", "audit", cache, "--name", "s", "--teacher", engine.url)
    differences = largest_differences(found, expected)
    print(f"{name}, vLLM {entry.entry.created_with.libraries['vllm']}, {len(found):,} positions:", differences)
    assert max(differences.values()) < TOLERANCE
    assert again.returncode == 0, again.stdout
    assert run("logit-cache", "audit", cache, "--name", "s", "--teacher", model).returncode == 0
    assert entry.entry.teacher.served.tokenizer == "compared on probes"  # type: ignore[union-attr]


def test_answers_have_the_form_of_the_recorded_ones(tmp_path: Path) -> None:
    """Of a version that answers otherwise, the recording is left for a look at it, in VLLM_DIR."""
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"vocab_size": 256})).save_pretrained(tmp_path / "bytes")
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    now = INSTALLED.parent / "recorded.json"
    with (
        running(tmp_path / "bytes", cap=CAP, context=CONTEXT) as engine,
        recording(engine.url.removesuffix("/v1"), now) as url,
    ):
        assert len(questions(url)[1]) == 2
    (recorded,) = RECORDED.glob("vllm-*.json")
    exchanges = [json.loads(file.read_text(encoding="utf-8")) for file in (recorded, now)]
    forms = [[(each["path"], each["status"], form(each["answer"])) for each in some] for some in exchanges]
    assert forms[0] == forms[1]


def test_kills_of_job_and_server(cache: Path, tmp_path: Path) -> None:
    """kill -9 of both, in turn: committed shards are not touched, nothing is lost, and the values are the model's."""
    model = save(tmp_path, "llama", cache / "tokenizer")

    def job() -> Job:
        options = ("--targets", "topk", "--encoding", "float32", "--fidelity-positions", 0, "--requests", 2)
        return start(cache, engine.url, *options)  # type: ignore[arg-type]

    with running(model) as engine:
        first = job()
        first.until("shard", 2)
        first.kill()
        first.end()
        done, before = committed(cache), contents(cache)
        second = job()
        second.until("shard", 1)
        engine.kill()
        engine.start()
        assert second.end(900) == 0, second.other
    assert len(second.events("shard")) == shards_of(cache) - done
    assert {key: data for key, data in contents(cache).items() if key in before} == before
    assert verify(str(cache), deep=True).problems == []
    _, expected = cache_logits(cache, "l", model, **FIELDS, fields=("label",))
    assert max(largest_differences(whole(cache, "a")[1], expected).values()) < TOLERANCE


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """What is started here runs on one core, where there are several."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def test_the_rate_of_a_job_and_of_a_bare_client(tmp_path: Path, text_file: Path, run: Run) -> None:
    """Printed, and not judged: positions a second of both, and the job's own processor time; the server has a core to
    itself, and the bare client throws the answers away."""
    cache, at_once, fields = tmp_path / "cache", 8, FIELDS | {"shard_tokens": 8_192}
    (tmp_path / "text.txt").write_text(3 * text_file.read_text(encoding="utf-8"), encoding="utf-8")
    line = ("--text", tmp_path / "text.txt", "--train-tokenizer", 400, "--out", cache)
    succeeded(run("logit-cache", "tokenize", *line))
    model = save(tmp_path, "llama", cache / "tokenizer")
    opened = LogitCache.open(str(cache))
    tokens = opened.tokens.read(0, len(opened.tokens)).astype(np.int64)
    rates: dict[str, list[float]] = {"bare": [], "job": [], "microseconds": []}
    with contextlib.ExitStack() as stack:
        with on_core(0):
            engine = stack.enter_context(running(model))
        stack.enter_context(on_core(1))
        for number in range(3):
            copied = copy_of(cache, tmp_path / f"copy-{number}")
            began, used = time.monotonic(), time.process_time()
            entry, _ = cache_logits(copied, "s", engine.url, **fields, requests=at_once)  # type: ignore[arg-type]
            rates["job"].append(len(tokens) / (time.monotonic() - began))
            rates["microseconds"].append(1e6 * (time.process_time() - used) / len(tokens))
            plan = windows(0, len(tokens), len(tokens), entry.entry.windowing, None)
            prompts = [
                prompt_of(window, tokens[window.start :], np.arange(window.first, window.last), None) for window in plan
            ]
            session = requests.Session()

            def ask(prompt: Prompt, session: requests.Session = session) -> int:
                body = VLLM.body("m", prompt.ids.tolist(), K)
                url = f"{engine.url}/completions"
                return len(session.post(url, json=body, timeout=60).content)

            began = time.monotonic()
            with ThreadPoolExecutor(at_once) as pool:
                assert min(pool.map(ask, prompts)) > 0
            rates["bare"].append(len(tokens) / (time.monotonic() - began))
    job, bare = float(np.median(rates["job"])), float(np.median(rates["bare"]))
    print(
        f"{len(tokens):,} positions: job {job:,.0f} a second, bare client {bare:,.0f}: {job / bare:.2f}; "
        f"{np.median(rates['microseconds']):.0f} µs of the job's processor per position"
    )
