"""Entries that do not store every field, and rows without targets.

Legend: `P` positions, `K` stored ids, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.caches.small import make_entry, make_entry_2, stream_record
from support.references.dense_targets import (
    V,
    dense,
    gradient,
    labels_for,
    member,
    normal,
    spoiled,
    stored,
    varopt,
    with_c,
)

from storage.errors import InputError
from storage.format.manifest.entry import TARGET_FIELDS
from student.evaluation.held_out import HeldOutSums, figure_of
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.target_batch import TargetBatch

P = 36
DOUBLE = torch.float64
THERE = torch.arange(P) % 3 == 0


def with_holes(targets: TargetBatch) -> TargetBatch:
    """Two rows of three without targets, whose values are anything."""
    broken = spoiled(targets, ~THERE)
    return replace(broken, kept=targets.kept.where(THERE, 0), certain=targets.certain.where(THERE, 0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tail": "controlled"},
        {"tail": "blend"},
        {"tail": "bucket", "min_entropy": 3.0},
        {"tail": "renormalise"},
        {"tail": "none"},
        {"loss": "reverse-kl"},
        {"loss": "jsd", "loss_scale": "babyllama", "window_tokens": 6},
    ],
    ids=str,
)
def test_a_row_without_targets_has_its_cross_entropy_and_nothing_else(options: dict[str, Any]) -> None:
    z, labels, targets = normal(1, P, V + 2).float(), labels_for(2, P), varopt(dense(3, P), 20, seed=4)
    teacher = member(sampled_at=1.0)
    loss = with_c(DistillationLoss(V, 0.4, 1.0, [teacher], **options), 0.5)
    plain = DistillationLoss(V, 1.0, 1.0, [], **{k: v for k, v in options.items() if "scale" in k or "window" in k})
    holes = {"t": with_holes(targets)}
    _, found = gradient(lambda z: loss(z, labels, holes).loss_sum, z)
    _, whole = gradient(lambda z: loss(z, labels, {"t": targets}).loss_sum, z)
    _, by_label = gradient(lambda z: plain(z, labels).loss_sum, z)
    assert torch.equal(found[THERE], whole[THERE])
    torch.testing.assert_close(found[~THERE], 0.4 * by_label[~THERE], rtol=1e-5, atol=1e-8)
    sums = loss(z, labels, holes)
    taught = (labels != NOT_TRAINED) & THERE
    assert (int(sums.taught["t"]), int(sums.count)) == (int(taught.sum()), int((labels != NOT_TRAINED).sum()))
    some = loss(z, labels.masked_fill(~THERE, NOT_TRAINED), {"t": targets})
    torch.testing.assert_close(sums.divergence["t"], some.divergence["t"])
    torch.testing.assert_close(sums.control, some.control)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (3.0, 0.5, 0.0)], ids=str)
def test_a_mixture_is_of_the_teachers_that_have_targets_at_a_row(weights: tuple[float, ...]) -> None:
    """By hand in float64: at each row the weights of those with targets, normalised; none of them: no divergence."""
    z, labels, teachers = normal(21, P, V), labels_for(22, P), [dense(23 + n, P) for n in range(3)]
    there = torch.stack([torch.arange(P) % 3 != 0, torch.arange(P) % 4 < 2, torch.arange(P) % 5 != 3])
    names = ("a", "b", "c")
    targets = {}
    for name, logp, at in zip(names, teachers, there, strict=True):
        full = stored(logp, V, dtype=DOUBLE)
        targets[name] = replace(spoiled(full, ~at), kept=full.kept.where(at, 0), certain=full.certain.where(at, 0))
    members = [member(name, weight) for name, weight in zip(names, weights, strict=True)]
    kl = torch.stack([(logp.exp() * (logp - torch.log_softmax(z, 1))).sum(1) for logp in teachers])
    share = torch.tensor(weights, dtype=DOUBLE)[:, None] * there
    taught = (kl * share).sum(0) / share.sum(0).clamp(min=1e-9)
    nats = -torch.log_softmax(z, 1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    expected = ((0.3 * nats + 0.7 * taught) * (labels != NOT_TRAINED)).sum()
    found = DistillationLoss(V, 0.3, 1.0, members)(z, labels, targets)
    torch.testing.assert_close(found.loss_sum, expected, rtol=1e-10, atol=0)
    counts = (there & (labels != NOT_TRAINED)).sum(1)
    assert [int(found.taught[name]) for name in names] == counts.tolist()


def test_a_loss_that_is_not_linear_takes_teachers_that_never_meet() -> None:
    math, code, both = (
        replace(member(name), sources=frozenset(sources))
        for name, sources in (("a", ["math"]), ("b", ["code"]), ("c", ["math", "web"]))
    )
    DistillationLoss(V, 0.3, 1.0, [math, code], loss="jsd")
    for others in ([math, code, both], [math, member("everywhere")]):
        with pytest.raises(InputError, match=r"loss jsd of several teachers \(a, (c|everywhere)\)"):
            DistillationLoss(V, 0.3, 1.0, others, loss="jsd")


def test_a_teacher_without_targets_at_a_row_is_not_sure_of_itself_there() -> None:
    z, labels, a, b = normal(5, P, V), torch.zeros(P, dtype=torch.int64), dense(6, P), dense(7, P)
    targets = {"a": with_holes(stored(a, 9, dtype=DOUBLE)), "b": stored(b, 9, dtype=DOUBLE)}
    least = float(targets["b"].entropy.median())
    both = DistillationLoss(V, 0.0, 1.0, [member("a"), member("b")], min_entropy=least)
    alone = DistillationLoss(V, 0.0, 1.0, [member("b")], min_entropy=least)
    _, found = gradient(lambda z: both(z, labels, targets).loss_sum, z)
    _, expected = gradient(lambda z: alone(z, labels, targets).loss_sum, z)
    torch.testing.assert_close(found[~THERE], expected[~THERE], rtol=1e-12, atol=1e-15)
    assert found[~THERE].any()


def test_held_out_figures_are_over_the_rows_with_targets() -> None:
    z, labels = normal(8, P, V).float(), labels_for(9, P)
    targets = {"whole": stored(dense(10, P), V), "sampled": varopt(dense(11, P), 12, seed=12)}
    members = [member("whole"), member("sampled", sampled_at=1.0), member("nowhere")]
    found, some = HeldOutSums(V, members), HeldOutSums(V, members[:2])
    nowhere = replace(targets["whole"], kept=torch.zeros(P, dtype=torch.int32))
    found.add(z, labels, {name: with_holes(each) for name, each in targets.items()} | {"nowhere": nowhere})
    some.add(z[THERE], labels[THERE], {name: each[THERE] for name, each in targets.items()})
    result, expected = found.result(), some.result()
    assert result.tokens == int((labels != NOT_TRAINED).sum())
    for name, kl in expected.kl.items():
        assert result.kl[name].nats == pytest.approx(kl.nats, rel=1e-6)
        assert not result.kl[name].lower_bound
    assert result.kl_not_measured == {"nowhere": "it has no targets of a scored position"}


def test_a_tail_that_is_not_known_leaves_the_renormalised_ids() -> None:
    z, labels, full = normal(13, P, V), labels_for(14, P), stored(dense(15, P), 9, dtype=DOUBLE)
    targets = {"t": replace(full, log_tail=None, log_tail_half=None, entropy=None)}
    teacher = replace(member(), absent=frozenset({"tail", "half-tail", "entropy"}))
    loss = DistillationLoss(V, 0.3, 1.0, [teacher])
    expected = DistillationLoss(V, 0.3, 1.0, [member()], tail="renormalise")
    for one, other in zip(
        gradient(lambda z: loss(z, labels, targets).loss_sum, z),
        gradient(lambda z: expected(z, labels, {"t": full}).loss_sum, z),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert loss.meaning("t") == "of the stored ids alone"
    for options in ({"tail": "bucket"}, {"tail": "none"}, {"loss": "jsd"}):
        with pytest.raises(
            InputError, match="mass outside its stored ids, which its entry does not know: take forward-kl"
        ):
            DistillationLoss(V, 0.3, 1.0, [teacher], **options)
    for options in ({"temperature": 2.0}, {"temperature": 1.0, "temperature_end": 2.0, "interpolate_tail": True}):
        with pytest.raises(InputError, match="temperature 2 needs half-tail, which its entry does not store"):
            DistillationLoss(V, 0.3, members=[teacher], **options)
    sums = HeldOutSums(V, [teacher])
    sums.add(z, labels, targets)
    assert sums.result().kl_not_measured == {"t": "its entry does not know the mass outside its ids"}


@pytest.mark.parametrize(
    ("fields", "changes", "absent", "figure"),
    [
        (None, {}, set(), "kl_t"),
        (TARGET_FIELDS, {"method": "varopt", "temperature": 1.0}, set(), "kl_t"),
        ((), {"method": "varopt", "temperature": 1.0}, {"entropy", "half-tail", "sampled-logprobs"}, "teacher_ce_t"),
        (("entropy",), {"method": "varopt", "temperature": 1.0}, {"half-tail", "sampled-logprobs"}, "kl_t"),
        (("half-tail",), {"method": "varopt", "temperature": 2.0}, {"entropy", "sampled-logprobs"}, None),
        ((), {}, {"entropy", "half-tail"}, "kl_t"),
        ((), {"tail": "unknown"}, {"entropy", "half-tail", "tail"}, None),
    ],
)  # fmt: skip
def test_a_member_knows_what_its_entry_lacks(
    fields: tuple[str, ...] | None, changes: dict[str, Any], absent: set[str], figure: str | None
) -> None:
    record = stream_record(50, V)
    teacher = Member.of("t", make_entry(record, 9) if fields is None else make_entry_2(record, 9, fields, **changes))
    unlabelled = {"label"} if fields is not None and "label" not in fields else set()
    assert teacher.absent == absent | unlabelled
    assert figure_of(teacher) == figure


LEAN = replace(member(sampled_at=1.0), absent=frozenset({"entropy", "half-tail", "sampled-logprobs"}))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        *(
            ({"tail": tail}, f"forward-kl with tail {tail}")
            for tail in ("bucket", "blend", "controlled", "renormalise")
        ),
        ({"loss": "jsd"}, "jsd with tail bucket"),
        ({"min_entropy": 1.0}, "a threshold of the teacher's entropy (min_entropy)"),
    ],
)
def test_what_needs_a_field_that_is_not_stored_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError) as caught:
        DistillationLoss(V, 0.5, 1.0, [LEAN], **options)
    field = "entropy" if "min_entropy" in options else "sampled-logprobs"
    expected = f"teacher t: {what} needs {field}, which its entry does not store: cache it with --fields {field}, or"
    assert str(caught.value) == f"{expected} --fields all"


def test_a_name_says_whether_the_constant_is_known() -> None:
    loss = DistillationLoss(V, 0.0, 1.0, [LEAN])
    assert (loss.log_name("t"), loss.meaning("t").split(",")[0]) == ("teacher_ce_t", "a cross-entropy to the teacher")
    z, labels, targets = normal(16, P, V), labels_for(17, P), varopt(dense(18, P), 20, seed=19, dtype=DOUBLE)
    full = DistillationLoss(V, 0.0, 1.0, [member(sampled_at=1.0)])
    assert full.log_name("t") == "kl_t"
    entropy = targets.entropy[labels != NOT_TRAINED].sum()
    found = loss(z, labels, {"t": replace(targets, entropy=None)}).divergence["t"]
    torch.testing.assert_close(found, full(z, labels, {"t": targets}).divergence["t"] + entropy)
