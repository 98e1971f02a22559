"""One chunk of the student's logits, reduced to its log-probs and then overwritten by the gradient, in one buffer.

Legend: `R` rows, `V_m` vocabulary of a teacher, `W` columns of the head, `K` stored ids of a teacher, `U` slots for the
ids that any teacher of a row stored, `tau` the temperature, ``u = z / tau``, ``q = softmax(u)``.

The loss of one teacher depends on ``ell_i = log q_i`` of its ids and on ``theta = log q_t`` of its tail, the other
columns below V_m. With g = dL/d ell, h = dL/d theta, G = sum(g) + h, and c the gradient by the cross-entropy::

    dL/du_j = g_j - q_j G                              j among its ids
              exp(u_j - log_tail) (h - q_t G)          j in its tail, log_tail = logsumexp of u over it
              -q_j G                                   j >= V_m, that teacher's
    dL/dz_j = sum over teachers of dL/du_j / tau, + c (softmax(z)_j - [j is the label])

Outside all teachers' ids that is, row by row, the exponential of u times a factor (at tau != 1 plus its power tau
times another); inside there are few enough ids to write one by one. So the ids of all teachers are taken out of the
buffer, and its columns are cut at every teacher's V_m: mostly into those below it and the padded ones, which no teacher
has. Each part is summed relative to its own largest logit: no sum is a difference, and none underflows beside another.

All work on [R, U] is here. The passes over a `Part` of the buffer come in two kinds: torch operations, here, and
Triton kernels (`student.loss.chunk.triton_chunk`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Logits per tile of a pass over the buffer: on a CPU 4 MiB of float32, which stay in the processor's cache from pass to
# pass. Smaller tiles are no faster, and threads wait for each other more often.
_TILE_LOGITS = {"cpu": 1 << 20}

Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor | None, Tensor | None]


class LogitChunk:
    """Takes over the buffer z [R, W], float32 or float64: do not read it until `to_gradient` has written dL/dz.

    labels      int64 [R], ignored where `trained` bool [R] is False; such rows get the gradient 0
    supports    by teacher: int [R, K], the ids, none of them twice in a row, -1 where there is none
    sizes       by teacher: V_m, which may exceed W
    softcap     the cap already applied to z; the gradient is by the logits before it

    cross_entropy [R] in nats at temperature 1, 0 where not trained; buckets, by teacher, (ell [R, K], 0 where there is
    no id; theta [R], -inf when nothing is outside). They carry no gradient.
    """

    def __init__(
        self,
        z: Tensor,
        labels: Tensor,
        trained: Tensor,
        supports: Sequence[Tensor],
        sizes: Sequence[int],
        temperature: float,
        softcap: float | None = None,
    ) -> None:
        self._z, self._trained, self._tau, self._softcap = z, trained, temperature, softcap
        self._labels = labels.masked_fill(~trained, 0)[:, None]
        self._ids, self._held, by_column = _union(supports, len(z), z.device)
        self._z_label = z.gather(1, self._labels)
        self._z_ids = z.gather(1, self._ids).masked_fill(~self._held, -math.inf)
        z.scatter_add_(1, self._ids, torch.zeros_like(self._z_ids).masked_fill(self._held, -math.inf))
        ends = sorted({*(min(size, z.shape[1]) for size in sizes), z.shape[1]})
        self._parts = [self._part(z[:, a:b], temperature) for a, b in pairwise([0, *ends])]

        # Relative to the row's largest logit, normalisers are small numbers, which round finely.
        largest = [part.largest[:, None] for part in self._parts]
        self._peak = torch.cat([*largest, self._z_ids], 1).amax(1, keepdim=True)
        z_ids, u = self._z_ids - self._peak, self._u_ids()
        sums = [part.log_sum(self._peak, temperature) for part in self._parts]
        self._lse = torch.cat([*sums, u], 1).logsumexp(1, keepdim=True)
        self._lse_one = torch.cat([*(part.log_sum(self._peak, 1.0) for part in self._parts), z_ids], 1).logsumexp(1)
        self._teachers = []
        for support, size, slots in zip(supports, sizes, by_column, strict=True):
            stored, below = support >= 0, ends.index(min(size, z.shape[1])) + 1
            own = torch.zeros_like(u).scatter_add_(1, slots, stored.to(u.dtype)) > 0
            apart = own | (self._ids >= size)
            others = torch.cat([*sums[:below], u.masked_fill(apart, -math.inf)], 1)
            self._teachers.append(_Teacher(slots, stored, apart, below, others.logsumexp(1, keepdim=True)))

        self.cross_entropy = (self._lse_one - (self._z_label - self._peak)[:, 0]).masked_fill(~trained, 0.0)
        self.buckets: list[Pair] = [
            ((u.gather(1, teacher.slots) - self._lse).masked_fill(~teacher.stored, 0.0),
             (teacher.log_tail - self._lse)[:, 0])
            for teacher in self._teachers
        ]  # fmt: skip

    def to_gradient(self, by_label: Tensor | None, by_bucket: Sequence[Gradients]) -> None:
        """Write dL/dz into the buffer, once, from the gradients of L by `cross_entropy` and by `buckets`.

        None stands for zeros. Entries without an id or not trained count as zeros.
        """
        tau, trained = self._tau, self._trained[:, None]
        at_ids, by_tau = self._by_u(by_bucket)
        at_ids /= tau
        by_one: list[Tensor | None] = [None for _ in self._parts]
        if by_label is not None:
            c = by_label[:, None].masked_fill(~trained, 0.0)
            lse_one = self._lse_one[:, None]
            at_ids += c * (self._z_ids - self._peak - lse_one).exp()
            by_one = [c * (part.above(self._peak, 1.0) - lse_one).exp() for part in self._parts]
        for part, a, b in zip(self._parts, by_tau, by_one, strict=True):
            part.to_gradient(a / tau, b, self._softcap)
        # The buffer is 0 at the ids. A slot without an id adds 0 to column 0.
        self._z.scatter_add_(1, self._ids, (at_ids * self._slope(self._z_ids)).masked_fill(~self._held, 0.0))
        if by_label is not None:
            self._z.scatter_add_(1, self._labels, -c * self._slope(self._z_label))

    def _by_u(self, by_bucket: Sequence[Gradients]) -> tuple[Tensor, list[Tensor]]:
        """dL/du of the teachers' terms: at the ids [R, U]; by part, the factor [R, 1] of its exponentials elsewhere."""
        u, lse, trained = self._u_ids(), self._lse, self._trained[:, None]
        q = (u - lse).exp()
        rests = [part.above(self._peak, self._tau) for part in self._parts]
        at_ids, by_tau = torch.zeros_like(u), [torch.zeros_like(lse) for _ in rests]
        for (g, h), teacher in zip(by_bucket, self._teachers, strict=True):
            g = u.new_zeros(teacher.slots.shape) if g is None else g.masked_fill(~(teacher.stored & trained), 0.0)
            h = torch.zeros_like(lse) if h is None else h[:, None].masked_fill(~trained, 0.0)
            total = g.sum(1, keepdim=True) + h
            # With nothing outside the ids both are -inf; any finite number here makes their exponential 0, as it is.
            tail = teacher.log_tail.masked_fill(teacher.log_tail.isneginf(), 0.0)
            for number, rest in enumerate(rests):
                by_tau[number] -= total * (rest - lse).exp()
                if number < teacher.below:
                    by_tau[number] += h * (rest - tail).exp()
            outside = (u - tail).exp() * (h - total * (teacher.log_tail - lse).exp())
            at_ids += torch.where(teacher.apart, -q * total, outside).scatter_add_(1, teacher.slots, g)
        return at_ids, by_tau

    @staticmethod
    def _part(z: Tensor, temperature: float) -> Part:
        """The first pass over some columns of the buffer, by the implementation of this class."""
        return _Exponentials.of(z, temperature)

    def _u_ids(self) -> Tensor:
        """u of the ids [R, U], relative to the peak; -inf in an empty slot."""
        return (self._z_ids - self._peak) / self._tau

    def _slope(self, z: Tensor) -> Tensor | float:
        return 1.0 if self._softcap is None else 1.0 - (z / self._softcap) ** 2


@dataclass(frozen=True)
class _Teacher:
    """A teacher's ids among the slots of a chunk.

    slots, stored   [R, K]: the slot of each of its columns, and whether the column holds an id
    apart           bool [R, U]: the slots of ids outside its tail: its own, and those that it does not have
    below           so many parts of the buffer are below V_m
    log_tail        [R, 1]: the logsumexp of u over its tail, relative to the peak
    """

    slots: Tensor
    stored: Tensor
    apart: Tensor
    below: int
    log_tail: Tensor


@dataclass
class Part(ABC):
    """Some columns of the buffer [R, C], and per row the sums of ``e = exp((z - largest) / tau)``.

    largest [R] is -inf in a row whose columns all are, and e is 0 there. total [R] sums e, total_one e**tau.
    """

    buffer: Tensor
    temperature: float
    largest: Tensor
    total: Tensor
    total_one: Tensor

    def above(self, peak: Tensor, temperature: float) -> Tensor:
        """The largest u [R, 1], relative to the peak's."""
        return (self.largest[:, None] - peak) / temperature

    def log_sum(self, peak: Tensor, temperature: float) -> Tensor:
        """log of the sum of exp(u) [R, 1], relative to the peak, at the temperature of e or at 1."""
        total = self.total_one if temperature == 1.0 else self.total
        return self.above(peak, temperature) + total.log()[:, None]

    @abstractmethod
    def to_gradient(self, a: Tensor, b: Tensor | None, softcap: float | None) -> None:
        """Write ``a * e + b * e**tau`` times the slope of the softcap into the buffer, once; a, b [R, 1]."""


class _Exponentials(Part):
    """A part whose buffer holds e until the gradient replaces it; any float type."""

    @classmethod
    def of(cls, z: Tensor, temperature: float) -> _Exponentials:
        largest, total, total_one = (z.new_empty(len(z)) for _ in range(3))
        for rows in row_slices(z, _TILE_LOGITS):
            tile = z[rows]
            largest[rows] = top = tile.amax(1)
            tile.sub_(top.masked_fill(top.isneginf(), 0.0)[:, None])
            if temperature != 1.0:
                tile.div_(temperature)
            total[rows] = tile.exp_().sum(1)
            if temperature != 1.0:
                total_one[rows] = tile.pow(temperature).sum(1)
        return cls(z, temperature, largest, total, total if temperature == 1.0 else total_one)

    def to_gradient(self, a: Tensor, b: Tensor | None, softcap: float | None) -> None:
        tau = self.temperature
        if b is not None and tau == 1.0:
            a, b = a + b, None
        for rows in row_slices(self.buffer, _TILE_LOGITS):
            tile = self.buffer[rows]
            factor = a[rows]
            if b is not None:
                factor = tile.pow(tau - 1.0).mul_(b[rows]).add_(factor)
            if softcap is not None:
                # z again, from its exponential. Where that is 0, the product is too, whatever finite number z is.
                largest = self.largest[rows, None]
                z = tile.clamp(min=torch.finfo(tile.dtype).tiny).log_().mul_(tau)
                z.add_(largest.masked_fill(largest.isneginf(), 0.0))
                factor = z.div_(softcap).square_().neg_().add_(1.0).mul_(factor)
            tile.mul_(factor)


def _union(supports: Sequence[Tensor], rows: int, device: torch.device) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(ids int64 [R, U], 0 in an empty slot; bool [R, U], slots with an id; by teacher, its columns' slots [R, K]).

    Every id has one slot, however many teachers stored it. A column without an id has an empty slot.
    """
    sizes = [support.shape[1] for support in supports]
    if len(supports) < 2:
        ids = supports[0] if supports else torch.empty(rows, 0, device=device)
        columns = [torch.arange(size, device=device).expand(rows, size) for size in sizes]
        return ids.clamp(min=0).to(torch.int64), ids >= 0, columns
    ids, order = torch.cat([support.to(torch.int64) for support in supports], 1).sort(1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    index = torch.arange(ids.shape[1], device=device).expand_as(ids)
    slots = torch.empty_like(order).scatter_(1, order, index.masked_fill(~first, 0).cummax(1).values)
    held = first & (ids >= 0)
    return ids.masked_fill(~held, 0), held, list(torch.split(slots, sizes, 1))


def row_slices(buffer: Tensor, logits_at_once: dict[str, int]) -> list[slice]:
    """Row ranges of about `logits_at_once` logits by device type or "elsewhere"; of all rows where neither is given.

    At least one range, if of no rows.
    """
    rows, columns = buffer.shape
    most = logits_at_once.get(buffer.device.type, logits_at_once.get("elsewhere", buffer.numel()))
    step = max(1, most // max(1, columns))
    return [slice(start, start + step) for start in range(0, max(1, rows), step)]
