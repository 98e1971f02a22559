"""The processes that hold one teacher together, and the columns of its LM head that each of them has.

Legend: `W` ranks, `T` rows, `C` columns of the head.

Nothing here is of the size of the logits: ranks exchange a few numbers per row, and objects of a few hundred bytes.
Sums over ranks are computed from gathered numbers, in rank order, so that every rank has the same sum and a repeated
run repeats it; an all-reduce guarantees neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """W processes that do the same work, each on its part of a teacher. All of them make the same calls, in order.

    They are those of torch's default process group, which serves tensors of its device and of the CPU.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()  # the index of this process, 0 .. W - 1
        self.size = dist.get_world_size()  # W

    def gather(self, value: Tensor) -> Tensor:
        """The values of all ranks, which have one shape, in rank order, [W, ...]."""
        gathered = value.new_empty(self.size, *value.shape)
        # torch 2.13 renamed it, and warns of the old name.
        collective: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        collective(gathered, value.contiguous()[None])
        return gathered

    def maximum(self, value: Tensor) -> Tensor:
        """The elementwise maximum over the ranks; not for values with NaN."""
        largest = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def objects(self, value: Any) -> list[Any]:
        """The values of all ranks, small plain data, in rank order."""
        # Unpickled data comes from ranks of the same job, which are trusted, and never from a file.
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def from_first(ranks: Ranks, value: Any = None) -> Any:
    """The value of rank 0, on every rank."""
    return ranks.objects(value if ranks.rank == 0 else None)[0]


def all_true(ranks: Ranks, mine: bool) -> bool:
    return all(ranks.objects(mine))


def summed(gathered: Tensor) -> Tensor:
    """The sum over the first dimension of [W, ...], in rank order."""
    total = gathered[0]
    for value in gathered[1:]:
        total = total + value
    return total


@dataclass(frozen=True)
class ColumnShard:
    """The columns of an LM head that this rank's logits cover: `runs[rank]`, a half-open range (start, stop).

    The runs are contiguous in rank order and cover all `head_columns`; some may be empty.
    """

    ranks: Ranks
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        ends = [stop for _, stop in self.runs]
        assert len(self.runs) == self.ranks.size
        assert [start for start, _ in self.runs] == [0, *ends[:-1]], self.runs
        assert all(start <= stop for start, stop in self.runs), self.runs

    @property
    def head_columns(self) -> int:
        return self.runs[-1][1]

    @property
    def own(self) -> slice:
        return slice(*self.runs[self.ranks.rank])

    @property
    def widest(self) -> int:
        """The largest number of columns of any rank; sizes that all ranks must agree on follow from it."""
        return max(stop - start for start, stop in self.runs)

    def whole(self, logits: Tensor) -> Tensor:
        """All columns [T, C] of rows of which each rank has its own; for few rows, since whole rows are gathered."""
        padded = torch.nn.functional.pad(logits, (0, self.widest - logits.shape[1]))
        gathered = self.ranks.gather(padded)
        return torch.cat([part[:, : b - a] for part, (a, b) in zip(gathered, self.runs, strict=True)], dim=1)


def equal_runs(columns: int, size: int) -> tuple[tuple[int, int], ...]:
    """Runs of ceil(columns / size) columns, as torch chunks a dimension; the last ones are shorter, or empty.

    >>> equal_runs(10, 4)
    ((0, 3), (3, 6), (6, 9), (9, 10))
    """
    step = -(-columns // size)
    return tuple((min(rank * step, columns), min((rank + 1) * step, columns)) for rank in range(size))
