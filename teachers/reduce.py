"""Logits to what is stored of them: ids, tails, the label's log-prob and the entropy; exact, in float32.

Legend: `R` rows, `T` rows of one tile, `V` vocabulary size, `K` kept ids, `W` width of a block, `M` blocks.

The naive form, with z = logits[:, :V], p = softmax(z) and S the K ids that come first in the order
(logit descending, id ascending)::

    logprobs = log p[S]    label_logprob = log p[label]    entropy = -sum p log p
    log_tail = log sum_{j not in S} p_j    log_tail_half = log sum_{j not in S} sqrt(p_j)

VarOpt targets start from the same S: its first ids stay, the others give way to sampled ones (`teachers.sample`),
and the tails take in what left: they are of the ids that are not certain.

`torch.topk` over a whole row costs more than everything else together, and leaves the order of equal logits
undefined. Instead, the row is cut into blocks of W columns. The K best columns lie in the K blocks with the
best maxima, as long as one order (value, then the smaller id) ranks both, so only K * W columns are sorted.
That order is an int64 key, which only block maxima and candidates get.

All that is done to V columns of every row are the `Passes` of `_reduce_tile`; the formulas around them see numbers
per row, per block and per kept id. On a GPU the passes are Triton kernels (`teachers.triton_reduce`) that read the
logits and write nothing of their size; elsewhere, or without triton, they are torch's operators over a tile of rows.

Precision: everything is float32. The K chosen entries are left out of the sums, so that a tail is the
sum of its own terms, never one minus something; the normaliser is `log1p` of everything but the maximum, so
that a log-prob near zero keeps its digits. Against float64, log-probs and log-tails are within 1e-6 nats plus
3e-7 of their size, the entropy within 1e-6 of its size (`tests/test_reduce.py`); log_softmax alone was off by
2e-5 nats at 128k ids.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from storage.errors import InputError
from teachers.row_sums import row_nansums, row_sums
from teachers.sample import Masses, Sampling, TensorMasses, draw

# Under 32 columns torch's maximum over the last dimension is not vectorised and costs five times as much; among
# few columns that still pays.
_LEAST_FAST_BLOCK = 32
_LEAST_BLOCK = 8
_SHORT_ROW = 8192
# The two buffers of a tile (2 MiB each) should stay in cache between torch's passes; on a GPU only memory matters.
_CPU_TILE_LOGITS_PER_THREAD = 1 << 19
_GPU_TILE_LOGITS = 1 << 26
# A tail sum under this may have lost terms to underflow (float32 exp ends at e^-87, and a quarter of a
# million ids there are less than 1e-6 of e^-60): such rows are summed again relative to the tail's maximum.
_TAIL_UNDERFLOW = math.exp(-60.0)
_LAST_ID = (1 << 31) - 1


@dataclass(frozen=True)
class ReducedRows:
    """What is kept of R rows of logits; all tensors on the logits' device.

    token_ids      int64 [R, K]    most probable first, equal logits by ascending id
    logprobs       float32 [R, K]  of these ids, normalised over all V
    certain        int64 [R]       how many of them are there with certainty, the first ones; K for top-k
    log_tail       float32 [R]     log of the mass of the V - certain other ids; -inf exactly when there are none
    log_tail_half  float32 [R]     log of their sum of p**0.5; -inf exactly when there are none
    label_logprob  float32 [R]     log-prob of the label; NaN exactly where the label is -1
    entropy        float32 [R]     of the distribution over all V

    Nats. No log-prob or tail lies under the floor that the reducer was given.
    """

    token_ids: Tensor
    logprobs: Tensor
    certain: Tensor
    log_tail: Tensor
    log_tail_half: Tensor
    label_logprob: Tensor
    entropy: Tensor


class InvalidLogits(InputError):
    """A row of logits without a softmax. `row` counts from the first row that was handed in."""

    def __init__(self, row: int, found: str) -> None:
        self.row = row
        self.found = found
        super().__init__(
            f"row {row}: expected finite logits (or -inf for masked ids), found {found}; the model diverged or "
            f"overflowed in its dtype: try bfloat16 or float32 in place of float16, or check its weights"
        )


def rows_per_chunk(columns: int, budget_bytes: int) -> int:
    """How many rows of `columns` float32 logits fit the budget: at least 1, a multiple of 64 where 64 fit.

    The multiple keeps the matrix product of a full chunk on its fastest shapes.

    >>> rows_per_chunk(16_000, 64 << 20), rows_per_chunk(250_000, 1 << 20)
    (1024, 1)
    """
    rows = max(1, budget_bytes // (4 * columns))
    return rows - rows % 64 if rows >= 64 else rows


def reduce_topk(logits: Tensor, vocabulary_size: int, k: int, labels: Tensor, floor: float) -> ReducedRows:
    """Top-k, tails, label log-prob and entropy of softmax(logits[:, :vocabulary_size]); see the module.

    logits: float32 [R, columns >= V]; -inf masks an id. labels: int64 [R], each under V, or -1 where there is
    no next token. floor: finite, nats; what lies lower is stored as it. Memory beyond the result: on a CPU a few MiB
    per thread; on a GPU what `V // W` block maxima and K * W candidates per row take, which is little unless K comes
    near V; there without triton about four times a tile of at most 2**26 logits.
    Raises `InputError` when the logits have fewer than V columns or k is not in 1..V, `InvalidLogits` for a
    row with NaN, +inf, or nothing but -inf.
    """
    return _reduce(logits, vocabulary_size, k, labels, floor, None)


def reduce_varopt(
    logits: Tensor, vocabulary_size: int, k: int, labels: Tensor, floor: float, sampling: Sampling
) -> ReducedRows:
    """VarOpt targets of softmax(logits[:, :vocabulary_size]): like `reduce_topk`, with ids as `teachers.sample` says.

    All ids have their exact log-probs; what the drawn ones weigh follows from the tail and their number.
    """
    assert sampling.random.shape == labels.shape
    assert 0 <= sampling.head_ids < k
    return _reduce(logits, vocabulary_size, k, labels, floor, sampling)


def _reduce(
    logits: Tensor, vocabulary_size: int, k: int, labels: Tensor, floor: float, sampling: Sampling | None
) -> ReducedRows:
    rows, columns = logits.shape
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

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    result = ReducedRows(
        token_ids=empty(rows, k, dtype=torch.int64),
        logprobs=empty(rows, k),
        certain=empty(rows, dtype=torch.int64).fill_(k),
        log_tail=empty(rows),
        log_tail_half=empty(rows),
        label_logprob=empty(rows),
        entropy=empty(rows),
    )
    passes = _passes(rows, vocabulary_size, logits.device)
    for start in range(0, rows, passes.tile_rows):
        stop = min(start + passes.tile_rows, rows)
        _reduce_tile(
            passes,
            logits[start:stop, :vocabulary_size],
            labels[start:stop],
            floor,
            start,
            ReducedRows(**{name: value[start:stop] for name, value in vars(result).items()}),
            None if sampling is None else sampling.rows(start, stop),
        )
    return result


class Tail(Protocol):
    """The columns of T rows outside their K first ones; z = logits - the row's maximum.

    mass, half, weighted  float32 [T]  the sums over them of e^z, e^(z/2) and z e^z
    """

    mass: Tensor
    half: Tensor
    weighted: Tensor

    def masses(self, beta: float) -> Masses:
        """Their masses e^(beta z)."""
        ...


class Passes(Protocol):
    """What is done to all V columns of rows: of logits float32 [T, V], in rows of any stride, with T <= tile_rows."""

    tile_rows: int

    def block_maxima(self, logits: Tensor, width: int) -> Tensor:
        """[T, V // width]: the maxima of runs of `width` columns, NaN where one has a NaN; a shorter last run is
        left out."""
        ...

    def tail(self, logits: Tensor, row_max: Tensor, top: Tensor, ids: Tensor) -> Tail:
        """What lies outside the K first columns: `top` [T, K] are their logits, `ids` int64 [T, K], in order."""
        ...

    def row_sums(self, values: Tensor) -> Tensor:
        """The sums [T] of [T, n], n of any size."""
        ...


def _passes(rows: int, vocabulary_size: int, device: torch.device) -> Passes:
    if _has_kernels(device):
        from teachers.triton_reduce import TritonPasses

        return TritonPasses(rows)
    return _TorchPasses(rows, vocabulary_size, device)


def _has_kernels(device: torch.device) -> bool:
    """Whether the passes are Triton's, which are tried once. `LOGIT_CACHE_KERNELS=torch` does without them."""
    wanted = os.environ.get("LOGIT_CACHE_KERNELS") != "torch"
    return wanted and device.type == "cuda" and importlib.util.find_spec("triton") is not None and _compile(device)


@functools.cache
def _compile(device: torch.device) -> bool:
    """True; InputError where kernels do not compile. Torch's passes would round differently, on one worker of many."""
    from teachers.triton_reduce import TritonPasses

    try:
        TritonPasses(1).block_maxima(torch.zeros(1, _LEAST_FAST_BLOCK, device=device), _LEAST_FAST_BLOCK)
    except Exception as error:  # whatever stops a compiler
        raise InputError(
            f"Triton kernels cannot be compiled for {device} ({type(error).__name__}: {str(error).strip()[:200]}): "
            f"install a C compiler, or set LOGIT_CACHE_KERNELS=torch for every worker of the entry"
        ) from error
    return True


class _TorchPasses:
    def __init__(self, rows: int, vocabulary_size: int, device: torch.device) -> None:
        self.tile_rows = max(1, min(rows, _tile_logits(device) // vocabulary_size))
        # Two buffers for all tiles: fresh ones would cost a page fault per 4 KiB in every pass.
        self._buffers = torch.empty(2, self.tile_rows, vocabulary_size, dtype=torch.float32, device=device)

    def block_maxima(self, logits: Tensor, width: int) -> Tensor:
        return _block_maxima(logits, width)

    def tail(self, logits: Tensor, row_max: Tensor, top: Tensor, ids: Tensor) -> Tail:
        return _TorchTail(logits, row_max, ids, self._buffers[:, : len(logits)])

    def row_sums(self, values: Tensor) -> Tensor:
        return row_sums(values)


class _TorchTail:
    def __init__(self, logits: Tensor, row_max: Tensor, ids: Tensor, buffers: Tensor) -> None:
        half_z, mass = buffers  # [T, V] each
        # z/2 = (logit - max)/2 in one pass; halving first also keeps two huge logits from overflowing.
        torch.add(row_max[:, None] * -0.5, logits, alpha=0.5, out=half_z)
        torch.exp(half_z, out=mass)
        mass.scatter_(1, ids, 0.0)
        self.half = row_sums(mass)
        mass.mul_(mass)  # one exp per element: e^z is the square of e^(z/2)
        self.mass = row_sums(mass)
        half_z.mul_(mass)
        self.weighted = 2 * row_nansums(half_z)  # NaN here is -inf * 0, a masked id; it adds nothing to the entropy
        self._logits, self._row_max, self._ids, self._buffers = logits, row_max, ids, buffers

    def masses(self, beta: float) -> Masses:
        scratch, mass = self._buffers  # e^z is still in the second
        if beta != 1.0:
            torch.add(self._row_max[:, None] * -beta, self._logits, alpha=beta, out=mass)
            torch.exp(mass, out=mass)
            mass.scatter_(1, self._ids, 0.0)
        return TensorMasses(mass, scratch)


def _tile_logits(device: torch.device) -> int:
    return _CPU_TILE_LOGITS_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else _GPU_TILE_LOGITS


def _reduce_tile(
    passes: Passes,
    logits: Tensor,
    labels: Tensor,
    floor: float,
    first_row: int,
    into: ReducedRows,
    sampling: Sampling | None,
) -> None:
    k, vocabulary_size = into.token_ids.shape[1], logits.shape[1]
    row_max, ids, top = _select(passes, logits, k)  # [T], [T, K], [T, K]
    tail = passes.tail(logits, row_max, top, ids)

    # Clamped, because logits of opposite sign near float32's limits would give -inf and then -inf * 0.
    z = (top - row_max[:, None]).clamp_min_(torch.finfo(torch.float32).min)  # [T, K], column 0 is 0
    others = z[:, 1:].exp()
    head_but_max = passes.row_sums(others)
    rest = head_but_max + tail.mass  # the whole sum of e^z, without the maximum's 1
    log_sum = torch.log1p(rest)
    log_tail = -torch.log1p((1 + head_but_max) / tail.mass)
    log_tail_half = torch.log(tail.half) - 0.5 * log_sum

    into.token_ids.copy_(ids)
    into.logprobs.copy_((z - log_sum[:, None]).clamp_min_(floor))
    into.entropy.copy_(log_sum - (passes.row_sums(z[:, 1:] * others) + tail.weighted) / (1 + rest))
    label_z = logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1) - row_max
    label_logprob = (label_z - log_sum).clamp_min_(floor)
    into.label_logprob.copy_(label_logprob.masked_fill_(labels < 0, math.nan))

    invalid = ~torch.isfinite(row_max)  # amax hands on NaN; +inf and all -inf show as themselves
    underflown = (tail.mass < _TAIL_UNDERFLOW) & ~invalid
    # One transfer for both questions: on a GPU each one waits for everything above.
    has_invalid, has_underflown = torch.stack([invalid.any(), underflown.any()]).tolist()
    if has_invalid:
        row = int(invalid.nonzero()[0])
        raise InvalidLogits(first_row + row, _describe(logits[row]))
    if k == vocabulary_size:
        into.log_tail.fill_(-math.inf)
        into.log_tail_half.fill_(-math.inf)
        return
    if has_underflown:
        at_once = max(1, _tile_logits(logits.device) // vocabulary_size)
        for again in torch.split(underflown.nonzero().squeeze(1), at_once):
            far = _far_tail(passes, logits[again], ids[again], row_max[again], log_sum[again])
            log_tail[again], log_tail_half[again] = far
    into.log_tail.copy_(log_tail.clamp_min_(floor))
    into.log_tail_half.copy_(log_tail_half.clamp_min_(floor))
    if sampling is not None:
        _sample_tile(passes, tail, logits, row_max, z, log_sum, floor, into, sampling)


def _sample_tile(
    passes: Passes,
    tail: Tail,
    logits: Tensor,
    row_max: Tensor,
    z: Tensor,
    log_sum: Tensor,
    floor: float,
    into: ReducedRows,
    sampling: Sampling,
) -> None:
    """Put VarOpt samples in the place of the top-k in `into`; z [T, K] and log_sum [T] are those of `_reduce_tile`."""
    beta = 1.0 / sampling.temperature
    ids, certain = draw(tail.masses(beta), (beta * z).exp(), into.token_ids, sampling)
    left = torch.arange(z.shape[1], device=z.device) >= certain[:, None]
    into.log_tail.copy_(_joined(passes, into.log_tail, into.logprobs, left).masked_fill_(certain == 0, 0.0))
    into.log_tail_half.copy_(_joined(passes, into.log_tail_half, 0.5 * into.logprobs, left))
    ids, values = _best(logits.gather(1, ids), ids, z.shape[1])
    into.token_ids.copy_(ids)
    into.logprobs.copy_((values - row_max[:, None] - log_sum[:, None]).clamp_min_(floor))
    into.certain.copy_(certain)


def _joined(passes: Passes, log_tail: Tensor, logs: Tensor, left: Tensor) -> Tensor:
    """log of exp(log_tail) [T] and those of exp(logs) [T, K] that left the head; in log space nothing underflows."""
    terms = torch.cat([log_tail[:, None], logs.masked_fill(~left, -math.inf)], dim=1)
    most = terms.amax(1)
    most.masked_fill_(most == -math.inf, 0.0)
    return passes.row_sums((terms - most[:, None]).exp()).log() + most


def _far_tail(passes: Passes, logits: Tensor, ids: Tensor, row_max: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """log_tail and log_tail_half of rows whose tail lies below what exp(logit - max) can hold."""
    tail = logits.scatter(1, ids, -math.inf)
    tail_max = tail.amax(1)
    z = tail - tail_max.masked_fill(tail_max == -math.inf, 0.0)[:, None]
    gap = tail_max - row_max
    return (
        gap + passes.row_sums(z.exp()).log() - log_sum,
        0.5 * gap + passes.row_sums((0.5 * z).exp()).log() - 0.5 * log_sum,
    )


def _select(passes: Passes, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row maxima [T] (NaN where a row has one); ids and logits [T, K] of the K best columns, in order."""
    width = _block_width(logits.shape[1], k)
    if width == 1:
        return logits.amax(1), *_best(logits, torch.arange(logits.shape[1], device=logits.device), k)
    ids, row_max = _candidates(logits, None, k, width, passes.block_maxima)  # [T, K * W + remainder], [T]
    values = logits.gather(1, ids)
    while (width := _block_width(values.shape[1], k)) > 1:
        positions, _ = _candidates(values, ids, k, width, _block_maxima)
        values, ids = values.gather(1, positions), ids.gather(1, positions)
    return row_max, *_best(values, ids, k)


def _candidates(
    values: Tensor, ids: Tensor | None, k: int, width: int, block_maxima: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """The positions [T, <= n] among n columns in which the K best must lie, and the row maxima [T].

    ids: int64 [T, n], or None where columns are ids. Each run of `width` columns has ascending ids, so of two
    runs with equal maxima the one with the smaller first id holds the better column.
    """
    rows, columns = values.shape
    whole = columns // width * width
    maxima = block_maxima(values, width)  # [T, M]
    row_max = maxima.amax(1)
    first_ids = torch.arange(0, whole, width, device=values.device) if ids is None else ids[:, :whole:width]
    chosen = _ordered_keys(maxima, first_ids).topk(k, sorted=False).indices  # [T, K]
    positions = torch.arange(width, device=values.device)
    positions = (chosen[:, :, None] * width + positions).flatten(1)  # [T, K * W]
    if whole < columns:  # a last, shorter run is always among the candidates
        remainder = torch.arange(whole, columns, device=values.device)
        positions = torch.cat([positions, remainder.expand(rows, -1)], dim=1)
        row_max = torch.maximum(row_max, values[:, whole:].amax(1))
    return positions, row_max


def _block_maxima(values: Tensor, width: int) -> Tensor:
    blocks = values.shape[1] // width
    return values[:, : blocks * width].reshape(len(values), blocks, width).amax(2)


def _best(values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _unpack(_ordered_keys(values, ids).topk(k).values)


def _block_width(columns: int, k: int) -> int:
    """A power of two near sqrt(columns / k), which balances blocks against candidates; 1: no blocks."""
    least = _LEAST_BLOCK if columns <= _SHORT_ROW else _LEAST_FAST_BLOCK
    width = max(least, 1 << round(math.log2(columns / k) / 2))
    return width if 2 * k * width < columns else 1


def _ordered_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys, all different within a row, that descend by (value descending, id ascending)."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into +0.0: they are equal logits
    # A negative float's pattern grows with its magnitude; flipping the magnitude makes integers order floats.
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return ordered.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(_LAST_ID - ids)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The ids and values that `_ordered_keys` packed."""
    ordered = (keys >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return _LAST_ID - (keys & 0xFFFFFFFF), values


def _describe(row: Tensor) -> str:
    if bool(row.isnan().any()):
        return f"{int(row.isnan().sum())} NaN, the first at id {int(row.isnan().nonzero()[0])}"
    if bool((row == math.inf).any()):
        return f"+inf at id {int((row == math.inf).nonzero()[0])}"
    return "-inf everywhere"
