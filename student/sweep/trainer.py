"""The trainer of all trials of a sweep: each trial has its own job, all read the same caches.

transformers' `hyperparameter_search` calls `train(trial=…)` on one trainer and sets fields of its arguments. A trial of
ours is more than that (its loss, windows and model differ too), so `train` first installs the whole job: the fields
that the base class would set one by one are then set already. A trial is bit-identical to the `train-student` run of
the same job: same seeds at the same points, same order, same evaluations.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback

from storage.errors import InputError, LogitCacheError
from student.job import StudentJob
from student.models.loading import load_student
from student.sweep.record import SweepFolder, TrialRecord
from student.sweep.search_space import Search
from student.sweep.trial import MODEL, OBJECTIVE, STEP, WINDOWS, shown, trial_job, trial_settings, write_settings
from student.training.arguments import training_arguments, training_values
from student.training.bound_forward import bind_loss
from student.training.inputs import Caches, Data, check_step, job_inputs
from student.training.progress import TrainingProgress
from student.training.step import divide_step, windows_per_step
from student.training.trainer import DistillationTrainer, FollowAlpha


class TrialFailed(Exception):
    """A trial ended without a figure; the sweep continues."""


class _Diverged(Exception):
    """The loss is NaN, or the metric is not finite."""


@dataclass(frozen=True)
class SweepInputs:
    """The inputs of all trials: the sweep's job, the search, the opened caches and their special token ids."""

    job: StudentJob
    search: Search
    caches: Caches
    special_ids: dict[str, int | None]


class SweepTrainer(DistillationTrainer):
    """One trainer for all trials of a sweep in this process.

    `possible` are valid values of the parameters that decide windows, loss and model. The trainer is constructed with
    them, and they are replaced before the first step.
    """

    def __init__(self, inputs: SweepInputs, possible: Mapping[str, Any], folder: SweepFolder) -> None:
        self.inputs, self.folder = inputs, folder
        self.search = inputs.search
        args = training_arguments(inputs.job, self._values(inputs.job))
        job = trial_job(inputs.job, possible, inputs.job.output_dir, self._configuration(possible))
        first = job_inputs(inputs.caches, job)
        self._loaded_for(first)
        super().__init__(
            load_student(first.job.model, **self._fitting, seed=first.job.seed, attention=first.job.attention),
            args,
            train_dataset=first.windows,
            eval_dataset=first.eval_windows,
            loss=first.loss,
            eval_members=first.eval_members,
            eval_loss=first.measured_loss,
            fused_head=first.job.fused_head,
        )
        self.remove_callback(PrinterCallback)
        self.model_init = self._make_model
        self._final: dict[str, float] | None = None
        self._record = TrialRecord(number=-1, state="failed")
        self._began, self._evaluations, self._progress = 0.0, 0, TrainingProgress(1)
        self._data = first

    def _loaded_for(self, data: Data) -> None:
        self._fitting: dict[str, Any] = {
            "vocabulary_size": data.windows.vocabulary_size,
            "special_ids": self.inputs.special_ids,
            "window_tokens": data.windows.input_tokens,
        }

    def _values(self, job: StudentJob) -> dict[str, Any]:
        """Training fields of a trial: no checkpoints, unless the sweep's job sets save_strategy."""
        return {**training_values(job), **({} if "save_strategy" in job.training else {"save_strategy": "no"})}

    def compute(self, metrics: dict[str, float]) -> float:
        """The metric of the search, from those of an evaluation."""
        return float(metrics[self.search.figure])

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> Any:
        """Run a trial and write its record. Raises TrialFailed where it ended without a figure."""
        number, values = self._sample(trial)
        self._begin(number, values)
        try:
            job = trial_job(self.inputs.job, values, self._output_dir, self._configuration(values))
            self._install(job)
            result = super().train(trial=trial)
            # Training mostly ends with an evaluation, of the same weights unless the best ones were put back.
            step, metrics = self._last
            fresh = step == self.state.global_step and not self.args.load_best_model_at_end
            self._final = metrics if fresh else self.evaluate()
            value = self._finite(self.compute(self._final))
        except Exception as error:
            self._end_badly(error)
            # The backends free the model of a successful trial only; the memory may not hold two.
            self.drop_model()
            if self._record.state == "failed":
                raise TrialFailed(self._record.error) from error
            raise
        finally:
            self.pop_callback(TrainingProgress)
            self._progress.on_train_end(self.args, self.state, self.control)
        self._write(
            state="complete",
            value=value,
            metrics=self._final,
            parameters={name: self._applied(name) for name in values},
        )
        self.folder.publish()
        self._print(f"{self.search.figure} {value:.4f}")
        # Without an objective the library asks for an evaluation: it gets the one that was just made, and not the
        # last one of training, which may lie some steps back.
        self.objective: float | None = None
        return result

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out figures; those of a finished trial are not computed again."""
        if self._final is not None and eval_dataset is None:
            return dict(self._final)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if math.isnan(logs.get("loss", 0.0)) and not self.args.fp16:
            # float16 skips such steps; elsewhere every weight is NaN from here on.
            raise _Diverged(f"the training loss is no number at step {self.state.global_step}")
        super().log(logs, start_time)

    def _sample(self, trial: Any) -> tuple[int, dict[str, Any]]:
        """The number of a trial, and its values by name."""
        parameters = self.search.parameters
        if self.search.backend == "optuna":
            from student.sweep.optuna_backend import suggest

            number, raw = trial.number, {name: suggest(trial, name, item.domain()) for name, item in parameters.items()}
        else:
            number, raw = self.folder.reserve(), trial
        return number, {name: item.value(raw[name]) for name, item in parameters.items()}

    def _begin(self, number: int, values: dict[str, Any]) -> None:
        self._began, self._evaluations, self._final, self._parts = time.monotonic(), 0, None, None
        self._last: tuple[int, dict[str, float]] = (-1, {})
        self._output_dir = f"{self.inputs.job.output_dir}/trial-{number}"
        self.state.global_step, self.state.log_history = 0, []
        self._record = TrialRecord(number=number, state="running", parameters=values)
        self._write()
        self.folder.publish()
        self._print(shown(values))

    def drop_model(self) -> None:
        """Free the model, the optimizer and the scheduler."""
        owner: Any
        for owner in (self, self.callback_handler):
            owner.model = owner.optimizer = owner.lr_scheduler = None
        self.model_wrapped: Any = None
        self.accelerator.free_memory()

    def _configuration(self, values: Mapping[str, Any]) -> str | None:
        settings = trial_settings(self.inputs.job, values)
        return None if settings is None else write_settings(settings, self.inputs.job.output_dir)

    def _install(self, job: StudentJob) -> None:
        """Replace the last trial's arguments, windows and loss by those of a job."""
        data = job_inputs(self.inputs.caches, job)
        in_the_sweeps_folder = job.model_copy(update={"output_dir": self.inputs.job.output_dir})
        args = training_arguments(in_the_sweeps_folder, self._values(job))
        divide_step(job, args)
        check_step(data.windows, args)
        fields = job.model_dump(mode="json", include=job.model_fields_set)
        self._record = self._record.model_copy(update={"job": fields})
        self.args, self._data = args, data
        self.neftune_noise_alpha = args.neftune_noise_alpha
        self.train_dataset, self.eval_dataset = data.windows, data.eval_windows
        self.distillation_loss, self._reading_order = data.loss, None
        self.eval_loss = data.measured_loss
        self._loaded_for(data)
        self.remove_callback(FollowAlpha)
        self.add_callback(FollowAlpha(data.loss))
        self._progress = TrainingProgress(windows_per_step(args) * job.window_tokens)
        if sys.stderr.isatty():
            self.add_callback(self._progress)

    def _make_model(self, trial: Any) -> PreTrainedModel:
        """The model of the installed job, with its loss bound.

        The base class has seeded everything just before, and nothing here uses its random state, so dropout starts as
        in a run by itself.
        """
        job = self._data.job
        model = load_student(job.model, **self._fitting, seed=job.seed, attention=job.attention)
        self.not_fused = bind_loss(model, self.distillation_loss, job.fused_head)
        model.config.use_cache = self.args.use_cache
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        """Recreate only the objects that depend on the arguments, which are the trial's already."""
        self._trial = trial
        if trial is not None and self.hp_search_backend is not None:
            self._train_batch_size = self.args.train_batch_size
            self.create_accelerator_and_postprocess()

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        """Report an evaluation to the search. Pruners count evaluations: a step is not the same for all trials."""
        if trial is None or self.hp_search_backend is None:
            return
        value = self._finite(self.compute(metrics))
        self._evaluations += 1
        self._last = step, dict(metrics)
        self._write(value=value, evaluations=(*self._record.evaluations, (step, value)))
        if step < self.state.max_steps:
            super()._report_to_hp_search(trial, self._evaluations, metrics)
        elif self.search.backend == "optuna":
            # A finished run is not pruned: there is nothing left to save.
            trial.report(value, self._evaluations)

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: Ray Tune's backend would keep the model and optimizer of every trial."""

    def _applied(self, name: str) -> Any:
        """A parameter as the run had it, from the object that used it."""
        if name.startswith(MODEL):
            model: Any = self.model
            return getattr(model.config, name.removeprefix(MODEL))
        if name in OBJECTIVE:
            return getattr(self.distillation_loss.objective, name)
        if name in WINDOWS:
            windows = self._data.windows
            return windows.window_tokens if name == "window_tokens" else windows.blocks.offset
        if name == STEP:
            return windows_per_step(self.args)
        found = getattr(self.args, name)
        return getattr(found, "value", found)

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise _Diverged(f"{self.search.figure} is {value} at step {self.state.global_step}")
        return value

    def _end_badly(self, error: Exception) -> None:
        if _is_pruned(error, self.search.backend):
            self._write(state="pruned")
            self.folder.publish()
            self._print(f"pruned at {self.search.figure} {self._record.value:.4f}")
            return
        reason = _reason(error)
        if reason is None:
            return
        self._write(state="failed", value=None, error=reason)
        self.folder.publish()
        self._print(f"failed: {reason}")

    def _write(self, **changes: Any) -> None:
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        known = {
            "seconds": round(time.monotonic() - self._began, 3),
            "steps": self.state.global_step,
            "train_loss": losses[-1] if losses else None,
        }
        if self.model is not None:
            known["model_parameters"] = sum(p.numel() for p in self.model.parameters())
        self._record = self._record.model_copy(update=known | changes)
        self.folder.write(self._record)

    def _print(self, line: str) -> None:
        print(f"trial {self._record.number}: {line}", file=sys.stderr, flush=True)


def _is_pruned(error: Exception, backend: str) -> bool:
    if backend != "optuna":
        return False
    from optuna import TrialPruned

    return isinstance(error, TrialPruned)


def _reason(error: Exception) -> str | None:
    """Why a trial failed, in one line, where its values are at fault; None where the sweep has to stop."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return f"out of memory: {text}"
    if isinstance(error, LogitCacheError) and not isinstance(error, InputError):
        return None
    return text if isinstance(error, (_Diverged, ValueError)) else None
