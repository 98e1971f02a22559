"""Rescoring: the stored values of single windows of an entry, and a live teacher's values of them, in the same terms.

Legend: `R` positions of a window that it scores, `K` stored ids per position, `V` vocabulary size, `C` context tokens.

It shares only the plan of the windows with the code that makes entries, or it would repeat that code's mistakes:
batches are assembled independently, and everything is reduced densely over V in float64, at the stored ids.

`Values` hold, by field, float64 nats, NaN where there is no value to compare::

    logprobs       [R, K]   of the stored ids
    token_ids      [R, K]   live: how far the stored id of rank i falls short of the live teacher's i-th best; 0 when
                            they are the same id, or tied. Stored: 0. Only for ids that are certain
    top_logprob, log_tail, log_tail_half, label_logprob, entropy    [R]   tails outside the *stored* certain ids
    spread         [R]      live only: the best log-prob less the median one, with which rounding errors scale
    sampled        [R]      live only: the mean log-prob of the sampled ids less its expectation
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logit_cache.caching.windows import Window, batch_inputs, windows
from storage.cache.reader import LogitCache
from storage.errors import CorruptCache, InputError
from storage.format.encoding import MIN_STEP_NATS, logprob_floor
from storage.format.manifest import TeacherEntry
from storage.format.targets import SparseTargets
from teachers.base import Teacher

FIELDS = ("logprobs", "token_ids", "top_logprob", "log_tail", "log_tail_half", "label_logprob", "entropy")
Values = dict[str, NDArray[np.float64]]

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


def sample_windows(
    entry: TeacherEntry,
    committed: NDArray[np.bool_],
    document_starts: NDArray[np.uint64] | None,
    count: int,
    rng: np.random.Generator,
) -> list[Window]:
    """The windows that score `count` random positions of the committed shards, ascending, each once.

    One position is sampled from each of `count` equal parts, so a stretch of two parts' length is always hit. A window
    has all positions that it scores within one shard. Fewer are returned where two positions share a window.
    """
    size = entry.layout.shard
    shards = np.flatnonzero(committed).astype(np.int64)
    lengths = np.minimum((shards + 1) * size, entry.positions) - shards * size
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    count = min(count, total)
    found: dict[int, Window] = {}
    for part in range(count):
        sampled = int(rng.integers(part * total // count, (part + 1) * total // count))
        at = int(np.searchsorted(ends, sampled, side="right"))
        start = int(shards[at]) * size
        position = start + sampled - int(ends[at] - lengths[at])
        window = _window_of(position, start, start + int(lengths[at]), entry, document_starts)
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


def stored_values(targets: SparseTargets) -> Values:
    """The stored values of the positions of a sample."""
    logprobs = np.where(targets.is_kept, np.maximum(targets.logprobs, _FLOOR), np.nan)
    values = {
        "logprobs": logprobs,
        "token_ids": np.where(targets.is_certain, 0.0, np.nan),
        "top_logprob": logprobs[:, 0],
    }
    for name in FIELDS[3:]:
        stored = getattr(targets, name)
        value = np.full(len(targets), np.nan) if stored is None else stored.astype(np.float64)
        # -inf is the tail of a row that holds every id: the format's rules have compared it with `certain`.
        values[name] = np.where(np.isneginf(value), np.nan, np.maximum(value, _FLOOR))
    return {name: value.astype(np.float64) for name, value in values.items()}


def live_values(
    teacher: Teacher,
    entry: TeacherEntry,
    samples: list[Sample],
    batch_windows: int,
    progress: Callable[[int], None] | None = None,
) -> list[Values]:
    """The teacher's values of each sample, scored in batches of `batch_windows` windows, padded to that shape."""
    found: list[Values] = []
    for first in range(0, len(samples), batch_windows):
        batch = samples[first : first + batch_windows]
        found += _score_batch(teacher, entry, batch, batch_windows)
        if progress is not None:
            progress(len(batch))
    return found


def _score_batch(teacher: Teacher, entry: TeacherEntry, batch: list[Sample], batch_windows: int) -> list[Values]:
    read = [(sample.tokens, sample.window.offsets) for sample in batch]
    inputs, rows = batch_inputs(read, entry.windowing, batch_windows)
    stored = [sample.stored for sample in batch]
    per_row = [
        np.concatenate([targets.token_ids for targets in stored]),
        np.concatenate([targets.kept for targets in stored]),
        np.concatenate([targets.certain for targets in stored]),
        np.concatenate([sample.labels for sample in batch]),
    ]
    on_device = [torch.from_numpy(array.astype(np.int64)).to(teacher.device) for array in per_row]
    parts: list[dict[str, Tensor]] = []
    for here, tile in scored_tiles(teacher, entry, inputs, rows, _TILE_LOGITS):
        ids, kept, certain, labels = (array[here] for array in on_device)
        parts.append(_row_values(tile, ids, kept, certain, labels, entry.targets.temperature))
    whole = {name: torch.cat([part[name] for part in parts]).cpu().double().numpy() for name in parts[0]}
    ends = np.cumsum([len(targets) for targets in stored])[:-1]
    split = {name: np.split(values, ends) for name, values in whole.items()}
    return [{name: values[number] for name, values in split.items()} for number in range(len(batch))]


def scored_tiles(
    teacher: Teacher, entry: TeacherEntry, inputs: NDArray[np.int64], rows: NDArray[np.int64], tile_logits: int
) -> Iterator[tuple[slice, Tensor]]:
    """The logits [r, V] of a batch of windows, and which of `rows` [R] they are, r * V at most about `tile_logits`.

    inputs, rows: of `batch_inputs`. Of a teacher that is sharded over ranks, whole rows are gathered.
    """
    step = max(1, tile_logits // entry.vocabulary_size)
    done = 0
    for logits in teacher.score(*(torch.from_numpy(array).to(teacher.device) for array in (inputs, rows))):
        for start in range(0, len(logits), step):
            tile = logits[start : start + step]
            if teacher.shard is not None:
                tile = teacher.shard.whole(tile)
            yield slice(done, done + len(tile)), tile[:, : entry.vocabulary_size]
            done += len(tile)
    assert done == len(rows), "a teacher yields one row of logits per scored row"


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
        "logprobs": at_ids.masked_fill(~is_kept, torch.nan),
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
