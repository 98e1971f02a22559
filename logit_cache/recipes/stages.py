"""Stages of a pipeline: each a public command in a subprocess of its own, so that its memory is freed at its end."""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import InputError


@dataclass(frozen=True)
class Stage:
    """A command and its purpose. `makes`: a file that marks it as done, if the command does not detect that itself."""

    title: str
    command: tuple[str, ...]
    makes: Path | None = None

    @property
    def line(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(self.command)


def run_stages(stages: Sequence[Stage], again: str) -> None:
    """Run stages in order. `again` is the remedy that the error of a failed stage ends with.

    Every command resumes where it stopped and repeats no finished work, so stages can be run again. Raises InputError
    with the exit status of a stage that fails; the stage itself has printed the reason.
    """
    for number, stage in enumerate(stages, 1):
        if stage.makes is not None and stage.makes.exists():
            continue
        print(f"[{number}/{len(stages)}] {stage.title}", file=sys.stderr, flush=True)
        _run(stage, again)


def _run(stage: Stage, again: str) -> None:
    name, *arguments = stage.command
    program = Path(sysconfig.get_path("scripts")) / name
    if not program.exists():
        raise InputError(f"{program} is not installed: install logit-cache in this environment")
    # The result goes to stdout at the end; the output of a stage on the way is progress, for stderr.
    status = subprocess.run([str(program), *arguments], stdout=sys.stderr, check=False).returncode
    if status:
        raise InputError(f"{stage.line} ended with status {status}: see above, then {again}")
