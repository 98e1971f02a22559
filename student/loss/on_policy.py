"""Offline on-policy distillation: a student's own samples, weighed by what a teacher thinks of each of their tokens.

Legend: `P` positions of a batch (flattened), `p` the teacher and `q` the student, `x` the token that follows a
position, which the student sampled. Everything is in nats.

Lightning OPD (Wu, Han and Cai 2026, arXiv 2604.13010v3) is the policy gradient on rollouts that the student made before
it was trained. With `sg` for what carries no gradient, of a position::

    A    = sg(log p(x) - log q(x)), limited to [-10, 10]
    loss = -A q(x) / sg(q(x))           value -A,  gradient -A * d log q(x)

A is that of section 3.1 and its limits those of table 6. The ratio is the surrogate of the authors' code
(`slime/backends/megatron_utils/loss.py`, estimator `on_policy_distillation`), whose old policy is the one of the step
where a batch is read once, so that it is 1 and never clipped.

log p(x) is stored, log q(x) is the student's of now. At the model that made the rollouts the mean of the loss is the
reverse KL(q || p), and the mean of its gradient that of the reverse KL's own tokens: each token answers for itself, not
for those that follow. Later the samples are a former student's, so the condition is that they were that of the start
(`student.data.rollouts`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from storage.errors import InputError
from student.loss.teacher_targets import Member
from student.target_batch import TargetBatch

MOST_ADVANTAGE = 10.0
"""Nats."""


@dataclass(frozen=True)
class SampledTokens:
    """The loss of the module for one teacher; its fields are those of `student.loss.teacher_targets.Tempered`.

    support   int32 [P, 1]   x; -1 where a position does not count
    scores    float [P, 1]   log p(x), 0 where a position does not count
    trained   bool [P]       the positions that are trained and have targets
    """

    support: Tensor
    scores: Tensor
    trained: Tensor
    member: Member
    entropy: None = None

    @classmethod
    def of(cls, targets: TargetBatch, member: Member, labels: Tensor, trained: Tensor) -> SampledTokens:
        """Of the positions that are `trained` [P], with labels int64 [P]. Raises InputError without the labels'
        log-probs."""
        known = targets.label_logprob
        if known is None:
            raise InputError(
                f"teacher {member.name}: its targets hold no log-probs of labels, which lightning-opd reads"
            )
        trained = trained & targets.there & ~known.isnan()
        support = torch.where(trained, labels, -1).to(torch.int32)
        return cls(support[:, None], torch.where(trained, known, 0.0)[:, None], trained, member)

    def __call__(self, ell: Tensor, theta: Tensor, rows: slice = slice(None)) -> Tensor:
        """The loss [R] of the student's log-probs ell [R, 1] of x, at some rows."""
        del theta
        log_q = ell[:, 0]
        advantage = (self.scores[rows, 0] - log_q.detach()).clamp(-MOST_ADVANTAGE, MOST_ADVANTAGE)
        return -advantage * (log_q - log_q.detach()).exp()
