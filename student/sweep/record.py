"""The folder of a sweep: one record per trial, `sweep.json` with all of them, and the best trial as a job of its own.

::

    run.json            the sweep's identity (`student.training.run_folder`)
    trials/<n>.json     the record of a trial, from its first step on
    models/<sha>.json   configurations of models, where a trial has one of its own
    sweep.json          all records, rewritten after every trial
    best.yaml           the best trial's job, as `train-student --config` takes it
    optuna.db           Optuna's study (backend optuna); ray/ is Ray Tune's own

The records are authoritative about the trials; the state of the search library is reconciled with them.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from student.sweep.search_space import Search

INTERRUPTED = "interrupted: the process ended while it ran"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


class TrialRecord(_Record):
    """State and outcome of a trial.

    value              the metric on held-out text at its end, or when it was pruned; None where it failed
    parameters         as the run had them: read from its arguments, loss, windows and model
    steps, seconds     that it took
    evaluations        during training: step and value of the metric
    metrics            held-out figures of the finished model
    model_parameters   weights of its model
    train_loss         last logged
    job                its job, to be run by itself
    """

    number: int
    state: Literal["running", "complete", "pruned", "failed"]
    value: float | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    error: str | None = None
    evaluations: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict)
    model_parameters: int | None = None
    train_loss: float | None = None
    job: dict[str, Any] = Field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether it is one of the trials that were asked for, and not an interrupted one that another replaces."""
        return self.state != "running" and self.error != INTERRUPTED


class SweepReport(_Record):
    """`sweep.json`. `seconds` counts all the processes that ran the sweep, `best` is the number of a trial."""

    kind: Literal["sweep"] = "sweep"
    format: Literal[1] = 1
    title: str
    cache: str
    metric: str
    direction: Literal["minimize", "maximize"]
    backend: str
    seconds: float
    job: dict[str, Any]
    search: dict[str, Any]
    best: int | None
    trials: tuple[TrialRecord, ...]

    def ranked(self) -> list[TrialRecord]:
        """Best first: complete trials, then pruned ones, then the others."""
        sign = -1.0 if self.direction == "maximize" else 1.0
        order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}
        return sorted(
            self.trials,
            key=lambda t: (order[t.state], math.inf if t.value is None else sign * t.value, t.number),
        )


def seed_of(seed: int, done: int) -> int:
    """A sampler's seed after `done` trials, below 2**32; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence([seed, done]).generate_state(1)[0])


class SweepFolder:
    """Reads and writes the records of one sweep; several of its processes may write at once."""

    def __init__(self, path: str, search: Search, job: dict[str, Any], cache: str) -> None:
        self.path = Path(path)
        self.search, self.job, self.cache = search, job, cache
        self._before, self._started = self._earlier_seconds(), time.monotonic()

    def trials(self) -> list[TrialRecord]:
        """All records, by number."""
        found = []
        for path in (self.path / "trials").glob("*.json"):
            try:
                found.append(TrialRecord.model_validate_json(path.read_bytes()))
            except ValidationError:
                # `reserve` creates the file before the first record is written.
                found.append(TrialRecord(number=int(path.stem), state="running"))
        return sorted(found, key=lambda trial: trial.number)

    def reserve(self) -> int:
        """Reserve the next free trial number, by an exclusive create of its file."""
        folder = self.path / "trials"
        folder.mkdir(parents=True, exist_ok=True)
        number = max((trial.number for trial in self.trials()), default=-1) + 1
        while True:
            try:
                os.close(os.open(folder / f"{number}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return number
            except FileExistsError:
                number += 1

    def write(self, trial: TrialRecord) -> None:
        """Write a trial's record, by an atomic rename."""
        (self.path / "trials").mkdir(parents=True, exist_ok=True)
        _write(self.path / "trials" / f"{trial.number}.json", trial.model_dump_json(indent=1) + "\n")

    def _earlier_seconds(self) -> float:
        """Seconds that earlier processes spent on the sweep."""
        try:
            return float(json.loads((self.path / "sweep.json").read_bytes())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def publish(self) -> SweepReport:
        """Rewrite `sweep.json` and `best.yaml` from the records."""
        search = self.search
        report = SweepReport(
            title=search.title or f"{len(search.parameters)} parameters by {search.backend}, {search.sampler}",
            cache=self.cache,
            metric=search.figure,
            direction=search.aim,
            backend=search.backend,
            seconds=round(self._before + time.monotonic() - self._started, 3),
            job=self.job,
            search=search.model_dump(mode="json", exclude_none=True),
            best=None,
            trials=tuple(self.trials()),
        )
        first = next((trial for trial in report.ranked() if trial.state == "complete"), None)
        if first is not None:
            report = report.model_copy(update={"best": first.number})
            header = f"# Trial {first.number} of the sweep in {self.path}: {report.metric} {first.value!r}\n"
            _write(self.path / "best.yaml", header + yaml.safe_dump(first.job, sort_keys=False, allow_unicode=True))
        _write(self.path / "sweep.json", report.model_dump_json(indent=1) + "\n")
        return report


def table(report: SweepReport, folder: str) -> str:
    """The trials, best first, as text."""
    names = list(report.search["parameters"])
    rows = [["trial", "state", report.metric, "steps", "seconds", *names]]
    for trial in report.ranked():
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        cells = [_cell(trial.parameters.get(name, "-")) for name in names]
        rows.append([str(trial.number), trial.state, value, f"{trial.steps:,}", f"{trial.seconds:,.1f}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"trial {trial.number} failed: {trial.error}" for trial in report.trials if trial.state == "failed"]
    if report.best is None:
        return "\n".join([*lines, "no trial was completed"])
    return "\n".join([*lines, f"best: trial {report.best}; train it with train-student --config {folder}/best.yaml"])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
