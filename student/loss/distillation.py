"""``alpha * CE + (1 - alpha) * tau**2 * sum_m w_m D(p_m, q)`` on stored targets, as sums and counts.

Legend: `P` positions of a batch (flattened), `R` rows of a chunk of it, `K` stored ids per position, `V` the ids that
labels and targets can name, `V_m` a teacher's vocabulary, `W` columns of the student's LM head (W >= V), `tau` the
temperature. Everything is in nats.

Three steps, so that the logits may come whole or in chunks of rows::

    prepared = loss.prepare(labels, targets)                    the teachers' side, [P, K]; no logits
    cross_entropy, buckets = student_buckets(                   the student's side
        logits, labels, prepared.supports, prepared.sizes, tau)
    sums = prepared.sums(slice(None), cross_entropy, buckets)   the loss; sums of chunks add up

`loss(logits, labels, targets)` runs all three; `student.loss.fused` runs the last two without ever holding [P, W].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from storage.errors import InputError
from student.labels import NOT_TRAINED
from student.loss.control_variate import ControlCoefficient, ControlledTail
from student.loss.divergences import Divergence, TailAwareKL
from student.loss.members import check_linear, normalised, tail_of
from student.loss.objective import LIGHTNING_OPD, SAMPLED_TAILS, TEACHER_CROSS_ENTROPY, Objective, Tail, objective_of
from student.loss.on_policy import SampledTokens
from student.loss.student_logprobs import check_batch, student_buckets
from student.loss.teacher_targets import Member, Tempered, by_distinct_ids, targets_of, temper, weights
from student.target_batch import StoredBatch, TargetBatch

# A divergence [R] of the student's log-probs ell [R, K] and log-mass theta [R] at some rows.
Term = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True)
class LossSums:
    """Sums over the trained positions of a batch, scalar tensors; divide once, by the global count.

    cross_entropy   sum of -log q(label), nats, temperature 1; carries no gradient
    divergence      by member: sum of the divergence at the loss's temperature, nats, neither weighted nor times
                    tau**2; carries no gradient. Empty when alpha is 1 at every step
    loss_sum        sum of alpha * CE + (1 - alpha) * tau**2 * sum_m w_m D_m, the sum over the members that have targets
                    at a position, their weights normalised; differentiable
    count           number of trained positions, int64
    taught          by member: number of trained positions with targets, int64
    control         float [C, 3], of the C members with tail controlled, what `DistillationLoss.end_step` takes

    Position weights and the entropy threshold change `loss_sum` and `control`, the loss scale `loss_sum` alone: the
    other sums are for the log and keep their meaning under all settings.
    """

    cross_entropy: Tensor
    divergence: dict[str, Tensor]
    loss_sum: Tensor
    count: Tensor
    taught: dict[str, Tensor]
    control: Tensor

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            self.cross_entropy + other.cross_entropy,
            {name: value + other.divergence[name] for name, value in self.divergence.items()},
            self.loss_sum + other.loss_sum,
            self.count + other.count,
            {name: value + other.taught[name] for name, value in self.taught.items()},
            self.control + other.control,
        )


@dataclass(frozen=True)
class PreparedLoss:
    """The part of a batch's loss that needs no logits.

    labels       int64 [P], and trained bool [P]: False where the label is `NOT_TRAINED`
    supports     by member: int32 [P, K_m], the ids whose log-probs `sums` expects; -1 where there is none
    sizes        by member: V_m, the ids of which the others are its tail
    _taught      by member: bool [P], the trained positions for which it has targets
    """

    labels: Tensor
    supports: list[Tensor]
    sizes: list[int]
    trained: Tensor
    vocabulary_size: int
    temperature: float
    _label_share: float  # alpha, and below (1 - alpha) * tau**2, each times its factor from the loss scale
    _teacher_share: float
    _members: tuple[Member, ...]
    _taught: tuple[Tensor, ...]
    _terms: tuple[Term, ...]
    _label_weights: Tensor | None  # [P], factors of the positions' cross-entropy; None: 1
    _teacher_weights: Tensor | None  # [P], and of their divergence

    def sums(self, rows: slice, cross_entropy: Tensor, buckets: Sequence[tuple[Tensor, Tensor]]) -> LossSums:
        """The sums of some rows; the sums of all rows add up to the batch's.

        cross_entropy [R], 0 where a position is not trained, and by member (ell [R, K_m], theta [R]), as returned by
        `student_buckets` for `supports`. Differentiable in all of them.
        """
        # A term of weight zero stays out of the graph: the backward pass then skips its pass over the logits.
        loss = torch.zeros((), dtype=cross_entropy.dtype, device=cross_entropy.device)
        if self._label_share > 0:
            loss = loss + self._label_share * _weighted(cross_entropy, self._label_weights, rows)
        divergence, number, control = {}, {}, []
        for member, term, taught, (ell, theta) in zip(self._members, self._terms, self._taught, buckets, strict=True):
            values = torch.where(taught[rows], term(ell, theta, rows), 0.0)
            divergence[member.name] = values.detach().sum()
            number[member.name] = taught[rows].sum()
            if isinstance(term, ControlledTail):
                sums = term.step_sums(ell, theta, rows)
                if self._teacher_weights is not None:
                    # As the variance of the gradient is, to which a position adds by the square of its weight.
                    sums = sums * self._teacher_weights[rows, None] ** 2
                control.append(torch.cat([number[member.name][None], sums.sum(0)]))
            share = self._teacher_share * member.weight
            if share > 0:
                loss = loss + share * _weighted(values, self._teacher_weights, rows)
        by_control = torch.stack(control) if control else loss.new_zeros(0, 3)
        return LossSums(
            cross_entropy.detach().sum(), divergence, loss, self.trained[rows].sum(), number, by_control.detach()
        )


class DistillationLoss:
    """``alpha * CE + (1 - alpha) * tau**2 * sum_m w_m D(p_m, q)``, per trained token.

    logits             float [P, W], W >= V; CE is at temperature 1 over all W columns
    labels             int64 [P]; `NOT_TRAINED` = -100 excludes a position from both terms
    targets            by member name, of the same positions, moved to the labels' device; not needed, and ignored, if
                       alpha stays 1
    position_weights   float [P] or None: factors of both terms; the count stays that of trained positions

    Returns `LossSums`. The members' weights are normalised to sum 1. tau**2 keeps the scale of the gradient when the
    temperature changes (Hinton et al. 2015). `options` are the other fields of `student.loss.objective.Objective`;
    where some change during a run, `current` is the objective of the step that `set_progress` was called for.

    Mixtures: forward KL is linear in p, so the weighted sum is the KL of the mixture ``p = sum_m w_m p_m`` (each
    member tempered, then mixed) up to a constant in the student: same gradient at K = V, and at K < V that of the
    members' own tail buckets. Where some members have no targets at a position, the mixture there is of the others,
    their weights normalised to sum 1; where none has, only CE counts. The other divergences are not linear: they take
    one member with a weight above 0, or several that teach the documents of different sources; for a mixture, cache the
    teachers as one ensemble entry.

    min_entropy (nats) drops the divergence where the teachers' entropy (of a mixture: the weighted mean of its
    members', at most its own) is lower. It is an absolute threshold, not a rank within a batch, which would depend on
    how a step is cut into micro-batches. Both terms are divided by all trained positions.

    tail controlled: `controls` has the coefficient of each member's control variate. It stays 0, which is tail sampled,
    in a loop that does not call `end_step` after each optimizer step; `DistillationTrainer` does.

    loss_scale babyllama, for windows of T = `window_tokens` positions: divergence summed over the window, CE as a mean
    over the T - 1 positions whose label lies in the window. After the division by the count it is exactly
    ``alpha * CE.mean() + (1 - alpha) * KLDivLoss(batchmean)`` of [windows, T, V] where all positions are trained;
    elsewhere the same multiples of means over trained positions. Not for windows that begin with an id of their own,
    whose last label is at one row or another.

    A member with fewer ids (V_m < V) gives the others no mass, and they are not part of its tail. One with more
    (V_m > V) is for a student of as few columns, where its targets name no id from V on: a tail is then compared over
    the ids that the student has (`DistillationWindows.within` checks the targets).

    Raises InputError for fields that do not fit together, members whose weights are negative, not finite or all
    zero, no or repeated members, VarOpt entries at a temperature other than the one they were sampled for, sampled
    tails of entries without sampled ids, and W < V.
    """

    def __init__(
        self,
        vocabulary_size: int,
        alpha: float,
        temperature: float,
        members: Sequence[Member],
        *,
        window_tokens: int | None = None,
        **options: Any,
    ) -> None:
        self.objective: Objective = objective_of(alpha=alpha, temperature=temperature, **options)
        self.vocabulary_size = vocabulary_size
        self.current: Objective = self.objective.at(0.0)
        self.window_tokens = window_tokens
        self.members: tuple[Member, ...] = ()
        if self.objective.uses_teachers:
            self.members = normalised(members)
        self.tails: dict[str, Tail] = {member.name: tail_of(member, self.objective) for member in self.members}
        self.controls = {name: ControlCoefficient() for name, tail in self.tails.items() if tail == "controlled"}
        if self.objective.loss_scale == "babyllama" and (window_tokens is None or window_tokens < 2):
            raise InputError(f"loss_scale babyllama needs window_tokens of 2 or more; got {window_tokens}")
        check_linear(self.members, self.objective)

    def __repr__(self) -> str:
        of, told = self.objective, [f"{member.name} {member.weight:g}" for member in self.members]
        teachers = ", ".join(told) or "no teacher"
        return f"{type(self).__name__}({of.loss} to {teachers}; alpha {self.alpha:g}, temperature {of.temperature:g})"

    @property
    def alpha(self) -> float:
        """That of the current step."""
        return self.current.alpha

    @property
    def temperature(self) -> float:
        """That of the current step; 1 without teachers."""
        # Without a divergence there is nothing that it is the temperature of; a control does not depend on it.
        return self.current.temperature if self.objective.uses_teachers else 1.0

    def set_progress(self, progress: float) -> None:
        """Set what changes during the run for a point of it: 0 at its first optimizer step, 1 at its last.

        Call it between optimizer steps only: all micro-batches and processes of a step share one objective.
        """
        self.current = self.objective.at(progress)

    def end_step(self, control: Tensor) -> None:
        """Take what the control variates learn from an optimizer step.

        control: `LossSums.control`, added up over its micro-batches and processes. Call it between steps only.
        """
        for coefficient, sums in zip(self.controls.values(), control, strict=True):
            coefficient.end_step(sums)

    def log_name(self, name: str) -> str:
        """The name of a member's divergence in logs, such as ``kl_<teacher>``."""
        figure = TEACHER_CROSS_ENTROPY if self._is_cross_entropy(name) else self.objective.log_name
        return f"{figure}_{name}"

    def _is_cross_entropy(self, name: str) -> bool:
        (member,) = (each for each in self.members if each.name == name)
        return self.tails.get(name) in SAMPLED_TAILS and not member.knows_constant

    def meaning(self, name: str) -> str:
        """A member's reported divergence in a few words: how it relates to the dense one, such as a lower bound."""
        tail = self.tails[name]
        if self.objective.loss == LIGHTNING_OPD:
            return "of the rollouts' tokens: an estimate of the reverse KL near the model that made them"
        if self._is_cross_entropy(name):
            return "a cross-entropy to the teacher, whose entropy is not stored; an estimate from drawn ids"
        if tail == "bucket":
            return "a lower bound: the tail counts as one bucket"
        if tail in SAMPLED_TAILS:
            return "an estimate from drawn ids" + (", blended with a lower bound" if tail == "blend" else "")
        return "of the stored ids alone"

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        targets: Mapping[str, StoredBatch | TargetBatch] | None = None,
        position_weights: Tensor | None = None,
        windows: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> LossSums:
        """The sums of one batch; the class states shapes and errors.

        windows, and positions that restart at each of several documents in one, int64 [B, T], are for live teachers.
        """
        del windows, positions
        check_batch(logits, labels, self.vocabulary_size)
        prepared = self.prepare(labels, targets, position_weights)
        cross_entropy, buckets = student_buckets(logits, labels, prepared.supports, prepared.sizes, self.temperature)
        return prepared.sums(slice(None), cross_entropy, buckets)

    def needed_rows(self, labels: Tensor) -> Tensor | None:
        """int64 [R]: the rows of labels [P] that the loss depends on, ascending; None where it has to see all."""
        if self.objective.loss_scale == "babyllama":  # knows a row by its place in a window
            return None
        rows = (labels != NOT_TRAINED).nonzero()[:, 0]
        return None if len(rows) == len(labels) else rows

    def prepare(
        self,
        labels: Tensor,
        targets: Mapping[str, StoredBatch | TargetBatch] | None = None,
        position_weights: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> PreparedLoss:
        """The part of a batch's loss that needs no logits: labels int64 [P], targets by member, weights float [P].

        rows: of `needed_rows`, those that there will be logits of; None for all.
        """
        if position_weights is not None and position_weights.shape != labels.shape:
            raise InputError(
                f"position_weights must be {list(labels.shape)}, one for each label; got {list(position_weights.shape)}"
            )
        by_member = [targets_of(member, targets, labels, rows) for member in self.members]
        if rows is not None:
            labels = labels[rows]
            position_weights = None if position_weights is None else position_weights[rows]
        trained = labels != NOT_TRAINED
        tempered = [
            self._compared(each, member, labels, trained) for member, each in zip(self.members, by_member, strict=True)
        ]
        of_label, of_teacher, in_window = self._scale(labels)
        supports, terms = zip(*map(self._term, tempered), strict=True) if tempered else ((), ())
        return PreparedLoss(
            labels=labels,
            trained=trained,
            supports=list(supports),
            sizes=[member.vocabulary_size for member in self.members],
            vocabulary_size=self.vocabulary_size,
            temperature=self.temperature,
            _label_share=self.alpha * of_label,
            _teacher_share=(1.0 - self.alpha) * self.temperature**2 * of_teacher,
            _members=self.members,
            _taught=tuple(each.trained for each in tempered),
            _terms=terms,
            _label_weights=_product(position_weights, in_window),
            _teacher_weights=_product(_product(position_weights, self._selected(tempered)), _renormalised(tempered)),
        )

    def _compared(
        self, targets: TargetBatch, member: Member, labels: Tensor, trained: Tensor
    ) -> Tempered | SampledTokens:
        if self.objective.loss == LIGHTNING_OPD:
            return SampledTokens.of(targets, member, labels, trained)
        return temper(targets, member, self.temperature, trained, self.objective.interpolate_tail)

    def _term(self, tempered: Tempered | SampledTokens) -> tuple[Tensor, Term]:
        """(the ids [P, K] that it reads the student's log-probs of, a member's term)."""
        if isinstance(tempered, SampledTokens):
            return tempered.support, tempered
        objective, name = self.current, tempered.member.name
        if name in self.controls:
            return tempered.support, ControlledTail.of(tempered, self.controls[name].value)
        if objective.loss == "forward-kl":
            return by_distinct_ids(tempered, weights(tempered, self.tails[name], objective.blending))
        if objective.loss == "tail-aware-kl":
            if tempered.sequence is None:
                raise InputError(f"teacher {name}: {objective.loss} needs targets that say their `sequence`")
            sequences, head = (tempered.sequence, tempered.trained), objective.head_size
            return tempered.support, TailAwareKL.of(tempered.bucketed, *sequences, head, objective.tail_weighting)
        divergence, (heads, log_tail) = Divergence(objective.divergence, objective.mixing), tempered.bucketed
        return tempered.support, lambda ell, theta, rows: divergence((heads[rows], log_tail[rows]), (ell, theta))

    def _scale(self, labels: Tensor) -> tuple[float, float, Tensor | None]:
        """The loss scale's factors of cross-entropy and divergence, and where the former counts (bool [P])."""
        if self.objective.loss_scale == "token":
            return 1.0, 1.0, None
        size = self.window_tokens
        assert size is not None
        if len(labels) % size:
            raise InputError(
                f"loss_scale babyllama sums over windows of {size} positions, and {len(labels)} labels are no whole "
                "number of them"
            )
        index = torch.arange(len(labels), device=labels.device) % size
        return size / (size - 1), float(size), index < size - 1

    def _selected(self, tempered: Sequence[Tempered | SampledTokens]) -> Tensor | None:
        """bool [P]: where the weighted mean entropy of the members that have targets reaches `min_entropy`; None:
        everywhere."""
        if self.objective.min_entropy is None or not tempered:
            return None
        known = [(each.member.weight * each.trained, each.entropy) for each in tempered if each.entropy is not None]
        excess = [weight * (entropy - self.objective.min_entropy) for weight, entropy in known]
        return torch.stack(excess).sum(0) >= 0


def forward_kl(
    logits: Tensor,
    targets: TargetBatch,
    member: Member,
    temperature: float,
    trained: Tensor | None = None,
    tail: Tail = "bucket",
    blend: float = 0.0,
) -> Tensor:
    """``KL(p || q)`` of one teacher, per position, with a treatment of the tail (see `student.loss.teacher_targets`).

    ``q = softmax(logits / tau)`` over all W columns; `theta` sums the columns j < V_m outside the kept ids, reduced
    over them and never as 1 - sum. The student's columns from V_m on get no teacher mass and are not part of theta.
    With a tail bucket it is between 0 and the dense KL, grows with K, and equals it at K = V_m. Not multiplied by
    tau**2.

    logits [P, W], any float type, computed in float32; trained bool [P], False gives 0 whatever the targets hold
    there. Returns [P] in nats. The gradient is that of Hinton et al. 2015 with a tail bucket: ``(q - p) / tau`` on the
    kept ids, and outside them the student's own shape scaled to the teacher's tail mass. Raises InputError for a
    temperature without a stored tail.
    """
    tempered = temper(targets, member, temperature, trained)
    labels = torch.where(tempered.trained, 0, NOT_TRAINED)
    support, term = by_distinct_ids(tempered, weights(tempered, tail, blend))
    _, ((ell, theta),) = student_buckets(logits, labels, [support], [member.vocabulary_size], temperature)
    return term(ell, theta)


def _weighted(values: Tensor, by_position: Tensor | None, rows: slice) -> Tensor:
    return values.sum() if by_position is None else (values * by_position[rows]).sum()


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return one * other if one is not None and other is not None else one if other is None else other


def _renormalised(tempered: Sequence[Tempered | SampledTokens]) -> Tensor | None:
    """``1 / sum of w_m over the members m that have targets`` [P], 1 where none has; None for a single member."""
    if len(tempered) < 2:
        return None
    there = torch.stack([each.trained for each in tempered])
    weight = tempered[0].scores.new_tensor([each.member.weight for each in tempered])
    total = (weight[:, None] * there).sum(0)
    # Exactly 1 with targets of all, whose weights sum to 1 but for the rounding.
    return torch.where(there.all(0) | (total == 0), 1.0, 1.0 / total)
