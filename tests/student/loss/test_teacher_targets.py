"""Treatments of the tail against dense references in float64: the value of each, and which of them is unbiased.

Legend: `P` positions, `K` stored ids, `V` vocabulary, `W` columns of the student's head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.references.dense_targets import (
    P,
    V,
    assert_same_loss,
    dense,
    dense_kl,
    gradient,
    joined,
    labels_for,
    member,
    normal,
    samples_of_one,
    stored,
    varopt,
)
from torch import Tensor

from storage.errors import InputError
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss, forward_kl
from student.loss.teacher_targets import interpolation_bound, mean_rounding, tail_bounds, temper, weights
from student.target_batch import TargetBatch

TEMPERATURES = [1.0, 2.0]
DOUBLE = torch.float64


def mixed_entry(logp: Tensor, tau: float, step: float | None = None) -> TargetBatch:
    dtype = torch.float32 if step else DOUBLE
    return varopt(logp, 24, seed=5, tau=tau, step=step, dtype=dtype)


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_a_sampled_tail_shares_the_mass_outside_the_certain_ids(tau: float) -> None:
    z, logp = normal(3, P, V), dense(4)
    targets = mixed_entry(logp, tau)
    p = torch.softmax(logp / tau, 1)
    w = torch.zeros(P, V, dtype=DOUBLE)
    for row in range(P):
        j, ids = int(targets.certain[row]), targets.token_ids[row].long()
        assert j < 24
        w[row, ids[:j]] = p[row, ids[:j]]
        w[row, ids[j:]] = (1 - w[row].sum()) / (24 - j)
    found = weights(temper(targets, member(sampled_at=tau), tau), "sampled")
    torch.testing.assert_close(found.heads, w.gather(1, targets.token_ids.long()), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.heads.sum(1), torch.ones(P, dtype=DOUBLE), rtol=1e-13, atol=0)
    assert not found.tail.any()
    constant = (logp.exp() * logp).sum(1) if tau == 1 else (w * torch.log_softmax(logp / tau, 1)).sum(1)

    def reference(z: Tensor) -> Tensor:
        return constant - (w * torch.log_softmax(z / tau, 1)).sum(1)

    assert_same_loss(lambda z: forward_kl(z, targets, member(sampled_at=tau), tau, None, "sampled"), reference, z)


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_the_mean_over_all_samples_is_the_dense_kl_and_its_gradient(tau: float) -> None:
    """With one sampled id, all samples can be listed with their probability: p_i over the mass outside the heads."""
    rows, v, k = 3, 29, 6
    z, logp, teacher = normal(5, rows, v + 2), dense(6, rows, vocabulary_size=v), member(sampled_at=tau, size=v)
    total, total_gradient = torch.zeros(rows, dtype=DOUBLE), torch.zeros_like(z)
    bucketed = torch.zeros(rows, dtype=DOUBLE)
    for chance, targets in samples_of_one(logp, k, tau):
        value, by_z = gradient(lambda z, t=targets: forward_kl(z, t, teacher, tau, None, "sampled"), z)
        total += chance * value
        total_gradient += chance[:, None] * by_z
        bucketed += chance * forward_kl(z, targets, teacher, tau, None, "bucket")
    expected, expected_gradient = gradient(lambda z: dense_kl(z, logp, tau), z)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(total_gradient, expected_gradient, rtol=1e-9, atol=1e-14)
    assert (bucketed < 0.95 * expected).all(), "the bucket is biased here, so unbiasedness is not trivial"


def test_a_blend_is_linear_in_its_share() -> None:
    z, logp = normal(9, P, V), dense(10)
    targets, teacher = mixed_entry(logp, 1.0), member(sampled_at=1.0)
    one, by_one = gradient(lambda z: forward_kl(z, targets, teacher, 1.0, None, "sampled"), z)
    other, by_other = gradient(lambda z: forward_kl(z, targets, teacher, 1.0, None, "bucket"), z)
    assert (one - other).abs().min() > 1e-6
    for share in (0.25, 0.75):
        value, by_z = gradient(lambda z, s=share: forward_kl(z, targets, teacher, 1.0, None, "blend", s), z)
        torch.testing.assert_close(value, share * one + (1 - share) * other, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(by_z, share * by_one + (1 - share) * by_other, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("tau", TEMPERATURES)
def test_renormalise_and_none_are_their_formulas(tau: float) -> None:
    z, logp = normal(11, P, V + 2), dense(12)
    targets = stored(logp, 9, dtype=DOUBLE)
    ids = targets.token_ids.long()
    p = torch.log_softmax(logp / tau, 1).gather(1, ids)
    renormalised = p - p.logsumexp(1, keepdim=True)
    for tail, target in (("renormalise", renormalised), ("none", p)):

        def reference(z: Tensor, target: Tensor = target) -> Tensor:
            return (target.exp() * (target - torch.log_softmax(z / tau, 1).gather(1, ids))).sum(1)

        assert_same_loss(lambda z, t=tail: forward_kl(z, targets, member(), tau, None, t), reference, z)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("step", [1 / 128, 1 / 32, 1.0])
@pytest.mark.parametrize("k", [24, V - 2])
def test_with_codes_buckets_sum_to_one_and_weights_too(step: float, k: int, tau: float) -> None:
    logp = dense(13)
    targets = varopt(logp, k, seed=1, tau=tau, step=step)
    tempered = temper(targets, member(step=step, sampled_at=tau), tau)
    heads, tail = tempered.bucketed
    assert tail.isfinite().all()
    torch.testing.assert_close(heads.exp().sum(1) + tail.exp(), torch.ones(P), rtol=0, atol=2e-6)
    found = weights(tempered, "sampled")
    torch.testing.assert_close(found.heads.sum(1) + found.tail, torch.ones(P), rtol=0, atol=2e-6)


def test_the_rest_of_the_tail_is_known_or_less_than_the_rounding() -> None:
    """All ids but two are stored, most of them sampled: their rounded sum lies above the stored tail in some rows."""
    step = 1 / 8
    logp = dense(14, scale=0.5)
    # The two ids that are left out have next to nothing.
    logp[:, :2] -= 12
    logp = torch.log_softmax(logp, 1)
    order = logp.argsort(dim=1, descending=True, stable=True)
    heads = stored(logp, 3, step=step)
    coded = stored(logp, V - 2, step=step)
    targets = replace(coded, certain=heads.certain, log_tail=heads.log_tail, log_tail_half=heads.log_tail_half)
    tempered = temper(targets, member(step=step), 1.0)
    sampled = torch.logsumexp(tempered.scores.masked_fill(tempered.certain, -math.inf), 1)
    assert (sampled > tempered.log_tail).any(), "else this proves nothing"
    truth = joined(logp, order[:, : V - 2])[1]
    least = math.log(-math.expm1(-step / 2)) + tempered.log_tail
    assert (tempered.log_rest >= least - 1e-5).all()
    assert (tempered.log_rest.exp() <= truth.exp() + 2 * math.expm1(step / 2)).all()
    z = normal(15, P, V)
    value, by_z = gradient(lambda z: forward_kl(z, targets, member(step=step), 1.0), z.float())
    assert value.isfinite().all()
    assert by_z.isfinite().all()


def test_with_every_id_stored_the_tail_is_empty_despite_rounding() -> None:
    logp = dense(16)
    heads, whole = stored(logp, 3, step=1 / 32), stored(logp, V, step=1 / 32)
    targets = replace(whole, certain=heads.certain, log_tail=heads.log_tail, log_tail_half=heads.log_tail_half)
    tempered = temper(targets, member(step=1 / 32), 1.0)
    assert tempered.log_rest.isneginf().all()


def test_a_row_without_sampled_ids_keeps_its_small_tail_bucket() -> None:
    logp = dense(17)
    targets = stored(logp, 30, dtype=DOUBLE)
    found = weights(temper(targets, member(sampled_at=1.0), 1.0), "sampled")
    bucket = weights(temper(targets, member(), 1.0), "bucket")
    for one, other in zip(vars(found).values(), vars(bucket).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("tau", [1.01, 1.25, 1.5, 1.9, 2.5, 4.0, 50.0])
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_an_interpolated_tail_is_within_its_bounds_and_so_is_the_truth(scale: float, tau: float) -> None:
    logp = dense(21, scale=scale)
    targets = stored(logp, 12, dtype=DOUBLE)
    truth = joined(logp / tau, targets.token_ids.long())[1]
    least, greatest = tail_bounds(targets, member(), tau)
    assert (least <= truth + 1e-12).all()
    assert (truth <= greatest + 1e-12).all()
    teacher = member()
    taken = temper(targets, teacher, tau, interpolate_tail=True).log_tail
    assert (least <= taken + 1e-12).all()
    assert (taken <= greatest + 1e-12).all()
    heads = (logp / tau).gather(1, targets.token_ids.long()).logsumexp(1)
    off = (torch.sigmoid(taken - heads) - torch.sigmoid(truth - heads)).abs()
    bound = interpolation_bound(targets, teacher, tau)
    assert (off <= bound + 1e-12).all()
    assert (bound <= 1).all()
    assert bound.max() > 0


def test_interpolation_meets_the_stored_tails_and_serves_a_loss() -> None:
    z, logp, labels = normal(22, P, V), dense(23), labels_for(24)
    targets = stored(logp, 12, dtype=DOUBLE)
    for tau, name in ((1 + 1e-9, "log_tail"), (2 - 1e-9, "log_tail_half"), (2 + 1e-9, "log_tail_half")):
        found = temper(targets, member(), tau, interpolate_tail=True).log_tail
        torch.testing.assert_close(found, getattr(targets, name), rtol=0, atol=1e-6)
    loss = DistillationLoss(V, 0.0, 1.5, [member()], interpolate_tail=True)
    found = loss(z, labels, {"t": targets}).divergence["t"]
    p_i, p_t = joined(torch.log_softmax(logp / 1.5, 1), targets.token_ids.long())
    q_i, q_t = joined(torch.log_softmax(z / 1.5, 1), targets.token_ids.long())
    exact = ((p_i.exp() * (p_i - q_i)).sum(1) + p_t.exp() * (p_t - q_t))[labels != NOT_TRAINED].sum()
    assert float(found) == pytest.approx(float(exact), rel=0.02)
    assert float(found) != pytest.approx(float(exact), rel=1e-6)


def test_interpolation_has_nothing_to_add_where_every_id_is_stored() -> None:
    z, logp = normal(25, P, V), dense(26)
    targets = stored(logp, V, dtype=DOUBLE)
    assert not interpolation_bound(targets, member(), 1.5).any()
    tempered = temper(targets, member(), 1.5, interpolate_tail=True)
    assert tempered.log_tail.isneginf().all()
    loss = DistillationLoss(V, 0.0, 1.5, [member()], interpolate_tail=True)
    labels = torch.zeros(P, dtype=torch.int64)
    assert_same_loss(
        lambda z: loss(z, labels, {"t": targets}).loss_sum, lambda z: 2.25 * dense_kl(z, logp, 1.5).sum(), z
    )


@pytest.mark.parametrize(
    ("tau", "flag", "words"),
    [
        (1.5, False, "--interpolate-tail"),
        (0.5, False, "below 1"),
        (0.5, True, "below 1"),
        (0.0, True, "below 1"),
        (-1.0, True, "below 1"),
        (math.nan, True, "below 1|finite"),
        (math.inf, True, "finite"),
    ],
)
def test_other_temperatures_are_refused(tau: float, flag: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DistillationLoss(V, 0.5, tau, [member()], interpolate_tail=flag)
    if math.isfinite(tau):
        with pytest.raises(InputError, match=words):
            temper(stored(dense(1), 5), member(), tau, interpolate_tail=flag)


@pytest.mark.parametrize("step", [1 / 8, 1 / 2, 1.0])
def test_the_mean_error_of_log_probs_that_are_rounded_for_the_mean_of_their_inverse(step: float) -> None:
    below = torch.linspace(0, step, 100_001, dtype=DOUBLE)  # nats below a code
    chance = torch.expm1(below) / math.expm1(step)  # of the next one
    assert float((below - step * chance).mean()) == pytest.approx(mean_rounding(step), abs=1e-6)
