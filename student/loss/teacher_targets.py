"""What a teacher says at a position, decoded and tempered, and what stands for the ids that are not stored.

Legend: `P` positions of a batch (flattened), `K` stored ids per position, `V` vocabulary of the cache, `S` the kept
ids of a position, of which the first `certain` are there with certainty and the others were drawn, `tau` the
temperature, `F(b) = log sum of p**b outside the certain ids`. Everything is in nats.

A teacher's targets are the plain tensors of a DataLoader batch::

    token_ids                      int32|int64 [P, K]   columns from `kept` on hold poison, possibly >= W
    codes | logprobs               uint16 | float32 [P, K]
    kept, certain                  int [P]
    top_logprob, log_tail, log_tail_half, entropy    float32 [P]

Raw codes are decoded here, on the training device: there it is a scan over K numbers, on the loader's side it costs
as much as the decompression.

Forward KL is linear in the teacher, so every treatment of the tail is a set of weights on the student's log-probs::

    loss = -sum_S w_i ell_i - w_t theta + constant        ell_i = log q_i, theta = log q(outside S)

    bucket        w = p on S, w_t = the mass outside S
    sampled       w = p on the certain ids, the mass outside them in equal parts on the drawn ones; w_t = 0
    blend         share * sampled + (1 - share) * bucket
    renormalise   w = p / P(S); w_t = 0
    none          w = p on S; w_t = 0
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from storage.errors import InputError
from storage.format.manifest import TeacherEntry
from student.loss.objective import Tail, check_temperature

Targets = Mapping[str, Tensor]

# Sums of float32 log-probs differ from what was added up by this much; see `Tempered.log_rest`.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Member:
    """One teacher entry in a mixture.

    `weight` is relative to the other members'. `step_nats` belongs to the entry's codes; None when it stores
    float32 log-probs. `vocabulary_size` is V. `sampled_at` is the temperature for which ids were drawn; None for an
    entry of top-k targets, in which every id is certain.
    """

    name: str
    weight: float
    step_nats: float | None
    vocabulary_size: int
    sampled_at: float | None = None

    @classmethod
    def of(cls, name: str, entry: TeacherEntry, weight: float = 1.0) -> Member:
        """The member that a teacher entry is."""
        sampled_at = entry.targets.temperature if entry.targets.method == "varopt" else None
        return cls(name, weight, entry.encoding.step_nats, entry.vocabulary_size, sampled_at)


@dataclass(frozen=True)
class Tempered:
    """A teacher's targets at a temperature, not normalised: each treatment of the tail has its own normaliser.

    support    int32 [P, K]   the kept ids; -1 beyond them, and at positions that are not trained
    scores     float [P, K]   log-prob / tau of these; -inf elsewhere
    certain    bool [P, K]    there with certainty
    log_tail   float [P]      F(1 / tau), outside the certain ids; 0 at positions that are not trained
    entropy    float [P]      of the whole distribution at temperature 1; 0 at positions that are not trained
    rounding   nats by which a sum of scores may be off
    """

    support: Tensor
    scores: Tensor
    certain: Tensor
    log_tail: Tensor
    entropy: Tensor
    trained: Tensor
    temperature: float
    vocabulary_size: int
    rounding: float

    @property
    def drawn(self) -> Tensor:
        """bool [P, K]: kept, but only by the draw."""
        return (self.support >= 0) & ~self.certain

    @cached_property
    def log_rest(self) -> Tensor:
        """Log of sum p**(1/tau) outside the kept ids [P]: the stored tail without the drawn ids; -inf if all are kept.

        ``F + log(1 - exp(d - F))`` with d the drawn ids' own sum. Drawn ids and tail were rounded apart, so d may
        come out above F; what is left is then not known, only that it is less than the rounding, and that is what
        stands for it (a log, however small, that a divergence can be taken of).
        """
        gap = torch.logsumexp(self.scores.masked_fill(self.certain, -math.inf), 1) - self.log_tail
        rest = self.log_tail + torch.log(-torch.expm1(gap.clamp(max=-self.rounding)))
        rest = torch.where(self.drawn.any(1), rest, self.log_tail)
        return rest.masked_fill((self.support >= 0).sum(1) == self.vocabulary_size, -math.inf)

    @cached_property
    def bucketed(self) -> tuple[Tensor, Tensor]:
        """(log-probs of the kept ids [P, K], log-mass of everything else [P]), normalised to sum 1.

        -inf where there is no id, and both -inf at positions that are not trained. The normaliser is taken over the
        values as decoded and the tail, so that quantisation moves mass but never makes or loses any.
        """
        log_z = _logsumexp(self.scores, self.log_rest)
        tail = (self.log_rest - log_z).masked_fill(~self.trained, -math.inf)
        return self.scores - log_z[:, None], tail


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
        # 0 * log 0 is 0: with every id stored both tails are empty, and a student may rule out what has no mass.
        on_heads = (heads * torch.where(heads > 0, ell, 0.0)).sum(1)
        return self.constant[rows] - on_heads - tail * torch.where(tail > 0, theta, 0.0)


def decode_logprobs(targets: Targets, step_nats: float | None) -> Tensor:
    """``top_logprob - step_nats * cumsum(codes)``, or the stored `logprobs`; -inf from column `kept` on.

    Returns float32 [P, K] in nats, normalised over the whole vocabulary (float64 `logprobs` stay float64).
    Raises InputError when there are codes and no step.
    """
    if "codes" in targets:
        if step_nats is None:
            raise InputError("these targets hold codes, so the entry's step_nats is needed to decode them; got None")
        # Whole numbers below 2**24 are exact in float32; valid rows sum to at most 2**16 (`logprob_floor`).
        steps = targets["codes"].to(torch.float32).cumsum(1)
        logprobs = targets["top_logprob"][:, None] - step_nats * steps
    else:
        logprobs = targets["logprobs"]
    return logprobs.masked_fill(~_leading_columns(targets["kept"], logprobs.shape[1]), -math.inf)


def temper(
    targets: Targets,
    member: Member,
    temperature: float,
    trained: Tensor | None = None,
    interpolate_tail: bool = False,
) -> Tempered:
    """A teacher's targets at a temperature.

    Head ratios ``p_i**(1/tau)`` are exact at any; the sum outside the heads is stored for 1 and 2, and interpolated
    above 1 when asked for. `trained` bool [P]: what the targets hold at other positions is looked at by nothing.
    Raises InputError for a temperature that the tails do not serve.
    """
    check_temperature(temperature, interpolate_tail)
    decoded = decode_logprobs(targets, member.step_nats)
    if trained is None:
        trained = torch.ones(len(decoded), dtype=torch.bool, device=decoded.device)
    columns = decoded.shape[1]
    scores = decoded.masked_fill(~trained[:, None], -math.inf)
    valid = _leading_columns(targets["kept"], columns) & trained[:, None]
    step = member.step_nats or 0.0
    return Tempered(
        support=torch.where(valid, targets["token_ids"], -1).to(torch.int32),
        scores=scores if temperature == 1.0 else scores / temperature,
        certain=valid & _leading_columns(targets["certain"], columns),
        log_tail=_log_tail(targets, member.vocabulary_size, temperature).masked_fill(~trained, 0.0),
        entropy=targets["entropy"].masked_fill(~trained, 0.0),
        trained=trained,
        temperature=temperature,
        vocabulary_size=member.vocabulary_size,
        rounding=max(step / 2, _ROUNDING) / temperature,
    )


def weights(tempered: Tempered, tail: Tail, blend: float = 0.0) -> Weights:
    """The weights of forward KL under a treatment of the tail (any but auto); see the module.

    The constant makes the loss a KL: with bucket ``KL(p || q)`` of the bucketed distributions, a lower bound of the
    dense one; with sampled an unbiased estimate of the dense one (at temperature 1 by the entropy of the whole
    distribution, at others by the drawn ids); with renormalise the KL of the renormalised heads; with none the terms
    of the heads alone.
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


def _bucket(tempered: Tempered) -> Weights:
    logp, log_tail = tempered.bucketed
    p, p_tail = logp.exp(), log_tail.exp()
    return Weights(p, p_tail, _negative_entropy(p, logp) + p_tail * torch.where(p_tail > 0, log_tail, 0.0))


def _heads_alone(logp: Tensor) -> Weights:
    p = logp.exp()
    constant = _negative_entropy(p, logp)
    return Weights(p, torch.zeros_like(constant), constant)


def _sampled(tempered: Tempered) -> Weights:
    """Certain ids at their own probability; the mass outside them shared by the drawn ids.

    Where nothing was drawn (the teacher's support fits in the certain ids) what little is outside stays one bucket, so
    that the weights sum to 1 at every position.
    """
    heads = tempered.scores.masked_fill(~tempered.certain, -math.inf)
    log_z = _logsumexp(heads, tempered.log_tail)
    log_tail = (tempered.log_tail - log_z).masked_fill(~tempered.trained, -math.inf)
    drawn = tempered.drawn
    number = drawn.sum(1)
    any_sampled = number > 0
    share = log_tail.exp() / number.clamp(min=1)
    w = torch.where(drawn, share[:, None], (heads - log_z[:, None]).exp())
    w_tail = log_tail.exp().masked_fill(any_sampled, 0.0)
    logp = tempered.scores - log_z[:, None]
    constant = _negative_entropy(w, logp) + w_tail * torch.where(w_tail > 0, log_tail, 0.0)
    if tempered.temperature == 1.0:
        constant = torch.where(any_sampled, -tempered.entropy, constant)
    return Weights(w, w_tail, constant)


def _negative_entropy(w: Tensor, logp: Tensor) -> Tensor:
    """sum_i w_i log p_i [P]; 0 log 0 is 0."""
    return (w * torch.where(w > 0, logp, 0.0)).sum(1)


def _log_tail(targets: Targets, vocabulary_size: int, temperature: float) -> Tensor:
    """F(1 / temperature) [P]: stored, or interpolated by the parabola through F(0), F(1/2) and F(1).

    F is convex, so the parabola is, and lies between the bounds of `tail_bounds` as F itself does.
    """
    if temperature == 1.0:
        return targets["log_tail"]
    if temperature == 2.0:
        return targets["log_tail_half"]
    zero, half, one = _known_tails(targets, vocabulary_size)
    b = 1 / temperature
    # -inf where nothing is outside: all three are, and their differences must not be formed.
    empty = one.isneginf()
    parabola = (1 - b) * (1 - 2 * b) * zero + 4 * b * (1 - b) * half + b * (2 * b - 1) * one
    return parabola.masked_fill(empty, -math.inf)


def tail_bounds(targets: Targets, vocabulary_size: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(least, greatest) value [P] that F(1 / temperature) can have, for a temperature above 1.

    F is convex with F(0) = log(V - certain), F(1/2) and F(1) known: it lies below the chord between the neighbouring
    two, and above the other chord extended.
    """
    zero, half, one = _known_tails(targets, vocabulary_size)
    b = 1 / temperature
    left, right = half + (2 * b - 1) * (half - zero), half + (2 * b - 1) * (one - half)
    empty = one.isneginf()
    return (
        torch.minimum(left, right).masked_fill(empty, -math.inf),
        torch.maximum(left, right).masked_fill(empty, -math.inf),
    )


def interpolation_bound(targets: Targets, member: Member, temperature: float) -> Tensor:
    """How far the teacher's mass outside the certain ids can be from what interpolation gives it, [P], in 0..1."""
    tempered = temper(targets, member, temperature, interpolate_tail=True)
    heads = torch.logsumexp(tempered.scores.masked_fill(~tempered.certain, -math.inf), 1)
    least, greatest = (
        torch.sigmoid(bound - heads) for bound in tail_bounds(targets, member.vocabulary_size, temperature)
    )
    taken = torch.sigmoid(tempered.log_tail - heads)
    return torch.maximum(greatest - taken, taken - least)


def quantisation_bound(step_nats: float) -> float:
    """``exp(step) - 1``: how far codes can move a bucketed target distribution, in L1, at temperature 1 or 2.

    A decoded log-prob is within step/2 of the teacher's, and so is the normaliser, whose log is a mean of these
    errors; so each probability stays within a factor exp(+-step), and ``sum |p' - p| <= exp(step) - 1``. The floats
    beside the codes keep 12 bits of mantissa: their relative error of 2**-13 is below step/2 for any top log-prob of
    a vocabulary under 2**31 ids, and for any tail of more than exp(-32) at the finest step; a smaller tail adds less
    than 1e-13.

    The gradient of a position's KL by the logits is ``(q - p) / tau``, so its L1 norm moves by at most the bound over
    tau (times tau in the loss, which multiplies by tau**2). At the default step of 1/32 nat the bound is 0.032; the
    rounding errors are of both signs, and what is seen is nearer to a quarter of it.
    """
    return math.expm1(step_nats)


def targets_of(member: Member, targets: Mapping[str, Targets] | None) -> Targets:
    """A member's targets in a batch; InputError naming what there is when they are missing."""
    if targets is None or member.name not in targets:
        found = ", ".join(targets) if targets else "none"
        raise InputError(f"the batch holds no targets of teacher {member.name} (found: {found}): add it to the dataset")
    return targets[member.name]


def _known_tails(targets: Targets, vocabulary_size: int) -> tuple[Tensor, Tensor, Tensor]:
    outside = (vocabulary_size - targets["certain"]).to(targets["log_tail"].dtype)
    return outside.log(), targets["log_tail_half"], targets["log_tail"]


def _logsumexp(scores: Tensor, tail: Tensor) -> Tensor:
    return torch.logsumexp(torch.cat([scores, tail[:, None]], dim=1), dim=1)


def _leading_columns(counts: Tensor, columns: int) -> Tensor:
    """bool [P, K]: column i < counts."""
    return torch.arange(columns, device=counts.device) < counts[:, None]
