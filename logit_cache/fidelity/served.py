"""A teacher behind a server as the live teacher of an audit: the values of stored ids, of its likeliest ids alone.

Legend: `R` positions of a window, `K` ids per row. The `Values` are those of `logit_cache.fidelity.rescore`, without
what a server does not tell. A stored id that is not among the K likeliest now has at most the log-prob of the last of
these, which it is given: where the two differ little it was a near tie, and a wrong id is off by what it lacks to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from logit_cache.caching.score_shard import prompt_of
from logit_cache.fidelity.rescore import comparable, first_column
from logit_cache.fidelity.sampled_ids import Values
from logit_cache.fidelity.samples import Sample
from storage.format.manifest.entry import TeacherEntry
from teachers.served.protocols import Prompt, ServedRows
from teachers.served.teacher import ServedTeacher, log_mass_outside


def served_values(
    teacher: ServedTeacher,
    entry: TeacherEntry,
    samples: Sequence[Sample],
    progress: Callable[[int], None] | None = None,
) -> list[Values]:
    """The values of each sample as the servers give them now, asked for in the order of the samples."""

    def prompts() -> Iterator[tuple[Prompt, int]]:
        for number, sample in enumerate(samples):
            scored = np.arange(sample.window.first, sample.window.last)
            tokens = np.append(sample.tokens, max(0, int(sample.labels[-1])))
            yield prompt_of(sample.window, tokens, scored, entry.windowing.begin_id), number

    found: dict[int, Values] = {}
    for answer in teacher.rows(prompts()):
        if answer is None:
            continue
        number, rows = answer
        found[number] = comparable(entry, _row_values(samples[number], rows))
        if progress is not None:
            progress(1)
    return [found[number] for number in range(len(samples))]


def _row_values(sample: Sample, rows: ServedRows) -> Values:
    stored = sample.stored
    certain = stored.is_certain
    ids = np.where(certain, stored.token_ids.astype(np.int64), -1)
    best = rows.logprobs[:, : ids.shape[1]]
    at_ids = np.where(certain, _logprobs_of(ids, rows), np.nan)
    unknown = np.full(len(stored), np.nan)
    return {
        "logprobs": at_ids,
        "sampled_logprobs": np.full_like(at_ids, np.nan),
        "token_ids": np.where(certain, best - at_ids, np.nan),
        "top_logprob": first_column(at_ids),
        "log_tail": log_mass_outside(np.where(certain, at_ids, -np.inf)),
        "log_tail_half": unknown,
        "label_logprob": np.where(sample.labels >= 0, rows.label_logprob, np.nan),
        "entropy": unknown,
        "sampled": unknown,
        "spread": rows.logprobs[:, 0] - rows.logprobs[:, -1],
    }


def _logprobs_of(ids: NDArray[np.int64], rows: ServedRows) -> NDArray[np.float64]:
    """The rows' log-probs [R, K] of ids [R, K]; of one that they lack, their least."""
    found = np.broadcast_to(rows.logprobs[:, -1:], ids.shape).copy()
    # One number for each id of each row, so that memory does not grow with K^2.
    row = np.arange(len(ids))[:, None] << 32
    theirs, ours = (rows.token_ids + row).ravel(), ids + row
    order = np.argsort(theirs)
    at = np.minimum(np.searchsorted(theirs, ours, sorter=order), len(theirs) - 1)
    here = (theirs[order][at] == ours) & (ids >= 0)
    found[here] = rows.logprobs.ravel()[order][at][here]
    return found
