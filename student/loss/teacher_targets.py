"""A teacher's stored targets: temperature, and the treatments of the tail (the ids that are not stored).

Legend: `P` positions of a batch (flattened), `K` stored ids per position, `V` vocabulary of the cache, `S` the kept
ids of a position, the first `certain` of which are certain ids and the others sampled ids (VarOpt, Cohen et al. 2011),
`tau` the temperature, `F(b) = log sum of p**b outside the certain ids`. Everything is in nats.

`student.target_batch.TargetBatch` has the fields, dtypes and units of what is weighed here.

Forward KL is linear in the teacher, so every treatment of the tail is a set of weights on the student's log-probs::

    loss = -sum_S w_i ell_i - w_t theta + constant        ell_i = log q_i, theta = log q(outside S)

    bucket        w = p on S, w_t = the mass outside S: one tail bucket
    sampled       w = p on the certain ids, the mass outside them in equal parts on the sampled ids; w_t = 0
    blend         share * sampled + (1 - share) * bucket
    renormalise   w = p / P(S); w_t = 0
    none          w = p on S; w_t = 0
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from storage.errors import InputError
from storage.format.manifest.entry import TeacherEntry
from student.loss.objective import Tail, check_temperature
from student.target_batch import StoredBatch, TargetBatch, leading_columns

# Error of a sum of float32 log-probs; see `Tempered.log_rest`.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Member:
    """One teacher entry in a mixture.

    `weight` is relative to the other members'. `step_nats` is the quantisation step of the entry's codes; None when it
    stores float32 log-probs. `vocabulary_size` is V. `sampled_at` is the temperature for which ids were sampled; None
    for an entry of top-k targets, in which every id is certain. `absent` are the fields that the entry does not store:
    some of entropy, half-tail, ids, label, sampled-logprobs, tail. `log_rounding` is what the stored log-probs of
    sampled ids are above the teacher's in the mean, nats: they are rounded for the mean of 1 / p. `sources` are those
    of the documents that it teaches, None for all. `stored_ids` is K, None where it is not known. `projected`: whether
    the targets are those of an entry in another vocabulary.
    """

    name: str
    weight: float
    step_nats: float | None
    vocabulary_size: int
    sampled_at: float | None = None
    absent: frozenset[str] = frozenset()
    log_rounding: float = 0.0
    sources: frozenset[str] | None = None
    stored_ids: int | None = None
    projected: bool = False

    @classmethod
    def of(cls, name: str, entry: TeacherEntry, weight: float = 1.0, sources: Collection[str] | None = None) -> Member:
        """The member that an entry is; `sources` as the windows are read with, by default those of the entry."""
        taught = entry.targets.sources if sources is None else sources
        varopt = entry.targets.method == "varopt"
        wanted = ("entropy", "half-tail", "ids", "label", "tail", *(("sampled-logprobs",) if varopt else ()))
        return cls(
            name,
            weight,
            entry.encoding.step_nats,
            entry.vocabulary_size,
            entry.targets.temperature if varopt else None,
            frozenset(field for field in wanted if not entry.targets.has(field)),
            mean_rounding(entry.encoding.sampled_step_nats or 0.0),
            None if taught is None else frozenset(taught),
            entry.targets.k,
            entry.made == "projected",
        )

    def meets(self, other: Member) -> bool:
        """Whether both may have targets at one position."""
        return self.sources is None or other.sources is None or not self.sources.isdisjoint(other.sources)

    def needs(self, field: str, what: str) -> None:
        """Raise InputError unless the entry stores a field, which something is computed from."""
        if field not in self.absent:
            return
        if field == "ids":
            raise InputError(
                f"teacher {self.name}: {what} needs the teacher's likely ids, and its entry holds the log-probs of the "
                f"text's own tokens alone: cache it with --targets varopt or topk, or take --loss lightning-opd"
            )
        if self.projected and field != "tail":
            raise InputError(
                f"teacher {self.name}: {what} needs {field}, which an entry from another vocabulary cannot have: leave "
                f"it out, or train on an entry that its teacher made in this vocabulary"
            )
        if field == "tail":
            raise InputError(
                f"teacher {self.name}: {what} needs the mass outside its stored ids, which its entry does not know: "
                f"take forward-kl with tail renormalise"
            )
        raise InputError(
            f"teacher {self.name}: {what} needs {field}, which its entry does not store: cache it with --fields "
            f"{field}, or --fields all"
        )

    @property
    def repeats(self) -> bool:
        """Whether a row may name an id more than once: drawn ids, each mapped to one of this vocabulary."""
        return self.projected and self.sampled_at is not None

    @property
    def knows_constant(self) -> bool:
        """Whether a sampled loss is known as a KL; else it is a cross-entropy to the teacher, a constant larger."""
        return (
            self.sampled_at is None or ("entropy" if self.sampled_at == 1.0 else "sampled-logprobs") not in self.absent
        )


@dataclass(frozen=True)
class Tempered:
    """A teacher's targets at a temperature, not normalised: each treatment of the tail has its own normaliser.

    support    int32 [P, K]   the kept ids; -1 beyond them, and at positions that are not trained
    scores     float [P, K]   log-prob / tau of these, NaN where it is not stored; -inf elsewhere
    certain    bool [P, K]    the columns of certain ids
    log_tail   float [P]      F(1 / tau), outside the certain ids; -inf where it is not known, 0 at positions that are
                              not trained
    entropy    float [P]      of the whole distribution at temperature 1; 0 at positions that are not trained; or None
    trained    bool [P]       the positions that are trained and have targets
    sequence   int32 [P]      that of `student.target_batch.TargetBatch`, or None
    rounding   error of a sum of scores, in nats
    """

    support: Tensor
    scores: Tensor
    certain: Tensor
    log_tail: Tensor
    entropy: Tensor | None
    trained: Tensor
    sequence: Tensor | None
    temperature: float
    rounding: float
    member: Member

    @property
    def sampled(self) -> Tensor:
        """bool [P, K]: the columns of sampled ids, those kept but not certain."""
        return (self.support >= 0) & ~self.certain

    @cached_property
    def log_rest(self) -> Tensor:
        """Log of sum p**(1/tau) outside the kept ids [P]: the stored tail less the sampled ids; -inf if all are kept.

        ``F + log(1 - exp(d - F))`` with d the log-sum of the sampled ids. Sampled ids and tail were rounded separately,
        so d may exceed F. The rest is then unknown, but less than the rounding, which is taken instead: a finite log,
        so that the divergences are defined.
        """
        gap = torch.logsumexp(self.scores.masked_fill(self.certain, -math.inf), 1) - self.log_tail
        rest = self.log_tail + torch.log(-torch.expm1(gap.clamp(max=-self.rounding)))
        rest = torch.where(self.sampled.any(1), rest, self.log_tail)
        return rest.masked_fill((self.support >= 0).sum(1) == self.member.vocabulary_size, -math.inf)

    @cached_property
    def bucketed(self) -> tuple[Tensor, Tensor]:
        """(log-probs of the kept ids [P, K], log-mass of the tail bucket [P]), normalised to sum 1.

        -inf where there is no id, and both -inf at positions that are not trained. The normaliser is taken over the
        decoded values and the tail, so that quantisation moves mass but never adds or loses any. Sampled ids without
        stored log-probs are part of the bucket.
        """
        scores, rest = self.scores, self.log_tail
        if "sampled-logprobs" in self.member.absent:
            scores = scores.masked_fill(~self.certain, -math.inf)
        else:
            rest = self.log_rest
        log_z = _logsumexp(scores, rest)
        tail = (rest - log_z).masked_fill(~self.trained, -math.inf)
        return scores - log_z[:, None], tail


@dataclass(frozen=True)
class Weights:
    """A forward KL ``-sum_i heads_i ell_i - tail theta + constant`` per position: heads [P, K], tail [P], constant [P].

    All 0 at positions that are not trained.
    """

    heads: Tensor
    tail: Tensor
    constant: Tensor

    def __call__(self, ell: Tensor, theta: Tensor, rows: slice = slice(None)) -> Tensor:
        """The loss [R] of the student's log-probs ell [R, K] and log-mass theta [R] at some rows."""
        heads, tail = self.heads[rows], self.tail[rows]
        # 0 * log 0 is 0: with every id stored both tails are empty, and a student may rule out ids without mass.
        on_heads = (heads * torch.where(heads > 0, ell, 0.0)).sum(1)
        return self.constant[rows] - on_heads - tail * torch.where(tail > 0, theta, 0.0)


def temper(
    targets: TargetBatch,
    member: Member,
    temperature: float,
    trained: Tensor | None = None,
    interpolate_tail: bool = False,
) -> Tempered:
    """A teacher's targets at a temperature: scores ``log p_i / tau`` and tail ``F(1 / tau)``.

    The scores are exact at any temperature; the tail is stored for 1 and 2, and interpolated at others above 1 with
    `interpolate_tail`. `trained` bool [P]: targets at other positions are ignored, whatever they hold. Raises
    InputError for a temperature without a tail.
    """
    check_temperature(temperature, interpolate_tail)
    columns = targets.token_ids.shape[1]
    there = targets.kept > 0
    trained = there if trained is None else trained & there
    valid = leading_columns(targets.kept, columns) & trained[:, None]
    scores = targets.logprobs.masked_fill(~valid, -math.inf)
    return Tempered(
        support=torch.where(valid, targets.token_ids, -1).to(torch.int32),
        scores=scores if temperature == 1.0 else scores / temperature,
        certain=valid & leading_columns(targets.certain, columns),
        log_tail=_log_tail(targets, member, temperature).masked_fill(~trained, 0.0),
        entropy=None if targets.entropy is None else targets.entropy.masked_fill(~trained, 0.0),
        trained=trained,
        sequence=targets.sequence,
        temperature=temperature,
        rounding=max((member.step_nats or 0.0) / 2, _ROUNDING) / temperature,
        member=member,
    )


def weights(tempered: Tempered, tail: Tail, blend: float = 0.0) -> Weights:
    """The weights of forward KL under a treatment of the tail (any but auto); the module has the equations.

    The constant makes the loss a KL: with bucket ``KL(p || q)`` of the bucketed distributions, a lower bound of the
    dense one; with sampled an unbiased estimate of the dense one (at temperature 1 by the entropy of the whole
    distribution, at others by the sampled ids), or, with a constant of 0, of the cross-entropy to the teacher where
    these are not stored (`Member.knows_constant`); with renormalise the KL of the renormalised heads; with none the
    terms of the heads alone.
    """
    if tail == "sampled":
        return _sampled(tempered)
    if tail == "blend":
        one, other = _sampled(tempered), _bucket(tempered)
        return Weights(
            blend * one.heads + (1 - blend) * other.heads,
            blend * one.tail + (1 - blend) * other.tail,
            blend * one.constant + (1 - blend) * other.constant,
        )
    if tail == "renormalise":
        # A finite normaliser also where nothing is trained: all scores are -inf there.
        log_z = torch.logsumexp(tempered.scores, 1).masked_fill(~tempered.trained, 0.0)
        return _heads_alone(tempered.scores - log_z[:, None])
    if tail == "none":
        return _heads_alone(tempered.bucketed[0])
    assert tail == "bucket", tail
    return _bucket(tempered)


def by_distinct_ids(tempered: Tempered, found: Weights) -> tuple[Tensor, Weights]:
    """(support [P, K], weights) in which an id that a projected row names several times stands once, with their sum."""
    support = tempered.support
    if not tempered.member.repeats:
        return support, found
    ids, order = support.sort(dim=1, stable=True)
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    firsts = order.gather(1, index.masked_fill(repeated, 0).cummax(1).values)
    columns = torch.empty_like(order).scatter_(1, order, firsts)
    heads = torch.zeros_like(found.heads).scatter_add_(1, columns, found.heads)
    return torch.where(columns == index, support, -1), replace(found, heads=heads)


def _bucket(tempered: Tempered) -> Weights:
    logp, log_tail = tempered.bucketed
    p, p_tail = logp.exp(), log_tail.exp()
    return Weights(p, p_tail, _negative_entropy(p, logp) + p_tail * torch.where(p_tail > 0, log_tail, 0.0))


def _heads_alone(logp: Tensor) -> Weights:
    p = logp.exp()
    constant = _negative_entropy(p, logp)
    return Weights(p, torch.zeros_like(constant), constant)


def _sampled(tempered: Tempered) -> Weights:
    """Certain ids at their own probability; the mass outside them in equal parts on the sampled ids.

    Where no id was sampled (the teacher's support fits in the certain ids) the small mass outside stays one tail
    bucket, so that the weights sum to 1 at every position.
    """
    heads = tempered.scores.masked_fill(~tempered.certain, -math.inf)
    log_z = _logsumexp(heads, tempered.log_tail)
    log_tail = (tempered.log_tail - log_z).masked_fill(~tempered.trained, -math.inf)
    sampled = tempered.sampled
    number = sampled.sum(1)
    any_sampled = number > 0
    share = log_tail.exp() / number.clamp(min=1)
    w = torch.where(sampled, share[:, None], (heads - log_z[:, None]).exp())
    w_tail = log_tail.exp().masked_fill(any_sampled, 0.0)
    if not tempered.member.knows_constant:
        return Weights(w, w_tail, torch.zeros_like(w_tail))
    logp = tempered.scores - log_z[:, None] - sampled * (tempered.member.log_rounding / tempered.temperature)
    constant = _negative_entropy(w, logp) + w_tail * torch.where(w_tail > 0, log_tail, 0.0)
    if tempered.temperature == 1.0 and tempered.entropy is not None:
        constant = torch.where(any_sampled, -tempered.entropy, constant)
    return Weights(w, w_tail, constant)


def mean_rounding(step: float) -> float:
    """``step / 2 + step / (exp(step) - 1) - 1``: the mean error, nats, of a log-prob that is anywhere between two codes
    and is rounded to the lower one with the probability that makes the mean of 1 / p exact
    (`storage.format.version_2`)."""
    return step / 2 + step / math.expm1(step) - 1 if step else 0.0


def _negative_entropy(w: Tensor, logp: Tensor) -> Tensor:
    """sum_i w_i log p_i [P]; 0 log 0 is 0."""
    return (w * torch.where(w > 0, logp, 0.0)).sum(1)


def _log_tail(targets: TargetBatch, member: Member, temperature: float) -> Tensor:
    """F(1 / temperature) [P]: stored, or interpolated by the parabola through F(0), F(1/2) and F(1).

    F is convex, so the parabola is, and lies between the bounds of `tail_bounds` as F itself does. -inf where it is not
    known, as renormalised ids have it.
    """
    if targets.log_tail is None:
        return torch.full_like(targets.logprobs[:, 0], -math.inf)
    if temperature == 1.0:
        return targets.log_tail
    if temperature == 2.0:
        return _known(targets.log_tail_half, member, "temperature 2")
    zero, half, one = _known_tails(targets, member)
    b = 1 / temperature
    # All three are -inf where nothing is outside, and their differences are NaN.
    empty = one.isneginf()
    parabola = (1 - b) * (1 - 2 * b) * zero + 4 * b * (1 - b) * half + b * (2 * b - 1) * one
    return parabola.masked_fill(empty, -math.inf)


def tail_bounds(targets: TargetBatch, member: Member, temperature: float) -> tuple[Tensor, Tensor]:
    """(least, greatest) possible value [P] of F(1 / temperature), for a temperature above 1.

    F is convex with F(0) = log(V - certain), F(1/2) and F(1) known: it lies below the chord between the neighbouring
    two, and above the other chord extended.
    """
    zero, half, one = _known_tails(targets, member)
    b = 1 / temperature
    left, right = half + (2 * b - 1) * (half - zero), half + (2 * b - 1) * (one - half)
    bounds = (left.minimum(right), left.maximum(right))
    least, greatest = (bound.masked_fill(one.isneginf(), -math.inf) for bound in bounds)
    return least, greatest


def interpolation_bound(targets: TargetBatch, member: Member, temperature: float) -> Tensor:
    """Bound [P], in 0..1, on the error of the teacher's mass outside the certain ids when the tail is interpolated; 0
    without targets."""
    tempered = temper(targets, member, temperature, interpolate_tail=True)
    heads = torch.logsumexp(tempered.scores.masked_fill(~tempered.certain, -math.inf), 1)
    least, greatest = (torch.sigmoid(bound - heads) for bound in tail_bounds(targets, member, temperature))
    taken = torch.sigmoid(tempered.log_tail - heads)
    return torch.maximum(greatest - taken, taken - least).masked_fill(~tempered.trained, 0.0)


def targets_of(
    member: Member,
    targets: Mapping[str, StoredBatch | TargetBatch] | None,
    labels: Tensor,
    rows: Tensor | None = None,
) -> TargetBatch:
    """A member's targets of a batch, flat and beside its labels [P], whose device they are moved to and decoded on.

    rows: int64 [R], those that are wanted, None for all.

    Raises InputError where they are missing, naming the teachers present, or are of other positions.
    """
    if targets is None or member.name not in targets:
        found = ", ".join(targets) if targets else "none"
        raise InputError(f"the batch holds no targets of teacher {member.name} (found: {found}): add it to the dataset")
    flat = targets[member.name].flat().to(labels.device)
    if len(flat) != len(labels):
        raise InputError(f"teacher {member.name} has targets for {len(flat)} positions, there are {len(labels)} labels")
    return (flat if rows is None else flat[rows]).decoded()


def _known_tails(targets: TargetBatch, member: Member) -> tuple[Tensor, Tensor, Tensor]:
    one, half = (_known(tail, member, "a temperature above 1") for tail in (targets.log_tail, targets.log_tail_half))
    return (member.vocabulary_size - targets.certain).to(one.dtype).log(), half, one


def _known(tail: Tensor | None, member: Member, what: str) -> Tensor:
    if tail is None:
        member.needs("half-tail", what)
        raise InputError(f"teacher {member.name}: {what} needs a tail, which these targets do not have")
    return tail


def _logsumexp(scores: Tensor, tail: Tensor) -> Tensor:
    return torch.logsumexp(torch.cat([scores, tail[:, None]], dim=1), dim=1)
