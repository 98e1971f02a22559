"""A student of an entry that is still being written, by the real commands: what it learns is fixed when it starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import jobs
from support.commands import Run, refused, succeeded
from support.processes import start_code
from support.runs import KILLED, LLAMA, have_equal_weights, ranks

from storage import LogitCache
from student.report import TrainingReport

# The second process finds a complete entry, which the first saw before it was; each notes what it trains on.
LATER = """
import json, os, shutil, sys, time
from student.cli import train_student
from student.training import defaults, run
look, make, seen, rank = defaults.available_now, run._trainer, os.environ["SEEN"], os.environ["RANK"]
def looked(*given):
    while rank == "1" and not os.path.exists(seen):
        time.sleep(0.05)
    if rank == "1":
        shutil.copytree(os.environ["WHOLE"], os.environ["ENTRY"], dirs_exist_ok=True)
    found = look(*given)
    open(seen, "a").close()
    with open(f"{seen}-found-{rank}", "w") as notes:
        json.dump(found, notes)
    return found
def made(run, *others):
    with open(f"{seen}-taken-{rank}", "w") as notes:
        json.dump([run.job.available, len(run.data.windows)], notes)
    return make(run, *others)
defaults.available_now, run._trainer = looked, made
train_student(sys.argv[1:])
"""


def report_of(folder: Path) -> TrainingReport:
    return TrainingReport.model_validate_json((folder / "report.json").read_bytes())


@pytest.fixture
def half(cache: Path, teacher: Path, tmp_path: Path) -> Path:
    """A cache whose job was killed after some of its shards."""
    job = jobs.start(cache, teacher)
    job.until("shard", 6)
    job.kill()
    job.end()
    assert 6 <= jobs.committed(cache) < jobs.shards_of(cache) - 4
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    return cache


@pytest.fixture
def line(half: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    def of(output: str, *more: object) -> list[Any]:
        fields = {"per_device_train_batch_size": 8, "logging_steps": 1, "save_steps": 5, "num_train_epochs": 1}
        settings = [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
        base = ["--cache", half, "--teacher", "a", "--model", tmp_path / "llama.json", "--window-tokens", 30]
        return [*base, "--offset", "random", "--output-dir", tmp_path / output, *settings, *more]

    return of


def test_a_run_keeps_the_shards_of_its_start(
    half: Path, teacher: Path, tmp_path: Path, run: Run, installed: Run, line: Callable[..., list[Any]]
) -> None:
    refused(run("train-student", *line("none")), "teacher a lacks the positions", "--available")
    held_out = line("none", "--available", "--eval-cache", half)
    refused(run("train-student", *held_out), "the entry of teacher a is incomplete there", "leave --eval-cache out")
    assert not (tmp_path / "none").exists()
    ranges = LogitCache.open(str(half)).teacher("a").committed()
    done = succeeded(installed("train-student", *line("whole"), "--available"))
    assert " of the text: " in done.stderr
    assert " of the text: " in done.stdout
    whole = report_of(tmp_path / "whole")
    assert whole.available.committed == {"a": sum(stop - start for start, stop in ranges)}
    assert 0 < whole.available.positions < whole.available.of
    assert whole.job.available == {"a": tuple(ranges)}

    killed = start_code(KILLED.format(step=8), *line("cut"), "--available").end()
    assert killed.returncode == 9, killed.stderr
    assert jobs.start(half, teacher).end() == 0
    assert LogitCache.open(str(half)).teacher("a").missing() == []
    refused(run("train-student", *line("cut")), "available: the run has")
    resumed = succeeded(run("train-student", *line("cut"), "--available", "--json"))
    cut = report_of(tmp_path / "cut")
    assert cut.resumed_from_step == 5, resumed.stderr
    assert (cut.available, cut.job.available, cut.tokens_seen) == (
        whole.available,
        whole.job.available,
        whole.tokens_seen,
    )
    assert [entry["loss"] for entry in cut.train_log] == [entry["loss"] for entry in whole.train_log]
    assert have_equal_weights(tmp_path / "whole", tmp_path / "cut")
    # A finished run is not another one because more is there now.
    assert json.loads(succeeded(run("train-student", *line("whole"), "--available", "--json")).stdout) == json.loads(
        whole.model_dump_json()
    )
    new = json.loads(succeeded(run("train-student", *line("new"), "--available", "--json")).stdout)
    assert new["available"]["positions"] == new["available"]["of"] == whole.available.of


def test_processes_agree_though_shards_are_committed_while_they_start(
    half: Path, teacher: Path, tmp_path: Path, line: Callable[..., list[Any]]
) -> None:
    before = {"a": [list(each) for each in LogitCache.open(str(half)).teacher("a").committed()]}
    whole = jobs.copy_of(half, tmp_path / "complete")
    assert jobs.start(whole, teacher).end() == 0
    entries = {"WHOLE": str(whole / "teachers" / "a"), "ENTRY": str(half / "teachers" / "a")}
    words = map(str, line("two", "--available", "--windows-per-step", 8, "--set", "ddp_backend=gloo"))
    done = ranks(2, LATER, *words, SEEN=str(tmp_path / "seen"), **entries)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    found, taken = (
        [json.loads((tmp_path / f"seen-{what}-{rank}").read_text()) for rank in (0, 1)] for what in ("found", "taken")
    )
    assert found[0] == before != found[1]
    assert taken[0] == taken[1]
    assert taken[0][0] == before
