"""The errors that an entry's record states of its values, in nats: of its encoding, its source's numbers, its masses.

`Values` are those of `logit_cache.fidelity.rescore`, by name. A source is a file that an entry was imported from, or a
server: log-probs that its format rounds are within `error_nats`, e, of the teacher's; renormalised, within 2 e. Where a
mass was not summed but is one less the sum of a row's probabilities, it is off by what that sum is off.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from storage.format.encoding import FLOAT32_MASS_ERROR, ROUNDING_NATS
from storage.format.manifest.entry import TeacherEntry


def stated_error(entry: TeacherEntry, name: str, stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """The error of each stored value; for derived entries with the error that `recompress` adds."""
    return _encoding_error(entry, name, stored) + _source_error(entry, name, stored) + _mass_error(entry, name, stored)


def mass_error(entry: TeacherEntry) -> float:
    """By how much the mass outside a row's ids is off at most, where it is one less their sum; 0 where it was summed.

    A smaller mass is not told from this one.
    """
    served, source = entry.teacher.served, entry.imported_from
    if served is not None:
        return served.mass_error
    if source is None or source.values not in ("logprobs", "probabilities"):
        return 0.0
    return FLOAT32_MASS_ERROR + math.expm1(source.error_nats or 0.0)


def decoded_error(entry: TeacherEntry) -> float:
    """Of the log-prob of a certain id, and of the mass outside these, as they are read: their codes, and the row's sum.

    With float32 log-probs, what rounding adds.
    """
    step = entry.encoding.step_nats or 0.0
    if entry.format_version == 2:
        mass = _step_error(entry, "log_tail") if entry.targets.has("tail") else 0.0
        return ROUNDING_NATS + 2 * _step_error(entry, "logprobs") + mass
    assert entry.encoding.mantissa_bits is not None
    # The best of V log-probs is at least -log V.
    first = math.log(entry.vocabulary_size) * 2.0**-entry.encoding.mantissa_bits
    return ROUNDING_NATS + first + (step if entry.derived_from is not None else step / 2)


def _encoding_error(entry: TeacherEntry, name: str, stored: NDArray[np.float64]) -> NDArray[np.float64]:
    if name == "token_ids":
        return np.zeros_like(stored)
    if entry.format_version == 2:
        return np.full_like(stored, _step_error(entry, name))
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


def _step_error(entry: TeacherEntry, name: str) -> float:
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


def _source_error(entry: TeacherEntry, name: str, stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the rounding of log-probs in a file adds; with d = 2 e, by ``sum |p' log p' - p log p| <= d exp(d) (1 + H)``
    to an entropy H."""
    source = entry.imported_from
    error = 0.0 if source is None else 2 * (source.error_nats or 0.0)
    if name != "entropy":
        return np.full_like(stored, error)
    return error * math.exp(error) * (1 + stored)


def _mass_error(entry: TeacherEntry, name: str, stored: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the error of the mass outside the ids adds to its log: little, if the mass is large.

    stored: log-odds of that mass with codes, its log without them.
    """
    mass = mass_error(entry)
    if not mass or name != "log_tail":
        return np.zeros_like(stored)
    with np.errstate(invalid="ignore"):  # NaN, in rows without targets
        log_mass = stored if entry.encoding.step_nats is None else stored - np.logaddexp(0.0, stored)
        error: NDArray[np.float64] = np.log1p(mass * np.exp(-log_mass))
    return error
