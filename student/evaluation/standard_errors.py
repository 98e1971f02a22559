"""Standard errors of accuracies on minimal pairs, over the pairs of given paradigms, as lm-eval computes them.

Legend: paradigm `i` has `n_i` pairs, whose outcomes (1 right, 0 wrong, or a difference or mean of such) have the sample
variance ``s_i^2``, with ``n_i - 1`` in the denominator.

    of a paradigm      s_i / sqrt(n_i)
    of a group         sqrt(sum (n_i - 1) s_i^2 / sum (n_i - 1) / sum n_i), over its paradigms
    of a mean of m     sqrt(sum e_j^2) / m, of accuracies with the errors e_j, whose pairs are different ones

They say how far the accuracy may be off for the choice of pairs, and nothing about other seeds of a model. Of two
models on the same pairs, the error of their difference is that of the pairs' differences: most of it cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def of_outcomes(paradigms: Sequence[NDArray[np.float64]]) -> float | None:
    """The standard error of the mean of all outcomes; None where a paradigm has fewer than two pairs."""
    sizes = [len(outcomes) for outcomes in paradigms]
    if not sizes or min(sizes) < 2:
        return None
    squares = sum((size - 1) * float(found.var(ddof=1)) for size, found in zip(sizes, paradigms, strict=True))
    return math.sqrt(squares / (sum(sizes) - len(sizes)) / sum(sizes))


def of_mean(errors: Sequence[float | None]) -> float | None:
    """The standard error of the unweighted mean of accuracies; None where one of theirs is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None
