"""Fewer ids per position, or fewer positions, without the teacher.

Legend: `T` positions, `K` stored ids per position, `k` those that stay, `S` rows with more than k ids.

**Pruning.** Of a row with log-probs `l_0 >= l_1 >= …`, all certain, the leading `kept'` stay, and the mass of the
others joins the tail::

    kept'          = min(kept, k, the least j with sum_{i<j} exp(l_i) >= top_p * total)
    log_tail'      = log(exp(log_tail)      + sum_{kept' <= i < kept} exp(l_i))
    log_tail_half' = log(exp(log_tail_half) + sum_{kept' <= i < kept} exp(l_i / 2))

`total` is the mass of the row as stored, its tail included: 1, up to the quantisation error of its log-probs.

The label's log-prob and the entropy are of the whole distribution and stay as they are. Sums are float64 and in log
space: the exponential of a log-prob at the floor can underflow. The stored tail is the exact sum over its own ids, so
the only error of a new one is that of the log-probs that joined it: half a step of their codes.

**Shrinking.** A row with sampled ids is a weighted sample, and is sampled again. With `tau` the temperature that it was
sampled for, its certain ids weigh ``a_i = p_i**(1/tau)``, the `m` sampled ones ``w = R / m`` each, R the mass
``sum p**(1/tau)`` outside the certain ids. The rule is that of the first sample (VarOpt, Cohen et al. 2011)::

    n  = the number of certain ids with a_i >= (R + sum a) / k
    k' = n + ceil(k (1 - sum_{i<=n} a_i / (R + sum a))), rounded up to a multiple of 8, k at most; of fixed samples k
    j  = the least number, head_ids at least, with max(a_{j+1}, w) (k' - j) <= R'  for  R' = R + sum_{i>j} a_i
    the first j ids stay certain; of the others, certain ones before or sampled, k' - j ids are sampled, each with the
    inclusion probability (k' - j) a_i / R' or (k' - j) w / R', and weigh R' / (k' - j)

so that the mean of a row's weights is what they were, and their sum is. The others are laid end to end in the entry's
order of ids, each as long as its weight, and k' - j points R' / (k' - j) apart, shifted by one random number, sample
those that they fall in, however the ids were sampled first. The masses of ids that are certain no longer join both
tails, exactly. Lengths are whole numbers, 2**30 to an interval, so that no id is longer than an interval and comes
twice; rounding them down changes an inclusion probability by less than 2**-30. Where all ids are certain and those
beyond the k' first have less than 2**-53 of the mass, these k' stay, and nothing is sampled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.chance import SHRINKING, uniforms
from storage.format.targets import SparseTargets, leading_columns

SIZE_UNIT = 8
"""Rows of threshold sampling hold a multiple of so many ids, or K."""
_INTERVAL_BITS = 30  # times k <= 2**16 ids an interval fits int64
_LEAST_REST = 2.0**-53
_LEAST_LOG_WEIGHT = -600.0  # below the largest of a row: neither it nor the unit of such a rest leaves float64


def prune(targets: SparseTargets, k: int, top_p: float | None, floor: float) -> SparseTargets:
    """The targets with at most `k` columns, and each row cut where its mass first reaches `top_p` (None: nowhere).

    A row whose ids together stay below `top_p` keeps them all. Log-probs and tails under `floor` (nats) become
    it. Rows with sampled ids (`certain < kept`) must stay whole: dropping some of a sample
    would bias it, and the caller refuses that.
    """
    logprobs = targets.logprobs.astype(np.float64)  # [T, K], -inf from column kept on
    kept = np.minimum(targets.kept, k)
    if top_p is not None:
        mass = np.cumsum(np.exp(logprobs), axis=1)
        outside = np.zeros(len(targets)) if targets.log_tail is None else np.exp(targets.log_tail.astype(np.float64))
        short = mass < top_p * (mass[:, -1] + outside)[:, None]
        kept = np.minimum(kept, short.sum(axis=1) + 1)
    kept = kept.astype(np.uint16)
    cut = kept < targets.kept
    assert (targets.certain == targets.kept)[cut].all(), "a sample is kept whole"

    valid = leading_columns(kept, k)
    ids = targets.token_ids[:, :k]
    pruned = _with_more_outside(targets, ~leading_columns(kept, targets.k))
    per_position = ("log_tail", "log_tail_half", "label_logprob")
    floored: dict[str, Any] = {
        name: _floored(values, floor) for name, values in pruned.arrays().items() if name in per_position
    }
    return replace(
        pruned,
        token_ids=np.where(valid, ids, np.iinfo(ids.dtype).max).astype(ids.dtype),
        kept=kept,
        certain=np.minimum(targets.certain, kept),
        logprobs=np.where(valid, _floored(targets.logprobs[:, :k], floor), np.float32(-np.inf)),
        **floored,
    )


def shrink(
    targets: SparseTargets,
    k: int,
    temperature: float,
    head_ids: int,
    seed: int,
    order: NDArray[Any] | None = None,
    threshold: bool = False,
) -> SparseTargets:
    """The targets with at most `k` ids per row, sampled again from the rows that have more: the module has the rule.

    temperature: 1 or 2, the one that ids were sampled for; head_ids: so many of the certain ids stay certain, under k;
    seed: keys the random numbers, one for each absolute position, so that a row does not depend on its shard; order
    [V]: the ids in the order in which they lie, None where that is theirs; threshold: whether the sample is one by a
    threshold. Sampled ids need no log-probs.
    """
    assert head_ids < k
    kept = np.minimum(targets.kept, k)
    if threshold:
        weights, is_sampled = _weights(targets, targets.kept > 0, temperature)
        kept[targets.kept > 0] = np.minimum(kept[targets.kept > 0], _sizes(weights, is_sampled, k, head_ids))
    rows = targets.kept > kept
    chance = uniforms(seed, SHRINKING, targets.start, targets.stop, 1)[rows, 0]
    places = targets.token_ids[rows].astype(np.int64)
    if order is not None:
        # Beyond the kept ids stands none, which needs no place.
        places = np.argsort(order)[np.where(targets.is_kept[rows], places, 0)]
    sizes = kept[rows].astype(np.int64)
    found, chosen = _sampled_again(places, *_weights(targets, rows, temperature), sizes, head_ids, chance)
    columns = np.tile(np.arange(k), (len(targets), 1))
    columns[rows] = chosen[:, :k]
    certain = targets.certain.copy()
    certain[rows] = found
    shrunk = _with_more_outside(targets, targets.is_certain & ~leading_columns(certain, targets.k))
    ids, logprobs = (np.take_along_axis(values, columns, axis=1) for values in (targets.token_ids, targets.logprobs))
    valid = leading_columns(kept, k)
    return replace(
        shrunk,
        token_ids=np.where(valid, ids, np.iinfo(ids.dtype).max).astype(ids.dtype),
        kept=kept,
        certain=certain,
        logprobs=np.where(valid, logprobs, np.float32(-np.inf)),
    )


def without_rows(targets: SparseTargets, wanted: NDArray[np.bool_]) -> SparseTargets:
    """The targets without those of the rows that are not `wanted` [T]."""
    per_id = {"token_ids": np.iinfo(targets.token_ids.dtype).max, "logprobs": -np.inf}
    values: dict[str, Any] = {
        name: np.where(wanted.reshape(-1, *[1] * (array.ndim - 1)), array, per_id.get(name, np.nan)).astype(array.dtype)
        for name, array in targets.arrays().items()
        if name not in ("kept", "certain")
    }
    return replace(targets, kept=targets.kept * wanted, certain=targets.certain * wanted, **values)


def _weights(
    targets: SparseTargets, rows: NDArray[np.bool_], temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The weights of the ids of some rows, [S, K], 0 beyond those kept, in any unit of their row; which are sampled."""
    outside = targets.log_tail if temperature == 1.0 else targets.log_tail_half
    assert outside is not None
    assert temperature in (1.0, 2.0)
    is_kept, is_certain = targets.is_kept[rows], targets.is_certain[rows]
    is_sampled = is_kept & ~is_certain
    share = outside[rows].astype(np.float64) - np.log(is_sampled.sum(axis=1).clip(1))
    logs = np.where(is_certain, targets.logprobs[rows].astype(np.float64) / temperature, share[:, None])
    logs = np.where(is_kept, logs, -np.inf)
    below = np.maximum(logs - logs.max(axis=1, keepdims=True), _LEAST_LOG_WEIGHT)
    return np.where(is_kept, np.exp(below), 0.0), is_sampled


def _sizes(weights: NDArray[np.float64], is_sampled: NDArray[np.bool_], k: int, head_ids: int) -> NDArray[np.int64]:
    """How many ids each row holds by a threshold of 1 / k, int64 [S], of weights [S, K]; the module has the rule."""
    total = weights.sum(axis=1)
    likely = ((weights * k >= total[:, None]) & ~is_sampled).sum(axis=1).clip(head_ids)
    left = np.where(np.arange(weights.shape[1]) >= likely[:, None], weights, 0.0).sum(axis=1)
    wanted = likely + np.ceil(left * k / total).astype(np.int64)
    found: NDArray[np.int64] = (-(-wanted // SIZE_UNIT) * SIZE_UNIT).clip(max=k)
    return found


def _sampled_again(
    places: NDArray[np.int64],
    weights: NDArray[np.float64],
    is_sampled: NDArray[np.bool_],
    k: NDArray[np.int64],
    head_ids: int,
    chance: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The number of certain ids [S], and the columns [S, K], of which the k [S] that are chosen come first: certain
    ones, then by place."""
    columns = np.arange(places.shape[1])
    certain = _certain(weights, is_sampled, k, np.full(len(places), head_ids))
    rest = np.where(columns >= certain[:, None], weights, 0.0)
    left = _suffix_sums(rest)[:, 0]
    nothing_left = (left < _LEAST_REST * _suffix_sums(weights)[:, 0]) & ~is_sampled.any(axis=1)
    certain = np.where(nothing_left, k, certain)

    # The unit: from here on all sums are exact.
    unit = np.divide((k - certain) * 2.0**_INTERVAL_BITS, left, out=np.zeros(len(places)), where=certain < k)
    lengths = (rest * unit[:, None]).astype(np.int64)
    certain = _certain(lengths, is_sampled, k, certain)
    is_certain = columns < certain[:, None]
    # Certain ids, of no length, come first, in their own order; beyond the kept ones nothing has a length either.
    order = np.where(is_certain, columns - len(columns), places).argsort(axis=1, kind="stable")
    ends = np.take_along_axis(np.where(is_certain, 0, lengths), order, axis=1).cumsum(axis=1)
    number = (k - certain)[:, None]
    interval = ends[:, -1:] // number.clip(1)
    shift = (chance[:, None] * interval).astype(np.int64)
    # How many of the points shift, shift + interval, … lie before each end.
    passed = (-((shift - ends) // interval.clip(1))).clip(0, number)
    is_chosen = is_certain | (np.diff(passed, axis=1, prepend=0) > 0)
    assert np.array_equal(is_chosen.sum(axis=1), k), "no id is longer than an interval"
    return certain, np.take_along_axis(order, np.argsort(~is_chosen, axis=1, kind="stable"), axis=1)


def _certain(
    weights: NDArray[Any], is_sampled: NDArray[np.bool_], k: NDArray[np.int64], least: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The least j >= `least` [S] with max(a_{j+1}, w) (k - j) <= R', or k; it holds for every larger j then.

    R' is no less than k - j times the largest weight in it: less one weight, it is no less than k - j - 1 times that.
    """
    columns = np.arange(weights.shape[1])
    number = k[:, None] - columns
    largest = np.maximum(weights, np.where(is_sampled, weights, 0).max(axis=1, keepdims=True))
    holds = (largest * number <= _suffix_sums(weights)) & (columns >= least[:, None]) & (number > 0)
    found: NDArray[np.int64] = k - holds.sum(axis=1)
    return found


def _suffix_sums(values: NDArray[Any]) -> NDArray[Any]:
    """The sum of each column [S, K] and those after it, from the last one on, whatever rows stand beside it."""
    sums: NDArray[Any] = values[:, ::-1].cumsum(axis=1)[:, ::-1]
    return sums


def _with_more_outside(targets: SparseTargets, leaving: NDArray[np.bool_]) -> SparseTargets:
    """The targets, with the masses of the ids `leaving` [T, K] in their tails; -inf where both are 0."""
    rows = (leaving & targets.is_kept).any(axis=1)
    logs = np.where(leaving, targets.logprobs, -np.inf)[rows].astype(np.float64)
    tails: dict[str, Any] = {}
    for name, power in (("log_tail", 1.0), ("log_tail_half", 0.5)):
        if getattr(targets, name) is not None:
            tails[name] = getattr(targets, name).copy()
            terms = np.concatenate([tails[name][rows, None], power * logs], axis=1)
            tails[name][rows] = np.logaddexp.reduce(terms, axis=1)
    return replace(targets, **tails)


def _floored(values: NDArray[Any], floor: float) -> NDArray[np.float32]:
    """Raise finite values to the floor; -inf (no mass) and NaN (no label) stay."""
    return np.where(np.isneginf(values), values, np.maximum(values, np.float32(floor)))
