"""Metrics of one model of a recipe: functions that are None where its records do not have the figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from logit_cache.report.folders import Model
from student.report import HeldOutKL

Metric = Callable[[Model], float | None]


def pairs_mean(model: Model) -> float | None:
    """Minimal-pair accuracy of a model: unweighted mean over groups, a fraction."""
    return None if model.pairs is None else model.pairs.mean_over_groups


def group_accuracy(group: str) -> Metric:
    """The metric that is the accuracy on one group of minimal pairs, a fraction."""

    def accuracy(model: Model) -> float | None:
        found = None if model.pairs is None else model.pairs.groups.get(group)
        return None if found is None else found.accuracy

    return accuracy


def tokens_seen(model: Model) -> float | None:
    """Positions that a run read for training."""
    return None if model.run is None else model.run.tokens_seen


def peak_memory(of: Literal["process_bytes", "device_bytes"]) -> Metric:
    """The metric that is the peak memory of a run: of its process, or of its device."""

    def peak(model: Model) -> float | None:
        found = None if model.run is None else model.run.peak_memory
        return None if found is None else getattr(found, of)

    return peak


def run_seconds(model: Model) -> float | None:
    """Seconds of a run; None for a resumed one, which recorded only those of its last process."""
    return None if model.run is None or model.run.resumed_from_step else model.run.seconds


def logged(entry: dict[str, int | float], name: str) -> float | None:
    """A finite number of an entry of a run's log, else None."""
    value = entry.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def best_epoch(model: Model) -> float | None:
    """The epoch whose weights were published: that of the least selecting loss, or the last; None without a log."""
    if model.run is None:
        return None
    training = model.run.job.training
    name = f"eval_{str(training.get('metric_for_best_model') or 'loss').removeprefix('eval_')}"
    found = [
        (value, epoch)
        for entry in model.run.eval_log
        if (value := logged(entry, name)) is not None and (epoch := logged(entry, "epoch")) is not None
    ]
    if not found:
        return None
    if not training.get("load_best_model_at_end"):
        return max(epoch for _, epoch in found)
    return (max if training.get("greater_is_better") else min)(found)[1]


def kl_of(model: Model) -> dict[str, HeldOutKL]:
    """Held-out KL by teacher entry: from the scores, which every model may have; else from the run."""
    scored = None if model.scores is None else model.scores.held_out
    if scored is not None and scored.kl:
        return scored.kl
    return {} if model.run is None or model.run.held_out is None else model.run.held_out.kl


def kl_mean(model: Model) -> float | None:
    """Held-out KL(teacher || model) in nats per token: the mean over the model's teacher entries; of cross-entropies to
    them where that is known of all; None where a KL is known of some and a cross-entropy of others."""
    found = kl_of(model).values()
    if len({item.cross_entropy for item in found}) != 1:
        return None
    return sum(item.nats for item in found) / len(found)
