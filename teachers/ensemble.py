"""Several live teachers as one, whose members read the same windows.

Legend: `B` windows, `C` tokens per window, `R` scored rows, `r` rows of one chunk, `V` vocabulary size.

With z_m the logits of member m over the V ids of the vocabulary, padded columns dropped first, and weights that sum
to 1, the ensemble's logits are::

    logit-mean   sum_m w_m z_m                       with equal weights torch.stack(logits).mean(0)
    mixture      log sum_m w_m softmax(z_m)          the mean of the probabilities, at temperature 1

A logit-mean cannot be computed from its members' separate caches, whose tails are sums over different ids; neither can
a mixture for losses that are not linear in it. (A forward KL to a mixture needs no ensemble: its members' entries can
be mixed when a student is trained, with any weights, each tempered first.)

Members run in step, chunk by chunk: of each, the logits of one chunk of rows exist at a time.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from storage.errors import InputError
from storage.format.manifest.teacher import Teacher as TeacherRecord
from teachers.base import Teacher

Combination = Literal["logit-mean", "mixture"]


class EnsembleTeacher:
    """Two or more teachers as one; see `teachers.base.Teacher` for the attributes.

    weights: positive, one per teacher, None for equal ones; they are recorded normalised to a sum of 1.
    Raises InputError for a member whose head has fewer than `vocabulary_size` columns.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        combine: Combination,
        vocabulary_size: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        weights = weights or [1.0] * len(teachers)
        assert len(teachers) == len(weights) > 1
        narrow = min(teachers, key=lambda teacher: teacher.head_columns)
        if narrow.head_columns < vocabulary_size:
            raise InputError(
                f"{narrow.identity.members[0].name}: its head has {narrow.head_columns} columns, the vocabulary "
                f"{vocabulary_size} ids: every member of an ensemble must be able to score every id"
            )
        self._teachers: tuple[Teacher, ...] = tuple(teachers)
        self._weights = tuple(weight / sum(weights) for weight in weights)
        self._mixes = combine == "mixture"
        self.identity = TeacherRecord(
            combine=combine,
            members=tuple(member for teacher in teachers for member in teacher.identity.members),
            weights=self._weights,
        )
        self.head_columns = vocabulary_size
        self.device: torch.device = teachers[0].device
        self.shard: None = None  # members that are sharded over ranks were refused earlier
        self.head: Literal["fast", "general"] = "fast" if all(t.head == "fast" for t in teachers) else "general"
        self.attention = ", ".join(dict.fromkeys(teacher.attention for teacher in teachers))
        self.order: Tensor | None = None

    def packs(self, length: int) -> bool:
        """Whether all members do; each is asked, so that each says why it does not."""
        return False not in [teacher.packs(length) for teacher in self._teachers]

    def score(self, windows: Tensor, rows: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        """Combined logits float32 [r, V] of the rows, chunk by chunk; see `teachers.base.Teacher.score`."""
        streams = [_Rows(teacher.score(windows, rows, positions)) for teacher in self._teachers]
        left = len(rows)
        while left:
            # Members chunk their rows differently; the rows that all of them have ready are combined.
            count = min(stream.ready() for stream in streams)
            # Entered per chunk: a mode held across a yield would leak into the caller's code.
            with torch.inference_mode():
                members = [stream.take(count)[:, : self.head_columns] for stream in streams]
                # Members whose layers are on several devices may return logits on different ones.
                combined = self._combine([logits.to(members[0].device) for logits in members])
            yield combined
            left -= count

    def output_embeddings(self) -> Tensor:
        """The members' output embeddings of the V ids side by side, float32 [V, sum of H], on the CPU.

        Each member's are centred, and scaled so that their mean square norm is the square of its weight: members of any
        scale count by their weights.
        """
        parts = []
        for teacher, weight in zip(self._teachers, self._weights, strict=True):
            part = teacher.output_embeddings()[: self.head_columns]
            part = part - part.mean(0)
            norm = part.square().sum(1).mean().sqrt()
            parts.append(part * (weight / norm.clamp_min(torch.finfo(torch.float32).tiny)))
        return torch.cat(parts, dim=1)

    def in_order(self, order: Tensor) -> EnsembleTeacher:
        ordered = copy.copy(self)
        ordered.order = order
        ordered._teachers = tuple(teacher.in_order(order) for teacher in self._teachers)
        return ordered

    def _combine(self, logits: list[Tensor]) -> Tensor:
        """The combined logits, float32 [r, V], of the members' [r, V]."""
        if self._mixes:
            # logsumexp adds pairwise; log_softmax does not, and is off by 2e-5 nats at 128k ids.
            members = zip(logits, self._weights, strict=True)
            shares = (z - (z.logsumexp(1, keepdim=True) - math.log(weight)) for z, weight in members)
            return functools.reduce(torch.logaddexp, shares)
        combined = logits[0] * self._weights[0]
        for z, weight in zip(logits[1:], self._weights[1:], strict=True):
            combined.add_(z, alpha=weight)
        return combined


class _Rows:
    """Cuts a stream of chunks anew: `take` returns any number of rows up to `ready()`."""

    def __init__(self, chunks: Iterator[Tensor]) -> None:
        self._chunks = chunks
        self._chunk: Tensor | None = None

    def ready(self) -> int:
        """The number of rows that can be taken, at least 1; computes the next chunk when the last one is used up."""
        if self._chunk is None:
            self._chunk = next(self._chunks)
        return len(self._chunk)

    def take(self, count: int) -> Tensor:
        """The next `count` rows [count, columns], no more than are ready."""
        assert self._chunk is not None
        taken, rest = self._chunk[:count], self._chunk[count:]
        # The last reference is dropped before the next chunk is computed, so that two never exist.
        self._chunk = rest if len(rest) else None
        return taken
