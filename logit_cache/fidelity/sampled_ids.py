"""Sampled ids without log-probs, drawn again: how many come again, and how many should.

Legend: `r` rows of a tile, `R` positions of a window, `V` vocabulary size, `K` stored ids per position.

They hold no number to compare with the live teacher's, and which ids they are is a convention of the reducer, as the
plan of the windows is one: only the reducer itself draws the same ids again. So this is the one place where an audit
runs code that entries are made with. A mistake in it is found in another way, by `tolerance.biased_sample`.

A share `again` of them is sampled by the live teacher too; `teacher` is the same share between two of its own runs, and
`chance` that of two independent samples. Near ties move the points of a systematic sample: mostly from one id to its
neighbour, and where one id more becomes certain all points of a row. `teacher` is at most the share that comes again
from logits rounded to 2**-15 nats: at least so much differs from device to device in float32. With 1 - again the
missing share, and noise that of the teacher, an entry, and a window, differs if more is missing than

    min(3 noise + max(1 %, two rows' worth) (1 - chance), halfway between noise and 1 - chance)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.format.encoding import logprob_floor
from storage.format.manifest.entry import TeacherEntry
from teachers.reduction.reduce import reduce_rows
from teachers.reduction.varopt import sampling_of

NOISE_FACTOR = 3.0
# The share of the rows that may be drawn otherwise without any noise, and the rows of a window.
LEAST_MOVED = 0.01
LEAST_ROWS_MOVED = 2
_ROUNDED = 2.0**-15

Values = dict[str, NDArray[np.float64]]


def draws_again(entry: TeacherEntry) -> bool:
    """Whether sampled ids have to be drawn again, since no log-probs of them are stored, and can be.

    Ids that were sampled from a stored sample cannot: its random numbers were used on rounded masses.
    """
    targets = entry.targets
    return targets.method == "varopt" and not targets.has("sampled-logprobs") and not targets.shrunk_from


def drawn_again(entry: TeacherEntry, logits: Tensor, random: Tensor, order: Tensor | None) -> dict[str, Tensor]:
    """`sampled_ids` and `rounded_ids` [r, K], `chance` [r] of rows of logits [r, V].

    random: the rows' random numbers, as `teachers.reduction.varopt.Sampling` has them; order: int64 [V], the entry's
    sampling order, or None.

    Inclusion probabilities are m a_i / R, so two independent samples of m ids share sum (m a_i / R)**2 of them on
    average.
    """
    targets, logits = entry.targets, logits.float()
    sampling = sampling_of(targets, random, order)
    none = torch.full((len(logits),), -1, device=logits.device)
    floor = logprob_floor(entry.encoding.step_nats or 1.0)

    def drawn(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits if order is None else logits[:, order]
        reduced = reduce_rows(logits, entry.vocabulary_size, targets.k, none, floor, sampling, None)
        columns = torch.arange(targets.k, device=logits.device)
        certain, kept = columns < reduced.certain[:, None], columns < reduced.kept[:, None]
        return reduced.token_ids, certain, reduced.token_ids.double().masked_fill(certain | ~kept, torch.nan)

    _, _, rounded = drawn((logits / _ROUNDED).round() * _ROUNDED)
    ids, is_certain, sampled = drawn(logits)
    number = sampled.isfinite().sum(1)
    scaled = logits.double() / targets.temperature
    ids = ids.masked_fill(~is_certain, 0)  # any: nothing is added to it
    outside = scaled.scatter_add(1, ids, torch.zeros_like(sampled).masked_fill(is_certain, -torch.inf))
    inclusion = (number[:, None] * outside.softmax(1)).clamp_max(1.0)
    # 0 / 0 where no id is sampled.
    chance = (inclusion * inclusion).sum(1) / number
    return {"sampled_ids": sampled, "rounded_ids": rounded, "chance": chance}


@dataclass(frozen=True)
class DrawnAgain:
    """Sampled ids, and how many of them come again when they are drawn again: shares of all `ids`; see the module.

    windows_differing counts windows; `differs` is the verdict on all of them together.
    """

    ids: int
    again: float
    teacher: float
    chance: float
    limit: float
    windows_differing: int

    @property
    def differs(self) -> bool:
        return self.again < self.limit


def compare_drawn(
    stored: list[Values], live: list[Values], controls: list[list[Values]]
) -> tuple[DrawnAgain | None, list[int]]:
    """The share of sampled ids that come again, and the numbers of the samples in which too few do; None without any.

    stored, live, controls: `rescore.Values` of the samples, live of the teacher run as the entry records, controls of
    the same teacher run in other ways.
    """
    rows, total, missing, noise, unrelated = (np.zeros(len(stored)) for _ in range(5))
    for number, (values, now) in enumerate(zip(stored, live, strict=True)):
        if "sampled_ids" not in values:
            return None, []
        # Rows without targets hold neither certain nor sampled ids.
        there = ~np.isnan(np.hstack([values["token_ids"], values["sampled_ids"]])).all(axis=1)
        own = now["sampled_ids"][there]
        others = [now["rounded_ids"], *(control[number]["sampled_ids"] for control in controls)]
        per_row, gone = _missing(own, values["sampled_ids"][there])
        rows[number], total[number], missing[number] = np.count_nonzero(per_row), per_row.sum(), gone
        noise[number] = max(_missing(own, other[there])[1] for other in others)
        # NaN where the teacher samples no id.
        unrelated[number] = total[number] - np.nansum(now["chance"][there] * np.count_nonzero(~np.isnan(own), axis=1))
    if not total.any():
        return None, []
    noise_mean = float(noise.sum() / total.sum())
    differing = []
    for number in np.flatnonzero(total).tolist():
        at_most = _most_missing(
            max(noise_mean, noise[number] / total[number]), unrelated[number] / total[number], rows[number]
        )
        if missing[number] / total[number] > at_most:
            differing.append(number)
    unrelated_mean = float(unrelated.sum() / total.sum())
    found = DrawnAgain(
        ids=int(total.sum()),
        again=1 - float(missing.sum() / total.sum()),
        teacher=1 - noise_mean,
        chance=1 - unrelated_mean,
        limit=1 - _most_missing(noise_mean, unrelated_mean, rows.sum()),
        windows_differing=len(differing),
    )
    return found, differing


def _most_missing(noise: float, unrelated: float, rows: float) -> float:
    """The largest share of sampled ids that may be missing; noise, unrelated: the shares that the teacher's own runs,
    and independent samples, miss."""
    moved = max(LEAST_MOVED, LEAST_ROWS_MOVED / rows) * unrelated
    return min(NOISE_FACTOR * noise + moved, (noise + unrelated) / 2)


def _missing(ids: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[NDArray[np.int64], int]:
    """Of two samples [R, K]: the ids of each row [R], of the one that has more, and how many the other lacks in all."""
    per_row: NDArray[np.int64] = np.maximum(*(np.count_nonzero(~np.isnan(each), axis=1) for each in (ids, others)))
    return per_row, int(per_row.sum()) - int(np.isin(_keys(ids), _keys(others)).sum())


def _keys(ids: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers that tell row and id, of the sampled ids [R, K]."""
    keys = np.arange(len(ids))[:, None] * 2.0**32 + ids
    return keys[~np.isnan(keys)]
