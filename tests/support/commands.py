"""Installed console scripts as tests run them, where the checkout is, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sysconfig
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import click.testing

import logit_cache.cli.main
import student.cli
import teachers.cli

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# What a program of the tests needs before the installed packages: tests/storage would hide `storage` otherwise.
PYTHONPATH = os.pathsep.join((str(ROOT), str(TESTS)))
Run = Callable[..., subprocess.CompletedProcess[str]]
LIBRARY = Path(sysconfig.get_path("stdlib"))

COMMANDS: dict[str, click.Command] = {
    "cache-logits": logit_cache.cli.main.cache_logits,
    "logit-cache": logit_cache.cli.main.main,
    "train-student": student.cli.train_student,
    "train-teacher": teachers.cli.train_teacher,
}


def command(*arguments: object) -> list[str]:
    """An installed console script and its arguments."""
    return [str(Path(sysconfig.get_path("scripts")) / str(arguments[0])), *map(str, arguments[1:])]


def environment() -> dict[str, str]:
    """One thread each, no hub: what a test process runs under."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def in_process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A console script's command, run here: what it printed and its exit status, without a process and its imports.

    Warnings are filtered as the interpreter does by default, not as pytest does for the tests' own code.
    """
    name, *words = map(str, arguments)
    with contextlib.chdir(cwd or Path.cwd()), warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        runner = click.testing.CliRunner()
        done = runner.invoke(COMMANDS[name], words, prog_name=name, env=environment())
    status, error = done.exit_code, done.stderr
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        error += "".join(traceback.format_exception(done.exception))
    return subprocess.CompletedProcess([name, *words], status, done.stdout, error)


def succeeded(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """What a command did that ended with exit status 0."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One clear line, exit status 2."""
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0], errors[0]
