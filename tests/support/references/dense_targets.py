"""Stored targets of dense distributions, in float64 by default, for tests of the loss.

Legend: `P` positions, `K` stored ids, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from support.caches.small import make_entry, make_entry_2, varopt_targets, without_rows, write_entry
from torch import Tensor

from storage import LogitCache
from storage.format import encoding
from storage.format.manifest.entry import Targets
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.target_batch import TargetBatch

P, V = 37, 251
SEQUENCE = 9
"""Positions of a sequence."""
FILL_VALUE = 2**31 - 1


def normal(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_for(seed: int, positions: int = P, vocabulary_size: int = V) -> Tensor:
    labels = torch.randint(0, vocabulary_size, (positions,), generator=torch.Generator().manual_seed(seed))
    labels[::5] = NOT_TRAINED
    return labels


def dense(seed: int, positions: int = P, scale: float = 2.0, vocabulary_size: int = V) -> Tensor:
    """A teacher's log-probs [P, V], float64."""
    return torch.log_softmax(normal(seed, positions, vocabulary_size, scale=scale), 1)


def stored(
    logp: Tensor, k: int, kept: Tensor | None = None, step: float | None = None, dtype: torch.dtype = torch.float32
) -> TargetBatch:
    """Top-k targets of dense log-probs [P, V], as a DataLoader yields them; fill values beyond `kept`."""
    kept = torch.full((len(logp),), k) if kept is None else kept
    ids = logp.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return _targets(logp, ids, kept, kept, step, dtype)


def varopt(
    logp: Tensor, k: int, seed: int, tau: float = 1.0, step: float | None = None, dtype: torch.dtype = torch.float32
) -> TargetBatch:
    """VarOpt targets of dense log-probs [P, V] for a temperature."""
    found = varopt_targets(logp.numpy(), k, np.full(len(logp), -1), tau, seed)
    ids, certain = (torch.from_numpy(each.astype(np.int64)) for each in (found.token_ids, found.certain))
    return _targets(logp, ids, torch.full((len(logp),), k), certain, step, dtype)


def samples_of_one(logp: Tensor, k: int, tau: float) -> list[tuple[Tensor, TargetBatch]]:
    """All samples with one sampled id beside k - 1 certain ones, each with its probability [P]."""
    order = logp.argsort(dim=1, descending=True, stable=True)
    chances = torch.softmax((logp / tau).gather(1, order[:, k - 1 :]), 1)
    found = []
    for choice in range(chances.shape[1]):
        ids = torch.cat([order[:, : k - 1], order[:, k - 1 + choice, None]], 1)
        heads = stored(logp, k - 1, dtype=torch.float64)
        kept = torch.full((len(logp),), k, dtype=torch.int32)
        targets = replace(heads, kept=kept, token_ids=ids.to(torch.int32), logprobs=logp.gather(1, ids))
        found.append((chances[:, choice], targets))
    return found


def _targets(
    logp: Tensor, ids: Tensor, kept: Tensor, certain: Tensor, step: float | None, dtype: torch.dtype
) -> TargetBatch:
    k = ids.shape[1]
    values = logp.gather(1, ids)
    unused, heads = torch.arange(k) >= kept[:, None], torch.arange(k) < certain[:, None]
    outside = logp.scatter_add(1, ids, torch.zeros_like(values).masked_fill(heads, -math.inf))
    targets = {
        "kept": kept.to(torch.int32),
        "certain": certain.to(torch.int32),
        "logprobs": values.masked_fill(unused, math.nan),
        "log_tail": outside.logsumexp(1),
        "log_tail_half": (outside / 2).logsumexp(1),
        "entropy": -(logp.exp() * logp).sum(1),
    }
    targets = {name: value.to(dtype) if value.is_floating_point() else value for name, value in targets.items()}
    targets["sequence"] = (torch.arange(len(logp)) // SEQUENCE).to(torch.int32)
    targets["token_ids"] = ids.masked_fill(unused, FILL_VALUE).to(torch.int32)
    if step is not None:
        top, *tails = (
            encoding.round_mantissa(value.float().numpy(), 12)
            for value in (values[:, 0], targets["log_tail"], targets["log_tail_half"])
        )
        targets["log_tail"], targets["log_tail_half"] = (torch.from_numpy(tail).to(dtype) for tail in tails)
        codes = encoding.encode_logprobs(values.float().numpy(), top, kept.numpy().astype(np.uint16), step)
        decoded = torch.from_numpy(encoding.decode_logprobs(codes, top, step))
        targets["logprobs"] = decoded.masked_fill(unused, math.nan).to(dtype)
    return TargetBatch(**targets)


def spoiled(targets: TargetBatch, rows: Tensor) -> TargetBatch:
    """The targets with NaN, infinities and ids beyond all columns at some rows, bool [P]."""

    def spoil(values: Tensor) -> Tensor:
        fills = [math.nan, math.inf, -math.inf] if values.is_floating_point() else [FILL_VALUE]
        by_row = torch.tensor(fills)[torch.arange(len(values)) % len(fills)].to(values.dtype)
        shape = (-1, *(1 for _ in values.shape[1:]))
        return torch.where(rows.reshape(shape), by_row.reshape(shape), values)

    return TargetBatch(**{name: spoil(values) for name, values in vars(targets).items() if values is not None})


def quantisation_bound(step_nats: float) -> float:
    """``exp(step) - 1``: bound on the L1 error of a bucketed target distribution from codes, at temperature 1 or 2.

    A decoded log-prob is within step/2 of the teacher's, and so is the normaliser, whose log is a mean of these
    errors; so each probability stays within a factor exp(+-step), and ``sum |p' - p| <= exp(step) - 1``. The floats
    beside the codes keep 12 bits of mantissa: their relative error of 2**-13 is below step/2 for any top log-prob of
    a vocabulary under 2**31 ids, and for any tail of more than exp(-32) at the finest step; a smaller tail adds less
    than 1e-13.

    The gradient of a position's KL by the logits is ``(q - p) / tau``, so its L1 norm moves by at most the bound over
    tau (times tau in the loss, which multiplies by tau**2). At the default step of 1/32 nat the bound is 0.032; the
    rounding errors are of both signs, and the measured error is nearer to a quarter of it.
    """
    return math.expm1(step_nats)


def write_varopt(
    url: str,
    name: str,
    logp: Tensor,
    k: int,
    tau: float = 1.0,
    seed: int = 0,
    fields: tuple[str, ...] | None = None,
    there: np.ndarray | None = None,
) -> None:
    """Write a VarOpt entry of dense log-probs [N, V] into a cache, with the ids of `varopt`.

    fields: those of an entry of version 2, with codes, and there: bool [N], its rows with targets; else version 1.
    """
    cache = LogitCache.open(url)
    tokens = cache.tokens.read(0, len(logp)).astype(np.int64)
    targets = varopt_targets(logp.numpy(), k, np.append(tokens[1:], -1), tau, seed)
    if fields is None:
        method = Targets(method="varopt", k=k, seed=seed, temperature=tau, has_label_logprob=True)
        entry = make_entry(cache.record, k, encoding="float32").model_copy(update={"targets": method})
    else:
        positions = "all" if there is None else "some"
        entry = make_entry_2(cache.record, k, fields, method="varopt", temperature=tau, positions=positions)
    write_entry(url, name, entry, targets if there is None else without_rows(targets, ~there))


def member(
    name: str = "t", weight: float = 1.0, step: float | None = None, sampled_at: float | None = None, size: int = V
) -> Member:
    return Member(name, weight, step, size, sampled_at)


def with_c(loss: DistillationLoss, c: float) -> DistillationLoss:
    """The loss with this coefficient of all its control variates."""
    for control in loss.controls.values():
        control.load([c, 1.0])
    return loss


def dense_kl(z: Tensor, logp: Tensor, tau: float) -> Tensor:
    """KL(softmax(log p / tau) || softmax(z / tau)) [P], the student normalised over all its columns."""
    target = torch.log_softmax(logp / tau, 1)
    return (target.exp() * (target - torch.log_softmax(z / tau, 1)[:, : logp.shape[1]])).sum(1)


def joined(log_p: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs of some ids [P, K], log-mass of the others [P]) of dense log-probs [P, V]; at least one other."""
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(1, ids, False)
    return log_p.gather(1, ids), log_p.masked_fill(~outside, -math.inf).logsumexp(1)


def gradient(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient by z of the function's sum."""
    z = z.detach().clone().requires_grad_()
    value = function(z)
    (by_z,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), by_z


def assert_same_loss(ours: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], z: Tensor) -> None:
    """Equal values, and equal gradients by z of their sums, in float64."""
    (value, by_z), (expected, expected_by_z) = gradient(ours, z), gradient(reference, z)
    assert value.dtype == by_z.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_z, expected_by_z, rtol=1e-8, atol=1e-13)
