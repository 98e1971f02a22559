"""Stages of a longer road: each the public command, in a process of its own, so that nothing lingers in memory."""

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
    """A command and what it is for. `makes`: a file that shows it was done, where the command itself does not know."""

    title: str
    command: tuple[str, ...]
    makes: Path | None = None

    @property
    def line(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(self.command)


def run_stages(stages: Sequence[Stage], again: str) -> None:
    """Run stages in their order. `again`: what to do after a failure.

    Every command goes on where it stopped and repeats nothing that is done, and so do stages. Raises InputError for one
    that fails, which has said why.
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
    # Results go to stdout at the end; what a stage prints on the way is for the person who waits.
    status = subprocess.run([str(program), *arguments], stdout=sys.stderr, check=False).returncode
    if status:
        raise InputError(f"{stage.line} ended with status {status}: see above, then {again}")
