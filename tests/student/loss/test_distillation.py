"""The distillation loss against float64 dense references, at odd shapes.

Legend: `P` positions, `K` stored ids, `V` vocabulary, `W` columns of the student's head.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.references.dense_targets import (
    FILL_VALUE,
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
    quantisation_bound,
    stored,
)
from torch import Tensor

from storage.errors import InputError
from storage.format import encoding
from student.labels import NOT_TRAINED
from student.loss import student_logprobs as buckets
from student.loss.distillation import DistillationLoss, forward_kl
from student.loss.objective import Tail
from student.loss.student_logprobs import student_buckets
from student.loss.teacher_targets import temper
from student.target_batch import TargetBatch

WIDTHS = [V, V + 13]
TEMPERATURES = [1.0, 2.0]


def tempered_bucket(targets: TargetBatch, step: float | None, tau: float) -> tuple[Tensor, Tensor]:
    """(log-probs of the kept ids, log-mass of the rest)."""
    return temper(targets, member(step=step), tau).bucketed


def naive_kl(z: Tensor, logp: Tensor, k: int, tau: float) -> Tensor:
    """KL with everything outside the top-k ids as one tail bucket, if there is any, by plain autograd in float64."""
    if k == V:
        return dense_kl(z, logp, tau)
    ids = logp.argsort(dim=1, descending=True, stable=True)[:, :k]
    (p_i, p_t), (q_i, q_t) = (joined(torch.log_softmax(x / tau, 1), ids) for x in (logp, z))
    return (p_i.exp() * (p_i - q_i)).sum(1) + p_t.exp() * (p_t - q_t)


@pytest.fixture(params=[1 << 18, 1000], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(buckets._CHUNK_LOGITS, "cpu", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("tail", ["bucket", "sampled", "blend", "renormalise", "none"])
@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("width", WIDTHS)
def test_at_k_equal_v_loss_and_gradient_are_the_dense_kl(width: int, tau: float, tail: Tail) -> None:
    z, logp, teacher = normal(3, P, width), dense(4), member(sampled_at=tau)
    exact, single = (stored(logp, V, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert_same_loss(lambda z: forward_kl(z, exact, teacher, tau, None, tail, 0.4), lambda z: dense_kl(z, logp, tau), z)
    expected, expected_gradient = gradient(lambda z: dense_kl(z, logp, tau), z)
    value, by_z = gradient(lambda z: forward_kl(z, single, teacher, tau, None, tail, 0.4), z.float())
    torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(by_z, expected_gradient.float(), rtol=1e-5, atol=3e-7)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("tau", TEMPERATURES)
def test_any_loss_of_the_buckets_has_its_gradient(tau: float) -> None:
    """The rule holds for every loss, so it is tested on one that is no divergence."""
    width, k = V + 3, 7
    z, labels = normal(7, P, width), labels_for(8)
    ids = normal(9, P, V).argsort(1)[:, :k]
    support = ids.to(torch.int32)
    support[::3, 4:] = -1
    outside = torch.ones(P, V, dtype=torch.bool).scatter(1, ids, False)
    outside[::3] = torch.ones(P, V, dtype=torch.bool).scatter(1, ids[:, :4], False)[::3]

    def loss(ce: Tensor, ell: Tensor, theta: Tensor) -> Tensor:
        return (labels != NOT_TRAINED) * (0.3 * ce + ((support >= 0) * ell.sin()).sum(1) + theta.exp() * theta**2)

    def ours(z: Tensor) -> Tensor:
        ce, ((ell, theta),) = student_buckets(z, labels, [support], [V], tau)
        assert not ell[support < 0].any()
        return loss(ce, ell, theta)

    def naive(z: Tensor) -> Tensor:
        log_q = torch.log_softmax(z / tau, 1)
        ce = torch.nn.functional.cross_entropy(z, labels, ignore_index=NOT_TRAINED, reduction="none")
        theta = log_q[:, :V].masked_fill(~outside, -math.inf).logsumexp(1)
        return loss(ce, log_q.gather(1, ids), theta)

    assert_same_loss(ours, naive, z)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_mixture_has_the_gradient_of_the_mixed_teachers(width: int, tau: float) -> None:
    z, labels = normal(12, P, width), torch.randint(0, V, (P,), generator=torch.Generator().manual_seed(0))
    weights, teachers = [3.0, 1.0, 0.0], [dense(13), dense(14), dense(15)]
    names = ["a", "b", "c"]
    loss = DistillationLoss(V, 0.0, tau, [member(n, w) for n, w in zip(names, weights, strict=True)])
    targets = {n: stored(t, V, dtype=torch.float64) for n, t in zip(names, teachers, strict=True)}
    value, by_z = gradient(lambda z: loss(z, labels, targets).loss_sum, z)
    mixed = (0.75 * torch.softmax(teachers[0] / tau, 1) + 0.25 * torch.softmax(teachers[1] / tau, 1)).log()

    def reference(z: Tensor) -> Tensor:
        return tau**2 * (mixed.exp() * (mixed - torch.log_softmax(z / tau, 1)[:, :V])).sum()

    expected, expected_gradient = gradient(reference, z)
    torch.testing.assert_close(by_z, expected_gradient, rtol=1e-11, atol=1e-14)
    # The values differ by a constant in the student: the spread of the members about their mixture.
    entropies = [torch.softmax(t / tau, 1) for t in teachers[:2]]
    spread = [(p * (p.log() - mixed)).sum() for p in entropies]
    torch.testing.assert_close(value, expected + tau**2 * (0.75 * spread[0] + 0.25 * spread[1]), rtol=1e-11, atol=0)
    sums = loss(z, labels, targets)
    for name, teacher in zip(names, teachers, strict=True):
        torch.testing.assert_close(sums.divergence[name], dense_kl(z, teacher, tau).sum(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("step", [None, 1 / 32])
def test_columns_beyond_kept_are_never_used(step: float | None, tau: float) -> None:
    z, logp = normal(20, P, V + 2).float(), dense(21)
    kept = torch.randint(1, 12, (P,), generator=torch.Generator().manual_seed(1))
    targets = stored(logp, 31, kept, step=step)
    assert (targets.token_ids == FILL_VALUE).any()
    value, by_z = gradient(lambda z: forward_kl(z, targets, member(step=step), tau), z)
    for row in range(P):
        one = stored(logp[row : row + 1], int(kept[row]), step=step)
        alone, by_row = gradient(lambda z, one=one: forward_kl(z, one, member(step=step), tau), z[row : row + 1])
        torch.testing.assert_close(value[row : row + 1], alone, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_z[row : row + 1], by_row, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("k", [3, V])
def test_extreme_rows_stay_finite(k: int, tau: float) -> None:
    """Teachers and students so sharp that a tail is 0 in float32, and students that rule ids out."""
    logits = normal(27, P, V, scale=1.0)
    sharp = torch.log_softmax(torch.where(torch.arange(V) < 2, 400.0, 0.0) + logits, 1).float().double()
    students = {
        "sure of the head": torch.where(torch.arange(V) < 2, 300.0, 0.0) + logits,
        "sure of the tail": torch.where(torch.arange(V) < 2, -300.0, 0.0) + logits,
        "flat": torch.zeros(P, V),
    }
    for name, student in students.items():
        z = student.float().double()  # at a logit of 300, float32 has a spacing of 3e-5
        for teacher in (sharp, dense(28)):
            expected, expected_gradient = gradient(lambda z, t=teacher: naive_kl(z, t, k, tau), z.double())
            targets = stored(teacher, k)
            value, by_z = gradient(lambda z, t=targets: forward_kl(z, t, member(), tau), z.float())
            assert by_z.isfinite().all(), name
            torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-5, msg=name)
            torch.testing.assert_close(by_z, expected_gradient.float(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    z, logp, labels = normal(32, P, V + 3).to(dtype), dense(33), labels_for(34)
    loss = DistillationLoss(V, 0.5, 2.0, [member()])
    targets = {"t": stored(logp, 17)}
    half, half_gradient = gradient(lambda z: loss(z, labels, targets).loss_sum, z)
    full, full_gradient = gradient(lambda z: loss(z, labels, targets).loss_sum, z.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0)
    assert half_gradient.dtype == dtype
    torch.testing.assert_close(half_gradient, full_gradient.to(dtype), rtol=0, atol=0)


def test_alpha_one_is_plain_cross_entropy_and_needs_no_targets() -> None:
    z, labels = normal(38, P, V + 6), labels_for(39)
    loss = DistillationLoss(V, 1.0, 2.0, [])

    def reference(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z, labels, ignore_index=NOT_TRAINED, reduction="sum")

    assert_same_loss(lambda z: loss(z, labels).loss_sum, reference, z)
    sums = loss(z, labels)
    assert sums.divergence == {}
    torch.testing.assert_close(sums.cross_entropy, reference(z), rtol=1e-13, atol=0)


def test_alpha_zero_reports_the_cross_entropy_and_does_not_train_on_it() -> None:
    z, labels, targets = normal(40, P, V), labels_for(41), stored(dense(42), 9, dtype=torch.float64)
    loss = DistillationLoss(V, 0.0, 2.0, [member()])
    trained = labels != NOT_TRAINED
    assert_same_loss(
        lambda z: loss(z, labels, {"t": targets}).loss_sum,
        lambda z: 4 * forward_kl(z, targets, member(), 2.0, trained).sum(),
        z,
    )
    sums = loss(z, labels, {"t": targets})
    expected = torch.nn.functional.cross_entropy(z, labels, ignore_index=NOT_TRAINED, reduction="sum")
    torch.testing.assert_close(sums.cross_entropy, expected, rtol=1e-12, atol=0)
    assert not sums.cross_entropy.requires_grad


def test_no_copy_of_the_logits_is_kept_for_the_backward_pass() -> None:
    z = normal(46, P, V).to(torch.bfloat16).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        DistillationLoss(V, 0.5, 2.0, [member()])(z, labels_for(1), {"t": stored(dense(2), 9)})
    wide = [t for t in saved if t.numel() >= z.numel()]
    assert [t.data_ptr() for t in wide] == [z.data_ptr()]


@pytest.mark.parametrize("tau", TEMPERATURES)
@pytest.mark.parametrize("step", [1 / 128, 1 / 32, 1 / 8, 1.0])
@pytest.mark.parametrize("k", [9, V])
@pytest.mark.parametrize("scale", [0.1, 2.0, 15.0])
def test_codes_move_targets_and_gradients_by_no_more_than_the_bound(
    scale: float, k: int, step: float, tau: float
) -> None:
    logp, z = dense(47, scale=scale), normal(48, P, V + 2)
    exact, coded = stored(logp, k, dtype=torch.float64), stored(logp, k, step=step)
    truth, found = tempered_bucket(exact, None, tau), tempered_bucket(coded, step, tau)
    moved = (found[0].double().exp() - truth[0].exp()).abs().sum(1) + (found[1].double().exp() - truth[1].exp()).abs()
    bound = quantisation_bound(step)
    assert moved.max() <= bound + 1e-6
    _, by_exact = gradient(lambda z: forward_kl(z, exact, member(), tau), z)
    _, by_codes = gradient(lambda z: forward_kl(z, coded, member(step=step), tau), z)
    assert (by_exact - by_codes).abs().sum(1).max() <= bound / tau + 1e-6
    if scale == 2.0 and k == V:
        # Codes do move the targets by about the step: a bound far above the actual error would prove nothing.
        assert moved.max() > 0.1 * step / tau


def test_the_default_step_costs_little_divergence() -> None:
    logp = dense(49)
    head, tail = tempered_bucket(stored(logp, 64, step=encoding.DEFAULT_STEP_NATS), 1 / 32, 1.0)
    true_head, true_tail = tempered_bucket(stored(logp, 64, dtype=torch.float64), None, 1.0)
    moved = (true_head.exp() * (true_head - head)).sum(1) + true_tail.exp() * (true_tail - tail)
    assert 0 < moved.mean() < 1 / 32**2 / 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha: .* less than or equal to 1"),
        ({"alpha": math.nan}, "alpha: .* finite"),
        ({"members": []}, "at least one teacher"),
        ({"members": [member("a", -1.0), member("b")]}, "finite number >= 0"),
        ({"members": [member("a", math.nan)]}, "finite number >= 0"),
        ({"members": [member("a", 0.0), member("b", 0.0)]}, "at least one a weight above 0"),
        ({"members": [member("a"), member("a")]}, "named once"),
    ],
)
def test_losses_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"vocabulary_size": V, "alpha": 0.5, "temperature": 2.0, "members": [member()], **change}
    with pytest.raises(InputError, match=message):
        DistillationLoss(**arguments)  # type: ignore[arg-type]


def test_batches_that_do_not_fit_are_refused() -> None:
    loss = DistillationLoss(V, 0.5, 1.0, [member("a")])
    z, labels, targets = normal(1, P, V), labels_for(1), stored(dense(1), 5)
    with pytest.raises(InputError, match="250 columns, fewer than the 251"):
        loss(z[:, :-1], labels, {"a": targets})
    with pytest.raises(InputError, match=r"no targets of teacher a \(found: b\)"):
        loss(z, labels, {"b": targets})
    with pytest.raises(InputError, match="found: none"):
        loss(z, labels)
    with pytest.raises(InputError, match="flattened"):
        loss(z[None], labels, {"a": targets})
    with pytest.raises(InputError, match=r"labels must be \[37\]"):
        loss(z, labels[:-1], {"a": targets})
    with pytest.raises(InputError, match="teacher a has targets for 36 positions, there are 37 labels"):
        loss(z, labels, {"a": targets[1:]})
