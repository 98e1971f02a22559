"""What the likeliest ids of a row say of all others, whoever made the row.

Legend: `R` rows, `K` columns, `V` vocabulary size; of a row, `S` its n certain ids, p their probabilities, `m` the
least of these, `p_t` the mass outside them, and `N = V - n` the number of ids that have it. As S holds the likeliest
ids, each of the others has at most m, so that::

    p_t <= N m
    sum_S -p log p - p_t log min(m, p_t)  <=  H  <=  sum_S -p log p - p_t log(p_t / N)

H, the entropy of the whole distribution, is least where few ids have as much as they can, and most where all of them
have the same. Log-probs and masses are natural logs, float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Log of a mass that float32 numbers near 1 may leave by their rounding alone.
_LEAST_TAIL = -13.0

Rows = NDArray[np.float64]


def log_sums(values: NDArray[Any]) -> Rows:
    """log sum exp of each row [R]; -inf for one without finite numbers."""
    top = values.max(axis=1, initial=-np.inf)
    base = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        found: Rows = base + np.log(np.exp(values - base[:, None]).sum(axis=1))
    return found


def least_logprob(logprobs: Rows) -> Rows:
    """log m of each row [R] of logprobs [R, K], -inf in columns that are none; of a row without ids inf."""
    found: Rows = np.where(logprobs > -np.inf, logprobs, np.inf).min(axis=1, initial=np.inf)
    return found


def most_outside(least: Rows, others: NDArray[np.int64]) -> Rows:
    """log(N m) of each row, no less than what rounding makes; least, others [R]: log m, and N."""
    with np.errstate(divide="ignore"):
        found: Rows = np.maximum(np.log(others) + least, _LEAST_TAIL)
    return found


def entropy_bounds(logprobs: Rows, log_outside: Rows, others: NDArray[np.int64]) -> tuple[Rows, Rows]:
    """The least and the largest entropy [R] of rows, in nats.

    logprobs [R, K] of the certain ids, -inf in columns that are none; log_outside, others [R]: log p_t, and N.
    """
    known = logprobs > -np.inf
    heads = -(np.exp(logprobs) * np.where(known, logprobs, 0.0)).sum(axis=1)
    there = (log_outside > -np.inf) & (others > 0)
    log_mass = np.where(there, log_outside, 0.0)
    mass = np.where(there, np.exp(log_mass), 0.0)
    each = np.minimum(least_logprob(logprobs), log_mass)
    return heads - mass * each, heads - mass * (log_mass - np.log(np.maximum(others, 1)))
