"""Jobs whose teacher is behind a server: the same targets, whatever happens to job and server, and one line for each
thing that cannot work."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.streams import write_rows
from support.commands import Run, refused, succeeded
from support.jobs import Job, cache_logits, committed, contents, copy_of, refusal, shards_of, start, whole
from support.servers.engine import StandIn
from support.servers.fault_proxy import Fault, FaultProxy
from transformers import PreTrainedTokenizerFast

from logit_cache.engines.this_machine import build_missing
from storage import LogitCache
from storage.cache.verify import verify
from storage.format.targets import SparseTargets
from teachers.served import fleet, server

FIELDS = {"k": 16, "targets": "topk", "encoding": "float32", "shard_tokens": 512, "fidelity_positions": 0}


@pytest.fixture(params=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, teacher: Path, small_cache: Path) -> Iterator[StandIn]:
    with StandIn(request.param, teacher, small_cache / "tokenizer", "m", 64, 128) as running:
        yield running


@pytest.fixture
def vllm(teacher: Path, small_cache: Path) -> Iterator[StandIn]:
    with StandIn("vllm", teacher, small_cache / "tokenizer", "m", 64, 128) as running:
        yield running


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(fleet, "_FIRST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory, text_file: Path, run: Run) -> Path:
    """A stream of some 4,000 tokens, with a tokenizer of 400 ids: 8 shards."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "text.txt").write_text(text_file.read_text(encoding="utf-8")[:7_500], encoding="utf-8")
    line = ("--text", folder / "text.txt", "--train-tokenizer", 400, "--out", folder / "cache")
    succeeded(run("logit-cache", "tokenize", *line))
    return folder / "cache"


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    return copy_of(small_cache, tmp_path / "cache")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, text_file: Path, small_cache: Path, run: Run) -> Path:
    """A stream of documents of many lengths, one of a single token's text."""
    text = text_file.read_text(encoding="utf-8")
    pieces = [text[first : first + size] for first, size in ((0, 900), (900, 1), (901, 150), (1051, 40), (1100, 700))]
    folder = tmp_path_factory.mktemp("documents")
    write_rows(folder / "rows.jsonl", *({"text": piece} for piece in pieces))
    line = ("--text", folder / "rows.jsonl", "--tokenizer", small_cache, "--out", folder / "c")
    succeeded(run("logit-cache", "tokenize", *line))
    return folder / "c"


def same_targets(found: SparseTargets, expected: SparseTargets) -> None:
    assert np.array_equal(found.token_ids, expected.token_ids)
    assert np.array_equal(found.kept, expected.kept)
    for name in ("logprobs", "log_tail", "label_logprob"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5, rtol=0)
    assert found.entropy is None
    assert found.log_tail_half is None


@pytest.mark.parametrize(
    ("engine", "windows"),
    [("vllm", {"stride_tokens": 32, "bos_each_window": True}), ("sglang", {})],
    indirect=["engine"],
    ids=["vllm, overlapping, begun with BOS", "sglang"],
)
def test_targets_are_those_of_the_model_in_process(
    cache: Path, teacher: Path, engine: StandIn, windows: dict[str, Any]
) -> None:
    entry, found = cache_logits(cache, "s", engine.url, **FIELDS, **windows)  # type: ignore[arg-type]
    same_targets(found, cache_logits(cache, "l", teacher, **FIELDS, fields=("label",), **windows)[1])
    assert (entry.entry.made, entry.entry.targets.fields) == ("served", ("label",))
    assert entry.entry.created_with.libraries[engine.kind] == "0.0-stand-in"
    assert verify(str(cache), deep=True).problems == []
    asked = Counter(engine.asked[2:])  # the first two tell who answers
    assert set(asked.values()) == {1}
    assert len(asked) == -(-len(found) // windows.get("stride_tokens", 64)) - ("stride_tokens" in windows)


def test_rows_of_documents_end_where_they_end(documents: Path, engine: StandIn, teacher: Path) -> None:
    engine.tokenizer = None  # a server without that endpoint
    fields = {**FIELDS, "context_tokens": 48, "isolate_documents": True}
    entry, found = cache_logits(documents, engine.kind, engine.url, **fields)  # type: ignore[arg-type]
    same_targets(found, cache_logits(documents, f"of-{engine.kind}", teacher, **fields, fields=("label",))[1])
    assert np.isnan(found.label_logprob).sum() == 5
    assert entry.entry.teacher.served.tokenizer == "not compared"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "varopt": ({"targets": "varopt"}, "varopt samples from all of them: give --targets topk"),
    "entropy": ({"fields": ("entropy",)}, "entropy takes whole distributions"),
    "version 1": ({"format_version": 1}, "version 1 of the format takes whole distributions"),
    "a device": ({"device": "cuda"}, "--device is the server's to choose"),
    "a dtype": ({"dtype": "bfloat16"}, "--dtype is the server's to choose"),
    "a batch": ({"batch_windows": 4}, "--batch-windows is for a teacher in this process"),
    "cap on log-probs": ({"k": 65}, "start it with --max-logprobs 65, or take a smaller -k"),
    "context one too long": (
        {"context_tokens": 127, "shard_tokens": 508},
        "start it with --max-model-len 129, or take a context of 126",
    ),
    "context begun": (
        {"context_tokens": 126, "shard_tokens": 504, "bos_each_window": True},
        "a context of 125 or less",
    ),
    "another name": ({"served_model": "n"}, "serves no n: give --served-model one of: m"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_cannot_do_is_refused_before_anything_is_written(cache: Path, vllm: StandIn, case: str) -> None:
    fields, said = REFUSED[case]
    assert said in refusal(cache, "s", vllm.url, **{**FIELDS, **fields})  # type: ignore[arg-type]
    assert not (cache / "teachers" / "s").exists()


def test_the_longest_context_that_fits(cache: Path, vllm: StandIn) -> None:
    _, found = cache_logits(cache, "s", vllm.url, **{**FIELDS, "context_tokens": 126, "shard_tokens": 1260})  # type: ignore[arg-type]
    assert (found.kept == 16).all()


def test_a_cap_that_no_list_states_is_met_in_the_first_window(cache: Path, vllm: StandIn) -> None:
    vllm.answer, answer = lambda path, body: hidden(answer(path, body)), vllm.answer  # type: ignore[method-assign]

    def hidden(found: tuple[int, Any]) -> tuple[int, Any]:
        for card in found[1].get("data", ()):
            del card["max_model_len"]
        return found

    said = refusal(cache, "s", vllm.url, **{**FIELDS, "context_tokens": 128})  # type: ignore[arg-type]
    assert "start it with --max-model-len 130" in said


def test_other_servers_are_refused(cache: Path, vllm: StandIn, teacher: Path) -> None:
    both = refusal(cache, "s", vllm.url, teacher, **FIELDS)  # type: ignore[arg-type]
    assert "several servers of one model" in both
    assert "--served-model goes with" in refusal(cache, "s", teacher, **FIELDS, served_model="m")
    vllm.kind = "somebody"
    assert "is neither vLLM nor SGLang" in refusal(cache, "s", vllm.url, **FIELDS)  # type: ignore[arg-type]
    with FaultProxy(vllm.url) as proxy:
        proxy.faults.append(Fault("404", "GET", "models"))
        assert "lists no models at" in refusal(cache, "s", proxy.url, **FIELDS)  # type: ignore[arg-type]


def test_another_tokenizer_is_refused(cache: Path, vllm: StandIn, run: Run, text_file: Path, tmp_path: Path) -> None:
    line = ("--text", text_file, "--train-tokenizer", 390, "--out", tmp_path / "other")
    succeeded(run("logit-cache", "tokenize", *line))
    own: Any = vllm.tokenizer
    letters = lambda text, **_: {"input_ids": own.convert_tokens_to_ids(list("".join(own.tokenize(text))))}  # noqa: E731
    vllm.tokenizer = letters  # type: ignore[assignment]
    cache_logits(cache, "cut-otherwise", vllm.url, **FIELDS)  # type: ignore[arg-type]
    vllm.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "other" / "tokenizer" / "tokenizer.json"))
    assert "its tokenizer is not the cache's" in refusal(cache, "s", vllm.url, **FIELDS)  # type: ignore[arg-type]
    assert not (cache / "teachers" / "s").exists()


def test_commands_that_need_the_model_say_so(cache: Path, vllm: StandIn, run: Run, tmp_path: Path) -> None:
    line = ("--teacher", vllm.url, "--name", "s", "--targets", "topk")
    refused(run("logit-cache", "plan", "--cache", cache, *line), "a plan is measured on a teacher in this process")
    text = tmp_path / "t.txt"
    text.write_text("a")
    refused(run("cache-logits", "--text", text, "--out", tmp_path / "c", *line), "make the token stream first")


def test_a_model_that_was_swapped_between_two_runs_is_refused(
    cache: Path, vllm: StandIn, teacher: Path, make_teacher: Callable[..., Path]
) -> None:
    cache_logits(cache, "s", vllm.url, **FIELDS)  # type: ignore[arg-type]
    before = contents(cache, "s")
    root = vllm.root
    vllm.serve(make_teacher(7))
    vllm.root = root  # it says that it is the same
    assert "teacher.members.0.probe: the cache has" in refusal(cache, "s", vllm.url, **FIELDS)  # type: ignore[arg-type]
    vllm.serve(teacher)
    vllm.root = "/models/other"
    assert "teacher.members.0.model" in refusal(cache, "s", vllm.url, **FIELDS)  # type: ignore[arg-type]
    assert contents(cache, "s") == before


def test_a_server_that_comes_back_as_another_model_is_refused(
    cache: Path, vllm: StandIn, make_teacher: Callable[..., Path]
) -> None:
    """In the middle of a run, under the same name: no window is asked of it."""
    answer, count = vllm.answer, iter(range(1 << 20))

    def swap(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions" and next(count) == 12:
            vllm.serve(make_teacher(7))
            return 503, {"error": {"message": "starting"}}
        return answer(path, body)

    vllm.answer = swap  # type: ignore[method-assign]
    said = refusal(cache, "s", vllm.url, **FIELDS, requests=1)  # type: ignore[arg-type]
    assert "serves another model than this job's m" in said
    vllm.answer = answer  # type: ignore[method-assign]


FAULTS = {
    "503 for a while": [Fault("503", "POST", first=20, count=5)],
    "cut off": [Fault("truncated", "POST", "completions", first=9, count=3)],
    "too short, as announced": [Fault("short", "POST", "completions", first=9, count=3)],
    "connection reset": [Fault("reset", "POST", "completions", first=9, count=3)],
    "no answer in time": [Fault("stall", "POST", "completions", first=9, count=2)],
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_that_passes_changes_nothing(cache: Path, vllm: StandIn, teacher: Path, case: str) -> None:
    expected = cache_logits(cache, "l", teacher, **FIELDS, fields=("label",))[1]
    with FaultProxy(vllm.url) as proxy:
        proxy.faults += FAULTS[case]
        found = cache_logits(cache, "s", f"{proxy.url}/v1", **FIELDS, request_seconds=1)[1]  # type: ignore[arg-type]
        assert sum(fault.hits for fault in proxy.faults) == FAULTS[case][0].count
    same_targets(found, expected)


def test_a_server_is_left_alone_as_long_as_it_asks(cache: Path, vllm: StandIn) -> None:
    times: list[tuple[str, float]] = []
    answer = vllm.answer

    def timed(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        times.append((path, time.monotonic()))
        if len(times) == 30:
            vllm.busy.append((429, "1"))
        return answer(path, body)

    vllm.answer = timed  # type: ignore[method-assign]
    cache_logits(cache, "s", vllm.url, **FIELDS, requests=1)  # type: ignore[arg-type]
    assert max(np.diff([at for _, at in times])) >= 1.0


def test_retry_after_may_be_a_date() -> None:
    assert server._seconds("3") == 3.0
    assert server._seconds("Fri, 01 Jan 2100 00:00:00 GMT") > 1e6  # type: ignore[operator]
    assert server._seconds("Thu, 01 Jan 1970 00:00:00 GMT") == server._LEAST_PAUSE
    assert server._seconds("soon") is None


def test_two_servers_share_a_job_and_one_of_them_dies(cache: Path, vllm: StandIn, teacher: Path) -> None:
    expected = cache_logits(cache, "l", teacher, **FIELDS, fields=("label",))[1]
    with StandIn("vllm", teacher, cache / "tokenizer", "m", 64, 128) as other:
        vllm.seconds = 0.01
        answer, stopping, one_at_a_time = other.answer, threading.Thread(target=other.stop), threading.Lock()

        def dying(path: str, body: dict[str, Any]) -> tuple[int, Any]:
            with one_at_a_time:
                if len(other.asked) >= 6 and not stopping.ident:
                    stopping.start()
            return answer(path, body)

        other.answer = dying  # type: ignore[method-assign]
        found = cache_logits(cache, "s", vllm.url, other.url, **FIELDS, requests=2)[1]  # type: ignore[arg-type]
        stopping.join()
        assert other.asked
        assert len(vllm.asked) > len(other.asked)
    same_targets(found, expected)


def _job(cache: Path, engine: StandIn, *options: object) -> Job:
    served = ("--targets", "topk", "--encoding", "float32", "--fidelity-positions", 0, "--requests", 4)
    return start(cache, engine.url, *served, *options)  # type: ignore[arg-type]


def test_a_job_whose_server_is_gone_ends_and_resumes(cache: Path, vllm: StandIn, teacher: Path) -> None:
    """Status 1 and one line; what was committed is not touched again, and nothing is lost."""
    vllm.seconds = 0.02
    job = _job(cache, vllm, "--patience-seconds", 1)
    job.until("shard", 3)
    vllm.stop()
    assert job.end() == 1
    (line,) = [line for line in job.other if line.startswith("error:")]
    assert "no answer for 1 s (connection refused): start the server again" in line
    done, before = committed(cache), contents(cache)
    assert 3 <= done < shards_of(cache)
    vllm.start()
    again = _job(cache, vllm)
    assert again.end() == 0, again.other
    assert len(again.events("shard")) == shards_of(cache) - done
    assert {key: data for key, data in contents(cache).items() if key in before} == before
    _check_whole(cache, teacher)


def test_a_server_that_is_killed_and_started_again_is_waited_for(cache: Path, vllm: StandIn, teacher: Path) -> None:
    vllm.seconds = 0.02
    job = _job(cache, vllm)
    job.until("shard", 2)
    vllm.stop()
    time.sleep(0.5)
    vllm.start()
    assert job.end() == 0, job.other
    _check_whole(cache, teacher)


def test_a_job_that_is_killed_resumes(cache: Path, vllm: StandIn, teacher: Path) -> None:
    vllm.seconds = 0.02
    job = _job(cache, vllm)
    job.until("shard", 3)
    job.kill()
    job.end()
    done, before = committed(cache), contents(cache)
    again = _job(cache, vllm, "--workers", 2)
    assert again.end() == 0, again.other
    assert len(again.events("shard")) == shards_of(cache) - done
    assert {key: data for key, data in contents(cache).items() if key in before} == before
    _check_whole(cache, teacher)


def _check_whole(cache: Path, teacher: Path) -> None:
    assert verify(str(cache), deep=True).problems == []
    assert LogitCache.open(str(cache)).teacher("a").missing() == []
    same_targets(whole(cache, "a")[1], cache_logits(cache, "l", teacher, **FIELDS, fields=("label",))[1])


@pytest.mark.slow
def test_a_student_learns_the_same_from_both(
    cache: Path, vllm: StandIn, teacher: Path, run: Run, tmp_path: Path
) -> None:
    losses = []
    for name, source in (("s", vllm.url), ("l", teacher)):
        cache_logits(cache, name, source, **FIELDS, fields=("label",))  # type: ignore[arg-type]
        out = tmp_path / name
        line = ("train-student", "--cache", cache, "--teacher", name, "--model", "llama-tiny", "--window-tokens", 64)
        succeeded(run(*line, "--set", "max_steps=8", "--set", "logging_steps=1", "--output-dir", out))
        state = json.loads(next(out.rglob("trainer_state.json")).read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(losses[0]) >= 8
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-4)


def test_what_is_served_is_shown(cache: Path, vllm: StandIn, run: Run) -> None:
    cache_logits(cache, "s", vllm.url, **FIELDS)  # type: ignore[arg-type]
    shown = run("logit-cache", "inspect", cache).stdout
    assert "m (served by vllm as gpt2-0, weights not verified)" in shown
    assert "weights     not verified; tokenizer compared on probes" in shown
    assert "made        by its teacher behind a server" in shown


def test_waiting_keeps_leases_and_can_be_stopped(cache: Path, vllm: StandIn) -> None:
    """A worker that waits for a server still looks at the clock, so its leases live and SIGTERM ends it."""
    from logit_cache.caching.job import CacheJob
    from logit_cache.caching.prepare import open_job
    from logit_cache.caching.score_shard import score_shard

    opened = open_job(CacheJob(cache=str(cache), name="s", teacher=(vllm.url,), context_tokens=64, **FIELDS))
    vllm.seconds = 0.3
    done: list[int] = []
    score_shard(opened, 0, done.append)
    assert done.count(0) >= 2
    assert sum(done) == 512
    vllm.seconds = 0.0
    build_missing(opened)
