"""A control variate of sampled targets: the same gradient in the mean, with less noise the nearer the student is.

Legend: `P` positions of a batch, `R` rows of a chunk of it, `K` stored ids per position.

Outside the certain ids let p be the teacher, M its mass and q the student. Each of the m sampled ids is in the sample
with probability ``pi_i = m p_i / M``, and weighs ``s = M / m``. The student's own tail, scaled to the teacher's mass,
``r_i = M q_i / sum of q outside the certain ids``, is known for every id, and so is the error ``x_i - r_i`` of what the
same sample makes of it, ``x_i = [i sampled] r_i / pi_i``. For any c that does not depend on the sample, the target ::

    t_i = [i sampled] s + c (r_i - x_i)

has the mean p_i, as the bracket has the mean 0 (Horvitz-Thompson). On the ids that are not stored t is c r: the
student's own shape, so one tail bucket of their mass. c = 0 is the sampled loss. The mean of ``sum((s - c x)**2)`` over
the sampled ids is least at ``c = 1 / (1 + chi2)`` and lower by that share, with chi2 between the two tails.

The log-probs of sampled ids have to be right in the mean of 1 / p. Version 2 of an entry rounds them so (at temperature
2, up to 0.8 % of x at steps of 1/2 nat); as version 1 does, at 1/32 nat, 0.8 % of the tail's mass is misplaced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student.loss.teacher_targets import Tempered, Weights, weights

MEMORY_POSITIONS = 4_600.0
"""Positions after which a step weighs e times less: 0.8 in 1,024. By positions and not by steps, since they decide how
much noise there is in c, however large a step is."""


class ControlCoefficient:
    """c of one teacher, 0..1: ``sum(s x) / sum(x**2)`` over the sampled ids of the steps before; 0 in the first step.

    It regresses what the sample makes of the teacher's tail on what it makes of the student's. From the sample that it
    corrects, c would be biased, and depend on how a step is cut: `end_step` takes the sums of a whole optimizer step,
    over its micro-batches and processes, and they count from the next one on.
    """

    def __init__(self, memory_positions: float = MEMORY_POSITIONS) -> None:
        self.memory_positions = memory_positions
        self._sums = torch.zeros(2)

    @property
    def value(self) -> Tensor:
        """c, a scalar where the sums are: on the training device, so that no step waits for it."""
        products, squares = self._sums
        ratio: Tensor = products / squares.clamp(min=torch.finfo(squares.dtype).tiny)
        return ratio.clamp(max=1.0)

    def end_step(self, step: Tensor) -> None:
        """Add the sums of a step [3]: positions with targets, s x and x**2.

        One that is not finite is left out: a gradient scaler skips it, and the run continues.
        """
        positions, sums = step[0], step[1:]
        before = self._sums.to(sums)
        after = before * torch.exp(-positions / self.memory_positions) + sums
        self._sums = torch.where(sums.isfinite().all(), after, before)

    def state(self) -> list[float]:
        """The sums, for a checkpoint."""
        found: list[float] = self._sums.tolist()
        return found

    def load(self, state: Sequence[float] | None) -> None:
        """Take the sums of a `state`; None begins again at c = 0."""
        self._sums = torch.zeros(2) if state is None else torch.tensor(state)


@dataclass(frozen=True)
class ControlledTail:
    """Forward KL on sampled targets, with the gradient that t has; called as `Weights` are.

    Its value stays that of the sampled loss: both are unbiased, as estimates of the dense KL and of its gradient, and
    values compare between runs, whatever their c.

    sampled      the sampled loss
    s            [P, K]: the weight of sampled ids, 0 elsewhere
    inverse_pi   [P, K]: 1 / pi of sampled ids, 0 elsewhere
    c            scalar
    """

    sampled: Weights
    s: Tensor
    inverse_pi: Tensor
    c: Tensor

    @classmethod
    def of(cls, tempered: Tempered, c: Tensor) -> ControlledTail:
        """Of targets that have the log-probs of their sampled ids."""
        sampled, drawn = weights(tempered, "sampled"), tempered.sampled
        number = drawn.sum(1).clamp(min=1).to(tempered.log_tail.dtype)
        log_s = tempered.log_tail - number.log()  # before the normalisation, as the scores are
        inverse_pi = (log_s[:, None] - tempered.scores).exp()
        return cls(sampled, sampled.heads.masked_fill(~drawn, 0.0), inverse_pi.masked_fill(~drawn, 0.0), c)

    def __call__(self, ell: Tensor, theta: Tensor, rows: slice) -> Tensor:
        """The loss [R] of the student's log-probs ell [R, K] and log-mass theta [R] at some rows."""
        r, rest, x = self._student_tail(ell, theta, rows)
        correction = _without_value(ell, self.c * (r - x)).sum(1) + _without_value(theta, self.c * rest)
        return self.sampled(ell, theta, rows) - correction

    def step_sums(self, ell: Tensor, theta: Tensor, rows: slice) -> Tensor:
        """[R, 2]: s x and x**2, summed over the sampled ids."""
        _, _, x = self._student_tail(ell, theta, rows)
        return torch.stack([(self.s[rows] * x).sum(1), (x * x).sum(1)], 1)

    @torch.no_grad()
    def _student_tail(self, ell: Tensor, theta: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(r of the sampled ids [R, K], 0 elsewhere; its sum over the ids that are not stored [R]; x [R, K])."""
        s, inverse_pi = self.s[rows], self.inverse_pi[rows]
        tail = torch.cat([ell.masked_fill(s == 0, -math.inf), theta[:, None]], 1)
        # Nothing is outside the certain ids where no number comes out; a row without sampled ids has no mass here.
        r = torch.softmax(tail, 1).nan_to_num() * s.sum(1, keepdim=True)
        return r[:, :-1], r[:, -1], r[:, :-1] * inverse_pi


def _without_value(logs: Tensor, by: Tensor) -> Tensor:
    """0, with the gradient `by`; logs may be -inf where that is 0."""
    logs = torch.where(by != 0, logs, 0.0)
    return by * (logs - logs.detach())
