"""Lightning OPD against its definition in float64, and what it is of: the sampled tokens alone.

Legend: `P` positions, `V` vocabulary, `W` columns of the head, `H` hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.caches.small import make_entry_2, stream_record
from support.references.dense_targets import P, V, dense, labels_for, member, normal, stored
from torch import Tensor

from storage.errors import InputError
from student.labels import NOT_TRAINED
from student.loss import fused as fused_module
from student.loss.distillation import DistillationLoss, LossSums
from student.loss.fused import fused_loss
from student.loss.on_policy import MOST_ADVANTAGE
from student.loss.teacher_targets import Member
from student.target_batch import TargetBatch

LABELS = labels_for(1)
NO_IDS: dict[str, Any] = {"method": "none", "tail": "unknown", "fields": ("label",)}


def teacher(scale: float = 6.0) -> Tensor:
    """log p(x) [P], NaN where no token follows; some differ from any student's by more than an advantage may."""
    known = dense(2, scale=scale).gather(1, LABELS.clamp(min=0)[:, None])[:, 0]
    return known.masked_fill(LABELS == NOT_TRAINED, torch.nan)


def targets(known: Tensor, k: int = 0) -> TargetBatch:
    """The targets of an entry without ids, or of one that has the label's log-probs beside k of them."""
    if k:
        return replace(stored(dense(2), k, dtype=torch.float64), label_logprob=known)
    none = torch.zeros(len(known), dtype=torch.int32)
    no_ids = torch.empty(len(known), 0, dtype=torch.float64)
    return TargetBatch(no_ids.to(torch.int32), none, none, no_ids, label_logprob=known)


def by_definition(logits: Tensor, known: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum of the losses, gradient of that sum by the logits): -A and -A d log q(x), position by position."""
    z = logits.detach().clone().requires_grad_()
    value, surrogate = torch.zeros((), dtype=z.dtype), torch.zeros((), dtype=z.dtype)
    for row, weight in enumerate([1.0] * len(z) if weights is None else weights.tolist()):
        if LABELS[row] == NOT_TRAINED or known[row].isnan():
            continue
        log_q = torch.log_softmax(z[row], 0)[LABELS[row]]
        advantage = min(max(float(known[row]) - float(log_q.detach()), -MOST_ADVANTAGE), MOST_ADVANTAGE)
        value, surrogate = value - weight * advantage, surrogate - weight * advantage * log_q
    return value.detach(), torch.autograd.grad(surrogate, z)[0]


def loss_of(*members: Member, **options: Any) -> DistillationLoss:
    return DistillationLoss(V, 0.0, 1.0, members or [member("t")], loss="lightning-opd", **options)


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("width", [V, V + 9])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_the_definition(k: int, width: int, weighted: bool) -> None:
    known = teacher()
    known[3] = torch.nan  # a row without targets, though its label is trained on
    assert known.nan_to_num().min() < -3 * MOST_ADVANTAGE
    logits = normal(3, P, width).requires_grad_()
    weights = normal(4, P).abs() if weighted else None
    found = loss_of()(logits, LABELS, {"t": targets(known, k)}, weights)
    value, gradient = by_definition(logits, known, weights)
    torch.testing.assert_close(found.loss_sum.detach(), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found.loss_sum, logits)[0], gradient, rtol=1e-12, atol=1e-14)
    assert int(found.taught["t"]) == int((LABELS != NOT_TRAINED).sum()) - 1
    assert int(found.count) == int((LABELS != NOT_TRAINED).sum())
    if not weighted:
        torch.testing.assert_close(found.divergence["t"], value, rtol=1e-12, atol=1e-12)


def test_fused_and_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows, micro-batches, and rows that are left out because nothing is trained there, change nothing."""
    monkeypatch.setitem(fused_module._BUFFER_LOGITS, "cpu", 5 * V)
    known, loss = teacher(), loss_of()
    hidden, weight = normal(5, P, 19).requires_grad_(), normal(6, V, 19, scale=0.5).requires_grad_()
    whole = loss(hidden @ weight.T, LABELS, {"t": targets(known)})
    rows = loss.needed_rows(LABELS)
    fused = fused_loss(hidden[rows], weight, None, loss.prepare(LABELS, {"t": targets(known)}, None, rows))
    parts: LossSums | None = None
    for part in (slice(0, 11), slice(11, P)):
        sums = loss(hidden[part] @ weight.T, LABELS[part], {"t": targets(known)[part]})
        parts = sums if parts is None else parts + sums
    expected = torch.autograd.grad(whole.loss_sum, (hidden, weight), retain_graph=True)
    for other in (fused, parts):
        assert other is not None
        torch.testing.assert_close(other.loss_sum, whole.loss_sum, rtol=1e-12, atol=1e-12)
        for a, b in zip(torch.autograd.grad(other.loss_sum, (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_in_the_mean_over_rollouts_it_is_the_reverse_kl() -> None:
    """Value and gradient, with every token as the sampled one, weighed by the student's own probability."""
    log_p, logits = dense(2, 1), normal(3, 1, V).requires_grad_()
    log_q = torch.log_softmax(logits, 1)
    kl = (log_q.exp() * (log_q - log_p)).sum()
    each = loss_of()(logits.expand(V, V), torch.arange(V), {"t": targets(log_p[0])}, log_q[0].detach().exp())
    torch.testing.assert_close(each.loss_sum, kl)
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (each.loss_sum, kl))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_an_entry_without_ids_serves_no_other_loss() -> None:
    of_labels = Member.of("t", make_entry_2(stream_record(P, V), 0, **NO_IDS))
    for options in ({}, {"loss": "reverse-kl"}, {"loss": "jsd"}, {"tail": "renormalise"}):
        with pytest.raises(
            InputError, match=r"teacher t: .* needs the teacher's likely ids.* --targets varopt or topk"
        ):
            DistillationLoss(V, 0.5, 1.0, [of_labels], **options)
    with pytest.raises(InputError, match="needs label, which its entry does not store: cache it with --fields label"):
        loss_of(Member.of("t", make_entry_2(stream_record(P, V), 5)))
    assert "rollouts' tokens" in loss_of(of_labels).meaning("t")
    assert loss_of(of_labels).log_name("t") == "lightning_opd_t"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tail": "bucket"}, "tail bucket"),
        ({"min_entropy": 1.0}, "min_entropy 1"),
        ({"loss_scale": "babyllama", "window_tokens": 4}, "loss_scale babyllama"),
        ({"alpha_end": 0.5}, "alpha_end 0.5"),
        ({"mix": 0.5}, "mix belongs to"),
    ],
    ids=str,
)
def test_nothing_else_of_the_objective_is_open(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        loss_of(**options)
    with pytest.raises(InputError, match=r"alpha 0\.5: the cross-entropy of a student's own samples"):
        DistillationLoss(V, 0.5, 1.0, [member("t")], loss="lightning-opd")
    with pytest.raises(InputError, match="temperature 2"):
        DistillationLoss(V, 0.0, 2.0, [member("t")], loss="lightning-opd")
    with pytest.raises(InputError, match="of the same text: name one of them"):
        loss_of(member("a"), member("b"))
