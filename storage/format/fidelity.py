"""The fidelity report of a teacher entry: how far its stored targets are from the teacher's full distributions.

`teachers/<name>/fidelity.json`, an optional file of its own beside the entry: a sealed record that names the entry it
belongs to. It is measured on a sample when an entry has been completed and holds aggregate numbers only. No reader of
targets uses it. How each figure is computed: `logit_cache.fidelity.measure` and `logit_cache.fidelity.metrics`.

Version 1 is of entries of version 1 of the format, and has every treatment that their method allows. Version 2 has
those that a student can use: none where sampled ids of another temperature have no log-probs, `sampled` alone where
those of temperature 1 have none, `renormalise` alone where the mass outside the ids is not known.

Units: masses and calibration errors as fractions, divergences in nats, angles in degrees. A figure that is infinite or
not defined is null. Floats have 8 significant digits.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from storage.format.manifest.shared import ADDED, Count, Positive, Sha256
from storage.format.sealing import Record

FIDELITY_FILE = "fidelity.json"
MAX_FIDELITY_BYTES = 1 << 16

Treatment = Literal["bucket", "renormalise", "none", "sampled"]
Distribution = Literal["bucket", "bucket-unigram", "renormalise", "none", "sampled"]
Reference = Literal["uniform", "tempered"]

Mass = Annotated[float, Field(ge=0, le=1)]
Nats = Annotated[float, Field(ge=0, le=1e6)]
Degrees = Annotated[float, Field(ge=0, le=180)]
Bytes = Annotated[float, Field(ge=0, le=1 << 48)]


class Spread(Record):
    """Mean and quantiles of a mass over positions."""

    mean: Mass
    q05: Mass
    q25: Mass
    q50: Mass
    q75: Mass
    q95: Mass
    q99: Mass
    maximum: Mass


class Divergences(Record):
    """KL divergences between the full distributions p and the stored ones s.

    forward, reverse             mean over positions of KL(p || s), and of KL(s || p)
    mean_forward, mean_reverse   KL(mean p || mean s), and KL(mean s || mean p), of the means over positions
    mean_noise                   the value that sampling noise alone gives these two; for sampled ids
    infinite                     why a figure is null: ids without mass in the denominator, or s does not sum to 1
    """

    forward: Nats | None
    reverse: Nats | None
    mean_forward: Nats | None
    mean_reverse: Nats | None
    mean_noise: Nats | None = None
    infinite: Literal["ids without mass", "not a distribution"] | None = None


class Angle(Record):
    """Angle between the gradients of the stored and of the dense loss with respect to the logits: of all positions
    concatenated (noise and bias), and of the means over positions (bias). Null where a gradient is 0."""

    positions: Degrees | None
    mean: Degrees | None


class Calibration(Record):
    """Expected calibration error of the most probable id as a forecast of the next token, in 15 bins."""

    full: Mass
    stored: Annotated[dict[Treatment, Mass], Field(max_length=4)]


class Size(Record):
    """Storage cost of an entry: ``bytes_per_token`` of all arrays is ``overhead + share * mean_kept * bytes_per_id``.

    mean_kept: over the positions with targets, which are a `share` of all. bytes_per_target: of all arrays, per
    position with targets; None where all positions have some.
    """

    mean_kept: Annotated[float, Field(ge=1, le=1 << 16)]
    bytes_per_token: Bytes
    bytes_per_id: Bytes
    overhead_bytes_per_token: Bytes
    bytes_per_target: Bytes | None = ADDED


class NeededIds(Record):
    """The smallest k for which a mean over positions is at most `at_most`; k = V always reaches it.

    `bytes_per_token` is estimated: this entry's overhead and k times its bytes per id. That was 6 % low for a quarter
    of the ids and 9 % high for four times as many, so it is null further away, and where ids are sampled or pruned.
    """

    at_most: Annotated[float, Field(gt=0, le=1)]
    k: Positive
    bytes_per_token: Bytes | None = None


class CurvePoint(Record):
    """Means over positions if the k most probable ids were stored exactly, with the rest as an even bucket."""

    k: Positive
    residual_mass: Mass
    forward: Nats


class FidelityReport(Record):
    """`fidelity.json`; `record_sha256` is the digest of the entry's record."""

    format_version: Literal[1, 2] = 1
    kind: Literal["fidelity"] = "fidelity"
    record_sha256: Sha256
    positions: Positive
    windows: Positive
    labelled: Count
    residual_mass: Spread
    quantisation: Nats
    divergences: Annotated[dict[Distribution, Divergences], Field(max_length=5)]
    gradients: Annotated[dict[Treatment, dict[Reference, Angle]], Field(max_length=4)]
    calibration: Calibration | None
    size: Size
    k_for_residual_mass: Annotated[tuple[NeededIds, ...], Field(max_length=16)]
    k_for_forward: Annotated[tuple[NeededIds, ...], Field(max_length=16)]
    curve: Annotated[tuple[CurvePoint, ...], Field(max_length=40)]

    @model_validator(mode="after")
    def _is_whole(self) -> FidelityReport:
        treatments = set(self.gradients)
        if self.format_version == 1 and not {"bucket", "renormalise", "none"} <= treatments:
            raise ValueError("a treatment that every entry has is missing")
        if set(self.divergences) != treatments | ({"bucket-unigram"} if "bucket" in treatments else set()):
            raise ValueError("divergences and gradients are not of the same treatments")
        if any(set(angles) != {"uniform", "tempered"} for angles in self.gradients.values()):
            raise ValueError("gradients are not of both students")
        if self.calibration is not None and set(self.calibration.stored) != treatments:
            raise ValueError("calibration and gradients are not of the same treatments")
        return self
