"""Which token of the text rows of targets are about, the next one or their own, as the text itself shows it.

A teacher gives the token that is there far more probability than it gives that token's neighbour. So each row is held
against both: the mean log-prob of the right one is far higher, and where neither is, the rows belong to other tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from logit_cache.fidelity.row_bounds import least_logprob

Reading = Literal["after", "of"]
"""What a row is about: the token that follows the one at which it stands (after), or that token itself (of)."""

# Of the difference of the means: standard errors, and nats.
_CLEAR_ERRORS = 4.0
_CLEAR_NATS = 0.1
_FEWEST_ROWS = 8


class Evidence:
    """Sums over rows, of which both readings name a token."""

    def __init__(self) -> None:
        self.rows = 0
        self._sums = np.zeros(3)  # of log-probs after, of, and of their squared difference

    def add(
        self,
        tokens: NDArray[np.integer],
        start: int,
        ids: NDArray[np.int64],
        logprobs: NDArray[np.float64],
        others: NDArray[np.float64] | None = None,
    ) -> None:
        """Rows ids [R, K], logprobs float64 [R, K] (-inf beyond a row's own) that stand at tokens [L] from `start` on.

        others: float64 [R], the log-prob that counts for a token which a row lacks; by default the row's least one. The
        first token of a document has no context, so no row is about it.
        """
        if others is None:
            others = least_logprob(logprobs)
        at = start + np.arange(len(ids))
        both = np.flatnonzero((at >= 1) & (at + 1 < len(tokens)) & (logprobs.max(axis=1, initial=-np.inf) > -np.inf))
        if not len(both):
            return
        ids, logprobs, others, at = ids[both], logprobs[both], others[both], at[both]
        after, of = (_found(tokens[at + shift], ids, logprobs, others) for shift in (1, 0))
        self.rows += len(both)
        self._sums += [after.sum(), of.sum(), ((after - of) ** 2).sum()]

    @property
    def means(self) -> tuple[float, float]:
        """Nats: the mean log-prob of the token after, and of the row's own."""
        after, of, _ = self._sums / max(self.rows, 1)
        return float(after), float(of)

    @property
    def likelier(self) -> Reading:
        """The reading whose mean is higher; `is_clear` whether by enough."""
        after, of = self.means
        return "after" if after - of > 0 else "of"

    def is_clear(self, errors: float = _CLEAR_ERRORS) -> bool:
        """Whether the means differ by so many standard errors of their difference, and by more than `_CLEAR_NATS`."""
        after, of = self.means
        rows = max(self.rows, 1)
        spread = math.sqrt(max(self._sums[2] / rows - (after - of) ** 2, 0.0) / rows)
        return abs(after - of) > max(_CLEAR_NATS, errors * spread) and self.rows >= _FEWEST_ROWS

    def __str__(self) -> str:
        after, of = self.means
        return (
            f"of {self.rows:,} rows, the token that follows has a mean log-prob of {after:.3f}, the row's own token "
            f"{of:.3f}"
        )


def _found(
    tokens: NDArray[np.integer], ids: NDArray[np.int64], logprobs: NDArray[np.float64], others: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The log-prob of a token in each row [R]; of one that a row lacks, that of `others` [R]."""
    here = ids == tokens[:, None].astype(np.int64)
    held = here.any(axis=1)
    column = here.argmax(axis=1)
    return np.where(held, np.take_along_axis(logprobs, column[:, None], axis=1)[:, 0], others)
