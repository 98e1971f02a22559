"""The control variate of sampled targets against its definition in float64: mean, variance, and coefficient.

Legend: `P` positions, `K` stored ids, `V` vocabulary, `W` columns of the student's head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.caches.small import make_entry_2, stream_record
from support.references.dense_targets import (
    P,
    V,
    dense,
    dense_kl,
    gradient,
    labels_for,
    member,
    normal,
    samples_of_one,
    stored,
    varopt,
    with_c,
)
from torch import Tensor

from storage.format.stored import StoredTargets
from storage.format.targets import SparseTargets
from student.labels import NOT_TRAINED
from student.loss.control_variate import ControlCoefficient
from student.loss.distillation import DistillationLoss
from student.target_batch import StoredBatch

K = 24
DOUBLE = torch.float64


def loss_of(c: float, tau: float = 1.0, size: int = V, **options: object) -> DistillationLoss:
    teacher = member(sampled_at=tau, size=size)
    return with_c(DistillationLoss(size, 0.0, tau, [teacher], tail="controlled", **options), c)


def every(rows: int) -> Tensor:
    """Labels of positions that are all trained."""
    return torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("width", [V, V + 13])
def test_the_gradient_is_that_of_the_definition_and_the_value_that_of_the_sampled_loss(width: int, tau: float) -> None:
    """Weights on the ids, and c times the teacher's tail on the log-mass of all that is not certain."""
    z, logp, labels, c = normal(1, P, width), dense(2), labels_for(3), 0.75
    targets = varopt(logp, K, seed=4, tau=tau, dtype=DOUBLE)
    ids, certain = targets.token_ids.long(), torch.arange(K) < targets.certain[:, None]
    log_p = torch.log_softmax(logp / tau, 1)
    p = log_p.gather(1, ids).exp()
    mass = 1 - p.masked_fill(~certain, 0.0).sum(1, keepdim=True)
    share = mass / (~certain).sum(1, keepdim=True)
    is_certain = torch.zeros(P, width, dtype=torch.bool).scatter(1, ids, certain)

    def reference(z: Tensor) -> Tensor:
        log_q = torch.log_softmax(z / tau, 1)
        log_tail = log_q[:, :V].masked_fill(is_certain[:, :V], -math.inf).logsumexp(1, keepdim=True)
        r = (log_q.gather(1, ids) - log_tail).detach().exp() * mass
        weights = torch.where(certain, p, share * (1 - c * r / p))
        value = -(weights * log_q.gather(1, ids)).sum(1) - c * (mass * log_tail)[:, 0]
        return tau**2 * value[labels != NOT_TRAINED].sum()

    sampled = DistillationLoss(V, 0.0, tau, [member(sampled_at=tau)])
    value, found = gradient(lambda z: loss_of(c, tau)(z, labels, {"t": targets}).loss_sum, z)
    torch.testing.assert_close(found, gradient(reference, z)[1], rtol=1e-9, atol=1e-13)
    plain = sampled(z, labels, {"t": targets})
    assert torch.equal(value, plain.loss_sum)
    assert torch.equal(loss_of(c, tau)(z, labels, {"t": targets}).divergence["t"], plain.divergence["t"])


def test_where_the_tails_agree_every_sample_has_the_dense_gradient() -> None:
    logp = dense(9)
    targets = varopt(logp, K, seed=10, dtype=DOUBLE)
    is_certain = torch.zeros(P, V, dtype=torch.bool).scatter(
        1, targets.token_ids.long(), torch.arange(K) < targets.certain[:, None]
    )
    # The student's head is another one, its tail the teacher's in another size.
    z = torch.where(is_certain, normal(11, P, V), logp + 1.0)
    _, found = gradient(lambda z: loss_of(1.0)(z, every(P), {"t": targets}).loss_sum, z)
    _, expected = gradient(lambda z: dense_kl(z, logp, 1.0), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    _, sampled = gradient(lambda z: loss_of(0.0)(z, every(P), {"t": targets}).loss_sum, z)
    assert (sampled - expected).abs().max() > 1e-3


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_mean_over_all_samples_is_the_dense_gradient_and_the_best_c_varies_least(tau: float) -> None:
    rows, v, k = 3, 59, 6
    logp = dense(12, rows, vocabulary_size=v)
    z = logp + normal(13, rows, v, scale=0.6)
    p, q = torch.softmax(logp / tau, 1), torch.softmax(z / tau, 1)
    tail = logp < logp.sort(descending=True).values[:, k - 2, None]
    p_tail, q_tail = (torch.where(tail, x, 0.0) / torch.where(tail, x, 0.0).sum(1, keepdim=True) for x in (p, q))
    chi2 = torch.where(tail, q_tail**2 / p_tail, 0.0).sum(1) - 1
    samples = samples_of_one(logp, k, tau)
    _, expected = gradient(lambda z: tau**2 * dense_kl(z, logp, tau), z)
    variance = {}
    # The best c of each row by itself: the coefficient that the sums over all samples of it come to.
    sums = sum(
        chance[:, None] * torch.stack([loss_of(0.0, tau, v)(z[i : i + 1], every(1), {"t": s[i : i + 1]}).control[0, 1:]
                                       for i in range(rows)])
        for chance, s in samples
    )  # fmt: skip
    torch.testing.assert_close(sums[:, 0] / sums[:, 1], 1 / (1 + chi2), rtol=1e-9, atol=0)
    for c in (0.0, 0.5, 1.0, *(1 / (1 + chi2)).tolist()):
        loss = loss_of(c, tau, v)
        by_sample = [
            gradient(lambda z, t=t, loss=loss: loss(z, every(rows), {"t": t}).loss_sum, z)[1] for _, t in samples
        ]
        mean = sum(chance[:, None] * each for (chance, _), each in zip(samples, by_sample, strict=True))
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-8)  # c is a float32
        off = [((each - mean) ** 2).sum(1) for each in by_sample]
        variance[c] = sum(chance * each for (chance, _), each in zip(samples, off, strict=True))
    for row, best in enumerate((1 / (1 + chi2)).tolist()):
        assert best > 0.4, "else there is little to gain"
        # Equal without regard to means and in the space of ids; the gradient by the logits is near that.
        least, plain = float(variance[best][row]), float(variance[0.0][row])
        assert least == pytest.approx((1 - best) * plain, rel=0.25)


@pytest.mark.parametrize("rounding", ["up or down at random", "to the nearest"])
def test_stored_log_probs_are_right_in_the_mean(rounding: str) -> None:
    """40,000 samples of one row through version 2 at its default of 1/2 nat; rounded to the nearest, the bias shows."""
    rows, v, m, step, c = 40_000, 41, 4, 1 / 32, 0.8
    log_odds = 12 * step  # a code of the mass without rounding
    log_mass, log_head = (float(torch.nn.functional.logsigmoid(torch.tensor(x))) for x in (log_odds, -log_odds))
    tail = torch.log_softmax(normal(14, v - 1, scale=0.7), 0) + log_mass
    logp = torch.cat([torch.tensor([log_head]), tail])
    assert tail.max() < log_mass - math.log(m), "no id of the tail is certain"
    uniforms = torch.rand(rows, 1, generator=torch.Generator().manual_seed(15), dtype=DOUBLE)
    total = tail.exp().cumsum(0)
    sampled = 1 + torch.searchsorted(total, (uniforms + torch.arange(m)) * total[-1] / m)
    ids = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), sampled], 1)
    entry = make_entry_2(stream_record(rows, v), m + 1, ("sampled-logprobs",), method="varopt")
    written = SparseTargets(
        start=0,
        token_ids=ids.numpy().astype(np.uint16),
        kept=np.full(rows, m + 1, np.uint16),
        certain=np.ones(rows, np.uint16),
        logprobs=logp[ids].numpy().astype(np.float32),
        log_tail=np.full(rows, log_mass, np.float32),
    )
    batch = StoredBatch.of([[StoredTargets.of(entry, written)]], rows, [[0]])
    if rounding == "to the nearest":
        below = (log_mass - math.log(m) + step - logp) / entry.encoding.sampled_step_nats
        codes = torch.where(torch.arange(m + 1) < 1, 0.0, below[batch.flat().decoded().token_ids.long()].round())
        batch = replace(batch, arrays={**batch.arrays, "sampled_codes": codes.to(torch.uint8)[None]})
    z = (logp + normal(16, v, scale=0.8)).expand(rows, v)
    _, by_row = gradient(lambda z: loss_of(c, size=v)(z, every(rows), {"t": batch}).loss_sum, z)
    expected = torch.softmax(z[0], 0) - logp.exp()
    deviations = (by_row.mean(0) - expected) / (by_row.std(0) / rows**0.5 + 1e-6)
    assert (deviations.abs().max() < 4.5) == (rounding == "up or down at random"), deviations.abs().max()


def test_sums_of_a_step_are_of_trained_positions_with_targets_weighted_as_their_gradients_are() -> None:
    rows, tau = 30, 2.0
    z, logp, labels = normal(17, rows, V), dense(18, rows), labels_for(19, rows)
    targets = varopt(logp, K, seed=20, tau=tau, dtype=DOUBLE)
    there = torch.arange(rows) % 3 > 0
    targets = replace(targets, kept=targets.kept.masked_fill(~there, 0), certain=targets.certain.masked_fill(~there, 0))
    by_position = torch.rand(rows, generator=torch.Generator().manual_seed(21), dtype=DOUBLE)
    loss = loss_of(0.3, tau)
    expected = torch.zeros(3, dtype=DOUBLE)
    log_q = torch.log_softmax(z / tau, 1)
    log_p = torch.log_softmax(logp / tau, 1)
    for row in torch.nonzero(there & (labels != NOT_TRAINED))[:, 0].tolist():
        ids, certain = targets.token_ids[row].long(), int(targets.certain[row])
        outside = torch.ones(V, dtype=torch.bool)
        outside[ids[:certain]] = False
        s = log_p[row, outside].exp().sum() / (K - certain)
        rho = s * (K - certain) * (log_q[row] - log_q[row, outside].logsumexp(0) - log_p[row]).exp()[ids[certain:]]
        squared = by_position[row] ** 2
        expected += torch.stack([torch.tensor(1.0), squared * s**2 * rho.sum(), squared * s**2 * (rho**2).sum()])
    found = loss(z, labels, {"t": targets}, by_position)
    torch.testing.assert_close(found.control, expected[None], rtol=1e-10, atol=0)
    assert int(found.taught["t"]) == expected[0]


def test_rows_without_sampled_ids_have_the_sampled_loss() -> None:
    """Their small mass outside is one bucket already."""
    z, targets = normal(22, P, V), {"t": stored(dense(23), 30, dtype=DOUBLE)}
    for labels in (every(P), every(P) + NOT_TRAINED):
        ours, theirs = (
            gradient(lambda z, c=c, labels=labels: loss_of(c)(z, labels, targets).loss_sum, z) for c in (0.9, 0.0)
        )
        assert torch.equal(ours[1], theirs[1])
    assert not loss_of(0.9)(z, every(P), targets).control[0, 1:].any()


def test_a_coefficient_comes_from_earlier_steps_and_each_member_has_its_own() -> None:
    z, labels = normal(24, P, V), labels_for(25)
    targets = {name: varopt(dense(i), K, seed=i, dtype=DOUBLE) for i, name in enumerate("ab", 26)}
    loss = DistillationLoss(
        V, 0.5, 1.0, [member("a", 3.0, sampled_at=1.0), member("b", sampled_at=1.0)], tail="controlled"
    )
    sampled, first = (
        gradient(lambda z, each=each: each(z, labels, targets).loss_sum, z)[1]
        for each in (DistillationLoss(V, 0.5, 1.0, loss.members), loss)
    )
    assert torch.equal(first, sampled), "nothing is known in the first step"
    prepared = loss.prepare(labels, targets)
    control = loss(z, labels, targets).control
    loss.end_step(control)
    found = {name: float(each.value) for name, each in loss.controls.items()}
    ratios = (control[:, 1] / control[:, 2]).clamp(max=1.0).tolist()
    assert found == pytest.approx(dict(zip("ab", ratios, strict=True)))
    assert len({0.0, *found.values()}) == 3
    assert not any(float(term.c) for term in prepared._terms), "c is that of the step in which a batch was prepared"
    assert not torch.equal(gradient(lambda z: loss(z, labels, targets).loss_sum, z)[1], sampled)


def test_earlier_steps_weigh_less_by_the_positions_since_then() -> None:
    once, twice = ControlCoefficient(memory_positions=100.0), ControlCoefficient(memory_positions=100.0)
    assert float(once.value) == 0.0
    for each in (once, twice):
        each.end_step(torch.tensor([50.0, 3.0, 10.0]))
    assert float(once.value) == pytest.approx(0.3)
    once.end_step(torch.tensor([60.0, 2.0, 20.0]))
    kept = math.exp(-0.6)
    assert once.state() == pytest.approx([3 * kept + 2, 10 * kept + 20])
    for _ in range(2):
        twice.end_step(torch.tensor([30.0, 0.0, 0.0]))
    assert twice.state() == pytest.approx([3 * kept, 10 * kept])
    before = once.state()
    once.end_step(torch.tensor([60.0, math.nan, 1.0]))
    assert once.state() == before
    again = ControlCoefficient(memory_positions=100.0)
    again.load(before)
    assert torch.equal(again.value, once.value)
    again.end_step(torch.tensor([10.0, 1e9, 1.0]))
    assert float(again.value) == 1.0
    again.load(None)
    assert float(again.value) == 0.0
