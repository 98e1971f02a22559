"""Pruning: fewer ids per position, without the teacher; the mass of removed ids is added to the tail, exactly.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size.

Of a row with log-probs `l_0 >= l_1 >= …`, all certain, the leading `kept'` stay::

    kept'          = min(kept, k, the least j with sum_{i<j} exp(l_i) >= top_p * total)
    log_tail'      = log(exp(log_tail)      + sum_{kept' <= i < kept} exp(l_i))
    log_tail_half' = log(exp(log_tail_half) + sum_{kept' <= i < kept} exp(l_i / 2))

`total` is the mass of the row as stored, its tail included: 1, up to the quantisation error of its log-probs.

The label's log-prob and the entropy are of the whole distribution and stay as they are. Sums are float64 and in log
space: the exponential of a log-prob at the floor can underflow. The stored tail is the exact sum over its own ids, so
the only error of a new one is that of the log-probs that joined it: half a step of their codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.targets import SparseTargets, leading_columns


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

    dropped = np.where(leading_columns(kept, targets.k), -np.inf, logprobs)
    valid = leading_columns(kept, k)
    ids = targets.token_ids[:, :k]
    return replace(
        targets,
        token_ids=np.where(valid, ids, np.iinfo(ids.dtype).max).astype(ids.dtype),
        kept=kept,
        certain=np.minimum(targets.certain, kept),
        logprobs=np.where(valid, _floored(targets.logprobs[:, :k], floor), np.float32(-np.inf)),
        log_tail=None if targets.log_tail is None else _floored(_joined(targets.log_tail, dropped), floor),
        log_tail_half=(
            None if targets.log_tail_half is None else _floored(_joined(targets.log_tail_half, dropped / 2), floor)
        ),
        label_logprob=None if targets.label_logprob is None else _floored(targets.label_logprob, floor),
    )


def _joined(log_tail: NDArray[np.float32], dropped: NDArray[np.float64]) -> NDArray[np.float32]:
    """log of exp(log_tail) + the sum of exp(dropped) along each row; -inf where both are 0."""
    terms = np.concatenate([log_tail[:, None].astype(np.float64), dropped], axis=1)
    joined: NDArray[np.float64] = np.logaddexp.reduce(terms, axis=1)
    return joined.astype(np.float32)


def _floored(values: NDArray[Any], floor: float) -> NDArray[np.float32]:
    """Raise finite values to the floor; -inf (no mass) and NaN (no label) stay."""
    return np.where(np.isneginf(values), values, np.maximum(values, np.float32(floor)))
