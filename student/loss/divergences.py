"""Divergences D(p, q) of teacher and student over K known ids and one tail bucket.

Legend: `P` positions, `K` ids per position; a side is a pair (log-probs [P, K], log-mass of the tail bucket [P]), here
joined to K + 1 outcomes with probabilities p (teacher) and q (student). Everything is in nats.

With m as given, and g_i the derivative by log q_i:

======================  =======================================================  =================================
forward_kl              sum p log(p / q)                                         -p
reverse_kl              sum q log(q / p)                                         q (log q/p + 1)
jsd                     beta KL(p, m) + (1 - beta) KL(q, m)                      (1 - beta) q log q/m
                        m = beta p + (1 - beta) q
skew_forward_kl         sum p log(p / m)        m = lambda p + (1 - lambda) q    -p (1 - lambda) q / m
skew_reverse_kl         sum q log(q / m)        m = (1 - lambda) p + lambda q    q (log q/m + 1 - lambda q / m)
======================  =======================================================  =================================

Merging outcomes into a bucket never increases any of them (data processing inequality), so each is a lower bound of
its dense value, growing with K. Sources: generalised JSD as in Agarwal et al. 2023 (GKD), skewed divergences as in
Ko et al. 2024 (DistiLLM).

A student's padded ids have no outcome here, so its side may sum to less than 1. `Divergence` adds the cost of its mass
on them: where the divergence over all columns is finite, exactly their terms of it; reverse KL is infinite there and
takes its generalised form ``sum q log(q / p) - sum q + sum p``, which is 0 only at q = p. Without this, a student
would lower its reverse KL below 0 by moving mass to ids that do not exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from student.loss.objective import DivergenceName

Side = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Divergence:
    """A divergence by name, with its beta or lambda (`mix`, ignored by the plain ones), student's padding included.

    Called with the teacher's and the student's side; returns [P] in nats. Outcomes with a teacher log-prob of -inf do
    not exist (columns beyond `kept`; the tail bucket where every id is stored): the student's value there is ignored,
    and no gradient flows to it.
    """

    name: DivergenceName
    mix: float = 0.0

    def __call__(self, teacher: Side, student: Side) -> Tensor:
        """The divergence [P] of two sides, in nats; differentiable in the student's."""
        log_p, log_q = _joined(teacher), _joined(student)
        exists = log_p > -math.inf
        # Made finite before any arithmetic, not after it: both sides may be -inf where every id is stored, and the
        # derivative of the log of their mixture is NaN there, however its value is masked.
        log_p = torch.where(exists, log_p, 0.0)
        p, q = log_p.exp() * exists, log_q.exp() * exists
        return self._of_outcomes(log_p, log_q, p, q) + self.padding_cost * (1 - q.sum(1))

    def _of_outcomes(self, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """The table's value [P] of both sides' K + 1 outcomes [P, K + 1]; p and q are 0 where no outcome exists."""
        if self.name == "forward-kl":
            return _expected(p, log_p - log_q)
        if self.name == "reverse-kl":
            return _expected(q, log_q - log_p)
        if self.name == "skew-forward-kl":
            return _expected(p, log_p - _log_mixture(log_p, log_q, self.mix))
        if self.name == "skew-reverse-kl":
            return _expected(q, log_q - _log_mixture(log_p, log_q, 1 - self.mix))
        assert self.name == "jsd", self.name
        log_m = _log_mixture(log_p, log_q, self.mix)
        return self.mix * _expected(p, log_p - log_m) + (1 - self.mix) * _expected(q, log_q - log_m)

    @property
    def padding_cost(self) -> float:
        """Nats per unit of the student's mass on padded ids."""
        if self.name == "reverse-kl":
            return 1.0
        if self.name == "jsd":
            return -(1 - self.mix) * math.log(1 - self.mix)
        if self.name == "skew-reverse-kl":
            return -math.log(self.mix)
        return 0.0


@dataclass(frozen=True)
class TailAwareKL:
    """Forward KL cut into a head and a tail, the tail weighed against how little mass it has in a whole sequence.

    The head are a position's `head_ids` likeliest ids, the tail all others; a, q_tail are the two sides' mass of it::

        D1 = sum over the head of p log(p / q)  +  a log(a / q_tail)         the tail as one outcome
        D2 = sum over the tail of p/a log((p / a) / (q / q_tail))            the tail alone
        forward KL = D1 + a D2
        loss       = D1 + b a D2        b = beta / mean of a over the positions of the sequence

    (Dasgupta, Cohn and Baldwin 2026, arXiv:2602.20816v1, section 2 and equation 3.) By log q its derivative is -p on
    the head and ``-b p + (b - 1) a q / q_tail`` on the tail, which sum to -1. Of K stored ids those behind the head,
    and one bucket of all others, are the outcomes of the tail: D2 is at most its dense value, and equal at K = V.

    A sequence is a document in a window, of whose trained positions with targets the mean is taken: it depends on
    neither batches nor packing.

    teacher   (log-probs [P, K], likeliest first, log-mass of the tail bucket [P])
    b         [P]
    """

    teacher: Side
    b: Tensor
    head_ids: int

    @classmethod
    def of(cls, teacher: Side, sequence: Tensor, counted: Tensor, head_ids: int, beta: float) -> TailAwareKL:
        """sequence: int [P], the numbers of the positions' sequences; counted: bool [P], those that a mean is over."""
        log_p, log_tail = teacher
        mass = (log_p[:, head_ids:].exp().sum(1) + log_tail.exp()) * counted
        names, number = torch.unique(sequence, return_inverse=True)
        # Of float64, so that the order in which a GPU adds them cannot be seen.
        sums = mass.new_zeros((2, len(names)), dtype=torch.float64)
        sums.index_add_(1, number, torch.stack([mass, counted]).double())
        mean = (sums[0] / sums[1].clamp(min=1)).to(mass.dtype)[number]
        return cls(teacher, torch.where(mean > 0, beta / mean, 0.0), head_ids)

    def __call__(self, ell: Tensor, theta: Tensor, rows: slice) -> Tensor:
        """The loss [R] of the student's log-probs ell [R, K] and log-mass theta [R] at some rows, in nats."""
        heads, tail = self.teacher
        log_p, log_q = _joined((heads[rows], tail[rows])), _joined((ell, theta))
        exists = log_p > -math.inf
        in_tail = exists.clone()
        in_tail[:, : min(self.head_ids, heads.shape[1])] = False
        has_tail = in_tail.any(1, keepdim=True)
        log_a, log_q_tail = (
            # Finite where the tail is empty, whatever the student has there.
            torch.where(in_tail, each, torch.where(has_tail, -math.inf, 0.0)).logsumexp(1, keepdim=True)
            for each in (log_p, log_q)
        )
        p = torch.where(exists, log_p, 0.0).exp() * exists
        head = _expected(p * ~in_tail, log_p - log_q)
        as_one = _expected(has_tail * log_a.exp(), log_a - log_q_tail)
        return head + as_one + self.b[rows] * _expected(p * in_tail, (log_p - log_a) - (log_q - log_q_tail))


def _joined(side: Side) -> Tensor:
    heads, tail = side
    return torch.cat([heads, tail[:, None]], dim=1)


def _expected(weights: Tensor, values: Tensor) -> Tensor:
    """sum_i weights_i values_i [P], where 0 times anything is 0."""
    return (weights * torch.where(weights > 0, values, 0.0)).sum(1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
