"""A real Slurm cluster for tests (`tests/support/scripts/slurm.sh`), and the commands that tests send it.

Two nodes of one processor each. Its environment is given to the commands that a test starts, and not set in the
test's own process, whose libraries it could change.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import TESTS

SCRIPT = TESTS / "support/scripts/slurm.sh"


@dataclass(frozen=True)
class Cluster:
    """The running cluster; `environment` has all variables that its clients need, and suffices for a job, too."""

    environment: dict[str, str]

    def call(self, *arguments: object) -> str:
        """The output of a command such as `scontrol`; the test fails when the command does."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(map(str, arguments))}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, folder: Path, *options: object) -> int:
        """Submit a shell script that runs in `folder`; returns the number of the job, or of the whole array."""
        path = folder / "job.sh"
        path.write_text(f"#!/bin/bash\n{script}", encoding="utf-8")
        answer = self.call("sbatch", "--parsable", "--chdir", folder, "--open-mode", "append", *options, path)
        return int(answer.split(";")[0])

    def queue(self) -> str:
        """The jobs that have not ended, one a line."""
        return self.call("squeue", "--noheader", "--array")


def until(condition: Callable[[], bool], cluster: Cluster, description: str, seconds: float = 60) -> None:
    """Wait for a condition; fails after so many seconds, with its description and the queue."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {description}; in the queue:\n{cluster.queue()}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def running_slurm() -> Cluster:
    """The running cluster of `make test-slurm`."""
    done = subprocess.run([SCRIPT, "env"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"no Slurm: make test-slurm fetches and starts one; {done.stderr}")
    environment = dict(os.environ)
    for line in done.stdout.splitlines():
        name, _, value = shlex.split(line)[1].partition("=")
        environment[name] = value
    if not Path(environment["SLURM_CONF"]).exists():
        pytest.fail("Slurm does not run: make test-slurm starts it, and so does tests/support/scripts/slurm.sh start")
    return Cluster(environment)


@pytest.fixture
def slurm(running_slurm: Cluster) -> Iterator[Cluster]:
    """The cluster; the jobs that a test leaves in its queue are cancelled after it."""
    yield running_slurm
    running_slurm.call("scancel", "--user", os.getuid())
    running_slurm.call("scancel", "--user", os.getuid(), "--signal", "KILL", "--full")
    until(lambda: not running_slurm.queue(), running_slurm, "the jobs of the last test end")
