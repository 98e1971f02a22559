"""Reduced rows against a float64 definition over all columns."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from storage.format.encoding import logprob_floor
from teachers.reduction.reduce import ReducedRows, reduce_topk

FLOOR = logprob_floor(1 / 32)


def reference(logits: Tensor, vocabulary_size: int, k: int, labels: Tensor) -> dict[str, np.ndarray]:
    """The naive equations in float64, with a stable sort for the order; tails from their own terms."""
    z = logits[:, :vocabulary_size].double().numpy()
    order = np.argsort(-z, axis=1, kind="stable")
    z = z - z.max(axis=1, keepdims=True)
    ids, others = order[:, :k], order[:, k:]
    log_sum = np.log1p(np.exp(np.take_along_axis(z, order[:, 1:], 1)).sum(axis=1))
    logp = z - log_sum[:, None]

    def log_mass(beta: float) -> np.ndarray:
        return np.logaddexp.reduce(beta * np.take_along_axis(logp, others, 1), axis=1)

    full = k == vocabulary_size
    chosen = np.take_along_axis(logp, np.maximum(labels.numpy(), 0)[:, None], 1)[:, 0]
    with np.errstate(invalid="ignore"):
        plogp = np.nan_to_num(np.exp(logp) * logp, nan=0.0, neginf=0.0)
    return {
        "token_ids": ids,
        "logprobs": np.maximum(np.take_along_axis(logp, ids, 1), FLOOR),
        "log_tail": log_mass(1.0) if full else np.maximum(log_mass(1.0), FLOOR),
        "log_tail_half": log_mass(0.5) if full else np.maximum(log_mass(0.5), FLOOR),
        "label_logprob": np.where(labels.numpy() < 0, np.nan, np.maximum(chosen, FLOOR)),
        "entropy": -plogp.sum(axis=1),
    }


def check(logits: Tensor, vocabulary_size: int, k: int, labels: Tensor | None = None) -> ReducedRows:
    """The stated error: 1e-6 nats plus 3e-7 of the size for log-probs and tails, 1e-6 of its size for entropy.

    The order is exact, the input is left alone, and head plus tail is 1.
    """
    rows = len(logits)
    labels = torch.arange(rows) % vocabulary_size if labels is None else labels
    before = logits.clone()
    found = reduce_topk(logits, vocabulary_size, k, labels, FLOOR)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num()), "the input was written to"
    expected = reference(logits, vocabulary_size, k, labels)
    np.testing.assert_array_equal(found.token_ids.numpy(), expected["token_ids"])
    assert bool((found.certain == k).all())
    for name in ("logprobs", "log_tail", "log_tail_half", "label_logprob"):
        value = getattr(found, name)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-6, rtol=3e-7, err_msg=name)
    np.testing.assert_allclose(found.entropy.numpy(), expected["entropy"], rtol=1e-6, atol=1e-30)
    if k < vocabulary_size:
        total = found.logprobs.double().exp().sum(1) + found.log_tail.double().exp()
        np.testing.assert_allclose(total.numpy(), 1.0, atol=1e-6)
    return found


def spread_logits(rows: int, columns: int, scale: float = 4.0, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def masked_logits(vocabulary_size: int) -> Tensor:
    """Five rows with ids that are masked in all ways, for K = 64."""
    logits = spread_logits(5, vocabulary_size)
    logits[0, ::2] = -math.inf
    logits[1, 10:] = -math.inf  # fewer live ids than K
    logits[2, 1:] = -math.inf  # one live id
    logits[3, 64:] = -math.inf  # exactly K live ids: an empty tail
    logits[4, 1::2] = torch.finfo(torch.float32).min  # how some models mask
    return logits
