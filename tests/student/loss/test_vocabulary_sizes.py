"""Losses of teachers and students that do not have the same ids, against plain autograd in float64.

Legend: `P` positions, `K` stored ids, `V_m` vocabulary of a teacher, `W` columns of the student's head.

A teacher gives ids from V_m on no mass; a student may be without ids that a teacher's targets do not name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.references.dense_targets import P, V, gradient, labels_for, member, normal, stored
from torch import Tensor

from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss
from student.loss.fused import fused_loss

H = 11
ALPHA = 0.3
# (columns of the student, vocabularies of its teachers): padded, exact and short; a teacher short, with more, or both.
SIDES = [
    (V + 13, (V,)),
    (V, (V,)),
    (V, (V - 1,)),
    (V + 13, (V - 1,)),
    (V - 1, (V,)),
    (V, (V, V - 1)),
    (V + 1, (V - 3, V, V - 1)),
    (V - 1, (V, V - 1)),
    (V - 1, (V + 2, V - 2)),
]


def teacher(seed: int, size: int, columns: int) -> Tensor:
    """A teacher's log-probs [P, size], float64; next to no mass where the student has no column."""
    z = normal(seed, P, size)
    z[:, columns:] = -30.0
    return torch.log_softmax(z, 1)


def expected(z: Tensor, labels: Tensor, teachers: list[Tensor], ks: list[int], tau: float) -> tuple[Tensor, Tensor]:
    """(the loss [P], and each teacher's bucketed KL [M, P]) by definition, the tail over the ids that both have."""
    log_q, divergences = torch.log_softmax(z / tau, 1), []
    for logp, k in zip(teachers, ks, strict=True):
        target = torch.log_softmax(logp / tau, 1)
        ids = logp.argsort(dim=1, descending=True, stable=True)
        head, tail = ids[:, :k], ids[:, k:]
        common = torch.zeros_like(z, dtype=torch.bool)
        common[:, : logp.shape[1]] = True
        outside = log_q.masked_fill(~common.scatter(1, head, False), -torch.inf)
        kl = (target.gather(1, head).exp() * (target.gather(1, head) - log_q.gather(1, head))).sum(1)
        if tail.shape[1]:
            p_t = target.gather(1, tail).logsumexp(1)
            kl = kl + p_t.exp() * (p_t - outside.logsumexp(1))
        divergences.append(kl)
    trained = labels != NOT_TRAINED
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    together = torch.stack(divergences)
    return (ALPHA * ce + (1 - ALPHA) * tau**2 * together.mean(0)) * trained, together * trained


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("k", [9, "all"])
@pytest.mark.parametrize(("columns", "sizes"), SIDES, ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_definition(
    columns: int, sizes: tuple[int, ...], k: Any, tau: float
) -> None:
    """Whole logits and the fused head; where all ids are stored it is the dense loss."""
    # Where the student has fewer ids, one of them is left for the tail, which it would otherwise not have at all.
    count = min(*sizes, columns - (max(sizes) > columns))
    counts = [count if k == "all" else k + 4 * number for number in range(len(sizes))]
    dense = [teacher(number, size, columns) for number, size in enumerate(sizes)]
    names = "abc"[: len(sizes)]
    members = [member(name, size=size) for name, size in zip(names, sizes, strict=True)]
    loss = DistillationLoss(min(columns, V), ALPHA, tau, members)
    targets = {name: stored(logp, n, dtype=torch.float64) for name, logp, n in zip(names, dense, counts, strict=True)}
    labels = labels_for(3, vocabulary_size=min(columns, *sizes))
    hidden, weight = normal(7, P, H), normal(8, columns, H, scale=0.6)

    want, divergences = expected(hidden @ weight.t(), labels, dense, counts, tau)
    _, by_weight = gradient(lambda w: expected(hidden @ w.t(), labels, dense, counts, tau)[0], weight)
    for sums in (
        lambda w: loss(hidden @ w.t(), labels, targets),
        lambda w: fused_loss(hidden, w, None, loss.prepare(labels, targets)),
    ):
        found = sums(weight)
        torch.testing.assert_close(found.loss_sum, want.sum(), rtol=1e-11, atol=0)
        for name, each in zip(names, divergences, strict=True):
            torch.testing.assert_close(found.divergence[name], each.sum(), rtol=1e-11, atol=0)
        _, ours = gradient(lambda w, sums=sums: sums(w).loss_sum, weight)
        torch.testing.assert_close(ours, by_weight, rtol=1e-9, atol=1e-11 * float(by_weight.abs().max()))
