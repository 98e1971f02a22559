"""Every divergence against its dense definition, the written derivatives, and its own limits.

Legend: `P` positions, `K` stored ids, `V` vocabulary, `W` columns of the student's head.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.references.dense_targets import (
    P,
    V,
    assert_same_loss,
    dense,
    gradient,
    joined,
    labels_for,
    member,
    normal,
    stored,
    varopt,
)
from support.references.divergences import definition
from torch import Tensor

from student.labels import NOT_TRAINED
from student.loss import student_logprobs as buckets
from student.loss.distillation import DistillationLoss
from student.loss.divergences import Divergence
from student.loss.objective import DEFAULT_MIX, DivergenceName
from student.loss.student_logprobs import student_buckets

CASES: list[tuple[DivergenceName, float]] = [
    ("forward-kl", 0.0), ("reverse-kl", 0.0), ("jsd", 0.5), ("jsd", 0.1), ("skew-forward-kl", 0.1),
    ("skew-forward-kl", 0.6), ("skew-reverse-kl", 0.1), ("skew-reverse-kl", 0.6),
]  # fmt: skip
LOSSES = tuple(dict.fromkeys(name for name, _ in CASES))
TEMPERATURES = [1.0, 2.0]
DOUBLE = torch.float64
every_case = pytest.mark.parametrize(("name", "mix"), CASES, ids=lambda value: str(value))


def loss_of(name: DivergenceName, mix: float, tau: float, **others: Any) -> DistillationLoss:
    given = {"mix": mix} if name in DEFAULT_MIX else {}
    return DistillationLoss(
        V, 0.0, tau, [member(sampled_at=others.pop("sampled_at", None))], loss=name, **given, **others
    )


def padded(logp: Tensor, columns: int) -> Tensor:
    return torch.nn.functional.pad(logp.exp(), (0, columns))


@every_case
def test_derivatives_are_the_written_ones(name: DivergenceName, mix: float) -> None:
    """g_i and h of the table, by autograd in float64, at a student side that sums to 1 or to less."""
    p, q = torch.softmax(normal(1, P, 12), 1), torch.softmax(normal(2, P, 12), 1)
    for mass in (1.0, 0.7):
        log_q = (mass * q).log()
        ell, theta = log_q[:, :11].clone().requires_grad_(), log_q[:, 11].clone().requires_grad_()
        divergence = Divergence(name, mix)
        value = divergence((p[:, :11].log(), p[:, 11].log()), (ell, theta))
        # The cost of the padded ids is not in the table: take away its part that depends on the other ids' mass.
        inside = value + divergence.padding_cost * (ell.exp().sum(1) + theta.exp())
        g, h = torch.autograd.grad(inside.sum(), (ell, theta))
        found, student = torch.cat([g, h[:, None]], 1), mass * q
        ratio = student.log()
        if name == "forward-kl":
            expected = -p
        elif name == "reverse-kl":
            expected = student * (ratio - p.log() + 1)
        elif name == "jsd":
            expected = (1 - mix) * student * (ratio - (mix * p + (1 - mix) * student).log())
        elif name == "skew-forward-kl":
            expected = -p * (1 - mix) * student / (mix * p + (1 - mix) * student)
        else:
            m = (1 - mix) * p + mix * student
            expected = student * (ratio - m.log() + 1 - mix * student / m)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("padding", [0, 13])
@every_case
def test_at_k_equal_v_value_and_gradient_are_the_dense_ones(
    name: DivergenceName, mix: float, padding: int, tau: float
) -> None:
    """Over all W columns, the teacher's padding empty. Reverse KL is infinite there: its generalised form over V."""
    z, logp, labels = normal(5, P, V + padding), dense(6), labels_for(7)
    trained = labels != NOT_TRAINED

    def reference(z: Tensor) -> Tensor:
        p, q = padded(torch.log_softmax(logp / tau, 1), padding), torch.softmax(z / tau, 1)
        if name == "reverse-kl":
            q, empty = q[:, :V], q[:, V:].sum(1)
            return (definition(name, mix, p[:, :V], q) + empty)[trained].sum()
        return definition(name, mix, p, q)[trained].sum()

    loss, targets = loss_of(name, mix, tau), {"t": stored(logp, V, dtype=DOUBLE)}
    assert_same_loss(lambda z: loss(z, labels, targets).loss_sum / tau**2, reference, z)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("padding", [0, 13])
@pytest.mark.parametrize("rows", [1 << 18, 1000], ids=["one chunk", "many chunks"])
@every_case
def test_below_v_it_is_the_divergence_of_joined_outcomes(
    name: DivergenceName, mix: float, padding: int, tau: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the cost of padded ids. Also for sampled ids: any ids with their own probabilities will do."""
    monkeypatch.setitem(buckets._CHUNK_LOGITS, "cpu", rows)
    z, logp, labels = normal(8, P, V + padding), dense(9), labels_for(10)
    trained, cost = labels != NOT_TRAINED, Divergence(name, mix).padding_cost
    top_k = [stored(logp, k, dtype=DOUBLE) for k in (1, 11, V - 1)]
    for targets in (*top_k, varopt(logp, 20, seed=3, tau=tau, dtype=DOUBLE)):
        ids = targets.token_ids.long()

        def reference(z: Tensor, ids: Tensor = ids) -> Tensor:
            log_q = torch.log_softmax(z / tau, 1)
            p, q = (joined(each, ids) for each in (torch.log_softmax(logp / tau, 1), log_q[:, :V]))
            p, q = (torch.cat([heads, tail[:, None]], 1).exp() for heads, tail in (p, q))
            return (definition(name, mix, p, q) + cost * log_q[:, V:].exp().sum(1))[trained].sum()

        loss = loss_of(name, mix, tau, tail="bucket", sampled_at=tau)
        assert_same_loss(lambda z, loss=loss, t=targets: loss(z, labels, {"t": t}).loss_sum / tau**2, reference, z)


@pytest.mark.parametrize("tau", TEMPERATURES)
@every_case
def test_bucketed_is_between_zero_and_dense_and_grows_with_k(name: DivergenceName, mix: float, tau: float) -> None:
    z, logp = normal(11, P, V, scale=3.0), dense(12, scale=3.0)
    whole = definition(name, mix, torch.softmax(logp / tau, 1), torch.softmax(z / tau, 1))
    before, labels = torch.zeros(P, dtype=DOUBLE), torch.zeros(P, dtype=torch.int64)
    for k in (1, 2, 5, 17, 64, 200, V):
        targets = stored(logp, k, dtype=DOUBLE)
        _, (side,) = student_buckets(z, labels, [targets.token_ids], [V], tau)
        teacher = joined(torch.log_softmax(logp / tau, 1), targets.token_ids.long())
        value = Divergence(name, mix)(teacher, side)
        assert (value >= before - 1e-12).all()
        assert (value <= whole + 1e-12).all()
        if k == 2:
            assert value.mean() < 0.99 * whole.mean(), "strict at some positions, else the inequalities prove nothing"
        before = value


@every_case
def test_mass_on_padded_ids_is_never_a_gain(name: DivergenceName, mix: float) -> None:
    """A student equal to its teacher but for a share of its mass on ids that do not exist."""
    logp = dense(15)
    targets = stored(logp, 9, dtype=DOUBLE)
    teacher = joined(logp, targets.token_ids.long())
    before = torch.full((P,), -1e-15, dtype=DOUBLE)
    for share in (0.0, 0.01, 0.3, 0.63, 0.9):
        log_q = logp + math.log1p(-share)
        value = Divergence(name, mix)(teacher, joined(log_q, targets.token_ids.long()))
        assert (value > before).all() if share else value.abs().max() < 1e-12
        before = value
    z = torch.cat([logp, torch.zeros(P, 1, dtype=DOUBLE)], 1)
    loss, labels = loss_of(name, mix, 1.0), torch.zeros(P, dtype=torch.int64)
    _, by_z = gradient(lambda z: loss(z, labels, {"t": targets}).loss_sum, z)
    assert (by_z[:, V] > 0).all(), "descent moves mass off them"


def test_limits_and_symmetries() -> None:
    p, q = torch.softmax(normal(16, P, 9), 1).log(), torch.softmax(normal(17, P, 9), 1).log()
    one, other = (p[:, :8], p[:, 8]), (q[:, :8], q[:, 8])

    def value(name: DivergenceName, mix: float, a: Any = one, b: Any = other) -> Tensor:
        return Divergence(name, mix)(a, b)

    kl, reverse = value("forward-kl", 0.0), value("reverse-kl", 0.0)
    torch.testing.assert_close(value("jsd", 0.5), value("jsd", 0.5, other, one), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(reverse, value("forward-kl", 0.0, other, one), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(value("jsd", 1e-7) / 1e-7, kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value("jsd", 1 - 1e-7) / 1e-7, reverse, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value("skew-forward-kl", 1e-9), kl, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value("skew-reverse-kl", 1e-9), reverse, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("k", [3, V])
@every_case
def test_extreme_rows_stay_finite(name: DivergenceName, mix: float, k: int, tau: float) -> None:
    """Teachers and students so sharp that a tail is 0 in float32, ids that a student rules out, ids at the floor."""
    logits = normal(18, P, V, scale=1.0)
    sharp = torch.log_softmax(torch.where(torch.arange(V) < 2, 400.0, 0.0) + logits, 1)
    masked = dense(19).masked_fill(torch.arange(V) == 5, -2000.0)
    excluding = logits.masked_fill(torch.arange(V) == 5, -math.inf)
    students = [torch.where(torch.arange(V) < 2, sign * 300.0, 0.0) + logits for sign in (1, -1)] + [excluding]
    loss, labels = loss_of(name, mix, tau), labels_for(20)
    for teacher in (sharp, masked):
        targets = {"t": stored(teacher.clamp(min=-2000.0), k)}
        for student in students:
            value, by_z = gradient(lambda z, t=targets: loss(z, labels, t).loss_sum, student.float())
            assert value.isfinite()
            assert by_z.isfinite().all()
            assert student is not excluding or not by_z[:, 5].any()
            assert value >= -1e-4


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize(("positions", "v", "k"), [(252, 507, 123), (123, 252, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_our_error_is_not_above_the_naive_ones(
    name: DivergenceName, dtype: torch.dtype, positions: int, v: int, k: int, tau: float
) -> None:
    """The definition in plain torch, in the same type, on the same logits; the truth in float64."""
    z = normal(21, positions, v + 5, scale=4.0).to(dtype)
    logp, labels = dense(22, positions, scale=4.0, vocabulary_size=v), labels_for(23, positions, v)
    mix = DEFAULT_MIX.get(name, 0.0)
    trained = labels != NOT_TRAINED
    targets = stored(logp, k)
    ids = targets.token_ids.long()

    def naive(z: Tensor) -> Tensor:
        log_q = torch.log_softmax(z / tau, 1)
        sides = (joined(log_p, ids) for log_p in (torch.log_softmax(logp.to(z.dtype) / tau, 1), log_q[:, :v]))
        p, q = (torch.cat([heads, tail[:, None]], 1).exp() for heads, tail in sides)
        # Padded ids as one outcome more; reverse KL gives it its cost and not its infinity.
        extra = log_q[:, v:].exp().sum(1) * Divergence(name, mix).padding_cost
        nats = torch.nn.functional.cross_entropy(z, labels, ignore_index=NOT_TRAINED, reduction="sum")
        return 0.5 * nats + 0.5 * tau**2 * (definition(name, mix, p, q) + extra)[trained].sum()

    given = {"mix": mix} if name in DEFAULT_MIX else {}
    loss = DistillationLoss(v, 0.5, tau, [member(size=v)], loss=name, **given)
    true_value, truth = gradient(naive, z.double())
    naive_value, naive_gradient = gradient(naive, z)
    value, ours = gradient(lambda z: loss(z, labels, {"t": targets}).loss_sum, z)
    assert ours.dtype == dtype
    assert (ours - truth).abs().max() <= (naive_gradient - truth).abs().max() + 1e-6
    assert (value - true_value).abs() <= (naive_value - true_value).abs() + 1e-6 * true_value.abs()
