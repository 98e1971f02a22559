"""SparseTargets: one teacher's distributions for a range of positions, in memory.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size. All log-probs are natural
logarithms (nats). Position `t` holds the distribution of token `t + 1` given the tokens up to `t`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.format.encoding import token_id_dtype


@dataclass(frozen=True, repr=False)
class SparseTargets:
    """Targets for the positions `start .. start + T`.

    token_ids      uint16|uint32 [T, K]  the first `kept` of a row are valid: the certain ids, most probable first,
                   equal log-probs by ascending id, then the sampled ones; the others hold the type's maximum
    kept           uint16 [T]   valid leading columns; 0 in a row without targets
    certain        uint16 [T]   so many leading ids are certain to be in the row (top-k: all `kept`); others are sampled
    logprobs       float32 [T, K]  of the ids, normalised over all V, not over the stored ones; -inf from column `kept`
                   on, NaN for sampled ids whose log-probs are not stored
    log_tail       float32 [T]  log of the mass outside the certain ids; -inf where there is none
    log_tail_half  float32 [T]  log of the sum of p**0.5 outside the certain ids (temperature 2); -inf where it is empty
    label_logprob  float32 [T]  log-prob of the token that follows in the text; NaN where there is none
    entropy        float32 [T]  of the full distribution

    The last four are None where the entry does not have them, and NaN, but for the label, in a row without targets. An
    entry without ids (K = 0) has the label alone, and it is NaN where a row has no targets.
    """

    start: int
    token_ids: NDArray[Any]
    kept: NDArray[np.uint16]
    certain: NDArray[np.uint16]
    logprobs: NDArray[np.float32]
    log_tail: NDArray[np.float32] | None = None
    log_tail_half: NDArray[np.float32] | None = None
    label_logprob: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        assert all(len(values) == len(self.token_ids) for values in self.arrays().values())

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return f"SparseTargets(positions {self.start}..{self.stop} of {self.k} ids)"

    @property
    def stop(self) -> int:
        """The first position after the range."""
        return self.start + len(self)

    @property
    def k(self) -> int:
        return int(self.token_ids.shape[1])

    @property
    def there(self) -> NDArray[np.bool_]:
        """bool [T]: the rows with targets."""
        if self.k:
            return self.kept > 0
        assert self.label_logprob is not None, "without ids there are labels"
        return ~np.isnan(self.label_logprob)

    @property
    def is_kept(self) -> NDArray[np.bool_]:
        """bool [T, K]: the valid columns."""
        return leading_columns(self.kept, self.k)

    @property
    def is_certain(self) -> NDArray[np.bool_]:
        """bool [T, K]: the columns of certain ids."""
        return leading_columns(self.certain, self.k)

    @property
    def largest_ids(self) -> NDArray[np.int64]:
        """int64 [T]: the largest id of a row; 0 where there is none."""
        found: NDArray[np.int64] = np.where(self.is_kept, self.token_ids.astype(np.int64), 0).max(axis=1, initial=0)
        return found

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that there are, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "start"}
        return {name: values for name, values in named.items() if values is not None}

    def rows(self, start: int, stop: int) -> SparseTargets:
        """The targets of the absolute positions `start .. stop`, a view."""
        if not self.start <= start <= stop <= self.stop:
            raise IndexError(f"positions {start}..{stop} are not inside {self.start}..{self.stop}")
        cut = slice(start - self.start, stop - self.start)
        return SparseTargets(start, **{name: values[cut] for name, values in self.arrays().items()})


class TargetRows:
    """SparseTargets of the positions `start .. stop`, filled row by row; a position that gets no row has no targets.

    names: of the arrays that they have beside ids and log-probs.
    """

    def __init__(self, start: int, stop: int, k: int, vocabulary_size: int, names: Collection[str]) -> None:
        self.start, self.stop = start, stop
        count, dtype = stop - start, np.dtype(token_id_dtype(vocabulary_size))
        self._token_ids = np.full((count, k), np.iinfo(dtype).max, dtype=dtype)
        self._logprobs = np.full((count, k), -np.inf, dtype=np.float32)
        self._kept, self._certain = np.zeros(count, dtype=np.uint16), np.zeros(count, dtype=np.uint16)
        self._values = {name: np.full(count, np.nan, dtype=np.float32) for name in names}

    def put(self, positions: NDArray[np.int64], rows: Mapping[str, Any]) -> None:
        """Rows of absolute positions [R]: arrays by the names of SparseTargets, [R] and [R, <= K]; what is behind the
        `kept` columns of a row may be anything."""
        at, kept, ids = positions - self.start, rows["kept"], rows["token_ids"]
        columns = ids.shape[1]
        is_kept = leading_columns(kept, columns)
        self._kept[at], self._certain[at] = kept, rows["certain"]
        self._token_ids[at, :columns] = np.where(is_kept, ids, np.iinfo(self._token_ids.dtype).max)
        self._logprobs[at, :columns] = np.where(is_kept, rows["logprobs"], -np.inf)
        for name, values in self._values.items():
            values[at] = rows[name]

    def targets(self) -> SparseTargets:
        return SparseTargets(self.start, self._token_ids, self._kept, self._certain, self._logprobs, **self._values)


def leading_columns(counts: NDArray[Any], columns: int) -> NDArray[np.bool_]:
    """bool [T, columns]: column i < counts [T]."""
    found: NDArray[np.bool_] = np.arange(columns, dtype=counts.dtype) < counts[:, None]
    return found


def is_order(ids: NDArray[Any]) -> bool:
    """Whether ids [V] are each of 0 .. V - 1 once."""
    return np.array_equal(np.sort(ids), np.arange(len(ids)))
