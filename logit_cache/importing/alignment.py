"""Whether rows are about the next token or their own, decided by the data.

A teacher gives the token that is there far more probability than it gives that token's neighbour. So each row is held
against both: the mean log-prob of the right one is far higher, and where neither is, the rows belong to other tokens.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import Reading
from storage.errors import InputError
from storage.format.manifest import Alignment

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
        self, tokens: NDArray[np.uint32], start: int, ids: NDArray[np.int64], logprobs: NDArray[np.float64]
    ) -> None:
        """Rows ids [R, K], logprobs float64 [R, K] (-inf beyond a row's own) that stand at tokens [L] from `start` on.

        The first token of a document has no context, so no row is about it.
        """
        at = start + np.arange(len(ids))
        both = np.flatnonzero((at >= 1) & (at + 1 < len(tokens)) & (logprobs.max(axis=1, initial=-np.inf) > -np.inf))
        if not len(both):
            return
        ids, logprobs, at = ids[both], logprobs[both], at[both]
        after, of = (_found(tokens[at + shift], ids, logprobs) for shift in (1, 0))
        self.rows += len(both)
        self._sums += [after.sum(), of.sum(), ((after - of) ** 2).sum()]

    def decided(self, expected: Reading | None, given: Reading | None, name: str) -> Alignment:
        """The reading; `expected` by the format, `given` by whoever imports. Raises InputError for an unclear one, and
        for one that contradicts either of them."""
        rows = max(self.rows, 1)
        after, of = self._sums[:2] / rows
        difference = after - of
        spread = math.sqrt(max(self._sums[2] / rows - difference**2, 0.0) / rows)
        clear = abs(difference) > max(_CLEAR_NATS, _CLEAR_ERRORS * spread) and self.rows >= _FEWEST_ROWS
        found: Reading = "after" if difference > 0 else "of"
        numbers = (
            f"of {self.rows:,} rows, the token that follows has a mean log-prob of {after:.3f}, the row's own token "
            f"{of:.3f}"
        )
        wanted = given or expected
        if clear and wanted is not None and found != wanted:
            said = "--alignment says" if given else f"{name} files say"
            raise InputError(
                f"rows are about the token {_WORDS[found]}, where {said} {_WORDS[wanted]}: {numbers}. The rows or the "
                f"tokens were moved by one: mend the file" + (", or leave --alignment out" if given else "")
            )
        if not clear and given is None:
            raise InputError(
                f"it is not clear which token the rows are about: {numbers}. They may belong to other tokens (another "
                f"tokenizer, rows moved by more than one, settings that decode garbage); where you know better, give "
                f"--alignment after or --alignment of"
            )
        reading = given or found
        return Alignment(
            reading=reading, given=given is not None, rows=self.rows, after_nats=float(after), of_nats=float(of)
        )


_WORDS = {"after": "that follows", "of": "at which they stand"}


def _found(tokens: NDArray[np.uint32], ids: NDArray[np.int64], logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log-prob of a token in each row [R]; where a row lacks it, the least one of the row."""
    here = ids == tokens[:, None].astype(np.int64)
    least = np.where(logprobs > -np.inf, logprobs, np.inf).min(axis=1)
    held = here.any(axis=1)
    column = here.argmax(axis=1)
    return np.where(held, np.take_along_axis(logprobs, column[:, None], axis=1)[:, 0], least)
