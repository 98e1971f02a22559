"""The distances of stored targets from the full distributions that they stand for: sums over positions, in float64.

Legend: `r` positions of one tile, `N` all of them, `V` vocabulary, `K` stored ids per position, `S` the kept ids of a
position, `p` its full distribution, `p_t = sum_{j not in S} p_j` (reduced over the complement), `q` a student's.

Stored values are read as a student reads them: as in `student.loss.teacher_targets`, from which this must not differ.
With l_i the decoded log-probs, m = exp(log_tail) the stored mass outside the certain ids, and m' = m less the sampled
ids' sum (top-k: m' = m), each treatment of the tail is a set of weights w_i on S and w_t on everything else together::

    bucket        w_i = exp(l_i) / Z, w_t = m' / Z               Z = sum_S exp(l_i) + m'
    renormalise   w_i = exp(l_i) / sum_S exp(l_i), w_t = 0
    none          w_i as the bucket's, w_t = 0                    sums to less than 1
    sampled       w_i = exp(l_i) / Z' where i is certain, (m / Z') / number where it is sampled; w_t = 0, or m / Z'
                  where no id is sampled                         Z' = sum_certain exp(l_i) + m

As a distribution s over V ids, w_t is spread over the ids outside S: evenly, or for `bucket-unigram` in proportion to
the counts of the sampled windows' tokens plus one, as a student without other information would spread it.

Of sampled ids whose log-probs are not stored no l_i is known. A student that reads them has the treatment `sampled`
alone; of the bucket's weights, which the quantisation takes, they are then part of w_t. Where the mass outside is not
known, w_t is 0, and there is `renormalise` alone.

    quantisation    sum_i p_i log(p_i / w_i) + p_t log(p_t / w_t), with the bucket's weights, over the ids of known
                    log-prob; the first sum alone, of p renormalised on them, where w_t = 0
    forward         KL(p || s) = sum_j p_j log(p_j / s_j)         infinite where ids with p_j > 0 have no mass
    reverse         KL(s || p); for `renormalise` -log P(S), up to the quantisation
    mean_forward    KL(mean p || mean s), mean_reverse the other way round
    mean_noise      1/2 sum_j Var(mean w_j) / (mean p_j), with Var(w_j) = p_j m / number - p_j**2 outside the certain
                    ids: the second order of both, by which an unbiased sample of N positions misses 0. Ids that are
                    expected to be sampled less than once in all N positions make it too large
    gradients       by the logits: dense g = q - p, and with W = sum_S w_i + w_t (MATHS, section 2)
                        g'_i = q_i W - w_i on S,   g'_j = q_j (W - w_t / q_t) outside, q_t = sum_{j not in S} q_j
                    angle of positions: cos = sum_t <g_t, g'_t> / sqrt(sum_t |g_t|^2 sum_t |g'_t|^2)
                    angle of the mean: between mean_t g_t and mean_t g'_t, the gradient of an output bias
                    students: q uniform, and the tempered teacher q = softmax(z / 2)
    calibration     sum_b n_b / N * |correct_b / n_b - confidence_b / n_b| over 15 equal bins of the greatest w
    k needed        with p sorted and R_k = sum_{i > k} p_i, for every k at once by cumulative sums from the smallest:
                    residual R_k, and KL of the even bucket sum_{i > k} p_i log p_i - R_k log R_k + R_k log(V - k)

Precision: float64 throughout, since the quantisation of a 1/32 nat step is a KL of about 4e-5; complements are summed
and never subtracted from 1. A log-prob under -2000, as of a masked id, counts as -2000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.format.encoding import MIN_STEP_NATS, logprob_floor
from storage.format.fidelity import (
    Angle,
    Calibration,
    CurvePoint,
    Distribution,
    Divergences,
    NeededIds,
    Reference,
    Treatment,
)

BINS = 15
RESIDUALS = (0.1, 0.05, 0.02, 0.01)
FORWARDS = (0.1, 0.03, 0.01, 0.003)

_FLOOR = logprob_floor(MIN_STEP_NATS)
# Sums of float32 log-probs are off by this much.
_ROUNDING = 1e-6
_REFERENCES: tuple[Reference, ...] = get_args(Reference)


@dataclass(frozen=True)
class StoredRows:
    """Decoded targets of r positions: ids int64 [r, K], logprobs float64 [r, K] (-inf beyond the kept ones, NaN where
    they are not stored), kept and certain int64 [r], log_tail float64 [r] (-inf where it is not known)."""

    ids: Tensor
    logprobs: Tensor
    kept: Tensor
    certain: Tensor
    log_tail: Tensor

    def rows(self, rows: slice) -> StoredRows:
        """The rows of a slice."""
        return StoredRows(*(values[rows] for values in vars(self).values()))

    @staticmethod
    def together(parts: Sequence[StoredRows]) -> StoredRows:
        """The rows of all parts, in order."""
        return StoredRows(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class _Weights:
    """log w [r, K] (-inf beyond the kept ids), log w_t [r]."""

    log_heads: Tensor
    log_tail: Tensor

    @property
    def heads(self) -> Tensor:
        return self.log_heads.exp()

    @property
    def tail(self) -> Tensor:
        return self.log_tail.exp()


class Measures:
    """The sums; `add` tiles of positions, then call the methods of the figures.

    counts      float64 [V]: of each id in the sampled windows, plus one
    step_nats   of the entry's codes; 0 for float32 log-probs
    treatments  the treatments that the entry's targets allow
    """

    def __init__(self, counts: Tensor, step_nats: float, treatments: tuple[Treatment, ...]) -> None:
        self.positions = 0
        self.vocabulary_size = len(counts)
        self.treatments = treatments
        self._counts = counts
        self._step_nats = step_nats
        self._labels: list[NDArray[np.int64]] = []
        self._rows: dict[str, list[NDArray[Any]]] = {}
        self._vectors: dict[str, Tensor] = {}
        self._distributions: list[tuple[Distribution, Treatment]] = [(name, name) for name in treatments]
        if "bucket" in treatments:
            self._distributions.insert(1, ("bucket-unigram", "bucket"))

    def add(self, logits: Tensor, stored: StoredRows, labels: NDArray[np.int64]) -> None:
        """Add r positions: logits float64 [r, V], their stored rows, and the next tokens int64 [r], -1: none."""
        logp = torch.log_softmax(logits, dim=1).clamp_min(_FLOOR)
        p = logp.exp()
        tile = _Tile(logp, p, stored.ids, torch.arange(stored.ids.shape[1], device=p.device) < stored.kept[:, None])
        weights = _weights(stored, tile.is_kept, self.vocabulary_size, self._step_nats)
        self.positions += len(p)
        self._labels.append(labels)
        self._keep("residual", tile.outside)
        self._keep("kept", stored.kept)
        self._add("mean full", p.sum(0))
        self._add_quantisation(tile, stored, weights["bucket"])
        for name, treatment in self._distributions:
            self._add_distribution(tile, name, weights[treatment])
        if "sampled" in self.treatments:
            self._add_noise(tile, stored)
        confidence, guess = p.max(1)
        self._keep("confidence full", confidence)
        self._keep("guess full", guess)
        for name in self.treatments:
            greatest, column = weights[name].log_heads.max(1)
            self._keep(f"confidence {name}", greatest.exp())
            self._keep(f"guess {name}", stored.ids.gather(1, column[:, None])[:, 0])
        for reference in _REFERENCES:
            q = torch.full_like(p, 1 / p.shape[1]) if reference == "uniform" else torch.softmax(logits / 2, dim=1)
            self._add_gradients(tile, reference, q, weights)
        self._add_curve(p)

    def _add_quantisation(self, tile: _Tile, stored: StoredRows, bucket: _Weights) -> None:
        known = tile.is_kept & ~stored.logprobs.isnan()
        if not bool((known == tile.is_kept).all()):
            tile = _Tile(tile.logp, tile.p, stored.ids, known)
        alone = bucket.log_tail.isneginf()
        log_mass = tile.p_heads.sum(1).log().masked_fill(~alone, 0.0)
        logp = tile.logp_heads - log_mass[:, None]
        heads = tile.on_heads(logp.exp(), logp - bucket.log_heads)
        outside = tile.outside.masked_fill(alone, 0.0)
        self._keep("quantisation", heads + torch.where(outside > 0, outside * (outside.log() - bucket.log_tail), 0.0))

    def _add_distribution(self, tile: _Tile, name: Distribution, weights: _Weights) -> None:
        w, w_t, empty = weights.heads, weights.tail, weights.log_tail.isneginf()
        # The tail is spread like c_j over the ids outside S, whose sum C is exact: counts are whole numbers.
        c = self._counts if name == "bucket-unigram" else torch.ones_like(self._counts)
        log_c, c_heads = c.log(), c[tile.ids]
        outside = (c.sum() - tile.on_heads(c_heads, 1.0)).clamp_min(1.0)
        log_outside = outside.log()
        p_log_c = tile.p @ log_c - tile.on_heads(tile.p_heads, log_c[tile.ids])
        own = ((c * log_c).sum() - tile.on_heads(c_heads, log_c[tile.ids])) / outside - log_outside
        theirs = (tile.logp @ c - tile.on_heads(c_heads, tile.logp_heads)) / outside
        # Means: the tail's share on all ids first; on the kept ids it is replaced by their own weights.
        self._add(f"mean {name}", c * (w_t / outside).sum())
        changes = w - c_heads * (w_t / outside)[:, None]
        self._vectors[f"mean {name}"].index_add_(0, tile.ids.flatten(), (changes * tile.is_kept).flatten())
        log_w_t = weights.log_tail.masked_fill(empty, 0.0)
        forward = (tile.p * tile.logp).sum(1) - tile.on_heads(tile.p_heads, weights.log_heads)
        forward = forward - tile.outside * (log_w_t - log_outside) - p_log_c
        self._keep(f"forward {name}", forward.masked_fill(empty & (tile.outside > 0), torch.inf))
        reverse = tile.on_heads(w, weights.log_heads - tile.logp_heads) + w_t * (log_w_t + own - theirs)
        self._keep(f"reverse {name}", reverse)

    def _add_noise(self, tile: _Tile, stored: StoredRows) -> None:
        certain = tile.is_kept & (torch.arange(tile.ids.shape[1], device=tile.p.device) < stored.certain[:, None])
        number = stored.kept - stored.certain
        rest = tile.p.scatter_add(1, tile.ids, -tile.p_heads.masked_fill(~certain, 0.0))
        rest = rest.masked_fill((number == 0)[:, None], 0.0)
        share = rest.sum(1) / number.clamp_min(1)
        self._add("variance", share @ rest - (rest * rest).sum(0))

    def _add_gradients(self, tile: _Tile, reference: Reference, q: Tensor, weights: dict[Treatment, _Weights]) -> None:
        q_heads = q.gather(1, tile.ids).masked_fill(~tile.is_kept, 0.0)
        q_outside = q.scatter_add(1, tile.ids, -q_heads).sum(1)
        dense = (q - tile.p).flatten()
        self._add(f"dense {reference}", dense.view_as(q).sum(0))
        self._add(f"dense norm {reference}", dense @ dense)
        for name in self.treatments:
            w, w_t = weights[name].heads, weights[name].tail
            total = w.sum(1) + w_t
            factor = total - torch.where(q_outside > 0, w_t / q_outside, 0.0)
            sparse = q * factor[:, None]
            sparse.scatter_add_(1, tile.ids, (q_heads * (total - factor)[:, None] - w).masked_fill(~tile.is_kept, 0.0))
            flat = sparse.flatten()
            self._add(f"sparse {reference} {name}", sparse.sum(0))
            self._add(f"norm {reference} {name}", flat @ flat)
            self._add(f"product {reference} {name}", dense @ flat)

    def _add_curve(self, p: Tensor) -> None:
        # Column n - 1: the n smallest, which are left out at k = V - n.
        ascending = p.sort(dim=1).values[:, :-1]
        rest = ascending.cumsum(1)
        self._add("rest", rest.sum(0))
        number = torch.arange(1, p.shape[1], device=p.device, dtype=p.dtype)
        kl = torch.xlogy(ascending, ascending).cumsum_(1).sub_(torch.xlogy(rest, rest)).add_(rest * number.log())
        self._add("rest kl", kl.sum(0))

    def _keep(self, name: str, values: Tensor) -> None:
        self._rows.setdefault(name, []).append(values.cpu().numpy())

    def _add(self, name: str, values: Tensor) -> None:
        self._vectors[name] = self._vectors[name] + values if name in self._vectors else values.clone()

    def per_position(self, name: str) -> NDArray[np.float64]:
        """`residual`, `kept` or `quantisation` of every position, [N]."""
        return np.concatenate(self._rows[name]).astype(np.float64)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The next token of every position, -1 where there is none."""
        return np.concatenate(self._labels)

    def divergences(self) -> dict[Distribution, Divergences]:
        """The divergences of every distribution that the stored values can be read as."""
        found: dict[Distribution, Divergences] = {}
        full = self._vectors["mean full"] / self.positions
        for name, treatment in self._distributions:
            ways = {way: float(self.per_position(f"{way} {name}").mean()) for way in ("forward", "reverse")}
            stored = self._vectors[f"mean {name}"].clamp_min(0) / self.positions
            ways |= {"mean_forward": _kl(full, stored), "mean_reverse": _kl(stored, full)}
            lacks = treatment == "none" and bool(self.per_position("kept").min() < self.vocabulary_size)
            figures = {way: None if lacks else _finite(value) for way, value in ways.items()}
            noise = None
            if name == "sampled":
                share = torch.where(full > 0, self._vectors["variance"] / full, 0.0).sum()
                noise = tidy(max(0.0, float(share) / (2 * self.positions**2)))
            infinite: Any = "not a distribution" if lacks else "ids without mass" if None in figures.values() else None
            found[name] = Divergences(**figures, mean_noise=noise, infinite=infinite)
        return found

    def gradients(self) -> dict[Treatment, dict[Reference, Angle]]:
        """Angles to the dense gradient, by treatment and student."""
        return {
            name: {reference: self._angle(reference, name) for reference in _REFERENCES} for name in self.treatments
        }

    def _angle(self, reference: Reference, name: Treatment) -> Angle:
        sums, key = self._vectors, f"{reference} {name}"
        dense, sparse = sums[f"dense {reference}"], sums[f"sparse {key}"]
        return Angle(
            positions=_degrees(sums[f"product {key}"], sums[f"dense norm {reference}"], sums[f"norm {key}"]),
            mean=_degrees(dense @ sparse, dense @ dense, sparse @ sparse),
        )

    def calibration(self) -> Calibration | None:
        """The calibration of the full distribution and each treatment; None where no position has a next token."""
        labels = self.labels
        known = labels >= 0
        if not known.any():
            return None

        def error(confidence: str, guess: str) -> float:
            correct = np.concatenate(self._rows[f"guess {guess}"])[known] == labels[known]
            return calibration_error(self.per_position(f"confidence {confidence}")[known], correct)

        return Calibration(full=error("full", "full"), stored={name: error(name, name) for name in self.treatments})

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean residual mass and mean KL of the even bucket at k = 1 .. V, each [V]."""
        both = [(self._vectors[name].flip(0) / self.positions).cpu().numpy() for name in ("rest", "rest kl")]
        residual, kl = (np.append(values, 0.0).clip(min=0) for values in both)
        return residual, kl

    def needed(self) -> tuple[tuple[NeededIds, ...], tuple[NeededIds, ...], tuple[CurvePoint, ...]]:
        """The least k for each of `RESIDUALS` and `FORWARDS`, and points of the curve."""
        residual, kl = self.curve()
        size = self.vocabulary_size
        ks = [*(1 << power for power in range(size.bit_length()) if 1 << power < size), size]
        least = [
            tuple(NeededIds(at_most=bound, k=int(np.argmax(values <= bound)) + 1) for bound in bounds)
            for values, bounds in ((residual, RESIDUALS), (kl, FORWARDS))
        ]
        points = (
            CurvePoint(k=k, residual_mass=tidy(min(1.0, residual[k - 1])), forward=tidy(float(kl[k - 1]))) for k in ks
        )
        return least[0], least[1], tuple(points)


class _Tile:
    """r rows of full distributions with their stored ids [r, K], made safe to gather with (0 beyond the kept)."""

    def __init__(self, logp: Tensor, p: Tensor, ids: Tensor, is_kept: Tensor) -> None:
        self.logp, self.p, self.is_kept = logp, p, is_kept
        self.ids = ids.masked_fill(~is_kept, 0)
        self.logp_heads = logp.gather(1, self.ids)
        self.p_heads = p.gather(1, self.ids).masked_fill(~is_kept, 0.0)
        # p - p is exactly 0, so this is the sum of the others alone.
        self.outside = p.scatter_add(1, self.ids, -self.p_heads).sum(1)

    def on_heads(self, shares: Tensor, values: Tensor | float) -> Tensor:
        """sum over the kept ids of shares * values, [r]; infinities beyond them do not count."""
        return (shares * values).masked_fill(~self.is_kept, 0.0).sum(1)


def _weights(stored: StoredRows, is_kept: Tensor, vocabulary_size: int, step_nats: float) -> dict[Treatment, _Weights]:
    """Every treatment's weights on a tile; see the module."""
    columns = torch.arange(stored.ids.shape[1], device=stored.ids.device)
    certain = columns < stored.certain[:, None]
    heads = stored.logprobs.masked_fill(~certain, -torch.inf)
    sampled = is_kept & ~certain
    number = sampled.sum(1)
    logprobs = stored.logprobs.masked_fill(stored.logprobs.isnan(), -torch.inf)
    # The tail without the sampled ids; rounded separately, they may exceed it, and then the remainder is not known.
    log_sampled = torch.logsumexp(logprobs.masked_fill(certain, -torch.inf), 1)
    gap = log_sampled - stored.log_tail
    rounding = max(step_nats / 2, _ROUNDING)
    rest = stored.log_tail + torch.log(-torch.expm1(gap.clamp(max=-rounding)))
    rest = torch.where(log_sampled > -torch.inf, rest, stored.log_tail)
    rest = rest.masked_fill(stored.kept == vocabulary_size, -torch.inf)

    def together(scores: Tensor, tail: Tensor) -> Tensor:
        return torch.logsumexp(torch.cat([scores, tail[:, None]], dim=1), dim=1)

    nothing = torch.full_like(rest, -torch.inf)
    z = together(logprobs, rest)
    bucket = _Weights(logprobs - z[:, None], rest - z)
    z = together(heads, stored.log_tail)
    share = (stored.log_tail - z - number.clamp_min(1).log())[:, None]
    return {
        "bucket": bucket,
        "renormalise": _Weights(torch.log_softmax(logprobs, dim=1), nothing),
        "none": _Weights(bucket.log_heads, nothing),
        "sampled": _Weights(
            torch.where(sampled, share, heads - z[:, None]), (stored.log_tail - z).masked_fill(number > 0, -torch.inf)
        ),
    }


def calibration_error(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """The expected calibration error of predictions: confidence [n], and whether each is correct [n]."""
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, correct.astype(np.float64), BINS) - np.bincount(bins, confidence, BINS)
    return tidy(min(1.0, float(np.abs(gaps).sum()) / len(confidence)))


def tidy(value: float) -> float:
    """Round to 8 significant digits, so that sums that were added in another order are equal."""
    return float(f"{value:.8g}")


def _kl(a: Tensor, b: Tensor) -> float:
    """KL(a || b) of distributions [V]; infinite if a has mass where b has none."""
    if bool(((a > 0) & (b <= 0)).any()):
        return math.inf
    there = a > 0
    return float((a[there] * (a[there] / b[there]).log()).sum())


def _finite(value: float) -> float | None:
    # Rounding errors of float64 may leave a KL of 0 a little below it.
    return tidy(max(0.0, value)) if math.isfinite(value) else None


def _degrees(product: Tensor, one: Tensor, other: Tensor) -> float | None:
    lengths = math.sqrt(float(one)) * math.sqrt(float(other))
    if lengths == 0:
        return None
    return tidy(math.degrees(math.acos(min(1.0, max(-1.0, float(product) / lengths)))))
