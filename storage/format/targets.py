"""SparseTargets: one teacher's stored distributions for a range of positions, in memory.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size. All log-probs are natural
logarithms (nats). Position `t` holds the distribution of token `t + 1` given the tokens up to `t`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.encoding import decode_logprobs

_PER_POSITION = ("kept", "certain", "top_logprob", "log_tail", "log_tail_half", "label_logprob", "entropy")


@dataclass(frozen=True, repr=False)
class SparseTargets:
    """Targets for the positions `start .. start + T`.

    token_ids      uint16|uint32 [T, K]  the first `kept` of a row are valid, most probable first, equal
                   log-probs by ascending id; the others hold the type's maximum
    kept           uint16 [T]   valid leading columns
    certain        uint16 [T]   so many leading ids are certain to be in the row (top-k: all `kept`); others are sampled
    top_logprob    float32 [T]  log-prob of column 0
    log_tail       float32 [T]  log of the mass outside the certain ids; -inf exactly when certain = V
    log_tail_half  float32 [T]  log of the sum of p**0.5 outside the certain ids (temperature 2)
    label_logprob  float32 [T]  log-prob of the token that follows in the text; NaN where there is none
    entropy        float32 [T]  of the full distribution

    Log-probs come in one of two forms: `codes` uint16 [T, K] with `step_nats`, or `exact_logprobs` float32
    [T, K]; `logprobs` gives float32 [T, K] for either, -inf from column `kept` on. They are normalised over
    all V ids, not over the stored ones.
    """

    start: int
    token_ids: NDArray[Any]
    kept: NDArray[np.uint16]
    certain: NDArray[np.uint16]
    top_logprob: NDArray[np.float32]
    log_tail: NDArray[np.float32]
    log_tail_half: NDArray[np.float32]
    label_logprob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    codes: NDArray[np.uint16] | None = None
    exact_logprobs: NDArray[np.float32] | None = None
    step_nats: float | None = None

    def __post_init__(self) -> None:
        assert (self.codes is None) != (self.exact_logprobs is None), "one form of log-probs, not two or none"
        assert (self.codes is None) == (self.step_nats is None)
        assert all(len(getattr(self, name)) == len(self.token_ids) for name in _PER_POSITION)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        form = "log-probs" if self.codes is None else f"codes of {self.step_nats} nats"
        return f"SparseTargets(positions {self.start}..{self.stop} of {self.k} ids, {form})"

    @property
    def stop(self) -> int:
        """The first position after the range."""
        return self.start + len(self)

    @property
    def k(self) -> int:
        """Stored ids per position, K."""
        return int(self.token_ids.shape[1])

    @cached_property
    def logprobs(self) -> NDArray[np.float32]:
        """Log-probs float32 [T, K] in nats, decoded on first use; -inf where a column is not valid."""
        if self.exact_logprobs is not None:
            decoded = self.exact_logprobs
        else:
            assert self.codes is not None
            assert self.step_nats is not None
            decoded = decode_logprobs(self.codes, self.top_logprob, self.step_nats)
        if len(self) and int(self.kept.min()) < self.k:
            return np.where(np.arange(self.k) < self.kept[:, None], decoded, np.float32(-np.inf))
        return decoded

    def rows(self, start: int, stop: int) -> SparseTargets:
        """The targets of the absolute positions `start .. stop`, a view."""
        if not self.start <= start <= stop <= self.stop:
            raise IndexError(f"positions {start}..{stop} are not inside {self.start}..{self.stop}")
        cut = slice(start - self.start, stop - self.start)
        part = object.__new__(SparseTargets)
        # Without the constructor, which takes longer than all other work on a window of 128 positions; its checks hold
        # for rows if they hold for all.
        for name in ("token_ids", *_PER_POSITION, "codes", "exact_logprobs"):
            values = getattr(self, name)
            object.__setattr__(part, name, None if values is None else values[cut])
        object.__setattr__(part, "start", start)
        object.__setattr__(part, "step_nats", self.step_nats)
        return part


def head_mass(targets: SparseTargets) -> NDArray[np.float64]:
    """Sum of the stored probabilities, float64 [T]."""
    mass: NDArray[np.float64] = np.exp(targets.logprobs.astype(np.float64)).sum(axis=1)
    return mass


def concatenate(parts: list[SparseTargets]) -> SparseTargets:
    """Adjacent ranges of one entry, in order, as one range."""
    assert all(a.stop == b.start for a, b in pairwise(parts)), "ranges must touch"
    first = parts[0]
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ("token_ids", *_PER_POSITION)
    }
    for name in ("codes", "exact_logprobs"):
        joined[name] = None if getattr(first, name) is None else np.concatenate([getattr(p, name) for p in parts])
    return replace(first, **joined)
