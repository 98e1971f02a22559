"""`cache-logits --engine ray` on a cluster of two nodes on this machine: the same bytes as without, whatever is killed.

The cluster lets in only who has its token.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.clusters.ray_nodes import RayNodes, kill, until
from support.commands import TESTS, Run, command, environment, in_process, refused, succeeded
from support.jobs import contents
from support.processes import start

# Where two workers share the tests, one of them has the nodes.
pytestmark = pytest.mark.xdist_group("ray nodes")


@pytest.fixture(scope="session")
def run() -> Run:
    """Commands as processes: a driver of Ray keeps its connection for as long as its process lives."""
    return lambda *arguments: start(*arguments).end()


NAME = "a"
SHARDS = 65
# As fast as it can be, and still some seconds of work for two.
JOB = (
    "--name", NAME, "-k", 16, "--context-tokens", 128, "--stride-tokens", 8, "--shard-tokens", 256,
    "--chunk-tokens", 256, "--fidelity-positions", 256, "--log-format", "json",
)  # fmt: skip


@pytest.fixture(scope="module")
def teacher(make_teacher: Callable[..., Path]) -> Path:
    """With enough layers to be caught at its work."""
    return make_teacher(n_embd=64, n_layer=4)


@pytest.fixture(scope="module")
def expected(small_cache: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory, run: Run) -> dict[str, bytes]:
    """The objects that one process stores."""
    path = Path(shutil.copytree(small_cache, tmp_path_factory.mktemp("expected") / "cache"))
    succeeded(run("cache-logits", "--cache", path, "--teacher", teacher, *JOB))
    return contents(path)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    started = RayNodes(environment())
    try:
        started.add()
        yield started
    finally:
        started.stop()


class Job:
    """`cache-logits` that runs on the cluster."""

    def __init__(
        self, nodes: RayNodes, cache: Path, teacher: Path, *more: object, script: tuple[str, ...] = ()
    ) -> None:
        self._path = cache.parent / "log"
        arguments = ("--cache", cache, "--teacher", teacher, *JOB)
        ray = ("--engine", "ray", "--ray-address", nodes.address, "--workers", 2)
        words = command("cache-logits", *arguments, *ray, *more)
        if script:
            words = [sys.executable, str(TESTS / "support/clusters/ray_faulty.py"), *script, *words[1:]]
        self._cache = cache
        with self._path.open("wb") as log:
            self.process = subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=log, env=environment() | nodes.access
            )

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind so far; the last line may be incomplete."""
        lines = [line for line in self.log.splitlines(keepends=True) if line.startswith("{") and line.endswith("}\n")]
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    @property
    def log(self) -> str:
        return self._path.read_text(encoding="utf-8")

    def built(self) -> int:
        """Number of committed shards."""
        return len(list((self._cache / "teachers" / NAME / "receipts").glob("????????.json")))

    def in_the_middle(self, workers: int = 1) -> list[dict[str, Any]]:
        """Wait until so many workers have started and some shards are built; returns the events of the workers."""

        def some() -> bool:
            assert self.process.poll() is None, self.log
            return len(self.events("worker")) >= workers and self.built() > 10

        until(some, f"{workers} workers build")
        assert self.built() < SHARDS - 5
        return self.events("worker")

    def end(self) -> int:
        """Its exit status."""
        return self.process.wait(300)


def whole(job: Job, cache: Path, expected: dict[str, bytes], run: Run) -> None:
    """The job is done, with the bytes of one process, and all of it can be verified."""
    assert job.end() == 0, job.log
    assert contents(cache) == expected
    succeeded(run("logit-cache", "verify", cache, "--deep"))


# Refusals


def test_without_ray(cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = in_process("cache-logits", "--cache", cache, "--teacher", teacher, *JOB, "--engine", "ray")
    refused(done, "pip install 'logit-cache[ray]'")


def test_without_a_cluster(cache: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = ("cache-logits", "--cache", cache, "--teacher", teacher, *JOB, "--engine", "ray")
    refused(in_process(*job, "--ray-address", "127.0.0.1:9"), "127.0.0.1:9", "Connection refused")
    refused(in_process(*job, "--ray-address", "ray://127.0.0.1:10001"), "ray://127.0.0.1:10001", "head node")
    monkeypatch.setenv("RAY_ADDRESS", "nowhere.invalid:6379")
    refused(in_process(*job), "nowhere.invalid:6379 cannot be reached")


@pytest.mark.slow
def test_with_another_token(
    nodes: RayNodes, cache: Path, teacher: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ("cache-logits", "--cache", cache, "--teacher", teacher, *JOB, "--engine", "ray")
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    refused(run(*job), nodes.address, "RAY_AUTH_MODE=token")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    refused(run(*job), nodes.address, "another token")


@pytest.mark.slow
def test_jobs_that_do_not_fit(
    nodes: RayNodes, cache: Path, teacher: Path, make_teacher: Callable[..., Path], run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in nodes.access.items():
        monkeypatch.setenv(name, value)
    plain = [word for word in JOB if word not in ("--log-format", "json")]

    def job(source: Path, *more: object) -> subprocess.CompletedProcess[str]:
        ray = ("--engine", "ray", "--ray-address", nodes.address, "--workers", 2)
        return run("cache-logits", "--cache", cache, "--teacher", source, *plain, *ray, *more)

    refused(job(teacher, "-k", 401), "--k 401", "400 ids")
    done = job(make_teacher(vocabulary_size=300))
    refused(done, "300 columns", "400 ids")
    assert "is lost" not in done.stderr, "the user's error is reported once"
    assert not (cache / "teachers" / NAME).exists()
    assert run("cache-logits", "--cache", cache, "--teacher", teacher, *JOB, "--shard-tokens", 8192).returncode == 0
    before = contents(cache)
    refused(job(make_teacher(seed=1, n_embd=64, n_layer=4), "--shard-tokens", 8192), NAME, "weights")
    assert contents(cache) == before


@pytest.mark.slow
def test_a_wait_for_room_is_logged(nodes: RayNodes, cache: Path, teacher: Path) -> None:
    job = Job(nodes, cache, teacher, "--worker-cpus", 2, "--log-format", "text")
    until(lambda: "wait for room" in job.log, "the wait is logged", 60)
    assert "2 of 2 workers wait for room: each needs 2 CPUs of a node" in job.log
    assert "none of its nodes is large enough" in job.log
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 1
    assert not (cache / "teachers" / NAME).exists()


# Kills


@pytest.mark.slow
def test_a_cluster_of_its_own(cache: Path, teacher: Path, expected: dict[str, bytes], run: Run) -> None:
    job = ("cache-logits", "--cache", cache, "--teacher", teacher, *JOB, "--engine", "ray")
    refused(run(*job, "--worker-cpus", 1000), "a worker needs 1,000 CPUs", "on this machine")
    succeeded(run(*job, "--workers", 2))
    assert contents(cache) == expected


@pytest.mark.slow
def test_undisturbed(nodes: RayNodes, cache: Path, teacher: Path, expected: dict[str, bytes], run: Run) -> None:
    job = Job(nodes, cache, teacher)
    whole(job, cache, expected, run)
    workers = job.events("worker")
    assert len({worker["node"] for worker in workers}) == 2
    assert {event["worker"] for event in job.events("shard")} == {"0", "1"}
    assert not job.events("worker lost")
    until(lambda: not nodes.actors(), "no actor is left", 30)


@pytest.mark.slow
def test_a_worker_that_is_killed(
    nodes: RayNodes, cache: Path, teacher: Path, expected: dict[str, bytes], run: Run
) -> None:
    job = Job(nodes, cache, teacher)
    victim = job.in_the_middle()[0]
    kill(victim["pid"])
    whole(job, cache, expected, run)
    (lost,) = job.events("worker lost")
    assert lost["worker"] == victim["worker"]


@pytest.mark.slow
def test_a_driver_that_is_asked_to_stop(
    nodes: RayNodes, cache: Path, teacher: Path, expected: dict[str, bytes], run: Run
) -> None:
    job = Job(nodes, cache, teacher, "--grace-seconds", 10)
    job.in_the_middle()
    asked = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 1
    assert time.monotonic() - asked < 11
    assert "was stopped with" in job.log
    assert 10 < job.built() < SHARDS
    # By another engine, on this machine alone.
    succeeded(run("cache-logits", "--cache", cache, "--teacher", teacher, *JOB))
    assert contents(cache) == expected


@pytest.mark.slow
def test_a_driver_that_is_killed(
    nodes: RayNodes, cache: Path, teacher: Path, expected: dict[str, bytes], run: Run
) -> None:
    first = Job(nodes, cache, teacher)
    first.in_the_middle()
    kill(first.process.pid)
    assert nodes.actors()
    first.end()
    until(lambda: not nodes.actors(), "no actor is left", 30)
    there = first.built()
    second = Job(nodes, cache, teacher)
    whole(second, cache, expected, run)
    assert len(second.events("shard")) == SHARDS - there


@pytest.mark.slow
def test_a_shard_that_always_fails(
    nodes: RayNodes, cache: Path, teacher: Path, expected: dict[str, bytes], run: Run
) -> None:
    faulty = Job(nodes, cache, teacher, script=("7", "this one is odd", ""))
    assert faulty.end() == 1
    assert "1 shard failed permanently, in every attempt: 7 (RuntimeError: this one is odd)" in faulty.log
    receipts = cache / "teachers" / NAME / "receipts"
    assert {int(path.stem) for path in receipts.glob("????????.json")} == set(range(SHARDS)) - {7}
    note = json.loads((receipts / "00000007.failed.json").read_bytes())
    assert (note["attempts"], note["error"].splitlines()[-1]) == (3, "RuntimeError: this one is odd")
    assert [event["attempt"] for event in faulty.events("retry")] == [1, 2]
    assert not faulty.events("worker lost")
    sound = Job(nodes, cache, teacher)
    whole(sound, cache, expected, run)
    assert [event["shard"] for event in sound.events("shard")] == [7]


@pytest.mark.slow
def test_a_device_that_is_broken(
    nodes: RayNodes, cache: Path, teacher: Path, expected: dict[str, bytes], run: Run, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    job = Job(nodes, cache, teacher, script=("20", "CUDA error: an illegal memory access", str(once)))
    whole(job, cache, expected, run)
    assert once.exists()
    (lost,) = job.events("worker lost")
    assert "CUDA error: an illegal memory access" in lost["error"]
    broken = next(worker for worker in job.events("worker") if worker["worker"] == lost["worker"])
    after = [event["worker"] for event in job.events("shard") if event["shard"] == 20]
    assert after != [lost["worker"]]
    assert broken["pid"] not in nodes.actors()
    (retry,) = job.events("retry")
    assert retry["shard"] == 20, "its other shards are not to blame"


@pytest.mark.slow
def test_a_node_that_is_killed(
    nodes: RayNodes, cache: Path, teacher: Path, expected: dict[str, bytes], run: Run
) -> None:
    job = Job(nodes, cache, teacher)
    workers = {nodes.node_of(worker["pid"]): worker["worker"] for worker in job.in_the_middle(workers=2)}
    nodes.kill(1)
    # In time for the end of the job, or not: the other node can do it alone.
    nodes.add()
    whole(job, cache, expected, run)
    first, *others = job.events("worker lost")
    assert first["worker"] == workers[1]
    assert "its node is gone, or cannot be reached" in first["error"]
    # Ray may start the replacement on that node while it does not know yet that it is gone.
    assert len(others) <= 1
    assert not job.events("retry"), "no shard is to blame for it"
