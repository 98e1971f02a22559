"""Sampled rows against the rule of VarOpt, in float64."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from support.references.reducer import FLOOR
from torch import Tensor

from storage.format.targets import SparseTargets
from teachers.reduction.reduce import ReducedRows, reduce_topk, reduce_varopt
from teachers.reduction.varopt import Sampling, random_bits, random_words


def sampling_of(
    rows: int,
    seed: int,
    temperature: float = 1.0,
    head_ids: int = 0,
    pivotal: int = 0,
    order: Tensor | None = None,
    threshold: bool = False,
) -> Sampling:
    """The sampling of the first positions; pivotal: K for that method, 0 for the systematic one."""
    random = random_words(seed, 0, rows, pivotal) if pivotal else random_bits(seed, 0, rows)
    return Sampling(temperature, head_ids, torch.from_numpy(random), order, threshold)


def sample(
    logits: Tensor,
    k: int,
    seed: int = 0,
    head_ids: int = 0,
    temperature: float = 1.0,
    vocabulary_size: int = 0,
    pivotal: bool = False,
    threshold: bool = False,
) -> ReducedRows:
    rows, columns = logits.shape
    sampling = sampling_of(rows, seed, temperature, head_ids, k if pivotal else 0, threshold=threshold)
    return reduce_varopt(logits, vocabulary_size or columns, k, torch.arange(rows) % columns, FLOOR, sampling)


def sampled_targets(
    logits: np.ndarray, k: int, seed: int = 0, temperature: float = 1.0, head_ids: int = 0, threshold: bool = False
) -> SparseTargets:
    """A sample of K ids of each row, as a teacher's worker has it; the label of row t is t modulo the columns."""
    found = sample(torch.from_numpy(logits).float(), k, seed, head_ids, temperature, threshold=threshold)
    kept, certain = (values.numpy().astype(np.uint16) for values in (found.kept, found.certain))
    valid = np.arange(k) < kept[:, None]
    ids = np.where(valid, found.token_ids.numpy(), np.iinfo(np.uint16).max).astype(np.uint16)
    logprobs = np.where(valid, found.logprobs.numpy(), np.float32(-np.inf))
    floats = {name: getattr(found, name).numpy() for name in ("log_tail", "log_tail_half", "label_logprob", "entropy")}
    return SparseTargets(0, ids, kept, certain, logprobs, **floats)


def dense(logits: Tensor) -> np.ndarray:
    """float64 log-probs."""
    return torch.log_softmax(logits.double(), dim=1).numpy()


def sizes(logp: np.ndarray, k: int, head_ids: int, temperature: float) -> set[int]:
    """How many ids a row may hold by a threshold of 1 / K: one number, or more where rounding decides."""
    mass = np.sort(np.exp(logp / temperature))[::-1]
    found = set()
    for slack in (1 - 4e-6, 1, 1 + 4e-6):
        likely = max(head_ids, int((mass * k * slack >= mass.sum()).sum()))
        share = mass[likely:].sum() / mass.sum()
        # In float32 nothing is left of a rest this small.
        for rest in {share, share if share > 1e-30 else 0.0}:
            found.add(min(k, 8 * math.ceil((likely + math.ceil(k * slack * rest)) / 8)))
    return found


def certain_ids(logp: np.ndarray, k: int, head_ids: int, temperature: float) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Of one row: the ids in order, their tempered masses, and between which bounds the least j of the rule lies.

    Where a_{j+1} (K - j) and R_j are equal within float32's rounding either answer is right: an id that is sampled with
    probability one is certain.
    """
    order = np.argsort(-logp, kind="stable")
    mass = np.exp(logp[order] / temperature)
    rest = np.append(np.cumsum(mass[::-1])[::-1], 0.0)
    if np.isneginf(logp[order[k:]]).all():
        return order, mass, k, k
    bounds = []
    for slack in (1 + 4e-6, 1 - 4e-6):
        held = [j for j in range(head_ids, k) if mass[j] * (k - j) < rest[j] * slack]
        bounds.append(held[0] if held and rest[held[0]] > 2.0**-53 * rest[0] else k)
    return order, mass, *bounds


def check(
    found: ReducedRows, logits: Tensor, k: int, head_ids: int = 0, temperature: float = 1.0, threshold: bool = False
) -> None:
    """The rule of every sample, whichever ids it has."""
    logp = dense(logits)
    vocabulary_size = logp.shape[1]
    ids, certain = found.token_ids.numpy(), found.certain.numpy()
    top = reduce_topk(logits, vocabulary_size, k, torch.arange(len(ids)) % vocabulary_size, FLOOR)
    assert torch.equal(found.entropy, top.entropy)
    assert torch.equal(found.label_logprob, top.label_logprob)
    widest = k
    for row in range(len(ids)):
        k = int(found.kept[row])
        assert k in (sizes(logp[row], widest, head_ids, temperature) if threshold else {widest})
        exact = np.maximum(logp[row, ids[row, :k]], FLOOR)
        np.testing.assert_allclose(found.logprobs[row, :k].numpy(), exact, atol=1e-6, rtol=3e-7)
        assert (np.diff(found.logprobs[row, :k].numpy()) <= 0).all()
        assert len(set(ids[row, :k])) == k
        order, mass, low, high = certain_ids(logp[row], k, head_ids, temperature)
        j = int(certain[row])
        assert low <= j <= high
        assert (ids[row, :j] == order[:j]).all()
        ranks = np.argsort(order)[ids[row, :k]]
        assert (np.diff(ranks) > 0).all(), "by log-prob, equal ones by id"
        for name, beta in (("log_tail", 1.0), ("log_tail_half", 0.5)):
            value = float(getattr(found, name)[row])
            outside = np.logaddexp.reduce(beta * logp[row, order[j:]])
            expected = -math.inf if j == vocabulary_size else max(outside, FLOOR)
            np.testing.assert_allclose(value, expected, atol=1e-6, rtol=3e-7, err_msg=name)
        if j < k:
            rest = mass[j:].sum()
            assert (mass[ranks[j:]] <= rest / (k - j) * (1 + 4e-6)).all(), "no sampled id is worth more than its weight"


def check_systematic(found: ReducedRows, logits: Tensor, seed: int, temperature: float = 1.0) -> None:
    """The stated ids, in float64 from the same random number, where no point is within rounding of an id's end."""
    rows, k = found.token_ids.shape
    clear = 0
    for row, logp in enumerate(dense(logits)):
        j = int(found.certain[row])
        mass = np.exp(logp / temperature)
        mass[found.token_ids[row, :j].numpy()] = 0.0
        ends = np.cumsum(mass)
        points = (random_bits(seed, row, row + 1)[0] / 2**32 + np.arange(k - j)) * ends[-1] / (k - j)
        if np.abs(ends[:, None] - points).min() > 1e-6 * ends[-1]:
            clear += 1
            expected = np.searchsorted(ends, points, side="right")
            assert sorted(found.token_ids[row, j:].tolist()) == expected.tolist()
    assert clear > rows / 2


def duels(inclusion: Sequence[float]) -> dict[frozenset[int], float]:
    """The probabilities of the sets that ordered pivotal sampling draws, from inclusion probabilities in order.

    The first id, with p, meets the next, with q: with p + q < 1 one of them gets p + q and the other 0, else one gets 1
    and the other p + q - 1, each so that its mean stays. The one with neither 0 nor 1 meets the next id.
    """
    chances = {(frozenset[int](), 0): 1.0}  # of the sampled ids and the one that goes on
    p = inclusion[0]
    for rival, q in enumerate(inclusion[1:], 1):
        both = p + q
        after: dict[tuple[frozenset[int], int], float] = defaultdict(float)
        for (sampled, id_), chance in chances.items():
            if both < 1 - 1e-9:
                after[sampled, id_] += chance * p / both
                after[sampled, rival] += chance * q / both
            else:
                wins = (1 - q) / (2 - both)
                after[sampled | {id_}, rival] += chance * wins
                after[sampled | {rival}, id_] += chance * (1 - wins)
        chances, p = after, both if both < 1 - 1e-9 else both - 1
    found: dict[frozenset[int], float] = defaultdict(float)
    for (sampled, id_), chance in chances.items():
        found[sampled | {id_} if p > 0.5 else sampled] += chance
    return found
