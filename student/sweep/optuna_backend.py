"""Optuna behind a sweep: its distributions, samplers and pruners, and a study that outlives its process.

Needs the extra `tune`; imported where a sweep asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from student.sweep.record import INTERRUPTED, SweepFolder, TrialRecord, seed_of
from student.sweep.search_space import Domain, Pruner

_STUDY = "sweep"


def suggest(trial: Trial, name: str, domain: Domain) -> Any:
    """Sample a parameter of a trial; a repeated call returns the same value."""
    if domain.kind == "choice":
        return trial.suggest_categorical(name, list(domain.choices))
    if domain.kind == "int":
        return trial.suggest_int(name, int(domain.low), int(domain.high), step=domain.step, log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log)


class NumberedSampler(BaseSampler):
    """Any sampler, created anew for every trial with a seed that follows from the number of finished trials.

    So the proposals follow from the seed and the trials before, whatever process they ran in. One sampler with one
    seed would restart its sequence in a resumed sweep, and repeat its proposals.
    """

    def __init__(self, make: Callable[[int], BaseSampler], done: Callable[[], int]) -> None:
        self._make, self._done = make, done
        self._sampler = make(0)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler = self._make(self._done())
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


def sampler(name: str, seed: int, done: Callable[[], int]) -> BaseSampler:
    """The sampler of a search; `done` counts the finished trials."""

    def make(number: int) -> BaseSampler:
        each = seed_of(seed, number)
        return TPESampler(seed=each) if name == "tpe" else RandomSampler(seed=each)

    return NumberedSampler(make, done)


def pruner(asked: Pruner) -> BasePruner:
    """The pruner of a search; its resource is the number of evaluations."""
    if asked.name == "hyperband":
        return HyperbandPruner(
            min_resource=asked.min_evaluations,
            max_resource=asked.max_evaluations or "auto",
            reduction_factor=asked.reduction_factor,
        )
    if asked.name == "median":
        return MedianPruner(n_startup_trials=asked.startup_trials, n_warmup_steps=asked.min_evaluations - 1)
    return NopPruner()


def study_options(folder: SweepFolder) -> dict[str, Any]:
    """Arguments that `hyperparameter_search` passes to `optuna.create_study`; reconciles the study with the records."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search = folder.search
    options: dict[str, Any] = {
        "study_name": _STUDY,
        "storage": f"sqlite:///{(folder.path / 'optuna.db').resolve()}",
        "load_if_exists": True,
        "sampler": sampler(search.sampler, search.seed, lambda: sum(trial.counts for trial in folder.trials())),
        "pruner": pruner(search.pruner),
    }
    _reconcile(optuna.create_study(direction=search.aim, **options), folder)
    return options


def _reconcile(study: optuna.Study, folder: SweepFolder) -> None:
    """Report the outcomes of trials that a killed process left open, and enqueue again those that did not end."""
    records = {trial.number: trial for trial in folder.trials()}
    for trial in study.trials:
        record = records.get(trial.number, TrialRecord(number=trial.number, state="running"))
        if trial.state == TrialState.RUNNING:
            _report_outcome(study, record)
        if trial.state in (TrialState.RUNNING, TrialState.FAIL) and record.state == "running":
            folder.write(record.model_copy(update={"state": "failed", "value": None, "error": INTERRUPTED}))
            study.enqueue_trial(trial.params)


def _report_outcome(study: optuna.Study, record: TrialRecord) -> None:
    if record.state == "complete":
        study.tell(record.number, record.value)
    else:
        study.tell(record.number, state=TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL)
