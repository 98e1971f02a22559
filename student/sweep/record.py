"""The folder of a sweep: one record per trial, `sweep.json` with all of them, and the best trial as a job of its own.

::

    run.json            the sweep's identity (`student.training.run_folder`)
    optuna.log          Optuna's study, where it is in no database; it is authoritative about the trials
    trial-<n>/          the run folder of a trial; scores.json in it: those of its minimal pairs, as `evaluate` has them
    trial-<n>.lock      held by the process that runs it
    models/<sha>.json   configurations of models, where a trial has one of its own
    sweep.json          all records, rewritten after every trial
    best.yaml           the best trial's job, as `train-student --config` takes it
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError

from storage.config import Reported
from storage.errors import InputError
from storage.files import replace_file
from storage.text import columns, counted
from student.job import StudentJob
from student.report import REPORT_FILE, RUN_FILE, Seconds
from student.sweep.search_space import Scalar, Search

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

JOURNAL = "optuna.log"
SCORES_FILE = "scores.json"
RECORD = "record"
"""The user attribute of Optuna's trial that holds its `TrialRecord`."""

INTERRUPTED = "interrupted: the process ended while it ran"
"""The error of trials that an earlier version ran again under another number."""


class TrialRecord(Reported):
    """State and outcome of a trial.

    value              the metric on held-out text at its end, or when it was pruned; None where it failed
    parameters         as the run had them: read from its arguments, loss, windows and model
    steps, seconds     that it took
    evaluations        during training: step and value of the metric
    metrics            held-out figures of the finished model
    model_parameters   weights of its model
    train_loss         last logged
    pairs              mean over groups of its accuracies on minimal pairs, a fraction, and `pairs_stderr` its error
    job                its job, to be run by itself
    """

    number: int
    state: Literal["running", "complete", "pruned", "failed"]
    value: float | None = None
    parameters: dict[str, Scalar | None] = Field(default_factory=dict)
    seconds: Seconds = 0.0
    steps: int = 0
    error: str | None = None
    evaluations: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict)
    model_parameters: int | None = None
    train_loss: float | None = None
    pairs: float | None = None
    pairs_stderr: float | None = None
    job: dict[str, Any] = Field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether it is one of the trials that were asked for and has ended."""
        return self.state != "running" and self.error != INTERRUPTED

    def outcome(self, metric: str) -> str:
        """How it ended, as a line of text."""
        if self.state == "failed":
            return f"failed: {self.error}"
        return f"{'pruned at ' if self.state == 'pruned' else ''}{metric} {self.value:.4f}"


class SweepReport(Reported):
    """`sweep.json`. `seconds` counts all the processes that ran the sweep, `best` is the number of a trial."""

    kind: Literal["sweep"] = "sweep"
    format: Literal[1] = 1
    title: str
    cache: str
    metric: str
    direction: Literal["minimize", "maximize"]
    backend: str
    seconds: Seconds
    job: dict[str, Any]
    search: dict[str, Any]
    best: int | None
    trials: tuple[TrialRecord, ...]

    def ranked(self) -> list[TrialRecord]:
        """Best first: complete trials, then pruned ones, then the others; last of each those without a finite value."""
        sign = -1.0 if self.direction == "maximize" else 1.0
        order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}

        def place(trial: TrialRecord) -> tuple[int, float, int]:
            finite = trial.value is not None and math.isfinite(trial.value)
            return order[trial.state], sign * (trial.value or 0.0) if finite else math.inf, trial.number

        return sorted(self.trials, key=place)


class SweepFolder:
    """Writes the records of one sweep, of which several processes are at work in it; under the sweep's lock."""

    def __init__(self, job: StudentJob, search: Search) -> None:
        self.path = Path(job.output_dir)
        self._job, self._search, self._written = job, search, time.monotonic()

    def publish(self, trials: Sequence[FrozenTrial]) -> SweepReport:
        """Rewrite `sweep.json` and `best.yaml`, and remove what the trials that ended need no longer."""
        search, now = self._search, time.monotonic()
        report = SweepReport(
            title=search.title
            or f"{counted(len(search.parameters), 'parameter')} by {search.backend}, {search.sampler}",
            cache=self._job.cache,
            metric=search.figure,
            direction=search.aim,
            backend=search.backend,
            seconds=round(self._earlier_seconds() + now - self._written, 3),
            job=self._job.model_dump(mode="json", include=self._job.model_fields_set),
            search=search.model_dump(mode="json", exclude_none=True, exclude={"storage"}),
            best=None,
            trials=tuple(map(_record_of, trials)),
        )
        self._written = now
        first = next((trial for trial in report.ranked() if trial.state == "complete"), None)
        if first is not None:
            report = report.model_copy(update={"best": first.number})
            header = f"# Trial {first.number} of the sweep in {self.path}: {report.metric} {first.value!r}\n"
            text = header + yaml.safe_dump(first.job, sort_keys=False, allow_unicode=True)
            replace_file(self.path / "best.yaml", text.encode())
        replace_file(self.path / "sweep.json", (report.model_dump_json(indent=1) + "\n").encode())
        for trial in report.trials:
            if trial.state != "running":
                self._tidy(self.path / f"trial-{trial.number}", trial.number == report.best)
        return report

    def _earlier_seconds(self) -> float:
        """Seconds that were spent on the sweep, as the last of its processes wrote them."""
        try:
            return float(json.loads((self.path / "sweep.json").read_bytes())["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    @property
    def _keeps_checkpoints(self) -> bool:
        asked = self._search.keep_checkpoints
        return "save_strategy" in self._job.training if asked is None else asked

    def _tidy(self, run: Path, best: bool) -> None:
        """Keep the record and the report of a run, the model of the best one, and checkpoints that were asked for."""
        for path in run.iterdir() if run.is_dir() else ():
            checkpoint = path.name.startswith("checkpoint-")
            kept = self._keeps_checkpoints if checkpoint else best
            if kept or path.name in (RUN_FILE, REPORT_FILE, SCORES_FILE):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_earlier(path: str, record: Mapping[str, Any]) -> bool:
    """Whether an earlier version, whose trials had no folders, began the sweep of this `run.json` (empty: none)."""
    return bool(record) and "study" not in record.get("launch", {}) and not (Path(path) / JOURNAL).exists()


def earlier_report(path: str, trials: int) -> SweepReport:
    """The report of a sweep that an earlier version finished. Raises InputError where it did not."""
    try:
        report = SweepReport.model_validate_json((Path(path) / "sweep.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        ended = 0
    else:
        ended = sum(trial.counts for trial in report.trials)
        if ended >= trials:
            return report
    raise InputError(
        f"{path}: an earlier version began this sweep, and {ended} of {trials} trials ended; they have no run folders "
        f"to go on from: ask for {ended} trials to see them, or give another --output-dir"
        if ended
        else f"{path}: an earlier version began this sweep, and no trial ended: give another --output-dir"
    )


def _record_of(trial: FrozenTrial) -> TrialRecord:
    begun = {"number": trial.number, "state": "running"}
    record = TrialRecord.model_validate(begun | trial.user_attrs.get(RECORD, {}))
    # The record is written before the end is told.
    return record if trial.state.is_finished() else record.model_copy(update={"state": "running"})


def table(report: SweepReport, folder: str) -> str:
    """The trials, best first, as text."""
    names = list(report.search["parameters"])
    scored = any(trial.pairs is not None for trial in report.trials)
    rows = [["trial", "state", report.metric, *(["pairs"] if scored else []), "steps", "seconds", *names]]
    for trial in report.ranked():
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        cells = [_cell(trial.parameters.get(name, "-")) for name in names]
        pairs = ["-" if trial.pairs is None else f"{trial.pairs:.2%}"] if scored else []
        rows.append(
            [str(trial.number), trial.state, value, *pairs, f"{trial.steps:,}", f"{trial.seconds:,.1f}", *cells]
        )
    lines = columns(rows, left=2)
    lines += [f"trial {trial.number} failed: {trial.error}" for trial in report.trials if trial.state == "failed"]
    if report.best is None:
        return "\n".join([*lines, "no trial was completed"])
    return "\n".join([*lines, f"best: trial {report.best}; train it with train-student --config {folder}/best.yaml"])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
