"""The other parts of the loss: scale, weights, selection, schedule, chunks, masks, refusals.

Legend: `P` positions, `K` stored ids, `V` vocabulary, `B` windows of `T` positions.
"""

from __future__ import annotations

import math
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
    P,
    V,
    assert_same_loss,
    dense,
    dense_kl,
    gradient,
    labels_for,
    member,
    normal,
    spoiled,
    stored,
    varopt,
    with_c,
    write_varopt,
)
from torch import Tensor

from storage.cache.writer import EntryWriter
from storage.errors import FormatError, InputError
from storage.format.stored import StoredTargets
from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss, LossSums
from student.loss.student_logprobs import student_buckets
from student.loss.teacher_targets import Member

DOUBLE = torch.float64
OPTIONS: list[dict[str, Any]] = [
    {},
    {"tail": "bucket", "min_entropy": 3.0},
    {"tail": "blend", "blend": 0.3},
    {"tail": "controlled"},
    {"tail": "renormalise"},
    {"tail": "none"},
    {"loss": "reverse-kl"},
    {"loss": "jsd", "mix": 0.3},
    {"loss": "skew-forward-kl", "loss_scale": "babyllama", "window_tokens": 6},
    {"loss": "skew-reverse-kl", "alpha_end": 0.9},
]


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_babyllama_scale_is_the_formula_of_its_trainer(alpha: float, tau: float) -> None:
    """CE over B (T - 1) shifted positions as a mean, KL over all B T summed and divided by B alone."""
    b, t = 3, 8
    z = normal(1, b * t, V)
    logp, labels = dense(2, b * t), torch.randint(0, V, (b * t,), generator=torch.Generator().manual_seed(0))

    def formula(z: Tensor) -> Tensor:
        logits, blocks = z.reshape(b, t, V), labels.reshape(b, t)
        # The block's own tokens, of which the last predicts one that is not in it.
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, :-1].flatten())
        kl = torch.nn.KLDivLoss(reduction="batchmean")(
            F.log_softmax(logits / tau, -1), F.softmax(logp.reshape(b, t, V) / tau, -1)
        )
        return alpha * nats + (1 - alpha) * kl * tau**2

    loss = DistillationLoss(V, alpha, tau, [member()], loss_scale="babyllama", window_tokens=t)
    targets = {"t": stored(logp, V, dtype=DOUBLE)}
    assert_same_loss(lambda z: loss(z, labels, targets).loss_sum / (b * t), formula, z)
    plain = DistillationLoss(V, alpha, tau, [member()])
    sums, other = loss(z, labels, targets), plain(z, labels, targets)
    assert float(sums.cross_entropy) == float(other.cross_entropy)
    assert {k: float(v) for k, v in sums.divergence.items()} == {k: float(v) for k, v in other.divergence.items()}


def test_babyllama_scale_needs_whole_windows() -> None:
    with pytest.raises(InputError, match="window_tokens"):
        DistillationLoss(V, 0.5, 1.0, [member()], loss_scale="babyllama")
    loss = DistillationLoss(V, 0.5, 1.0, [member()], loss_scale="babyllama", window_tokens=8)
    with pytest.raises(InputError, match="windows of 8 positions, and 37 labels"):
        loss.prepare(labels_for(1), {"t": stored(dense(1), 5)})


def test_position_weights_multiply_both_terms_and_leave_the_count() -> None:
    z, labels, targets = normal(3, P, V + 2), labels_for(4), {"t": stored(dense(5), 9, dtype=DOUBLE)}
    loss = DistillationLoss(V, 0.25, 2.0, [member()])
    by_position = torch.rand(P, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    by_position[::3] = 0.0
    found, by_z = gradient(lambda z: loss(z, labels, targets, by_position).loss_sum, z)
    expected = torch.zeros((), dtype=DOUBLE)
    expected_gradient = torch.zeros_like(z)
    for row in range(P):
        one = {"t": targets["t"][row : row + 1]}
        value, by_row = gradient(lambda z, r=row, t=one: loss(z, labels[r : r + 1], t).loss_sum, z[row : row + 1])
        expected += by_position[row] * value
        expected_gradient[row] = by_position[row] * by_row[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_z, expected_gradient, rtol=1e-11, atol=1e-15)
    weighted, plain = loss(z, labels, targets, by_position), loss(z, labels, targets)
    assert int(weighted.count) == int(plain.count) == int((labels != NOT_TRAINED).sum())
    assert float(weighted.cross_entropy) == float(plain.cross_entropy)
    assert float(weighted.divergence["t"]) == float(plain.divergence["t"])
    with pytest.raises(InputError, match=r"position_weights must be \[37\]"):
        loss(z, labels, targets, by_position[:-1])


def test_the_divergence_is_taken_only_where_the_teachers_are_not_sure() -> None:
    z, labels = normal(6, P, V), labels_for(7)
    a, b = dense(8, scale=3.0), dense(9, scale=2.0)
    targets = {"a": stored(a, V, dtype=DOUBLE), "b": stored(b, V, dtype=DOUBLE)}
    entropy = 0.75 * targets["a"].entropy + 0.25 * targets["b"].entropy
    trained = labels != NOT_TRAINED
    least = float(entropy[trained].median())
    loss = DistillationLoss(V, 0.5, 1.0, [member("a", 3.0), member("b", 1.0)], min_entropy=least)

    def reference(z: Tensor) -> Tensor:
        nats = F.cross_entropy(z, labels, ignore_index=NOT_TRAINED, reduction="sum")
        chosen = trained & (entropy >= least)
        assert 0 < chosen.sum() < trained.sum()
        return 0.5 * nats + 0.5 * (0.75 * dense_kl(z, a, 1.0) + 0.25 * dense_kl(z, b, 1.0))[chosen].sum()

    assert_same_loss(lambda z: loss(z, labels, targets).loss_sum, reference, z)
    assert int(loss(z, labels, targets).count) == int(trained.sum())


@pytest.mark.parametrize(
    ("fixed", "schedules"),
    [
        ({}, {"alpha": (1.0, 0.625, 0.25)}),
        ({"interpolate_tail": True}, {"temperature": (2.0, 1.5, 1.0)}),
        ({"loss": "skew-reverse-kl"}, {"mix": (0.2, 0.5, 0.8)}),
        (
            {"loss": "jsd", "interpolate_tail": True},
            {"alpha": (0.0, 0.25, 0.5), "temperature": (1.0, 2.0, 3.0), "mix": (0.5, 0.3, 0.1)},
        ),
    ],
    ids=str,
)
def test_schedules_are_linear_in_the_steps(fixed: dict[str, Any], schedules: dict[str, tuple[float, ...]]) -> None:
    """First, middle and last step: each has the loss of a run in which nothing changes."""
    z, labels, targets = normal(10, P, V), labels_for(11), {"t": stored(dense(12), 9, dtype=DOUBLE)}
    constant = {"alpha": 0.3, "temperature": 2.0, **fixed}
    ends = {name: values[0] for name, values in schedules.items()}
    ends |= {f"{name}_end": values[2] for name, values in schedules.items()}
    loss = DistillationLoss(V, members=[member()], **constant | ends)
    for number, progress in enumerate((0.0, 0.5, 1.0)):
        loss.set_progress(progress)
        now = {name: values[number] for name, values in schedules.items()}
        assert {name: getattr(loss.current, name) for name in loss.objective.scheduled} == pytest.approx(now)
        at_step = DistillationLoss(V, members=[member()], **constant | now)
        assert_same_loss(
            lambda z: loss(z, labels, targets).loss_sum, lambda z, f=at_step: f(z, labels, targets).loss_sum, z
        )
        assert set(loss(z, labels, targets).divergence) == {"t"}


def test_a_schedule_begins_at_the_default_and_its_ends_need_their_targets() -> None:
    assert DistillationLoss(V, 0.5, 1.0, [member()], loss="jsd", mix_end=0.9).current.mix == 0.5
    constant = DistillationLoss(V, 0.5, 1.0, [member()])
    constant.set_progress(1.0)
    assert (constant.alpha, constant.temperature, constant.objective.scheduled) == (0.5, 1.0, ())
    with pytest.raises(InputError, match="at least one teacher"):
        DistillationLoss(V, 1.0, 1.0, [], alpha_end=0.5)
    assert DistillationLoss(V, 1.0, 1.0, [], alpha_end=1.0).members == ()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pieces_add_up_through_prepared_sums(options: dict[str, Any]) -> None:
    """Row slices of one prepared batch, as the fused head takes them; in pieces that no window ends with."""
    rows = 36
    z, labels = normal(13, rows, V + 4), labels_for(14, rows)
    targets = {"t": varopt(dense(15, rows), 20, seed=6, tau=2.0, dtype=DOUBLE)}
    by_position = torch.rand(rows, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    loss = with_c(DistillationLoss(V, 0.4, 2.0, [member(sampled_at=2.0)], **options), 0.8)

    def in_pieces(z: Tensor, cuts: list[int]) -> LossSums:
        prepared = loss.prepare(labels, targets, by_position)
        total: LossSums | None = None
        for start, stop in pairwise(cuts):
            cut = slice(start, stop)
            supports = [support[cut] for support in prepared.supports]
            sums = prepared.sums(cut, *student_buckets(z[cut], labels[cut], supports, prepared.sizes, 2.0))
            total = sums if total is None else total + sums
        assert total is not None
        return total

    whole = loss(z, labels, targets, by_position)
    pieces = in_pieces(z, [0, 1, 11, 29, rows])
    for name in ("cross_entropy", "loss_sum", "count", "control"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pieces.divergence, whole.divergence, rtol=1e-12, atol=1e-12)
    _, expected = gradient(lambda z: loss(z, labels, targets, by_position).loss_sum, z)
    _, found = gradient(lambda z: in_pieces(z, [0, 1, 11, 29, rows]).loss_sum, z)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-15)
    assert found.abs().max() > 1e-4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fill_values_where_nothing_is_trained_reach_no_gradient(options: dict[str, Any]) -> None:
    rows = 36
    z, labels = normal(19, rows, V + 4).float(), labels_for(20, rows)
    trained = labels != NOT_TRAINED
    targets = varopt(dense(21, rows), 20, seed=7)
    broken = spoiled(targets, ~trained)
    loss = with_c(DistillationLoss(V, 0.4, 1.0, [member(sampled_at=1.0)], **options), 0.8)
    value, by_z = gradient(lambda z: loss(z, labels, {"t": broken}).loss_sum, z)
    expected, expected_gradient = gradient(lambda z: loss(z, labels, {"t": targets}).loss_sum, z)
    assert torch.equal(value, expected)
    assert torch.equal(by_z, expected_gradient)
    assert not by_z[~trained].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "jsd", "tail": "sampled"}, "sampled goes with forward-kl only: .* unbiased only where"),
        ({"loss": "reverse-kl", "tail": "blend"}, "blend goes with forward-kl only"),
        ({"loss": "jsd", "tail": "controlled"}, "controlled goes with forward-kl only: .* unbiased only where"),
        ({"loss": "skew-reverse-kl", "tail": "renormalise"}, "renormalise goes with forward-kl only"),
        ({"loss": "skew-forward-kl", "tail": "none"}, "none goes with forward-kl only"),
        ({"loss": "js"}, "loss: .*'jsd'"),
        ({"tail": "buckets"}, "tail: "),
        ({"mix": 0.3}, "mix belongs to jsd"),
        ({"mix_end": 0.3}, "mix_end belongs to jsd"),
        ({"loss": "jsd", "mix": 0.0}, "mix: .* greater than 0"),
        ({"loss": "jsd", "mix_end": 1.0}, "mix_end: .* less than 1"),
        ({"temperature_end": 2.0}, "temperature 1 to 2: the steps between .* not exact; add --interpolate-tail"),
        ({"temperature_end": 0.5, "interpolate_tail": True}, "temperature 0.5: .* cannot be bounded below 1"),
        ({"loss": "jsd", "mix": 1.0}, "mix: .* less than 1"),
        ({"head_ids": 3}, "head_ids belongs to tail-aware-kl; the loss is forward-kl"),
        ({"loss": "jsd", "tail_weight": 3.0}, "tail_weight belongs to tail-aware-kl; the loss is jsd"),
        ({"loss": "tail-aware-kl", "tail": "renormalise"}, "renormalise goes with forward-kl only"),
        ({"blend": 0.3}, "needs tail blend"),
        ({"tail": "blend", "blend": 1.5}, "blend: "),
        ({"alpha_end": -0.1}, "alpha_end: "),
        ({"min_entropy": -1.0}, "min_entropy: "),
        ({"min_entropy": math.nan}, "min_entropy: .*finite"),
        ({"loss_scale": "sum"}, "loss_scale: "),
        ({"epsilon": 1.0}, "no field 'epsilon'"),
        (
            {"tail": "sampled"},
            "teacher t stores its top-k ids and no sampled ids, so tail sampled has no sample of its tail",
        ),
        ({"tail": "blend"}, "teacher t stores its top-k ids and no sampled ids, so tail blend"),
        ({"tail": "controlled"}, "teacher t stores its top-k ids and no sampled ids, so tail controlled"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        DistillationLoss(V, 0.5, 1.0, [member()], **options)
    assert "\n" not in str(caught.value)


def test_sampled_ids_serve_only_the_temperature_they_were_sampled_for() -> None:
    for loss in ("forward-kl", "jsd"):
        for tail in ("auto", "bucket", *(("controlled",) if loss == "forward-kl" else ())):
            with pytest.raises(
                InputError, match="teacher v: its ids were sampled for temperature 2 and are biased at 1"
            ):
                DistillationLoss(V, 0.5, 1.0, [member("v", sampled_at=2.0)], loss=loss, tail=tail)
    with pytest.raises(InputError, match="sampled for temperature 1"):
        DistillationLoss(V, 0.5, 1.5, [member("v", sampled_at=1.0)], interpolate_tail=True)
    with pytest.raises(InputError, match="sampled for temperature 1 and are biased at 2"):
        DistillationLoss(V, 0.5, 1.0, [member("v", sampled_at=1.0)], temperature_end=2.0, interpolate_tail=True)


def test_auto_is_sampled_for_sampled_ids_under_a_linear_loss() -> None:
    members = [member("top", 1.0), member("sampled", 1.0, sampled_at=1.0)]
    assert DistillationLoss(V, 0.5, 1.0, members).tails == {"top": "bucket", "sampled": "sampled"}
    assert DistillationLoss(V, 0.5, 1.0, members, tail="bucket").tails == {"top": "bucket", "sampled": "bucket"}
    alone = DistillationLoss(V, 0.5, 1.0, members[1:], loss="jsd")
    assert alone.tails == {"sampled": "bucket"}
    assert "lower bound" in alone.meaning("sampled")
    assert "estimate" in DistillationLoss(V, 0.5, 1.0, members).meaning("sampled")
    assert "alone" in DistillationLoss(V, 0.5, 1.0, members, tail="none").meaning("top")


def test_mixtures_of_entries_are_for_forward_kl_alone() -> None:
    z, labels = normal(22, P, V), labels_for(23)
    a, b = dense(24), dense(25)
    targets = {"a": stored(a, V, dtype=DOUBLE), "b": varopt(b, 30, seed=8, dtype=DOUBLE)}
    members = [member("a", 3.0), member("b", 1.0, sampled_at=1.0)]
    mixed = DistillationLoss(V, 0.0, 1.0, members)
    parts = [DistillationLoss(V, 0.0, 1.0, [each]) for each in members]
    _, by_z = gradient(lambda z: mixed(z, labels, targets).loss_sum, z)
    by_part = [gradient(lambda z, p=part: p(z, labels, targets).loss_sum, z)[1] for part in parts]
    torch.testing.assert_close(by_z, 0.75 * by_part[0] + 0.25 * by_part[1], rtol=1e-11, atol=1e-15)
    for loss in ("reverse-kl", "jsd", "skew-forward-kl", "skew-reverse-kl", "tail-aware-kl"):
        members = members if loss != "tail-aware-kl" else [member("a"), member("b")]
        with pytest.raises(InputError, match=rf"{loss} of several teachers \(a, b\)"):
            DistillationLoss(V, 0.5, 1.0, members, loss=loss)
        watched = DistillationLoss(V, 0.5, 1.0, [members[0], replace(members[1], weight=0.0)], loss=loss)
        assert set(watched(z, labels, targets).divergence) == {"a", "b"}


def test_every_masked_position_and_no_other_is_left_out(tmp_path: Path) -> None:
    """`loss_mask[p]` states whether token p + 1 is learnt, from row p of the targets: the definition, by position."""
    n, v, t = 60, 23, 7
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, v, n).astype(np.uint16), rng.random(n) < 0.5
    logits = 2 * rng.normal(size=(n, v))
    record = make_corpus(str(tmp_path / "c"), tokens, v, loss_mask=mask)
    targets = dense_targets(logits, v, np.append(tokens[1:], -1).astype(np.int64))
    entry = make_entry(record, v, encoding="float32")
    write_entry(str(tmp_path / "c"), "a", entry, targets)
    # A student whose logits are a table by position, so that an index off by one is another row.
    table = torch.from_numpy(rng.normal(size=(n, v)))
    windows = DistillationWindows(str(tmp_path / "c"), ["a"], t)
    loss = DistillationLoss(v, 0.3, 1.0, [Member.of("a", windows.entries["a"])])
    total, count = 0.0, 0
    for index in range(len(windows)):
        start, length = windows.blocks.span(index)
        batch = collate([windows[index]])
        z = torch.cat([table[start : start + length], torch.zeros(t - length, v, dtype=DOUBLE)])
        sums = loss(z, batch["labels"].flatten(), batch["targets"])
        total, count = total + float(sums.loss_sum), count + int(sums.count)
    learnt = [p for p in range(n - 1) if mask[p]]
    log_p, log_q = (torch.log_softmax(torch.as_tensor(x), 1) for x in (logits, table))
    nats = sum(-float(log_q[p, int(tokens[p + 1])]) for p in learnt)
    kl = sum(float((log_p[p].exp() * (log_p[p] - log_q[p])).sum()) for p in learnt)
    assert count == len(learnt)
    assert total == pytest.approx(0.3 * nats + 0.7 * kl, rel=1e-6)


def test_a_varopt_entry_on_disk_is_learnt_from_as_sampled(tmp_path: Path) -> None:
    n, v, k = 40, 61, 12
    url = str(tmp_path / "c")
    make_corpus(url, np.random.default_rng(1).integers(0, v, n).astype(np.uint16), v)
    logp = dense(26, n, vocabulary_size=v)
    write_varopt(url, "a", logp, k, tau=2.0)
    windows = DistillationWindows(url, ["a"], n - 1)
    teacher = Member.of("a", windows.entries["a"], weight=2.0)
    assert teacher == Member("a", 2.0, None, v, 2.0, stored_ids=k)
    batch = collate([windows[0]])
    loss = DistillationLoss(v, 0.0, 2.0, [teacher])
    z = normal(27, n - 1, v)
    found = loss(z, batch["labels"].flatten(), batch["targets"]).loss_sum
    expected = loss(z, batch["labels"].flatten(), {"a": varopt(logp, k, 0, tau=2.0)[: n - 1]}).loss_sum
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="sampled for temperature 2"):
        DistillationLoss(v, 0.5, 1.0, [teacher])


BAD = [
    ("logprobs", math.nan), ("logprobs", math.inf), ("logprobs", -math.inf), ("kept", 0),
    ("kept", 10), ("certain", 10), ("token_ids", V),
    ("log_tail", math.nan), ("log_tail", math.inf), ("log_tail", -math.inf), ("log_tail_half", math.nan),
    ("log_tail_half", math.inf), ("log_tail_half", -math.inf), ("entropy", math.nan), ("entropy", math.inf),
    ("label_logprob", math.inf), ("label_logprob", math.nan),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_values_without_a_gradient_are_refused_before_they_reach_one(name: str, value: float, tmp_path: Path) -> None:
    """At write; and at read by the same rule, which `storage.cache.reader` asks before it hands anything out."""
    n, k = 30, 9
    tokens = np.random.default_rng(2).integers(0, V, n).astype(np.uint16)
    record = make_corpus(str(tmp_path / "c"), tokens, V)
    entry = make_entry(record, k, encoding="float32")
    targets = dense_targets(dense(28, n).numpy(), k, np.append(tokens[1:], -1).astype(np.int64))
    assert StoredTargets.of(entry, targets).broken_rule() is None
    changed = getattr(targets, name).copy()
    changed[(4, 2) if changed.ndim == 2 else 4] = value
    bad = replace(targets, **{name: changed})
    assert StoredTargets.of(entry, bad).broken_rule() is not None
    writer = EntryWriter.open(str(tmp_path / "c"), "a", entry)
    with pytest.raises(FormatError, match="not written"):
        writer.commit(0, bad)
    assert writer.pending() == [0]
