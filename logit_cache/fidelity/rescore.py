"""Rescoring: the stored values of sampled windows of an entry, and a live teacher's values of them, in the same terms.

Legend: `R` positions of a window that it scores, `K` stored ids per position, `V` vocabulary size, `C` context tokens.

It shares only the plan of the windows with the code that makes entries, or it would repeat that code's mistakes:
batches are assembled independently, and everything is reduced densely over V in float64, at the stored ids. The one
exception is `logit_cache.fidelity.sampled_ids`, which says why.

`Values` hold, by field, float64, NaN where there is no value to compare. In nats::

    logprobs       [R, K]   of the certain ids
    sampled_logprobs  [R, K]   of the sampled ids
    token_ids      [R, K]   live: how far the stored id of rank i falls short of the live teacher's i-th best; 0 when
                            they are the same id, or tied. Stored: 0. Only for ids that are certain
    top_logprob, log_tail, log_tail_half, label_logprob, entropy    [R]   tails outside the *stored* certain ids
    spread         [R]      live only: the best log-prob less the median one, with which rounding errors scale
    sampled        [R]      live only: the mean log-prob of the sampled ids less its expectation

Codes of version 2 are compared as what they state, each with its own error: `logprobs` less the first of the row, and
`log_tail` less the log of the mass of the certain ids. Version 2 has no `top_logprob` beside them. Where the mass
outside the ids is not known, `logprobs` are relative to each other, and are compared less the first of the row too.

Of entries whose sampled ids have no log-probs::

    sampled_ids    [R, K]   stored, and as the live teacher's reducer samples them
    rounded_ids    [R, K]   live only: as it samples them from rounded logits
    chance         [R]      live only: the share of its sampled ids that an independent sample has too, on average
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logit_cache.caching.windows import Inputs, batch_inputs
from logit_cache.fidelity.sampled_ids import Values, drawn_again, draws_again
from logit_cache.fidelity.samples import Sample
from logit_cache.fidelity.stated_errors import mass_error
from storage.errors import InputError
from storage.format.encoding import MIN_STEP_NATS, logprob_floor
from storage.format.layout import VALUES
from storage.format.manifest.entry import TeacherEntry
from storage.format.targets import SparseTargets
from storage.format.version_2 import NOTHING_OUTSIDE
from teachers.base import Teacher
from teachers.reduction.varopt import random_numbers

_PER_POSITION = tuple(VALUES.values())
FIELDS = ("logprobs", "sampled_logprobs", "token_ids", "top_logprob", *_PER_POSITION)

# The highest floor of any step: below it, entries encode "no mass" in different ways.
_FLOOR = logprob_floor(MIN_STEP_NATS)
# Logits at once in float64; several arrays of that size live at a time.
_TILE_LOGITS = 1 << 23


def stored_values(entry: TeacherEntry, targets: SparseTargets) -> Values:
    """The stored values of the positions of a sample."""
    is_sampled = targets.is_kept & ~targets.is_certain
    values = {
        "logprobs": np.where(targets.is_certain, targets.logprobs, np.nan),
        "sampled_logprobs": np.where(is_sampled, targets.logprobs, np.nan),
        "token_ids": np.where(targets.is_certain, 0.0, np.nan),
        "top_logprob": first_column(np.where(targets.is_kept, targets.logprobs, np.nan)),
    }
    for name in _PER_POSITION:
        stored = getattr(targets, name)
        values[name] = np.full(len(targets), np.nan) if stored is None else stored
    if draws_again(entry):
        values["sampled_ids"] = np.where(is_sampled, targets.token_ids, np.nan)
    return comparable(entry, {name: value.astype(np.float64) for name, value in values.items()})


def first_column(values: NDArray[Any]) -> NDArray[Any]:
    """Of [R, K] the first column [R]; NaN without any."""
    return values[:, 0] if values.shape[1] else np.full(len(values), np.nan)


def comparable(entry: TeacherEntry, values: Values) -> Values:
    """Values as the entry states them, none below what it can hold, or can tell; see the module."""
    found = {name: np.maximum(value, _FLOOR) if name in FIELDS else value for name, value in values.items()}
    if entry.format_version == 1:
        return found
    found["top_logprob"] = np.full_like(found["top_logprob"], np.nan)
    logprobs, mass = found["logprobs"], mass_error(entry)
    if mass:
        found["log_tail"] = np.maximum(found["log_tail"], np.log(mass))
    if entry.encoding.step_nats is not None or not entry.targets.has("tail"):
        found["logprobs"] = logprobs - logprobs[:, :1]
    if entry.encoding.step_nats is None:
        return found
    log_head = np.logaddexp.reduce(np.where(np.isnan(logprobs), -np.inf, logprobs), axis=1, initial=-np.inf)
    # Without certain ids all mass is outside them: nothing is stored of it, and there is nothing to compare.
    found["log_tail"] = np.where(np.isneginf(log_head), np.nan, found["log_tail"] - log_head)
    for name in _PER_POSITION:
        step = entry.encoding.step_nats if name == "log_tail" else entry.encoding.value_step_nats
        found[name] = found[name].clip((NOTHING_OUTSIDE + 1) * (step or 0.0))
    return found


def live_values(
    teacher: Teacher,
    entry: TeacherEntry,
    samples: list[Sample],
    batch_windows: int,
    progress: Callable[[int], None] | None = None,
    order: NDArray[np.uint32] | None = None,
) -> list[Values]:
    """The teacher's values of each sample, scored in batches of `batch_windows` windows, padded to that shape.

    order: the entry's sampling order [V], if it has one.
    """
    found: list[Values] = []
    for first in range(0, len(samples), batch_windows):
        batch = samples[first : first + batch_windows]
        found += _score_batch(teacher, entry, batch, batch_windows, order)
        if progress is not None:
            progress(len(batch))
    return found


def _score_batch(
    teacher: Teacher, entry: TeacherEntry, batch: list[Sample], batch_windows: int, order: NDArray[np.uint32] | None
) -> list[Values]:
    read = [(sample.tokens, sample.window.offsets) for sample in batch]
    inputs = batch_inputs(read, entry.windowing, batch_windows)
    stored = [sample.stored for sample in batch]
    per_row = [
        np.concatenate([targets.token_ids for targets in stored]),
        np.concatenate([targets.kept for targets in stored]),
        np.concatenate([targets.certain for targets in stored]),
        np.concatenate([sample.labels for sample in batch]),
    ]
    on_device = [torch.from_numpy(array.astype(np.int64)).to(teacher.device) for array in per_row]
    windows = [sample.window for sample in batch]
    random = np.concatenate([random_numbers(entry.targets, each.first, each.last) for each in windows])
    columns = None if order is None else torch.from_numpy(order.astype(np.int64))
    parts: list[dict[str, Tensor]] = []
    for here, tile in scored_tiles(teacher, entry, inputs, _TILE_LOGITS):
        ids, kept, certain, labels = (array[here] for array in on_device)
        parts.append(_row_values(tile, ids, kept, certain, labels, entry.targets.temperature))
        if draws_again(entry):
            # mps has no float64.
            near = tile.cpu() if tile.device.type == "mps" else tile
            own = None if columns is None else columns.to(near.device)
            parts[-1] |= drawn_again(entry, near, torch.from_numpy(random[here]).to(near.device), own)
    whole = {name: torch.cat([part[name] for part in parts]).cpu().double().numpy() for name in parts[0]}
    whole = comparable(entry, whole)
    ends = np.cumsum([len(targets) for targets in stored])[:-1]
    split = {name: np.split(values, ends) for name, values in whole.items()}
    return [{name: values[number] for name, values in split.items()} for number in range(len(batch))]


def scored_tiles(
    teacher: Teacher, entry: TeacherEntry, inputs: Inputs, tile_logits: int
) -> Iterator[tuple[slice, Tensor]]:
    """The logits [r, V] of a batch of windows, and which of its scored rows [R] they are, r * V at most about
    `tile_logits`.

    Of a teacher that is sharded over ranks, whole rows are gathered.
    """
    step = max(1, tile_logits // entry.vocabulary_size)
    done = 0
    for logits in teacher.score(*inputs.tensors(teacher.device)):
        for start in range(0, len(logits), step):
            tile = logits[start : start + step]
            if teacher.shard is not None:
                tile = teacher.shard.whole(tile)
            yield slice(done, done + len(tile)), tile[:, : entry.vocabulary_size]
            done += len(tile)
    assert done == len(inputs.scored), "a teacher yields one row of logits per scored row"


def _row_values(
    logits: Tensor, ids: Tensor, kept: Tensor, certain: Tensor, labels: Tensor, sampled_at: float
) -> dict[str, Tensor]:
    """`Values` of rows of logits [r, V]; ids [r, K], kept, certain and labels [r] are int64.

    sampled_at: the temperature that ids were sampled for.
    """
    # float64, so that a difference is the teacher's or the cache's, and not this sum's; mps has none.
    logits = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
    if not bool(torch.isfinite(logits.amax(1)).all()):
        raise InputError(
            "the live teacher's logits have no softmax (NaN, or an infinity): it overflows in its dtype, or its "
            "weights are broken: try --dtype float32"
        )
    logp = torch.log_softmax(logits, dim=1)
    columns = torch.arange(ids.shape[1], device=ids.device)
    is_kept, is_certain = columns < kept[:, None], columns < certain[:, None]
    safe = ids.masked_fill(~is_kept, 0)
    # Columns that are not certain add 0 to an id, and so may name any.
    outside = logp.scatter_add(1, safe, torch.zeros_like(safe, dtype=logp.dtype).masked_fill(is_certain, -torch.inf))
    at_ids = logp.gather(1, safe).clamp_min(_FLOOR)
    best = logp.topk(max(1, ids.shape[1]), dim=1).values.clamp_min(_FLOOR)
    is_sampled = is_kept & ~is_certain
    expected = ((outside / sampled_at).softmax(1) * logp.clamp_min(_FLOOR)).sum(1)
    return {
        "logprobs": at_ids.masked_fill(~is_certain, torch.nan),
        "sampled_logprobs": at_ids.masked_fill(~is_sampled, torch.nan),
        "token_ids": (best[:, : ids.shape[1]] - at_ids).masked_fill(~is_certain, torch.nan),
        "top_logprob": at_ids[:, 0] if ids.shape[1] else best[:, 0],
        "log_tail": torch.logsumexp(outside, dim=1).clamp_min(_FLOOR),
        "log_tail_half": torch.logsumexp(outside / 2, dim=1).clamp_min(_FLOOR),
        "label_logprob": logp.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        .clamp_min(_FLOOR)
        .masked_fill(labels < 0, torch.nan),
        "entropy": -(logp.exp() * logp.clamp_min(_FLOOR)).sum(1),
        # 0 / 0 where no id was sampled.
        "sampled": (at_ids * is_sampled).sum(1) / is_sampled.sum(1) - expected,
        "spread": best[:, 0] - logp.median(1).values.clamp_min(_FLOOR),
    }
