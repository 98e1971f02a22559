"""Workers of one machine: killed, stopped, failing, helping; always the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from click.testing import CliRunner
from support.commands import TESTS, Run, command, environment, refused
from support.jobs import SMALL, committed, contents, copy_of, shards_of, start

import logit_cache.engines.run
import logit_cache.engines.worker
import storage.cache.leases
from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import open_job
from logit_cache.cli.main import cache_logits
from logit_cache.engines.shutdown import Stopped, Stopping
from logit_cache.engines.this_machine import build_missing
from storage import LogitCache
from storage.cache.leases import leases_in
from storage.cache.verify import verify
from storage.stores import open_store


@pytest.fixture(scope="module")
def alone(small_cache: Path, slow_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The entry that one undisturbed process makes."""
    cache = copy_of(small_cache, tmp_path_factory.mktemp("alone") / "cache")
    done = invoke(cache, slow_teacher)
    assert done.exit_code == 0, done.output
    return contents(cache)


def check(cache: Path, alone: dict[str, bytes]) -> None:
    """Complete, sound, and equal to the entry of one process alone."""
    assert LogitCache.open(str(cache)).teacher("a").missing() == []
    found = verify(str(cache), deep=True)
    assert found.problems == []
    assert contents(cache) == alone


@pytest.mark.slow
def test_two_workers_and_one_of_them_killed(cache: Path, slow_teacher: Path, alone: dict[str, bytes]) -> None:
    secrets = {"HF_TOKEN": "hf_a_secret", "AWS_SECRET_ACCESS_KEY": "another_secret"}
    job = start(cache, slow_teacher, "--workers", 2, "--json", **secrets)
    workers = [job.until("worker"), job.until("worker")]
    assert workers[0]["pid"] != workers[1]["pid"]
    job.until("shard", 5)
    os.kill(workers[0]["pid"], signal.SIGKILL)
    assert job.end() == 0, job.other
    (lost,) = job.events("worker lost")
    assert (lost["worker"], "SIGKILL" in lost["error"]) == (workers[0]["worker"], True)
    assert len(job.events("worker")) == 3, "a replacement was started"
    assert {line["worker"] for line in job.events("shard")} >= {workers[1]["worker"]}
    assert job.events("end")[0]["given_up"] == []
    # Every line on stderr is an event of the entry, and the result is alone on stdout.
    assert job.other == []
    assert {"start", "worker", "shard", "progress", "end"} <= {line["event"] for line in job.logged}
    assert all(line["entry"] == "a" and line["time"] for line in job.logged)
    result = json.loads(job.process.output()[0])
    assert result["positions_cached"] == result["positions"]
    stored = b"".join(path.read_bytes() for path in cache.rglob("*") if path.is_file())
    for secret in secrets.values():
        assert secret not in "".join(job.process.output())
        assert secret.encode() not in stored
    check(cache, alone)


@pytest.mark.slow
def test_a_stopped_job_ends_in_time_and_another_engine_resumes_it(
    cache: Path, slow_teacher: Path, alone: dict[str, bytes]
) -> None:
    job = start(cache, slow_teacher, "--workers", 2, "--grace-seconds", 20)
    job.until("shard", 4)
    asked = time.monotonic()
    job.kill(signal.SIGTERM)
    assert job.end() == 1
    assert time.monotonic() - asked < 20
    done, shards = committed(cache), shards_of(cache)
    assert 4 <= done < shards
    (error,) = [line for line in job.other if line.startswith("error: ")]
    assert f"{shards - done} of {shards} shards missing" in error
    assert job.events("end")[0]["stopped"]
    # Alone, then as one of seven, which helps with the shares of the six that are not started.
    job = start(cache, slow_teacher)
    job.until("shard", 3)
    job.kill(signal.SIGTERM)
    assert job.end() == 1
    assert committed(cache) >= done + 3
    job = start(cache, slow_teacher, "--worker", "5/7")
    assert job.end() == 0, job.other
    assert job.events("rank")[0]["of"] == 7
    check(cache, alone)


@pytest.mark.slow
def test_the_parent_killed_and_its_workers_with_it(cache: Path, slow_teacher: Path, alone: dict[str, bytes]) -> None:
    job = start(cache, slow_teacher, "--workers", 2)
    pids = [job.until("worker")["pid"] for _ in range(2)]
    job.until("shard", 3)
    job.kill()
    assert job.end() == -signal.SIGKILL
    until = time.monotonic() + 60
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.05)
    assert committed(cache) < shards_of(cache)
    assert start(cache, slow_teacher, "--workers", 3).end() == 0
    check(cache, alone)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_job_beside_another_one_takes_other_shards(cache: Path, slow_teacher: Path, alone: dict[str, bytes]) -> None:
    """Two plain commands on one entry: each shard is computed once, and both end when all of it is done."""
    jobs = [start(cache, slow_teacher) for _ in range(2)]
    assert [job.end() for job in jobs] == [0, 0]
    shards = [line["shard"] for job in jobs for line in job.events("shard")]
    assert sorted(shards) == list(range(shards_of(cache)))
    assert all(job.events("shard") for job in jobs)
    check(cache, alone)


@pytest.mark.slow
def test_a_job_waits_for_a_shard_leased_by_another(cache: Path, slow_teacher: Path, alone: dict[str, bytes]) -> None:
    leases = leases_in(open_store(str(cache)), "teachers/a/receipts")
    assert leases.take(7)
    job = start(cache, slow_teacher)
    while committed(cache) < shards_of(cache) - 1:
        assert job.process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    assert job.process.poll() is None, "the holder of the lease may still build it"
    leases.release(7)
    assert job.end() == 0
    check(cache, alone)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("--workers", 2)])
def test_a_worker_that_hangs_does_not_hold_the_job(
    workers: tuple[object, ...], cache: Path, slow_teacher: Path, alone: dict[str, bytes]
) -> None:
    """One of two processes, then one of a job's two workers: its lease ends, and the other builds its shard."""
    words = ("--cache", cache, "--teacher", slow_teacher, "--name", "a", *SMALL, "--log-format", "json", *workers)
    script = [sys.executable, str(TESTS / "support/programs/short_leases.py"), "3", *map(str, words)]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(script, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    with begin() as job:
        assert job.stderr is not None
        events = (json.loads(line) for line in job.stderr if line.startswith("{"))
        hung = job.pid
        if workers:
            hung = next(event["pid"] for event in events if event["event"] == "worker")
        next(event for event in events if event["event"] == "shard")
        os.kill(hung, signal.SIGSTOP)
        try:
            if workers:
                assert list(events)[-1]["given_up"] == []
                assert job.wait(60) == 0
                assert not _is_alive(hung)
            else:
                assert committed(cache) < shards_of(cache) - 2
                with begin() as other:
                    assert "Traceback" not in other.communicate(timeout=120)[1]
                    assert other.returncode == 0
                assert committed(cache) == shards_of(cache)
                os.kill(hung, signal.SIGCONT)
                assert job.communicate(timeout=60)[1] is not None
                assert job.returncode == 0, "it finds its shard built, with the same bytes"
        finally:
            job.kill()
    check(cache, alone)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[BaseException]]:
    """Errors that computing a shard raises, one each time."""
    errors: dict[int, list[BaseException]] = {}
    score = logit_cache.engines.worker.score_shard

    def scored(opened: Any, shard: int, progress: Any) -> Any:
        if errors.get(shard):
            raise errors[shard].pop(0)
        return score(opened, shard, progress)

    monkeypatch.setattr(logit_cache.engines.worker, "score_shard", scored)
    return errors


def invoke(cache: Path, teacher: Path, *options: object) -> Any:
    words = ("--cache", cache, "--teacher", teacher, "--name", "a", *SMALL, *options)
    return CliRunner().invoke(cache_logits, list(map(str, words)))


def test_a_shard_that_fails_every_attempt_is_named_and_the_rest_is_done(
    cache: Path, teacher: Path, failing: dict[int, list[BaseException]], run: Run
) -> None:
    failing[3] = [RuntimeError("out of memory")] * 3
    failing[5] = [RuntimeError("out of memory")]
    done = invoke(cache, teacher)
    assert done.exit_code == 1, done.output
    assert "shard 5 failed, attempt 1 of 3" in done.stderr
    assert "shard 3 failed permanently, after 3 attempts: RuntimeError: out of memory" in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "1 shard failed permanently, in every attempt: 3 (" in error
    assert "Traceback" not in done.stderr
    assert committed(cache) == shards_of(cache) - 1
    status = run("logit-cache", "status", cache)
    assert "failed      1 shard, permanently" in status.stdout
    assert "shard 3 after 3 attempts" in status.stdout
    note = json.loads((cache / "teachers/a/receipts/00000003.failed.json").read_text())
    assert "Traceback" in note["error"]
    # The fault is over.
    assert invoke(cache, teacher).exit_code == 0
    assert not list((cache / "teachers/a/receipts").glob("*.failed.json"))
    assert json.loads(run("logit-cache", "status", cache, "--json").stdout)["complete"]


def test_attempts_can_be_chosen(cache: Path, teacher: Path, failing: dict[int, list[BaseException]]) -> None:
    failing[0] = [RuntimeError("out of memory")]
    assert invoke(cache, teacher, "--attempts", 1).exit_code == 1


def test_a_broken_device_ends_the_process(cache: Path, teacher: Path, failing: dict[int, list[BaseException]]) -> None:
    failing[4] = [RuntimeError("CUDA error: an illegal memory access was encountered")]
    done = invoke(cache, teacher)
    assert done.exit_code == 1
    assert "CUDA error" in done.stderr
    assert "this process cannot continue, and must be started again" in done.stderr
    assert committed(cache) == 4


def test_a_process_without_workers_has_the_grace_that_was_given(
    cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    def noted(seconds: float) -> Stopping:
        given.append(seconds)
        return Stopping(seconds)

    monkeypatch.setattr(logit_cache.engines.run, "Stopping", noted)
    assert invoke(cache, teacher, "--grace-seconds", 7).exit_code == 0
    assert given == [7.0]


def test_a_shard_that_can_be_done_in_time_is_finished_and_others_are_dropped() -> None:
    stopping = Stopping(100.0)
    stopping.begin()
    stopping.check(0.01)  # no stop was requested
    stopping.wanted, stopping.asked_at = True, time.monotonic()
    stopping._began = time.monotonic() - 10.0
    stopping.check(0.5)  # ten seconds to go
    with pytest.raises(Stopped):
        stopping.check(0.1)  # ninety
    with pytest.raises(Stopped):
        stopping.check(0.0)


def test_a_process_that_cannot_end_in_time_is_ended() -> None:
    script = (
        "import time\nfrom logit_cache.engines.shutdown import Stopping\n"
        "with Stopping(1.0).on_sigterm():\n    print('ready', flush=True)\n    time.sleep(600)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "not done 1 seconds after SIGTERM" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--engine", "kubernetes"), ("--engine", "local")),
        (("--workers", 0), ("--workers",)),
        (("--workers", 2, "--worker", "0/2"), ("--worker i/n",)),
        (("--ray-address", "auto"), ("--ray-address", "--engine ray")),
        (("--slurm", "partition=x"), ("--slurm", "--engine slurm")),
        (("--engine", "slurm", "--slurm", "partition"), ("NAME=VALUE",)),
        (("--no-wait",), ("--no-wait", "--engine slurm")),
        (("--grace-seconds", 0), ("--grace-seconds",)),
        (("--log-format", "xml"), ("--log-format",)),
    ],
)
def test_options_that_make_no_sense(cache: Path, teacher: Path, run: Run, options: Any, words: Any) -> None:
    base = ("--cache", cache, "--teacher", teacher, "--name", "a", *SMALL)
    refused(run("cache-logits", *base, *options), *words)
    assert not (cache / "teachers/a").exists()


@pytest.mark.slow
def test_a_refusal_of_every_worker_is_printed_once(cache: Path, make_teacher: Callable[..., Path], run: Run) -> None:
    narrow = make_teacher(1, vocabulary_size=100)
    done = run("cache-logits", "--cache", cache, "--teacher", narrow, "--name", "a", *SMALL, "--workers", 2)
    refused(done, "its head has 100 columns")
    assert not (cache / "teachers/a").exists()


def test_a_worker_that_was_killed_is_not_kept_out_by_its_own_leases(
    cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a store a lease outlives its holder: the same worker, started again, waits for its end, then builds."""
    monkeypatch.setattr(storage.cache.leases, "LEASE_SECONDS", 4.0)
    url = f"memory://{tmp_path.name}/cache"
    fsspec.filesystem("memory").put(f"{cache}/", f"/{tmp_path.name}/cache/", recursive=True)
    fields = {"cache": url, "teacher": str(teacher), "name": "a", "k": 16, "context_tokens": 64, "shard_tokens": 4096}
    opened = open_job(CacheJob(**{**fields, "chunk_tokens": 256}))
    killed = leases_in(open_store(url), "teachers/a/receipts")
    assert killed.take(0)
    assert killed.take(3)
    build_missing(opened)
    assert opened.writer.pending() == []


def test_a_worker_that_helps_nobody_does_its_share(cache: Path, teacher: Path) -> None:
    assert invoke(cache, teacher, "--worker", "1/3", "--no-help-others").exit_code == 0
    done = {int(path.stem) for path in (cache / "teachers/a/receipts").glob("????????.json")}
    assert done == set(range(1, shards_of(cache), 3))
    assert invoke(cache, teacher, "--worker", "0/3").exit_code == 0
    assert committed(cache) == shards_of(cache)


@pytest.mark.slow
def test_torchrun_gives_each_process_its_share(cache: Path, slow_teacher: Path, alone: dict[str, bytes]) -> None:
    words = command("cache-logits", "--cache", cache, "--teacher", slow_teacher, "--name", "a", *SMALL)
    launcher = ["torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*command(*launcher), *words], capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"worker {rank} of 2 (from RANK and WORLD_SIZE)" in done.stderr
    check(cache, alone)
