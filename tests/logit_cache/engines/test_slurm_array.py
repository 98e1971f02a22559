"""`cache-logits --engine slurm`, and plain Slurm tasks, on a real cluster whose tasks are disturbed: the same bytes.

The tests marked `slurm` need the cluster (`make test-slurm`); the others are about results and logs of tasks.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.clusters.slurm import Cluster, until
from support.commands import Run, command, environment, in_process, refused, succeeded
from support.jobs import contents

from logit_cache.caching.job import CacheJob
from logit_cache.engines.outcome import NotDone, Outcome
from logit_cache.engines.slurm import array as engine
from logit_cache.engines.slurm.task import ArrayTask
from storage.cache.failures import Failures
from storage.errors import InputError
from storage.stores import open_store


@pytest.fixture(scope="session")
def run(installed: Run) -> Run:
    """Commands as processes: the signals of Slurm and of the tests go to processes."""
    return installed


# Overlapping windows make it long enough to be disturbed: some 35 shards.
JOB = ("--name", "a", "-k", 40, "--context-tokens", 64, "--stride-tokens", 2, "--shard-tokens", 512,
       "--fidelity-positions", 256)  # fmt: skip
SHARDS = 33
ARRAY = ("--engine", "slurm", "--workers", 2, "--slurm", "partition=main", "--slurm", "time=10")


@pytest.fixture(scope="module")
def whole(small_cache: Path, teacher: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose entry one undisturbed process of this machine made."""
    path = Path(shutil.copytree(small_cache, tmp_path_factory.mktemp("whole") / "cache"))
    succeeded(run("cache-logits", "--cache", path, "--teacher", teacher, *JOB))
    return path


def receipts(cache: Path, task: int | None = None) -> int:
    """Number of committed shards, of those with which one of two tasks begins if `task` is given."""
    names = [path.stem for path in (cache / "teachers/a/receipts").glob("*.json") if path.stem.isdecimal()]
    return sum(task is None or (int(name) >= SHARDS // 2) == bool(task) for name in names)


class Waiting:
    """A `cache-logits` that waits for its array."""

    def __init__(self, cluster: Cluster, folder: Path, *arguments: object) -> None:
        self.folder = folder
        self.cluster = cluster
        with (folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                command("cache-logits", *arguments),
                cwd=folder,
                env={**environment(), **cluster.environment},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def number(self) -> int:
        """The job number of the array, once it is submitted."""
        until(lambda: "submitted job" in self.stderr() or self.process.poll() is not None, self.cluster, "a job")
        match = re.search(r"submitted job (\d+) ", self.stderr())
        assert match, self.stderr()
        return int(match[1])

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Wait until the command has ended; returns its result."""
        out, _ = self.process.communicate(timeout=180)
        return subprocess.CompletedProcess([], self.process.returncode, out, self.stderr())

    def logs(self) -> str:
        """The logs of all tasks."""
        return "".join(path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("slurm-logs/*/*_log.*")))


@pytest.fixture
def start(slurm: Cluster, cache: Path, teacher: Path, tmp_path: Path) -> Callable[..., Waiting]:
    """Starts the job on the cluster; paths are relative to where it is started."""

    def call(*arguments: object) -> Waiting:
        return Waiting(
            slurm, tmp_path, "--cache", cache.name, "--teacher", os.path.relpath(teacher, tmp_path), *JOB, *ARRAY,
            *arguments,
        )  # fmt: skip

    return call


def pythons(array: int, task: int) -> list[int]:
    """The processes of a task of an array that are a Python of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words, variables = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:
                continue
            named = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
            if b"python" in words[0] and named <= set(variables):
                found.append(int(entry.name))
    return found


def clean(run: Run, cache: Path) -> None:
    succeeded(run("logit-cache", "verify", cache, "--deep"))


@pytest.mark.slurm
def test_an_array_makes_the_entry_of_one_process(
    start: Callable[..., Waiting], cache: Path, whole: Path, run: Run
) -> None:
    done = succeeded(start("--json", "--worker-cpus", 1, "--slurm-folder", "slurm-logs").ended())
    assert json.loads(done.stdout)["complete"]
    assert contents(cache) == contents(whole)
    clean(run, cache)
    clean(run, cache)
    # The task finds that this job is not the entry's, and the command reports it, although the entry is complete.
    refused(start("-k", 20).ended(), "a task of job", "targets.k")
    assert contents(cache) == contents(whole)


@pytest.mark.slurm
def test_a_task_that_is_requeued_and_one_at_its_time_limit(
    start: Callable[..., Waiting], slurm: Cluster, cache: Path, whole: Path, run: Run
) -> None:
    waiting = start()
    array = waiting.number()
    until(lambda: min(receipts(cache, 0), receipts(cache, 1)) >= 2, slurm, "both tasks have built shards")
    slurm.call("scontrol", "requeue", f"{array}_0")
    # The signal that Slurm sends before the time limit.
    slurm.call("scancel", "--signal", "USR2", f"{array}_1")
    done = waiting.ended()
    assert done.returncode == 0, done.stderr + waiting.logs()
    logs = waiting.logs()
    assert "was stopped with" in logs, logs
    assert "Calling checkpoint method" in logs, logs
    assert contents(cache) == contents(whole)
    clean(run, cache)


@pytest.mark.slurm
def test_a_task_that_is_killed(
    start: Callable[..., Waiting], slurm: Cluster, cache: Path, whole: Path, run: Run
) -> None:
    waiting = start()
    array = waiting.number()
    until(lambda: receipts(cache, 0) >= 2, slurm, "the first task has built shards")
    for process in pythons(array, 0):
        os.kill(process, signal.SIGKILL)
    done = waiting.ended()
    if done.returncode:
        assert done.returncode == 1
        assert "srun: error: " in done.stderr.splitlines()[-1], done.stderr
        done = start().ended()
    assert done.returncode == 0, done.stderr + waiting.logs()
    assert contents(cache) == contents(whole)
    clean(run, cache)


@pytest.mark.slurm
def test_a_command_that_does_not_wait_and_one_that_is_ended(
    start: Callable[..., Waiting], slurm: Cluster, cache: Path, whole: Path, run: Run
) -> None:
    waiting = start()
    array = waiting.number()
    waiting.process.send_signal(signal.SIGTERM)
    ended = waiting.ended()
    assert ended.returncode == 1
    assert f"job {array} continues" in ended.stderr.splitlines()[-1]
    assert f"scancel {array}" in ended.stderr.splitlines()[-1]
    assert str(array) in slurm.queue()
    slurm.call("scancel", array)
    until(lambda: not slurm.queue(), slurm, "the array ends")

    started = start("--no-wait", "--json", "--workers", 1)
    array = started.number()
    done = started.ended()
    assert (done.returncode, done.stdout) == (0, "")
    assert f"scancel {array}" in done.stderr
    until(lambda: not slurm.queue(), slurm, "the array ends", 120)
    assert json.loads(run("logit-cache", "status", cache, "--json").stdout)["complete"]
    assert contents(cache) == contents(whole)
    clean(run, cache)


@pytest.mark.slurm
def test_plain_tasks_of_slurm_share_an_entry(
    slurm: Cluster, cache: Path, small_cache: Path, teacher: Path, whole: Path, run: Run, tmp_path: Path
) -> None:
    again = Path(shutil.copytree(small_cache, tmp_path / "again"))
    words = command("cache-logits", "--teacher", teacher, *JOB)
    everyone = Cluster({**environment(), **slurm.environment})
    answer = everyone.call(
        "sbatch", "--parsable", "--array=3-4", "--requeue", "--open-mode=append", f"--output={tmp_path}/array-%a",
        "--wrap", " ".join(map(str, [*words, "--cache", cache])),
    )  # fmt: skip
    until(lambda: receipts(cache, 0) >= 2, slurm, "the first task has built shards")
    slurm.call("scontrol", "requeue", f"{answer.strip()}_3")
    until(lambda: not slurm.queue(), slurm, "the array ends", 120)
    texts = [(tmp_path / f"array-{task}").read_text(encoding="utf-8") for task in (3, 4)]
    assert "was stopped with" in texts[0], texts[0]
    assert "worker 1 of 2 (from SLURM_ARRAY_TASK_ID)" in texts[1]
    assert contents(cache) == contents(whole)

    done = subprocess.run(
        ["srun", "--ntasks=2", *words, "--cache", str(again)],
        env=everyone.environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {f"worker {i} of 2 (from SLURM_PROCID)" for i in (0, 1)} <= set(done.stderr.splitlines())
    assert contents(again) == contents(whole)
    clean(run, again)


@pytest.mark.slurm
def test_refusals_of_sbatch(start: Callable[..., Waiting], slurm: Cluster, tmp_path: Path) -> None:
    refused(start("--slurm", "partition=nowhere").ended(), "Slurm does not take the job", "nowhere")
    refused(start("--slurm", "no-such-thing=1").ended(), "Slurm does not take the job", "no-such-thing")
    assert not (tmp_path / "slurm-logs").exists()
    assert not slurm.queue()


def test_without_slurm(cache: Path, teacher: Path, tmp_path: Path) -> None:
    done = in_process("cache-logits", "--cache", cache, "--teacher", teacher, *JOB, *ARRAY, cwd=tmp_path)
    refused(done, "srun")
    assert not (tmp_path / "slurm-logs").exists()


def test_the_variables_of_a_job_around_it_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "SLURM_CONF": "/c",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_STEP_NUM_TASKS": "2",
        "RANK": "1",
        "SBATCH_QOS": "q",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with engine._outside_of_jobs():
        assert {name for name in values if name in os.environ} == {"SLURM_CONF", "SBATCH_QOS"}
    assert {name: os.environ[name] for name in values} == values


@pytest.fixture
def ended(cache: Path, teacher: Path, tmp_path: Path) -> tuple[CacheJob, Path]:
    """An array that has ended without a shard of its entry, and its folder."""
    from logit_cache.caching.prepare import open_job

    job = CacheJob(cache=str(cache), teacher=(str(teacher),), name="a", context_tokens=64, shard_tokens=1024)
    open_job(job)
    folder = tmp_path / "logs"
    folder.mkdir()
    return job, folder


def test_an_array_that_ended_is_reported_with_its_error(ended: tuple[CacheJob, Path]) -> None:
    job, folder = ended
    with pytest.raises(NotDone, match=r"job 7 has ended with .* shards missing; its logs are in"):
        engine._outcome(job, "7", 3, folder, {})
    (folder / "7_0_0_log.err").write_text("error: old\nsrun: error: node1: task 0: Killed\nsomething else\n")
    with pytest.raises(NotDone, match=r"shards missing .srun: error: node1: task 0: Killed.; its"):
        engine._outcome(job, "7", 3, folder, {})
    (folder / "7_1_0_result.pkl").write_bytes(pickle.dumps(("error", "Traceback\n  x\nValueError: bad\n")))
    with pytest.raises(NotDone, match="ValueError: bad"):
        engine._outcome(job, "7", 3, folder, {})
    (folder / "7_0_0_result.pkl").write_bytes(pickle.dumps(("success", None)))
    (folder / "7_2_0_result.pkl").write_bytes(pickle.dumps(("success", ("refused", "no such teacher"))))
    with pytest.raises(InputError, match="a task of job 7 refused: no such teacher"):
        engine._outcome(job, "7", 3, folder, {})


def test_shards_that_failed_permanently_are_named(ended: tuple[CacheJob, Path]) -> None:
    job, folder = ended
    notes = Failures(open_store(job.cache), "teachers/a/receipts")
    notes.record(1, 3, "of the run before")
    before = notes.all()
    notes.record(4, 3, f"{'x' * 9000}\nRuntimeError: it broke")
    outcome = engine._outcome(job, "7", 3, folder, before)
    assert list(outcome.failed) == [4]
    assert outcome.failed[4].splitlines()[-1] == "RuntimeError: it broke"


def test_an_entry_without_its_report_is_not_done(ended: tuple[CacheJob, Path]) -> None:
    job, folder = ended
    words = ("--context-tokens", 64, "--shard-tokens", 1024, "--fidelity-positions")
    arguments = ("cache-logits", "--cache", job.cache, "--teacher", job.teacher[0], "--name", "a", *words)
    assert in_process(*arguments, 0).returncode == 0
    with pytest.raises(NotDone, match="without the report"):
        engine._outcome(job, "7", 3, folder, {})
    without = job.model_copy(update={"fidelity_positions": 0})
    engine._outcome(without, "7", 2, folder, {})
    # One of two tasks met a full disk; then both refuse, as for another job's entry.
    for task in (0, 1):
        (folder / f"7_{task}_0_result.pkl").write_bytes(pickle.dumps(("success", ("refused", "not this one"))))
        if task == 0:
            engine._outcome(without, "7", 2, folder, {})
    with pytest.raises(InputError, match="not this one"):
        engine._outcome(without, "7", 2, folder, {})


def test_runs_without_progress_end(ended: tuple[CacheJob, Path]) -> None:
    runs: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        task = ArrayTask(lambda *arguments: Outcome(runs.append(1) or 0), ended[0].model_dump(mode="json"), {})
        for _ in range(3):
            assert task() is None
            task = task.checkpoint().function
        error = task()
        assert error is not None
        assert (error[0], len(runs)) == ("failed", 3)
        assert "3 times the time limit" in error[1]
        # Another task has made progress meanwhile.
        task.missing = (task.missing or 0) + 1
        assert task() is None
        assert task.checkpoint().function.fruitless == 0
    finally:
        signal.signal(signal.SIGTERM, before)
