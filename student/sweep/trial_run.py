"""One trial: the training run of its job, in a folder of its own, with its evaluations reported to Optuna."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from optuna import TrialPruned
from optuna.trial import Trial
from transformers import TrainerCallback, TrainerState, TrainingArguments

from storage.errors import Diverged, InputError, LogitCacheError
from storage.files import replace_file
from storage.locks import locked
from storage.progress import silent
from student.evaluation.evaluate import evaluate
from student.evaluation.job import EvaluationJob
from student.evaluation.report import EvaluationReport
from student.job import StudentJob
from student.sweep.record import RECORD, SCORES_FILE, TrialRecord
from student.sweep.search_space import Search
from student.sweep.trial import STEP, micro_batches, trial_job, trial_settings, write_settings
from student.training.run import train


def run_trial(job: StudentJob, search: Search, trial: Trial, values: dict[str, Any]) -> TrialRecord:
    """Run a trial with its values, or resume it, to its end; the record is kept in Optuna's storage too.

    What its values are not to blame for is raised, and leaves the trial running.
    """
    watch, began = _Watch(trial, search.figure), time.monotonic()
    record = TrialRecord(number=trial.number, state="running", parameters=values)

    def known(**changes: Any) -> None:
        nonlocal record
        record = record.model_copy(update={"seconds": round(time.monotonic() - began, 3), **changes})
        trial.set_user_attr(RECORD, json.loads(record.model_dump_json()))

    known()
    folder = Path(job.output_dir) / f"trial-{trial.number}"
    folder.mkdir(exist_ok=True)
    with locked(folder, "a training run", wait=True):
        pass  # The last of a killed process, as its readers of windows, may still hold it.
    try:
        settings = trial_settings(job, values)
        with locked(Path(job.output_dir), "the sweep", wait=True):
            model = None if settings is None else write_settings(settings, job.output_dir)
        own = trial_job(job, values, str(folder), model)
        had = {STEP: math.prod(micro_batches(job, int(values[STEP])).values())} if STEP in values else {}
        known(job=own.model_dump(mode="json", include=own.model_fields_set), parameters=values | had)
        report = train(own, silent, callbacks=[watch])
        assert report.held_out is not None  # a sweep has held-out text
        metrics = report.held_out.logged()
        value = _finite(search.figure, metrics[search.figure], report.steps)
        ended = report.train_log + report.eval_log
        known(
            state="complete",
            value=value,
            metrics=metrics,
            model_parameters=report.parameters,
            **_from_log(ended, report.steps, search.figure),
        )
    except TrialPruned:
        found = watch.found()
        known(state="pruned", value=found["evaluations"][-1][1], **found)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        known(state="failed", error=reason, **watch.found())
    # The trainer refers to itself, and the memory may not hold two models.
    clear_device_cache(garbage_collection=True)
    if record.state == "complete":
        # What fails here is not its values' fault: it is raised, and the run is not trained again.
        known(**_pairs_scored(search, folder, bool(job.training.get("use_cpu"))))
    return record


def _pairs_scored(search: Search, folder: Path, on_cpu: bool) -> dict[str, float | None]:
    """Score a finished trial's model on the minimal pairs of the sweep, and write all of its scores beside it."""
    if search.pairs is None:
        return {}
    path = folder / SCORES_FILE
    if not path.exists():
        fields: dict[str, Any] = {"model": str(folder), "pairs": search.pairs, "limit": search.pairs_limit}
        fields |= {"device": "cpu"} if on_cpu else {}
        job = EvaluationJob.model_validate(fields)
        replace_file(path, (evaluate(job).model_dump_json(indent=1) + "\n").encode())
    found = EvaluationReport.model_validate_json(path.read_bytes()).minimal_pairs
    assert found is not None
    return {"pairs": found.mean_over_groups, "pairs_stderr": found.mean_over_groups_stderr}


class _Watch(TrainerCallback):
    """Reports a run's evaluations to its trial, and ends a run that is pruned.

    Pruners count evaluations: a step is not the same for all trials. A resumed run makes some of them again.
    """

    def __init__(self, trial: Trial, figure: str) -> None:
        self._trial, self._figure = trial, figure
        self._state = TrainerState()
        self._parameters: int | None = None

    def found(self) -> dict[str, Any]:
        """What is known of a run that ended early."""
        facts = _from_log(self._state.log_history, self._state.global_step, self._figure)
        return facts | {"model_parameters": self._parameters}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        self._state, self._parameters = state, sum(p.numel() for p in others["model"].parameters())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        value = _finite(self._figure, others["metrics"][self._figure], state.global_step)
        number = sum(self._figure in entry for entry in state.log_history)
        earlier = self._trial.storage.get_trial(self._trial._trial_id).intermediate_values
        if number not in earlier:
            self._trial.report(value, number)
        # A finished run is not pruned: there is nothing left to save.
        last = number >= max(earlier, default=0)
        if last and state.global_step < state.max_steps and self._trial.should_prune():
            raise TrialPruned


def _from_log(log: list[dict[str, Any]], steps: int, figure: str) -> dict[str, Any]:
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {
        "steps": steps,
        "train_loss": losses[-1] if losses else None,
        "evaluations": tuple((int(entry["step"]), float(entry[figure])) for entry in log if figure in entry),
    }


def _finite(figure: str, value: float, step: int) -> float:
    if not math.isfinite(value):
        raise Diverged(f"{figure} is {value} at step {step}")
    return float(value)


def _reason(error: Exception) -> str | None:
    """Why a trial failed, in one line, where its values are at fault; None where the sweep has to stop."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return f"out of memory: {text}"
    if isinstance(error, LogitCacheError) and not isinstance(error, (InputError, Diverged)):
        return None
    return text if isinstance(error, (Diverged, ValueError)) else None
