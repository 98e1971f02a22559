"""Whether stored values are those of a live teacher, given what the encoding and the teacher's own noise explain.

Legend: a *sample* is one window (`logit_cache.fidelity.rescore`); values are float64 nats, NaN where there is nothing
to compare.

The encoding's stated error is subtracted from the difference of a stored and a live value. The remainder is compared
with the noise: how far the live teacher is from itself when it runs in other ways, at least `LEAST_NOISE` of the range
of a row's log-probs, which is the effect of another order of float32 sums. A window differs in a field when

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

from logit_cache.fidelity.rescore import FIELDS, Sample
from logit_cache.fidelity.sampled_ids import Values
from storage.format.manifest import TeacherEntry

MEAN_FACTOR = 3.0
LARGEST_FACTOR = 8.0
LEAST_NOISE = 2.0**-16
# Standard errors by which the sampled ids may be off in the mean: an honest sample exceeds them once in 10**9 audits.
MOST_STANDARD_ERRORS = 6.0
_LEAST_ROWS = 64

Arrays = list[NDArray[np.float64]]


@dataclass(frozen=True)
class FieldReport:
    """One field over all windows; differences in nats, `beyond` the error that the encoding states.

    within          share of the values whose difference is explained by the encoding alone
    encoding_error  the largest of its stated errors
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
            stated.append(encoding_error(entry, name, here))
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


def encoding_error(entry: TeacherEntry, name: str, stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error that the encoding states, nats; for derived entries with the error that `recompress` adds."""
    if name == "token_ids":
        return np.zeros_like(stored)
    if entry.format_version == 2:
        return np.full_like(stored, _stated_error(entry, name)) + _mass_error(entry, name, stored)
    derived = entry.derived_from is not None
    step = entry.encoding.step_nats or 0.0
    if name in ("logprobs", "sampled_logprobs") and step:
        return np.full_like(stored, step if derived else step / 2)
    bits = entry.encoding.mantissa_bits
    assert bits is not None
    error: NDArray[np.float64] = np.abs(stored) * 2.0 ** -(bits + (0 if derived else 1))
    if derived and name in ("log_tail", "log_tail_half"):
        error += step
    return error


def _stated_error(entry: TeacherEntry, name: str) -> float:
    """The error of a field in version 2; it is 0 with log-probs as float32, all of whose steps are 0.

    Log-probs less the first one, and the log-odds of the mass, are whole steps rounded to nearest: half a step. Sampled
    log-probs are rounded up or down, by less than their step. In a recompressed entry log-probs are off by a step, as
    in version 1; the odds count the masses of ids that were cut off, each a step off its neighbours, and round again.
    """
    encoding, derived = entry.encoding, entry.made == "recompressed"
    step, value_step = encoding.step_nats or 0.0, encoding.value_step_nats or 0.0
    if name == "sampled_logprobs":
        return (2 if derived else 1) * (encoding.sampled_step_nats or 0.0)
    if name == "logprobs":
        return step if derived else step / 2
    if name == "log_tail":
        return 2 * step if derived else step / 2
    if not derived:
        return value_step / 2
    return value_step + (step if name == "log_tail_half" else 0.0)


def _mass_error(entry: TeacherEntry, name: str, stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a server's float32 sums add to the error of the log of the mass outside the ids: little, if that is large.

    stored: log-odds of that mass with codes, its log without them.
    """
    served = entry.teacher.served
    if served is None or name != "log_tail":
        return np.zeros_like(stored)
    log_mass = stored if entry.encoding.step_nats is None else stored - np.logaddexp(0.0, stored)
    error: NDArray[np.float64] = np.log1p(served.mass_error * np.exp(-log_mass))
    return error


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
