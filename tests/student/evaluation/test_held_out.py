"""Held-out figures against brute force, and against themselves in other pieces.

Legend: `P` positions, `K` stored ids, `V` vocabulary, `W` columns of the model's head.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.references.dense_targets import dense, normal, stored
from torch import Tensor

from storage.errors import InputError
from student.evaluation import held_out as evaluate
from student.evaluation.held_out import BINS, HeldOutSums, bytes_per_token
from student.labels import NOT_TRAINED
from student.loss.teacher_targets import Member
from student.report import HeldOutReport
from student.target_batch import TargetBatch

P, V, W = 203, 53, 61
Batch = tuple[Tensor, Tensor, dict[str, TargetBatch], Tensor]
MEMBERS = [Member("whole", 1.0, None, V), Member("top", 0.0, None, V)]


@pytest.fixture
def batch() -> Batch:
    """Logits, labels that follow them half of the time, targets by member, and the teacher's dense log-probs."""
    z = normal(0, P, W, scale=2.5)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (P,), generator=generator)
    agree = torch.rand(P, generator=generator) < 0.5
    labels = torch.where(agree, z[:, :V].argmax(1), labels)
    labels[::7] = NOT_TRAINED
    teacher = dense(2, P, vocabulary_size=V)
    return z.float(), labels, {"whole": stored(teacher, V), "top": stored(teacher, 5)}, teacher


def whole(batch: Batch) -> HeldOutSums:
    sums = HeldOutSums(V, MEMBERS)
    sums.add(*batch[:3])
    return sums


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [
        ({"text_bytes": 30, "positions": 12, "has_loss_mask": False}, 2.5),
        ({"text_bytes": 0, "positions": 12, "has_loss_mask": False}, None),
        ({"text_bytes": 30, "positions": 12, "has_loss_mask": True}, None),
    ],
)
def test_bytes_per_token_where_all_bytes_are_scored(corpus: dict[str, Any], expected: float | None) -> None:
    windows: Any = SimpleNamespace(record=SimpleNamespace(corpus=SimpleNamespace(**corpus)))
    assert bytes_per_token(windows) == expected


def test_figures_equal_brute_force(batch: Batch) -> None:
    z, labels, _, teacher = batch
    result = whole(batch).result(bytes_per_token=3.7)
    nats, correct, kl, bucketed, bins = 0.0, 0, 0.0, 0.0, [[0, 0.0, 0] for _ in range(BINS)]
    tokens = 0
    for row in range(P):
        label = int(labels[row])
        if label == NOT_TRAINED:
            continue
        tokens += 1
        logits = [float(x) for x in z[row].double()]
        total = math.log(sum(math.exp(x) for x in logits))
        nats += total - logits[label]
        guess = max(range(V), key=lambda j: logits[j])
        confidence = math.exp(logits[guess] - total)
        correct += guess == label
        index = next(b for b in range(BINS) if confidence <= (b + 1) / BINS)
        for i, value in enumerate((1, confidence, guess == label)):
            bins[index][i] += value
        p = sorted(((math.exp(float(teacher[row, j])), j) for j in range(V)), reverse=True)
        kl += sum(x * (math.log(x) - logits[j] + total) for x, j in p)
        tail_p, tail_q = sum(x for x, _ in p[5:]), sum(math.exp(logits[j] - total) for _, j in p[5:])
        bucketed += sum(x * (math.log(x) - logits[j] + total) for x, j in p[:5]) + tail_p * math.log(tail_p / tail_q)
    assert result.tokens == tokens
    assert result.cross_entropy == pytest.approx(nats / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / tokens / math.log(2) / 3.7, rel=1e-6)
    assert result.accuracy == correct / tokens
    assert 0.2 < result.accuracy < 0.8
    expected = sum(n / tokens * abs(hits / n - confidence / n) for n, confidence, hits in bins if n)
    assert result.ece == pytest.approx(expected, rel=1e-6)
    assert 0.01 < result.ece < 1
    assert sum(n > 0 for n, _, _ in bins) > 5
    assert result.kl["whole"].nats == pytest.approx(kl / tokens, rel=1e-6)
    assert result.kl["top"].nats == pytest.approx(bucketed / tokens, rel=1e-5)
    assert {name: kl.lower_bound for name, kl in result.kl.items()} == {"whole": False, "top": True}
    assert 0 < result.kl["top"].nats < result.kl["whole"].nats


def close(a: HeldOutReport, b: HeldOutReport) -> None:
    assert (a.tokens, a.accuracy) == (b.tokens, b.accuracy)
    assert [kl.lower_bound for kl in a.kl.values()] == [kl.lower_bound for kl in b.kl.values()]
    assert a.logged() == pytest.approx(b.logged(), rel=1e-6)


def test_splitting_into_batches_changes_nothing(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    z, labels, targets, _ = batch
    pieces = HeldOutSums(V, MEMBERS)
    for cut in (slice(0, 1), slice(1, 2), slice(2, 90), slice(90, P)):
        part = {name: each[cut] for name, each in targets.items()}
        pieces.add(z[cut], labels[cut], part)
    close(pieces.result(), whole(batch).result())
    monkeypatch.setitem(evaluate._CHUNK_LOGITS, "elsewhere", 10 * W)
    close(whole(batch).result(), pieces.result())


def test_processes_merge_by_adding_their_tensors(batch: Batch) -> None:
    z, labels, targets, _ = batch
    total = torch.zeros_like(whole(batch).tensor())
    for rank in range(3):
        part = {name: each[rank::3] for name, each in targets.items()}
        one = HeldOutSums(V, MEMBERS)
        one.add(z[rank::3], labels[rank::3], part)
        total += one.tensor()
    merged = HeldOutSums(V, MEMBERS)
    merged.load(total)
    close(merged.result(), whole(batch).result())
    merged.add(z[:0], labels[:0], {name: each[:0] for name, each in targets.items()})
    torch.testing.assert_close(merged.tensor(), total, rtol=0, atol=0)


def test_sums_of_other_teachers_do_not_load() -> None:
    with pytest.raises(InputError, match="same teachers"):
        HeldOutSums(V, MEMBERS).load(HeldOutSums(V, MEMBERS[:1]).tensor())


def test_a_calibrated_and_an_overconfident_model() -> None:
    """Two ids: right 3 times in 4 at confidence 3/4 is calibrated; at confidence 1 it is off by a quarter."""
    labels = torch.tensor([0, 0, 0, 1] * 10)
    for logit, expected in [(math.log(3), 0.0), (50.0, 0.25)]:
        sums = HeldOutSums(2)
        sums.add(torch.tensor([[logit, 0.0]]).expand(40, 2), labels)
        result = sums.result()
        assert result.ece == pytest.approx(expected, abs=1e-6)
        assert result.accuracy == 0.75
        assert (result.kl, result.bits_per_byte) == ({}, None)


def test_padded_columns_are_never_predicted() -> None:
    logits = torch.zeros(4, V + 2)
    logits[:, V] = 9.0
    logits[:, 3] = 5.0
    sums = HeldOutSums(V)
    sums.add(logits, torch.full((4,), 3))
    assert sums.result().accuracy == 1.0
    assert sums.result().cross_entropy == pytest.approx(math.log(math.exp(9) + math.exp(5) + V) - 5, rel=1e-5)


def test_half_precision_logits_are_scored_in_float32(batch: Batch) -> None:
    z, labels, targets, _ = batch
    half, full = HeldOutSums(V, MEMBERS), HeldOutSums(V, MEMBERS)
    half.add(z.bfloat16(), labels, targets)
    full.add(z.bfloat16().float(), labels, targets)
    torch.testing.assert_close(half.tensor(), full.tensor(), rtol=0, atol=0)


def test_nothing_scored_and_missing_targets_are_refused() -> None:
    sums = HeldOutSums(V, MEMBERS[:1])
    with pytest.raises(InputError, match="no held-out position"):
        sums.result()
    with pytest.raises(InputError, match="no targets of teacher whole"):
        sums.add(torch.zeros(3, V), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="52 columns"):
        sums.add(torch.zeros(3, V - 1), torch.zeros(3, dtype=torch.int64))


def test_a_model_that_is_hopelessly_wrong_has_infinite_perplexity() -> None:
    sums = HeldOutSums(2)
    sums.add(torch.tensor([[2000.0, 0.0]]), torch.tensor([1]))
    result = sums.result()
    assert result.cross_entropy == 2000.0
    assert result.perplexity == math.inf
