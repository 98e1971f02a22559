"""Ctrl-C at a terminal, which reaches every process of a command: one line, no traceback, and what it says is so."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import click
import psutil
import pytest
from click.testing import CliRunner
from support.commands import COMMANDS, command, environment
from support.jobs import SMALL

from student import cli_command
from student.lifeline import Lifeline

KEPT = "error: interrupted: what is finished is kept; run the same command again to resume"


def test_the_commands_that_resume_say_so() -> None:
    group = COMMANDS["logit-cache"]
    assert isinstance(group, click.Group)
    every = {**COMMANDS, **group.commands}
    resuming = {name for name, found in every.items() if isinstance(found, cli_command.Command) and found.resumes}
    assert every.keys() - resuming == {
        "logit-cache", "audit", "doctor", "evaluate", "export", "inspect", "list", "plan", "report", "status", "verify",
    }  # fmt: skip


@pytest.mark.parametrize(("resumes", "line"), [(True, KEPT), (False, "error: interrupted")])
@pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort])
def test_the_last_line(resumes: bool, line: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    @cli_command.command("interrupted", resumes=resumes)
    def interrupted() -> None:
        raise error

    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    done = CliRunner().invoke(interrupted)
    assert (done.exit_code, done.stderr, done.stdout) == (1, f"{line}\n", "")
    lifeline = Lifeline()
    try:  # a stage of a recipe, which has its own last line
        variables = {**lifeline.variables(), "LOGIT_CACHE_LIFELINE": str(os.dup(lifeline.descriptor))}
        assert CliRunner().invoke(interrupted, env=variables).stderr == ""
    finally:
        del lifeline  # not closed: the watcher of this process would end it


def test_an_interrupt_that_python_ignores_comes_again() -> None:
    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    @cli_command.command("deleting", resumes=True)
    def deleting() -> None:
        Interrupted()
        time.sleep(30)
        print("went on")

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = CliRunner().invoke(deleting)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert (done.exit_code, done.stderr, done.stdout) == (1, f"{KEPT}\n", "")


WORKERS = ("cache-logits", "--cache", "cache", "--name", "a", "--workers", 2, *SMALL)
LINES = {
    "starting": WORKERS,
    "at work": WORKERS,
    "training": ("train-student", "--cache", "cache", "--model", "llama-tiny", "--output-dir", "student",
                 "--set", "num_train_epochs=50", "--set", "dataloader_num_workers=1"),
}  # fmt: skip


SLOWLY = [pytest.param(when, marks=pytest.mark.slow) for when in ("starting", "training")]


@pytest.mark.parametrize("when", ["at work", *SLOWLY])
def test_control_c_ends_every_process(when: str, small_cache: Path, slow_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(small_cache, tmp_path / "cache")
    words = command(*LINES[when], *(() if when == "training" else ("--teacher", slow_teacher)))
    with (tmp_path / "errors").open("w+") as errors:
        job = subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=errors, start_new_session=True)
        while not (_others(job.pid) and (when != "at work" or any(tmp_path.glob("cache/teachers/a/receipts/0*.json")))):
            assert job.poll() is None, errors.read()
            time.sleep(0.02)
        os.killpg(job.pid, signal.SIGINT)
        try:
            assert job.wait(60) == 1
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            raise
    deadline = time.monotonic() + 10  # multiprocessing's helper of semaphores ends when it finds its pipe closed
    while _others(job.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    printed = (tmp_path / "errors").read_text()
    assert not re.search("Traceback|Warning", printed), printed
    assert printed.splitlines()[-1] == KEPT


def _others(leader: int) -> list[int]:
    """The running processes of a group but its leader; one that nobody has waited for yet is gone."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            in_group = process.pid != leader and os.getpgid(process.pid) == leader
            if in_group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found
