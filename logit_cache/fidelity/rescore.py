"""Rescoring: the stored values of single windows of an entry, and a live teacher's values of them, in the same terms.

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
`log_tail` less the log of the mass of the certain ids. Version 2 has no `top_logprob` beside them.

Of entries whose sampled ids have no log-probs::

    sampled_ids    [R, K]   stored, and as the live teacher's reducer samples them
    rounded_ids    [R, K]   live only: as it samples them from rounded logits
    chance         [R]      live only: the share of its sampled ids that an independent sample has too, on average
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logit_cache.caching.windows import Inputs, Window, batch_inputs, windows
from logit_cache.fidelity.sampled_ids import Values, drawn_again, draws_again
from storage.cache.reader import LogitCache, TeacherTargets
from storage.errors import CorruptCache, InputError
from storage.format.encoding import MIN_STEP_NATS, logprob_floor
from storage.format.layout import VALUES
from storage.format.manifest import TeacherEntry
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


@dataclass(frozen=True)
class Sample:
    """A window with its tokens int64 [<= C], the token after each scored position int64 [R] (-1: none), and targets."""

    window: Window
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    stored: SparseTargets


class TargetRows:
    """Which rows of the committed shards have targets."""

    def __init__(self, targets: TeacherTargets) -> None:
        self._targets = targets
        self._all = targets.entry.targets.in_every_row
        self._held: tuple[int, NDArray[np.int64]] | None = None  # windows are sampled shard after shard

    def counts(self) -> NDArray[np.int64]:
        """Of each shard [shards], the number of its rows with targets; 0 where it is not committed."""
        receipts = self._targets.receipts
        counts = shard_rows(self._targets.entry, receipts.committed())
        if not self._all:
            for shard in np.flatnonzero(counts).tolist():
                receipt = receipts.read(shard)
                if receipt is not None and receipt.statistics is not None:
                    counts[shard] = receipt.statistics.positions
        return counts

    def row(self, shard: int, number: int) -> int:
        """The position of the n-th row with targets of a shard, from the shard's start on. Raises CorruptCache."""
        if self._all:
            return number
        if self._held is None or self._held[0] != shard:
            self._held = shard, self._rows(shard)
        rows = self._held[1]
        if number >= len(rows):
            raise CorruptCache(
                f"{self._targets.name}: shard {shard} has {len(rows)} rows with targets, its receipt counts more"
            )
        return int(rows[number])

    def _rows(self, shard: int) -> NDArray[np.int64]:
        layout = self._targets.entry.layout
        start, stop = layout.shard_range(shard, self._targets.entry.positions)
        chunks = range(start // layout.chunk, -(-stop // layout.chunk))
        return np.flatnonzero(np.concatenate([self._targets.arrays["kept"].read_chunk(chunk) for chunk in chunks]))


def shard_rows(entry: TeacherEntry, committed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The number of rows of each shard [shards]; 0 where it is not `committed` [shards]."""
    starts = np.arange(len(committed), dtype=np.int64) * entry.layout.shard
    lengths: NDArray[np.int64] = np.where(committed, np.minimum(entry.layout.shard, entry.positions - starts), 0)
    return lengths


def sample_windows(
    entry: TeacherEntry,
    counts: NDArray[np.int64],
    document_starts: NDArray[np.uint64] | None,
    count: int,
    rng: np.random.Generator,
    row: Callable[[int, int], int] = lambda shard, number: number,
) -> list[Window]:
    """The windows that score `count` random positions, of those that have targets, ascending, each window once.

    One position is sampled from each of `count` equal parts, so a stretch of two parts' length is always hit. A window
    has all positions that it scores within one shard. Fewer are returned where two positions share a window.

    counts, row: as `TargetRows` has them.
    """
    ends = np.cumsum(counts)
    total = int(ends[-1])
    count = min(count, total)
    found: dict[int, Window] = {}
    for part in range(count):
        sampled = int(rng.integers(part * total // count, (part + 1) * total // count))
        shard = int(np.searchsorted(ends, sampled, side="right"))
        start, stop = entry.layout.shard_range(shard, entry.positions)
        position = start + row(shard, sampled - int(ends[shard] - counts[shard]))
        window = _window_of(position, start, stop, entry, document_starts)
        found[window.first] = window
    return [found[first] for first in sorted(found)]


def _window_of(
    position: int, start: int, stop: int, entry: TeacherEntry, document_starts: NDArray[np.uint64] | None
) -> Window:
    """The window that scores a position, with all positions that it scores of the shard `start .. stop`."""
    plan = (entry.positions, entry.windowing, document_starts)
    read = next(windows(position, position + 1, *plan))
    shares = windows(max(read.start, start), min(read.stop, stop), *plan)
    return next(share for share in shares if share.first <= position < share.last)


def take_sample(cache: LogitCache, name: str, window: Window) -> Sample:
    """The tokens and targets of a window.

    Raises CorruptCache for damage and for tokens outside the entry's vocabulary, IncompleteCache for a missing shard.
    """
    high = min(max(window.stop, window.last + 1), cache.record.corpus.positions)
    tokens = cache.tokens.read(window.start, high).astype(np.int64)
    size = cache.teacher(name).entry.vocabulary_size
    if tokens.max() >= size:
        raise CorruptCache(
            f"{cache.url}: the positions {window.start}..{high} have id {tokens.max()}, which teacher {name} with its "
            f"vocabulary of {size} ids cannot have scored"
        )
    following = np.arange(window.first, window.last) + 1
    labels = np.full(len(following), -1)
    inside = following < window.end
    labels[inside] = tokens[following[inside] - window.start]
    stored = cache.teacher(name).read(window.first, window.last)
    return Sample(window, tokens[: window.stop - window.start], labels, stored)


def stored_values(entry: TeacherEntry, targets: SparseTargets) -> Values:
    """The stored values of the positions of a sample."""
    is_sampled = targets.is_kept & ~targets.is_certain
    values = {
        "logprobs": np.where(targets.is_certain, targets.logprobs, np.nan),
        "sampled_logprobs": np.where(is_sampled, targets.logprobs, np.nan),
        "token_ids": np.where(targets.is_certain, 0.0, np.nan),
        "top_logprob": np.where(targets.kept > 0, targets.logprobs[:, 0], np.nan),
    }
    for name in _PER_POSITION:
        stored = getattr(targets, name)
        values[name] = np.full(len(targets), np.nan) if stored is None else stored
    if draws_again(entry):
        values["sampled_ids"] = np.where(is_sampled, targets.token_ids, np.nan)
    return comparable(entry, {name: value.astype(np.float64) for name, value in values.items()})


def comparable(entry: TeacherEntry, values: Values) -> Values:
    """Values as the entry's encoding states them, none below what it can hold; see the module."""
    found = {name: np.maximum(value, _FLOOR) if name in FIELDS else value for name, value in values.items()}
    if entry.format_version == 1:
        return found
    found["top_logprob"] = np.full_like(found["top_logprob"], np.nan)
    if entry.encoding.step_nats is None:
        return found
    logprobs = found["logprobs"]
    log_head = np.logaddexp.reduce(np.where(np.isnan(logprobs), -np.inf, logprobs), axis=1, initial=-np.inf)
    # Without certain ids all mass is outside them: nothing is stored of it, and there is nothing to compare.
    found["log_tail"] = np.where(np.isneginf(log_head), np.nan, found["log_tail"] - log_head)
    found["logprobs"] = logprobs - logprobs[:, :1]
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
    best = logp.topk(ids.shape[1], dim=1).values.clamp_min(_FLOOR)
    is_sampled = is_kept & ~is_certain
    expected = ((outside / sampled_at).softmax(1) * logp.clamp_min(_FLOOR)).sum(1)
    return {
        "logprobs": at_ids.masked_fill(~is_certain, torch.nan),
        "sampled_logprobs": at_ids.masked_fill(~is_sampled, torch.nan),
        "token_ids": (best - at_ids).masked_fill(~is_certain, torch.nan),
        "top_logprob": at_ids[:, 0],
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
