"""Logits to stored sparse targets: ids, tails, the label's log-prob and the entropy; exact, in float32.

Legend: `R` rows, `T` rows of one tile, `V` vocabulary size, `K` kept ids, `W` width of a block.

The naive form, with z = logits[:, :V], p = softmax(z) and S the K ids that come first in the order
(logit descending, id ascending)::

    logprobs = log p[S]    label_logprob = log p[label]    entropy = -sum p log p
    log_tail = log sum_{j not in S} p_j    log_tail_half = log sum_{j not in S} sqrt(p_j)

VarOpt targets start from the same S: its first ids are certain and stay, the others are replaced by sampled ids
(`teachers.reduction.varopt`), and the tails then cover all ids that are not certain. Where they are drawn in an order
of their own (`Sampling.order`), the logits' columns come in it: inside the reducer an id is then a column, and S has
equal logits by ascending column; labels, and all ids that come out, are the vocabulary's, equal logits by ascending id.

`teachers.reduction.top_k` finds S. All work over the V columns of every row is in `teachers.reduction.passes`; the
formulas of `_reduce_tile` use numbers per row, per block and per kept id. `Rows` connects the two: for whole rows, or
for rows whose columns are sharded over the ranks of a tensor-parallel teacher (`teachers.reduction.sharded`), with the
same formulas.

Precision: everything is float32. The K chosen entries are left out of the sums, so that a tail is the
sum of its own terms, never one minus something; the normaliser is `log1p` of everything but the maximum, so
that a log-prob near zero keeps its digits. Against float64, log-probs and log-tails are within 1e-6 nats plus
3e-7 of their size, the entropy within 1e-6 of its size (`tests/teachers/test_reduce.py`); log_softmax alone was off by
2e-5 nats at 128k ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.errors import InputError
from teachers.ranks import ColumnShard
from teachers.reduction.passes import Tail
from teachers.reduction.rows import Rows
from teachers.reduction.sharded import ShardedRows
from teachers.reduction.top_k import best
from teachers.reduction.varopt import Sampling, sample

# A tail sum under this may have lost terms to underflow (float32 exp ends at e^-87, and a quarter of a
# million ids there are less than 1e-6 of e^-60): such rows are summed again relative to the tail's maximum.
_TAIL_UNDERFLOW = math.exp(-60.0)


@dataclass(frozen=True)
class ReducedRows:
    """The stored fields of R rows of logits; all tensors on the logits' device.

    token_ids      int64 [R, K]    most probable first, equal logits by ascending id, the certain ones before others
    logprobs       float32 [R, K]  of these ids, normalised over all V
    kept           int64 [R]       the number of valid ids, which are the first ones; others hold anything
    certain        int64 [R]       the number of certain ids, the first of these; K for top-k
    log_tail       float32 [R]     log of the mass of the V - certain other ids; -inf exactly when there are none
    log_tail_half  float32 [R]     log of their sum of p**0.5; -inf exactly when there are none
    label_logprob  float32 [R]     log-prob of the label; NaN exactly where the label is -1
    entropy        float32 [R]     of the distribution over all V

    In nats. No log-prob or tail is below the reducer's floor.
    """

    token_ids: Tensor
    logprobs: Tensor
    kept: Tensor
    certain: Tensor
    log_tail: Tensor
    log_tail_half: Tensor
    label_logprob: Tensor
    entropy: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> ReducedRows:
        return ReducedRows(**{name: change(value) for name, value in vars(self).items()})


class InvalidLogits(InputError):
    """A row of logits without a softmax. `row`: its index in the logits of the call."""

    def __init__(self, row: int, found: str) -> None:
        self.row = row
        self.found = found
        super().__init__(
            f"row {row}: expected finite logits (or -inf for masked ids), found {found}; the model diverged or "
            f"overflowed in its dtype: try bfloat16 or float32 instead of float16, or check its weights"
        )


def reduce_topk(
    logits: Tensor, vocabulary_size: int, k: int, labels: Tensor, floor: float, shard: ColumnShard | None = None
) -> ReducedRows:
    """Top-k, tails, label log-prob and entropy of softmax(logits[:, :vocabulary_size]); see the module.

    logits: float32 [R, columns >= V]; -inf masks an id. labels: int64 [R], each under V, or -1 where there is
    no next token. floor: finite, nats; lower values are stored as the floor. Memory beyond the result: on a CPU a few
    MiB per thread; on a GPU `V // W` block maxima and K * W candidates per row, which is little unless K is near V; on
    a GPU without triton about four times a tile of at most 2**26 logits.
    shard: the columns that `logits` cover, if they are only this rank's; then all ranks call this together, with the
    same arguments, and get the same result.
    Raises `InputError` when the logits have fewer than V columns or k is not in 1..V, `InvalidLogits` for a
    row with NaN, +inf, or nothing but -inf.
    """
    return reduce_rows(logits, vocabulary_size, k, labels, floor, None, shard)


def reduce_varopt(
    logits: Tensor,
    vocabulary_size: int,
    k: int,
    labels: Tensor,
    floor: float,
    sampling: Sampling,
    shard: ColumnShard | None = None,
) -> ReducedRows:
    """VarOpt targets of softmax(logits[:, :vocabulary_size]): like `reduce_topk`, with the ids that
    `teachers.reduction.varopt` samples.

    All ids have their exact log-probs; the weight of the sampled ones follows from the tail and their number.
    """
    return reduce_rows(logits, vocabulary_size, k, labels, floor, sampling, shard)


def reduce_rows(
    logits: Tensor,
    vocabulary_size: int,
    k: int,
    labels: Tensor,
    floor: float,
    sampling: Sampling | None,
    shard: ColumnShard | None,
) -> ReducedRows:
    """`reduce_topk` without a sampling, `reduce_varopt` with one."""
    rows = len(logits)
    columns = logits.shape[1] if shard is None else shard.head_columns
    if columns < vocabulary_size:
        raise InputError(
            f"the teacher's head has {columns} columns, the vocabulary {vocabulary_size} ids: "
            f"the teacher was trained with another tokenizer"
        )
    if not 1 <= k <= vocabulary_size:
        raise InputError(f"k must be in 1..{vocabulary_size}, the vocabulary's size; found {k}")
    assert logits.dtype == torch.float32
    assert labels.shape == (rows,)
    assert math.isfinite(floor)
    order = None if sampling is None else sampling.order
    if sampling is not None:
        assert sampling.random.shape in ((rows,), (rows, k))
        assert 0 <= sampling.head_ids < k
        assert order is None or order.shape == (vocabulary_size,)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    result = ReducedRows(
        token_ids=empty(rows, k, dtype=torch.int64),
        logprobs=empty(rows, k),
        kept=empty(rows, dtype=torch.int64).fill_(k),
        certain=empty(rows, dtype=torch.int64).fill_(k),
        log_tail=empty(rows),
        log_tail_half=empty(rows),
        label_logprob=empty(rows),
        entropy=empty(rows),
    )
    size = rows, vocabulary_size, logits.device, order
    view = Rows(*size) if shard is None else ShardedRows(*size, shard)
    for start in range(0, rows, view.tile_rows):
        stop = min(start + view.tile_rows, rows)
        _reduce_tile(
            view,
            view.columns_of(logits[start:stop]),
            labels[start:stop],
            floor,
            start,
            result.each(lambda value, rows=slice(start, stop): value[rows]),  # type: ignore[misc]
            None if sampling is None else sampling.rows(start, stop),
        )
    return result


def _reduce_tile(
    view: Rows,
    logits: Tensor,
    labels: Tensor,
    floor: float,
    first_row: int,
    into: ReducedRows,
    sampling: Sampling | None,
) -> None:
    k = into.token_ids.shape[1]
    row_max, ids, top = view.first(logits, k)  # [T], [T, K], [T, K]
    tail = view.tail(logits, row_max, top, ids)

    # Clamped, because logits of opposite sign near float32's limits would give -inf and then -inf * 0.
    z = (top - row_max[:, None]).clamp_min_(torch.finfo(torch.float32).min)  # [T, K], column 0 is 0
    others = z[:, 1:].exp()
    head_but_max = view.row_sums(others)
    rest = head_but_max + tail.mass  # the whole sum of e^z, without the maximum's 1
    log_sum = torch.log1p(rest)
    log_tail = -torch.log1p((1 + head_but_max) / tail.mass)
    log_tail_half = torch.log(tail.half) - 0.5 * log_sum

    into.token_ids.copy_(ids)
    into.logprobs.copy_((z - log_sum[:, None]).clamp_min_(floor))
    into.entropy.copy_(log_sum - (view.row_sums(z[:, 1:] * others) + tail.weighted) / (1 + rest))
    label_z = view.at(logits, view.columns_with(labels.clamp_min(0))[:, None]).squeeze(1) - row_max
    label_logprob = (label_z - log_sum).clamp_min_(floor)
    into.label_logprob.copy_(label_logprob.masked_fill_(labels < 0, math.nan))

    invalid = ~torch.isfinite(row_max)  # amax propagates NaN; +inf and all -inf show as themselves
    underflown = (tail.mass < _TAIL_UNDERFLOW) & ~invalid
    # One transfer for both flags: on a GPU each one waits for everything above.
    has_invalid, has_underflown = torch.stack([invalid.any(), underflown.any()]).tolist()
    if has_invalid:
        row = int(invalid.nonzero()[0])
        raise InvalidLogits(first_row + row, view.describe(logits, row))
    if k == view.columns:
        into.token_ids.copy_(best(top, view.named(ids), k)[0])
        into.log_tail.fill_(-math.inf)
        into.log_tail_half.fill_(-math.inf)
        return
    if has_underflown:
        for again in torch.split(underflown.nonzero().squeeze(1), view.far_rows):
            far = _far_tail(view, logits[again], ids[again], row_max[again], log_sum[again])
            log_tail[again], log_tail_half[again] = far
    into.log_tail.copy_(log_tail.clamp_min_(floor))
    into.log_tail_half.copy_(log_tail_half.clamp_min_(floor))
    if sampling is not None:
        _sample_tile(view, tail, logits, row_max, z, log_sum, floor, into, sampling)


def _sample_tile(
    view: Rows,
    tail: Tail,
    logits: Tensor,
    row_max: Tensor,
    z: Tensor,
    log_sum: Tensor,
    floor: float,
    into: ReducedRows,
    sampling: Sampling,
) -> None:
    """Replace the top-k in `into` by VarOpt samples; z [T, K] and log_sum [T] are those of `_reduce_tile`."""
    beta = 1.0 / sampling.temperature
    ids, kept, certain = sample(tail.masses(beta), (beta * z).exp(), into.token_ids, sampling)
    columns = torch.arange(z.shape[1], device=z.device)
    left, unused = columns >= certain[:, None], columns >= kept[:, None]
    into.log_tail.copy_(_joined(view, into.log_tail, into.logprobs, left).masked_fill_(certain == 0, 0.0))
    into.log_tail_half.copy_(_joined(view, into.log_tail_half, 0.5 * into.logprobs, left))
    # Of equal ids some may be certain and others not: an order of columns chooses, and not that of ids.
    values = view.at(logits, ids).masked_fill_(unused, -math.inf)
    ids, values = best(values, view.named(ids).masked_fill_(unused, view.columns), z.shape[1], before=~left)
    into.token_ids.copy_(ids)
    into.logprobs.copy_((values - row_max[:, None] - log_sum[:, None]).clamp_min_(floor))
    into.kept.copy_(kept)
    into.certain.copy_(certain)


def _joined(view: Rows, log_tail: Tensor, logs: Tensor, left: Tensor) -> Tensor:
    """log of exp(log_tail) [T] plus the exp(logs) [T, K] that left the head; in log space nothing underflows."""
    terms = torch.cat([log_tail[:, None], logs.masked_fill(~left, -math.inf)], dim=1)
    most = terms.amax(1)
    most.masked_fill_(most == -math.inf, 0.0)
    return view.row_sums((terms - most[:, None]).exp()).log() + most


def _far_tail(view: Rows, logits: Tensor, ids: Tensor, row_max: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """log_tail and log_tail_half of rows whose tail underflows in exp(logit - max)."""
    tail_max, mass, half = view.far_sums(logits, ids)
    gap = tail_max - row_max
    return gap + mass.log() - log_sum, 0.5 * gap + half.log() - 0.5 * log_sum
