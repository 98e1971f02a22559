"""The distillation loss on stored targets: forward KL with a tail bucket, as sums and counts.

Legend: `P` positions of a batch (flattened), `K` stored ids per position, `V` vocabulary of the cache, `W` columns
of the student's head (W >= V), `S` the certain ids of a position, `tau` the temperature. Everything is in nats.

A teacher's targets are the plain tensors of a DataLoader batch::

    token_ids                      int32|int64 [P, K]   columns from `kept` on hold poison, possibly >= W
    codes | logprobs               uint16 | float32 [P, K]
    kept, certain                  int [P]
    top_logprob, log_tail, log_tail_half    float32 [P]

Raw codes are decoded here, on the training device: there it is a scan over K numbers, on the loader's side it
costs as much as the decompression.

The student's side goes through one autograd function that knows the gradient of any loss of the log-probs of S
and of the mass outside S. Against plain autograd it keeps only the logits and a few numbers per position: no
float32 copy, no softmax and no masked copy of [P, W] lives until the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from storage.errors import InputError

NOT_TRAINED = -100
"""The label of a position that takes part in no term of the loss."""

Targets = Mapping[str, Tensor]

# The stored sum over the tail, F(1/tau) = log of the sum of p**(1/tau) outside S, exists at two temperatures.
_TAIL_AT = {1.0: "log_tail", 2.0: "log_tail_half"}

# Rows are worked on in pieces of this many logits, which bounds the temporaries: 1 MiB of float32 on a CPU, where
# staying in the cache saves a tenth of the time, and 256 MiB elsewhere, where fewer launches count for more.
_CHUNK_LOGITS = {"cpu": 1 << 18}
_CHUNK_LOGITS_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Member:
    """One teacher entry in a mixture.

    `weight` is relative to the other members'. `step_nats` belongs to the entry's codes; None when it stores
    float32 log-probs. `vocabulary_size` is V.
    """

    name: str
    weight: float
    step_nats: float | None
    vocabulary_size: int


@dataclass(frozen=True)
class LossSums:
    """Sums over the valid positions of a batch, scalar tensors; divide once, by the global count.

    cross_entropy   sum of -log q(label), nats, temperature 1; carries no gradient
    divergence      by member: sum of the KL at the loss's temperature, nats, neither weighted nor times tau**2;
                    carries no gradient. Empty when alpha is 1
    loss_sum        sum of alpha * CE + (1 - alpha) * tau**2 * sum_m w_m KL_m; differentiable
    count           number of valid positions, int64
    """

    cross_entropy: Tensor
    divergence: dict[str, Tensor]
    loss_sum: Tensor
    count: Tensor


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


def tempered_bucket(targets: Targets, step_nats: float | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher at a temperature: ``p_i**(1/tau) / Z`` over the certain ids, and one bucket for all the others.

    Returns (log-probs [P, K], -inf where not certain; log-mass of the bucket [P]; valid bool [P, K]). Z is taken
    over the values as decoded and the stored tail, so the result sums to 1 and quantisation moves mass but never
    makes or loses any. Exact at temperatures 1 and 2, whose tails are stored; others raise InputError.
    """
    tail = targets[_tail_name(temperature)]
    decoded = decode_logprobs(targets, step_nats)
    valid = _leading_columns(targets["certain"], decoded.shape[1])
    logp = (decoded / temperature).masked_fill(~valid, -math.inf)
    log_z = torch.logsumexp(torch.cat([logp, tail[:, None]], dim=1), dim=1)
    return logp - log_z[:, None], tail - log_z, valid


def forward_kl_bucket(
    logits: Tensor,
    targets: Targets,
    member: Member,
    temperature: float,
    valid_positions: Tensor | None = None,
) -> Tensor:
    """``KL(p || q) = sum_S p_i (log p_i - log q_i) + p_t (log p_t - log q_t)`` of one teacher, per position.

    `p` is `tempered_bucket`; ``q = softmax(logits / tau)`` over all W columns; `q_t` sums the columns j < V outside
    S, reduced over them and never as 1 - sum. A student's columns from V on get no teacher mass and are not part of
    `q_t`. Between 0 and the dense KL, growing with K, equal to it at K = V. Not multiplied by tau**2.

    logits [P, W], any float type, computed in float32; valid_positions bool [P], False gives 0 whatever the
    targets hold there. Returns [P] in nats. The gradient is the rule of Hinton et al. 2015 with a bucket:
    ``(q - p) / tau`` on S, and outside it the student's own shape scaled to the teacher's mass.
    """
    check_batch(logits, None, member.vocabulary_size)
    logp, log_tail, support = _teacher(targets, member, temperature, valid_positions)
    _, buckets = student_buckets(logits, None, [support], member.vocabulary_size, temperature)
    return _bucket_kl(logp, log_tail, support, *buckets[0], valid_positions)


class DistillationLoss:
    """``alpha * CE + (1 - alpha) * tau**2 * sum_m w_m KL(p_m || q)``, per valid token.

    Called with logits [P, W], labels int64 [P] (`NOT_TRAINED` = -100 where a position counts for neither term) and
    the targets by member name; returns `LossSums`. CE is at temperature 1 over all W columns. The weights are
    normalised to sum 1. tau**2 keeps the size of the KL's gradient when the temperature changes.

    Forward KL is linear in p, so the weighted sum is the KL of the mixture ``p = sum_m w_m p_m`` (each member
    tempered, then mixed) up to a constant in the student: same gradient at K = V, and at K < V that of the members'
    own buckets. Needs no targets when alpha is 1, and ignores any that are given.

    Raises InputError for an alpha outside [0, 1], a temperature without a stored tail, weights that are negative,
    not finite or all zero, no or repeated members, members of another vocabulary, and W < V.
    """

    def __init__(self, vocabulary_size: int, alpha: float, temperature: float, members: Sequence[Member]) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise InputError(f"alpha is the share of the cross-entropy, between 0 and 1; got {alpha}")
        self.vocabulary_size = vocabulary_size
        self.alpha = float(alpha)
        self.temperature = float(temperature)
        self.members: tuple[Member, ...] = ()
        if alpha < 1.0:
            _tail_name(temperature)
            self.members = _normalised(members, vocabulary_size)

    def __call__(self, logits: Tensor, labels: Tensor, targets: Mapping[str, Targets] | None = None) -> LossSums:
        """The sums of one batch; see the class."""
        check_batch(logits, labels, self.vocabulary_size)
        trained = labels != NOT_TRAINED
        teachers = [_teacher(targets_of(member, targets), member, self.temperature, trained) for member in self.members]
        supports = [support for _, _, support in teachers]
        cross_entropy, buckets = student_buckets(logits, labels, supports, self.vocabulary_size, self.temperature)
        assert cross_entropy is not None
        nats = cross_entropy.sum()
        # A term of weight zero stays out of the graph: the backward pass then skips its pass over the logits.
        loss = self.alpha * nats if self.alpha > 0 else torch.zeros_like(nats)
        divergence = {}
        for member, (logp, log_tail, support), student in zip(self.members, teachers, buckets, strict=True):
            total = _bucket_kl(logp, log_tail, support, *student, trained).sum()
            divergence[member.name] = total.detach()
            if member.weight > 0:
                loss = loss + (1.0 - self.alpha) * self.temperature**2 * member.weight * total
        return LossSums(nats.detach(), divergence, loss, trained.sum())


def quantisation_bound(step_nats: float) -> float:
    """``exp(step) - 1``: how far codes can move a target distribution, in L1, at temperature 1 or 2.

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


def student_buckets(
    logits: Tensor,
    labels: Tensor | None,
    supports: Sequence[Tensor],
    vocabulary_size: int,
    temperature: float,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
    """The student's log-probs of some ids, and of everything outside them, for one batch and several teachers.

    With ``u = logits / tau`` and ``lse = logsumexp(u)`` over all W columns, for each support int [P, K] (-1 where
    a column holds no id): ``ell = u[ids] - lse`` [P, K], 0 where there is no id, and ``theta = logsumexp of u[j]
    over j < V outside the ids - lse`` [P], -inf when nothing is outside. Besides, when `labels` are given, the
    cross-entropy [P] at temperature 1, 0 where the label is `NOT_TRAINED`.

    logits [P, W] of any float type; results are float32 (float64 for float64 logits), differentiable once.
    """
    outputs = _StudentBuckets.apply(  # type: ignore[no-untyped-call]
        logits, labels, vocabulary_size, temperature, *supports
    )
    rest = outputs[1:] if labels is not None else outputs
    return (outputs[0] if labels is not None else None), list(zip(rest[::2], rest[1::2], strict=True))


class _StudentBuckets(torch.autograd.Function):
    """Forward and backward of `student_buckets`, in chunks of rows.

    For a loss L(ell, theta) with g = dL/d ell, h = dL/d theta, G = sum(g) + h, q = softmax(u), the gradient by u is
    g_i - q_i G on the ids, exp(u_j - lse_tail) (h - G q_t) outside them below V, and -q_j G from V on. It is written
    out rather than left to autograd because the derivative of a masked logsumexp is 0/0 when nothing is outside the
    ids (K = V), and because autograd would keep several [P, W] tensors per teacher.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor | None, vocabulary_size: int, temperature: float, *supports: Tensor
    ) -> tuple[Tensor, ...]:
        # float32 from here on: exp and its sum over the vocabulary lose digits in half precision.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        per_position = logits.new_empty(logits.shape[:1], dtype=dtype)
        peak, lse_one, lse, cross_entropy = (torch.empty_like(per_position) for _ in range(4))
        ells = [logits.new_empty(support.shape, dtype=dtype) for support in supports]
        tails = [torch.empty_like(per_position) for _ in supports]
        for rows in _chunks(logits):
            # Nothing below changes when a row is shifted. With its maximum at 0, normalisers are small numbers that
            # round finely (a logit of 20 has a float32 spacing of 2e-6) and exp cannot overflow.
            peak[rows] = logits[rows].amax(1)
            z = logits[rows].to(dtype) - peak[rows, None]
            if labels is not None or temperature == 1.0:
                lse_one[rows] = z.exp().sum(1).log()
            if labels is not None:
                trained, ids = _safe(labels[rows, None])
                picked = lse_one[rows] - z.gather(1, ids)[:, 0]
                cross_entropy[rows] = picked.masked_fill(~trained[:, 0], 0.0)
            if not supports:
                continue
            u = z if temperature == 1.0 else z / temperature
            lse[rows] = lse_one[rows] if temperature == 1.0 else u.exp().sum(1).log()
            for support, ell, tail in zip(supports, ells, tails, strict=True):
                valid, ids = _safe(support[rows])
                ell[rows] = (u.gather(1, ids) - lse[rows, None]).masked_fill(~valid, 0.0)
                tail[rows] = torch.logsumexp(_without(u[:, :vocabulary_size], ids, valid), 1)
        ctx.save_for_backward(logits, labels, peak, lse_one, lse, *supports, *ells, *tails)
        ctx.members, ctx.vocabulary_size, ctx.temperature = len(supports), vocabulary_size, temperature
        ctx.set_materialize_grads(False)
        outputs = [] if labels is None else [cross_entropy]
        for ell, tail in zip(ells, tails, strict=True):
            outputs += [ell, tail - lse]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, peak, lse_one, lse, *rest = ctx.saved_tensors
        n, tau = ctx.members, ctx.temperature
        supports, ells, tails = rest[:n], rest[n : 2 * n], rest[2 * n :]
        if all(gradient is None for gradient in gradients):
            return tuple(None for _ in range(4 + n))
        by_label = gradients[0] if labels is not None else None
        by_member = gradients[1:] if labels is not None else gradients
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            z = logits[rows].to(lse.dtype) - peak[rows, None]
            u = z if tau == 1.0 else z / tau
            parts = []
            for i in range(n):
                g, h = by_member[2 * i], by_member[2 * i + 1]
                if g is None and h is None:
                    continue
                g = torch.zeros_like(ells[i][rows]) if g is None else g[rows]
                h = torch.zeros_like(lse[rows]) if h is None else h[rows]
                # Dividing the small [rows, K] and [rows] gradients by tau is dividing their image by it.
                student = (ells[i][rows], lse[rows], tails[i][rows])
                parts.append(_bucket_gradient(u, supports[i][rows], *student, g / tau, h / tau, ctx.vocabulary_size))
            if by_label is not None:
                trained, ids = _safe(labels[rows, None])
                weight = by_label[rows, None].masked_fill(~trained, 0.0)
                parts.append((z - lse_one[rows, None]).exp_().mul_(weight).scatter_add_(1, ids, -weight))
            # Summed in float32 and rounded once to the logits' type.
            result[rows] = sum(parts[1:], parts[0]).to(result.dtype)
        return (result, None, None, None, *(None for _ in range(n)))


def _bucket_gradient(
    u: Tensor, support: Tensor, ell: Tensor, lse: Tensor, lse_tail: Tensor, g: Tensor, h: Tensor, vocabulary_size: int
) -> Tensor:
    """The gradient [rows, W] by u of one member's loss: the three lines of `_StudentBuckets`."""
    valid, ids = _safe(support)
    g = g.masked_fill(~valid, 0.0)
    total = g.sum(1) + h
    padding = (u[:, vocabulary_size:] - lse[:, None]).exp_().mul_(-total[:, None])
    # With nothing outside the ids, lse_tail is -inf; any finite number in its place makes exp(-inf - it) the 0 it is.
    tail = _without(u[:, :vocabulary_size], ids, valid).sub_(lse_tail.masked_fill(lse_tail.isneginf(), 0.0)[:, None])
    tail.exp_().mul_((h - total * (lse_tail - lse).exp())[:, None])
    tail.scatter_add_(1, ids, (g - ell.exp() * total[:, None]).masked_fill(~valid, 0.0))
    return torch.cat([tail, padding], dim=1) if padding.shape[1] else tail


def _without(u: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """A copy of u [rows, V] with -inf at the valid ids.

    Columns that are not valid add 0 to id 0, so they need no place of their own and may hold anything.
    """
    return u.scatter_add(1, ids, torch.zeros_like(valid, dtype=u.dtype).masked_fill(valid, -math.inf))


def _safe(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(which entries are ids: not negative; int64 indices that are 0 where they are not)."""
    return ids >= 0, ids.clamp(min=0).to(torch.int64)


def _chunks(logits: Tensor) -> list[slice]:
    """Row ranges to work on, one after the other."""
    rows = max(1, _CHUNK_LOGITS.get(logits.device.type, _CHUNK_LOGITS_ELSEWHERE) // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]


def _leading_columns(counts: Tensor, columns: int) -> Tensor:
    """bool [P, K]: column i < counts."""
    return torch.arange(columns, device=counts.device) < counts[:, None]


def _teacher(
    targets: Targets, member: Member, temperature: float, valid_positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`tempered_bucket`, with the ids instead of the mask: int32 [P, K], -1 where no certain id is."""
    logp, log_tail, valid = tempered_bucket(targets, member.step_nats, temperature)
    if valid_positions is not None:
        valid = valid & valid_positions[:, None]
    return logp, log_tail, torch.where(valid, targets["token_ids"], -1).to(torch.int32)


def _bucket_kl(
    logp: Tensor, log_tail: Tensor, support: Tensor, ell: Tensor, theta: Tensor, valid_positions: Tensor | None
) -> Tensor:
    """KL [P] between two bucketed distributions, 0 at positions that are not valid."""
    p = torch.where(support >= 0, logp.exp(), 0.0)
    p_tail = log_tail.exp()
    if valid_positions is not None:
        p_tail = p_tail.masked_fill(~valid_positions, 0.0)
    # 0 * log 0 is 0: at K = V both tails are empty and both logs -inf, and their difference must not be formed.
    head = p * torch.where(p > 0, logp - ell, 0.0)
    return head.sum(1) + p_tail * torch.where(p_tail > 0, log_tail - theta, 0.0)


def _tail_name(temperature: float) -> str:
    name = _TAIL_AT.get(float(temperature))
    if name is None:
        raise InputError(
            f"the stored tails are exact only at 1 and 2: a temperature of {temperature:g} cannot be served from this "
            "cache; take 1 or 2"
        )
    return name


def _normalised(members: Sequence[Member], vocabulary_size: int) -> tuple[Member, ...]:
    names = [member.name for member in members]
    if not names:
        raise InputError("alpha below 1 needs at least one teacher to learn from; name one, or set alpha to 1")
    if len(set(names)) < len(names):
        raise InputError(f"each teacher may be named once, with its whole weight; got {', '.join(names)}")
    for member in members:
        if not (math.isfinite(member.weight) and member.weight >= 0):
            raise InputError(f"teacher {member.name}: a weight is a finite number >= 0; got {member.weight}")
        if member.vocabulary_size != vocabulary_size:
            raise InputError(
                f"teacher {member.name} has a vocabulary of {member.vocabulary_size}, the cache one of "
                f"{vocabulary_size}: take a teacher entry of the same tokenizer"
            )
    total = sum(member.weight for member in members)
    if not 0 < total < math.inf:
        raise InputError(f"the weights of {', '.join(names)} sum to {total:g}: give at least one a weight above 0")
    return tuple(replace(member, weight=member.weight / total) for member in members)


def check_batch(logits: Tensor, labels: Tensor | None, vocabulary_size: int) -> None:
    """Raise InputError unless logits are [P, W] with W >= V and labels, when given, are [P]."""
    if logits.ndim != 2:
        raise InputError(f"logits must be flattened to [positions, columns]; got {list(logits.shape)}")
    if logits.shape[1] < vocabulary_size:
        raise InputError(
            f"the model's head has {logits.shape[1]} columns, fewer than the {vocabulary_size} ids of the cache's "
            "tokenizer: resize its embeddings or take another model"
        )
    if labels is not None and labels.shape != logits.shape[:1]:
        raise InputError(f"labels must be [{len(logits)}], one for each row of logits; got {list(labels.shape)}")


def targets_of(member: Member, targets: Mapping[str, Targets] | None) -> Targets:
    """A member's targets in a batch; InputError naming what there is when they are missing."""
    if targets is None or member.name not in targets:
        found = ", ".join(targets) if targets else "none"
        raise InputError(f"the batch holds no targets of teacher {member.name} (found: {found}): add it to the dataset")
    return targets[member.name]
