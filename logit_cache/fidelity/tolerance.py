"""Whether stored values are those of a live teacher, given what the encoding and the teacher's own noise explain.

Legend: a *sample* is one window (`logit_cache.fidelity.samples`); values are float64 nats, NaN where there is nothing
to compare.

The error that the entry states is subtracted from the difference of a stored and a live value. The remainder is
compared with the noise: how far the live teacher is from itself when it runs in other ways, at least `LEAST_NOISE` of
the range of a row's log-probs, which is the effect of another order of float32 sums. A window differs in a field when

its mean is over 3 times the mean noise of that field, in this window or in all, whichever is larger, or
one of its values is over 8 times the largest noise

Means detect small differences that are everywhere, and are insensitive to the few large ones that half precision or
a router of experts makes; the second rule detects a single wrong value where noise has no such tail.
docs/decisions/0007 has the measurements on both sides of these limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logit_cache.fidelity.rescore import FIELDS
from logit_cache.fidelity.sampled_ids import Values
from logit_cache.fidelity.samples import Sample
from logit_cache.fidelity.stated_errors import stated_error
from storage.format.manifest.entry import TeacherEntry

MEAN_FACTOR = 3.0
LARGEST_FACTOR = 8.0
LEAST_NOISE = 2.0**-16
# Standard errors by which the sampled ids may be off in the mean: an honest sample exceeds them once in 10**9 audits.
MOST_STANDARD_ERRORS = 6.0
_LEAST_ROWS = 64

Arrays = list[NDArray[np.float64]]


@dataclass(frozen=True)
class FieldReport:
    """One field over all windows; differences in nats, `beyond` the error that the entry states.

    within          share of the values whose difference is explained by that error alone
    encoding_error  the largest stated error
    position        of the largest difference
    worst_mean      mean beyond the encoding in the window that comes closest to its limit, or exceeds it most
    limit_mean      the limit of that window; limit_largest that of every value
    """

    values: int
    within: float
    encoding_error: float
    mean_beyond: float
    largest_beyond: float
    position: int
    worst_mean: float
    limit_mean: float
    limit_largest: float
    noise_mean: float
    noise_largest: float
    windows_differing: int


def compare(
    entry: TeacherEntry, samples: list[Sample], stored: list[Values], live: list[Values], controls: list[list[Values]]
) -> tuple[dict[str, FieldReport], list[int]]:
    """The report of each field that has values, and the numbers of the samples that differ in any of them.

    live: of the teacher run as the entry records; controls: of the same teacher run in other ways.
    """
    fields: dict[str, FieldReport] = {}
    differing: set[int] = set()
    for name in FIELDS:
        stated, beyond, noise = [], [], []
        for number in range(len(samples)):
            here, now = stored[number][name], live[number][name]
            stated.append(stated_error(entry, name, here))
            beyond.append(np.maximum(np.abs(here - now) - stated[-1], 0.0))
            least = LEAST_NOISE * (1 + live[number]["spread"]).reshape(-1, *[1] * (now.ndim - 1))
            runs = [np.abs(now - control[number][name]) for control in controls]
            # maximum propagates NaN: noise counts where there is a value to compare.
            noise.append(np.maximum.reduce([np.broadcast_to(least, now.shape), *runs, 0 * beyond[-1]]))
        if len(_numbers(beyond)):
            fields[name], windows = _report(samples, stated, beyond, noise)
            differing |= windows
    return fields, sorted(differing)


def _report(samples: list[Sample], stated: Arrays, beyond: Arrays, noise: Arrays) -> tuple[FieldReport, set[int]]:
    all_beyond, all_noise = _numbers(beyond), _numbers(noise)
    noise_mean, noise_largest = float(all_noise.mean()), float(all_noise.max())
    limit_largest = LARGEST_FACTOR * noise_largest
    means: dict[int, tuple[float, float]] = {}
    peaks: dict[int, float] = {}
    for number in range(len(samples)):
        values = _numbers([beyond[number]])
        if len(values):
            limit = MEAN_FACTOR * max(noise_mean, float(_numbers([noise[number]]).mean()))
            means[number] = float(values.mean()), limit
            peaks[number] = float(values.max())
    differing = {n for n, (mean, limit) in means.items() if mean > limit or peaks[n] > limit_largest}
    worst = max(means, key=lambda n: means[n][0] / means[n][1])
    peak = max(peaks, key=lambda n: peaks[n])
    row = np.argwhere(beyond[peak] == peaks[peak])[0, 0]
    report = FieldReport(
        values=len(all_beyond),
        within=float((all_beyond == 0).mean()),
        encoding_error=float(_numbers(stated).max()),
        mean_beyond=float(all_beyond.mean()),
        largest_beyond=peaks[peak],
        position=samples[peak].window.first + int(row),
        worst_mean=means[worst][0],
        limit_mean=means[worst][1],
        limit_largest=limit_largest,
        noise_mean=noise_mean,
        noise_largest=noise_largest,
        windows_differing=len(differing),
    )
    return report, differing


def biased_sample(live: list[Values]) -> str | None:
    """The defect of the sampled ids, or None: sampled by p, their mean log-prob has a known expectation.

    Which ids were sampled depends on the last bits of cumulative sums. That they are a sample at all, and not the
    likeliest ids under that name, shows in the mean over all rows.
    """
    off = _numbers([values["sampled"] for values in live])
    if len(off) < _LEAST_ROWS:
        return None
    mean, error = float(off.mean()), float(off.std(ddof=1)) / len(off) ** 0.5
    if abs(mean) <= MOST_STANDARD_ERRORS * error + LEAST_NOISE:
        return None
    return (
        f"the sampled ids are no sample of the teacher's tail: their mean log-prob is {mean:+.3g} nats from what it is "
        f"expected to be, at a standard error of {error:.2g} in {len(off)} positions"
    )


def _numbers(parts: Arrays) -> NDArray[np.float64]:
    flat: NDArray[np.float64] = np.concatenate([part.ravel() for part in parts])
    return flat[~np.isnan(flat)]
