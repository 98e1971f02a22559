"""Forward KL with a head and a tail that are weighed apart, against its definition over whole distributions.

Legend: `P` positions, `K` stored ids, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.references.dense_targets import (
    SEQUENCE,
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
)
from torch import Tensor

from storage.errors import InputError
from storage.format.manifest.entry import Windowing
from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss, forward_kl
from student.loss.divergences import TailAwareKL
from student.loss.student_logprobs import student_buckets
from student.loss.teacher_targets import Member, temper

DOUBLE = torch.float64
HEAD, BETA = 4, 3.0


def definition(p: Tensor, q: Tensor, head: Tensor, factor: Tensor) -> Tensor:
    """D1 + factor a D2 [P] of distributions [P, n] by equations 2 and 3 of the paper; head: bool [P, n]."""
    a, q_tail = (p * ~head).sum(1), (q * ~head).sum(1)
    d1 = (p * (p / q).log() * head).sum(1) + a * (a / q_tail).log()
    among = (p / a[:, None], q / q_tail[:, None])
    d2 = (among[0] * (among[0] / among[1]).log() * ~head).sum(1)
    return d1 + factor * a * d2


def factors(p: Tensor, head: Tensor, trained: Tensor) -> Tensor:
    """beta over the mean mass of the tail of each position's sequence, counted one by one."""
    mass, found = (p * ~head).sum(1), torch.zeros(len(p), dtype=DOUBLE)
    for start in range(0, len(p), SEQUENCE):
        rows = slice(start, start + SEQUENCE)
        found[rows] = BETA / mass[rows][trained[rows]].mean()
    return found


def outcomes(logp: Tensor, logq: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sides' probabilities of the teacher's k likeliest ids, in that order, and of all others together."""
    ids = logp.argsort(dim=1, descending=True, stable=True)[:, :k]
    if k == logp.shape[1]:
        return logp.gather(1, ids).exp(), logq.gather(1, ids).exp()
    pairs = (joined(each, ids) for each in (logp, logq))
    p, q = (torch.cat([heads, tail[:, None]], 1).exp() for heads, tail in pairs)
    return p, q


@pytest.mark.parametrize("columns", [V, V + 6])
@pytest.mark.parametrize(("k", "tau"), [(HEAD + 1, 1.0), (HEAD + 1, 2.0), (30, 2.0), (V, 1.0), (V, 1.5), (V, 2.0)])
def test_loss_and_gradient_are_those_of_the_definition(k: int, tau: float, columns: int) -> None:
    """At K = V the dense one; below it that of K + 1 outcomes. The student's further columns take mass from all."""
    z, logp, labels = normal(1, P, columns), dense(2), labels_for(3)
    trained = labels != NOT_TRAINED
    loss = DistillationLoss(
        V, 0.3, tau, [member()], loss="tail-aware-kl", head_ids=HEAD, tail_weight=BETA, interpolate_tail=True
    )

    def reference(z: Tensor) -> Tensor:
        logq = F.log_softmax(z / tau, 1)[:, :V]
        p, q = outcomes(F.log_softmax(logp / tau, 1), logq, k)
        head = torch.arange(p.shape[1]).expand(p.shape) < HEAD
        nats = F.cross_entropy(z, labels, ignore_index=NOT_TRAINED, reduction="sum")
        return 0.3 * nats + 0.7 * tau**2 * definition(p, q, head, factors(p, head, trained))[trained].sum()

    targets = {"t": stored(logp, k, dtype=DOUBLE)}
    assert_same_loss(lambda z: loss(z, labels, targets).loss_sum, reference, z)
    assert loss.log_name("t") == "tail_aware_kl_t"


def test_it_is_forward_kl_at_factor_one_and_grows_with_the_stored_ids() -> None:
    z, logp = normal(4, P, V), dense(5)
    labels, whole = torch.zeros(P, dtype=torch.int64), []
    for k in (HEAD + 1, 20, 100, V):
        targets = stored(logp, k, dtype=DOUBLE)
        tempered = temper(targets, member(), 1.0)
        _, (buckets,) = student_buckets(z, labels, [tempered.support], [V], 1.0)
        one = TailAwareKL(tempered.bucketed, torch.ones(P, dtype=DOUBLE), HEAD)
        torch.testing.assert_close(one(*buckets, slice(None)), forward_kl(z, targets, member(), 1.0))
        whole.append(replace(one, b=5 * one.b)(*buckets, slice(None)))
    assert all((less <= more + 1e-12).all() for less, more in pairwise(whole))
    assert (whole[0] < 0.9 * whole[-1]).any()


def test_rows_without_a_tail_have_the_loss_of_their_head_and_no_other_gradient() -> None:
    """Rows that keep fewer ids than the head has, one of them with no mass outside."""
    z, labels = normal(6, P, V), torch.zeros(P, dtype=torch.int64)
    targets = stored(dense(7), 9, kept=torch.where(torch.arange(P) % 2 == 0, 2, 9), dtype=DOUBLE)
    targets.log_tail[0] = -torch.inf
    loss = DistillationLoss(V, 0.0, 1.0, [member()], loss="tail-aware-kl", head_ids=HEAD)
    plain = DistillationLoss(V, 0.0, 1.0, [member()], tail="bucket")
    (value, by_z), (_, expected) = (
        gradient(lambda z, of=of: of(z, labels, {"t": targets}).loss_sum, z) for of in (loss, plain)
    )
    assert value.isfinite()
    short = targets.kept < HEAD
    torch.testing.assert_close(by_z[short], expected[short])
    assert not torch.allclose(by_z[~short], expected[~short], rtol=0.1)


@pytest.mark.parametrize("k", [HEAD + 1, V])
def test_extreme_rows_stay_finite(k: int) -> None:
    """A teacher and a student so sharp that a tail is 0 in float32, and an id that the student rules out."""
    logits, labels = normal(18, P, V, scale=1.0), labels_for(20)
    sharp = torch.where(torch.arange(V) < 2, 300.0, 0.0) + logits
    masked = torch.log_softmax(logits, 1).masked_fill(torch.arange(V) == 5, -2000.0)
    loss = DistillationLoss(V, 0.0, 1.0, [member()], loss="tail-aware-kl", head_ids=HEAD)
    for teacher in (torch.log_softmax(sharp, 1), masked):
        targets = {"t": stored(teacher, k)}
        for student in (sharp, -sharp, logits.masked_fill(torch.arange(V) == 5, -torch.inf)):
            if student is sharp or teacher is masked:
                value, by_z = gradient(lambda z, t=targets: loss(z, labels, t).loss_sum, student.float())
                assert value.isfinite()
                assert by_z.isfinite().all()


def test_the_mean_is_of_a_document_however_documents_share_windows(tmp_path: Path) -> None:
    v, n, t = 23, 90, 16
    rng = np.random.default_rng(0)
    starts = np.array([0, 5, 12, 40, 47, 61, 70], dtype=np.uint64)
    record = make_corpus(str(tmp_path / "c"), rng.integers(0, v, n).astype(np.uint16), v, document_starts=starts)
    windowing = Windowing(context_tokens=32, stride_tokens=32, isolate_documents=True)
    entry = make_entry(record, 12, encoding="float32", windowing=windowing)
    labels = np.full(n, 1)
    labels[np.append(starts[1:].astype(int), n) - 1] = -1
    # Spread out at some positions and not at others, so that windows differ in the mass of their tails.
    logits = rng.normal(size=(n, v)) * rng.uniform(0.5, 4, size=(n, 1))
    write_entry(str(tmp_path / "c"), "a", entry, dense_targets(logits, 12, labels))
    table, found = torch.from_numpy(rng.normal(size=(n, v))), []
    for packed, together in ((True, 3), (True, 1), (False, 4)):
        windows = DistillationWindows(str(tmp_path / "c"), ["a"], t, pack_documents=packed)
        loss = DistillationLoss(v, 0.0, 1.0, [Member.of("a", windows.entries["a"])], loss="tail-aware-kl", head_ids=3)
        total = torch.zeros((), dtype=DOUBLE)
        for first in range(0, len(windows), together):
            some = list(range(first, min(first + together, len(windows))))
            batch = collate(windows.__getitems__(some))
            z = torch.zeros(*batch["labels"].shape, v, dtype=DOUBLE)
            for row, spans in enumerate(windows.spans(some)):
                at = 0
                for start, length in spans:
                    z[row, at : at + length] = table[start : start + length]
                    at += length
            total += loss(z.flatten(0, 1), batch["labels"].flatten(), batch["targets"]).loss_sum
        found.append(float(total))
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("teacher", "options", "words"),
    [
        (
            member(sampled_at=1.0),
            {},
            "teacher t: tail-aware-kl needs a position's likeliest ids .* its ids are sampled",
        ),
        (
            replace(member(), absent=frozenset({"tail", "half-tail"})),
            {},
            "teacher t: tail-aware-kl with tail bucket needs the mass outside its stored ids",
        ),
        (
            replace(member(), stored_ids=10),
            {},
            "stores 10 ids a position, and tail-aware-kl with a head of 10 has none",
        ),
        (replace(member(), stored_ids=3), {"head_ids": 3}, "take a smaller --head-ids, or cache more ids"),
    ],
)
def test_entries_without_a_ranked_tail_are_refused(teacher: Member, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        DistillationLoss(V, 0.5, 1.0, [teacher], loss="tail-aware-kl", **options)


def test_targets_that_do_not_say_their_sequence_are_refused() -> None:
    loss = DistillationLoss(V, 0.5, 1.0, [member()], loss="tail-aware-kl")
    with pytest.raises(InputError, match="teacher t: tail-aware-kl needs targets that say their `sequence`"):
        loss.prepare(labels_for(1), {"t": replace(stored(dense(1), 20), sequence=None)})
