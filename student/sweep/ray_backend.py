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
from student.sweep.search_space import Draw, Parameter, Pruner

# ASHA stops a trial at its most evaluations, where the others let it end.
_NO_LIMIT = 1 << 30


def domains(parameters: dict[str, Parameter]) -> dict[str, Any]:
    """The search space as Ray Tune has it."""
    return {name: _domain(parameter.draw()) for name, parameter in parameters.items()}


def _domain(draw: Draw) -> Any:
    if draw.kind == "choice":
        return tune.choice(list(draw.choices))
    if draw.kind == "float":
        return tune.loguniform(draw.low, draw.high) if draw.log else tune.uniform(draw.low, draw.high)
    if draw.log:
        return tune.lograndint(int(draw.low), int(draw.high) + 1)
    if draw.step > 1:
        # Ray rounds to multiples of a step, and not to steps from the lowest value.
        return tune.choice(list(range(int(draw.low), int(draw.high) + 1, draw.step)))
    return tune.randint(int(draw.low), int(draw.high) + 1)


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
    """What `hyperparameter_search` hands to `ray.tune.run`; starts Ray on this machine where it is not running.

    A trial's files are looked for from where the sweep was started. A sweep that goes on draws with another seed:
    unlike Optuna's study, what Ray has drawn is not kept.
    """
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if not ray.is_initialized():
        # Not whatever cluster this machine may be a node of: trials read paths of this machine.
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
    """Name the end of trials that Ray stopped: it ends their process, so they cannot say it themselves."""
    for trial in folder.trials():
        if trial.state != "running":
            continue
        if trial.evaluations and not out_of_time:
            folder.write(trial.model_copy(update={"state": "pruned"}))
        else:
            folder.write(trial.model_copy(update={"state": "failed", "value": None, "error": INTERRUPTED}))
