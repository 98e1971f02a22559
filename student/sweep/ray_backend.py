"""Ray Tune behind a sweep: trials in processes of this machine, as many at once as it has CPUs or GPUs.

Needs the extra `tune`; imported where a sweep asks for it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from student.sweep.record import INTERRUPTED, SweepFolder, seed_of
from student.sweep.search_space import Domain, Parameter, Pruner

# ASHA stops a trial at `max_t` evaluations, where the others let it end.
_NO_LIMIT = 1 << 30


def domains(parameters: dict[str, Parameter]) -> dict[str, Any]:
    """The search space as Ray Tune's domains, by parameter."""
    return {name: _domain(parameter.domain()) for name, parameter in parameters.items()}


def _domain(domain: Domain) -> Any:
    if domain.kind == "choice":
        return tune.choice(list(domain.choices))
    if domain.kind == "float":
        return tune.loguniform(domain.low, domain.high) if domain.log else tune.uniform(domain.low, domain.high)
    if domain.log:
        return tune.lograndint(int(domain.low), int(domain.high) + 1)
    if domain.step > 1:
        # Ray rounds to multiples of a step, and not to steps from the lowest value.
        return tune.choice(list(range(int(domain.low), int(domain.high) + 1, domain.step)))
    return tune.randint(int(domain.low), int(domain.high) + 1)


def _scheduler(asked: Pruner, mode: str) -> TrialScheduler | None:
    if asked.name == "hyperband":
        return ASHAScheduler(
            metric="objective",
            mode=mode,
            max_t=asked.max_evaluations or _NO_LIMIT,
            grace_period=asked.min_evaluations,
            reduction_factor=asked.reduction_factor,
        )
    if asked.name == "median":
        return MedianStoppingRule(
            metric="objective",
            mode=mode,
            grace_period=asked.min_evaluations,
            min_samples_required=asked.startup_trials,
        )
    return None


def run_options(folder: SweepFolder, done: int, gpus: int) -> dict[str, Any]:
    """Arguments that `hyperparameter_search` passes to `ray.tune.run`; starts Ray on this machine if it does not run.

    Trials keep the sweep's working directory, against which their paths resolve. A resumed sweep samples with another
    seed: unlike Optuna's study, Ray's earlier samples are not kept.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if not ray.is_initialized():
        # Never an existing cluster that this machine is a node of: trials read paths of this machine.
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    search = folder.search
    mode = search.aim[:3]
    seed = seed_of(search.seed, done)
    options: dict[str, Any] = {
        "name": f"from-{done}",
        "storage_path": str((folder.path / "ray").resolve()),
        "resources_per_trial": {"cpu": 1, "gpu": 1 if gpus else 0},
        "search_alg": OptunaSearch(metric="objective", mode=mode, seed=seed)
        if search.sampler == "tpe"
        else BasicVariantGenerator(random_state=seed),
        "raise_on_failed_trial": False,
        "verbose": 0,
    }
    scheduler = _scheduler(search.pruner, mode)
    if scheduler is not None:
        options["scheduler"] = scheduler
    if search.timeout_seconds is not None:
        options["time_budget_s"] = search.timeout_seconds
    return options


def close(folder: SweepFolder, out_of_time: bool) -> None:
    """Record the outcomes of trials that Ray stopped: it ends their process before they can."""
    for trial in folder.trials():
        if trial.state != "running":
            continue
        if trial.evaluations and not out_of_time:
            folder.write(trial.model_copy(update={"state": "pruned"}))
        else:
            folder.write(trial.model_copy(update={"state": "failed", "value": None, "error": INTERRUPTED}))
