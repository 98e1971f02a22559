"""What a student is trained towards: the choices of the loss as frozen data, checked, no torch.

The equations are in `student.loss.distillation`, `student.loss.teacher_targets` and `student.loss.divergences`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storage.errors import InputError

LossName = Literal["forward-kl", "reverse-kl", "jsd", "skew-forward-kl", "skew-reverse-kl"]
Tail = Literal["auto", "bucket", "sampled", "blend", "renormalise", "none"]

EXACT_TEMPERATURES = (1.0, 2.0)
DEFAULT_MIX = {"jsd": 0.5, "skew-forward-kl": 0.1, "skew-reverse-kl": 0.1}
DEFAULT_BLEND = 0.75

# Why a tail serves forward KL alone.
_LINEAR_ONLY = {
    "sampled": "sampled targets are unbiased only where the loss is linear in the teacher's probabilities",
    "blend": "sampled targets are unbiased only where the loss is linear in the teacher's probabilities",
    "renormalise": "a student renormalised to the stored ids is compared with nothing outside them",
    "none": "a head without its tail is no distribution to diverge from",
}

_Share = Annotated[float, Field(gt=0, lt=1)]


class Objective(BaseModel):
    """``alpha * CE + (1 - alpha) * tau**2 * loss(teacher, student)``.

    loss               which divergence between teacher and student
    mix                beta of jsd [0.5], lambda of the skewed divergences [0.1]; between 0 and 1
    tail               what stands for the ids that are not stored. bucket: one outcome, a lower bound of the dense
                       loss. sampled: the drawn ids of a VarOpt entry, unbiased. blend: both. renormalise, none:
                       the stored ids alone, biased. auto: sampled where ids were drawn and the loss is forward-kl,
                       bucket elsewhere
    blend              share of `sampled` in tail = blend [0.75]
    alpha, alpha_end   share of the cross-entropy; with `alpha_end`, linear from `alpha` at the first step to it at
                       the last
    temperature        tau; 1 and 2 are exact, others above 1 need `interpolate_tail`
    interpolate_tail   take the mass of the tail at other temperatures from an interpolation, within stated bounds
    loss_scale         token: both terms are means over the trained positions. babyllama: the divergence is summed
                       over a window's positions, the cross-entropy is a mean over all of them but the last
    min_entropy        nats; the divergence is taken only where the teacher's entropy is at least this
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    loss: LossName = "forward-kl"
    mix: _Share | None = None
    tail: Tail = "auto"
    blend: _Share | None = None
    alpha: Annotated[float, Field(ge=0, le=1)]
    alpha_end: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: float = 1.0
    interpolate_tail: bool = False
    loss_scale: Literal["token", "babyllama"] = "token"
    min_entropy: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Objective:
        if self.mix is not None and self.loss not in DEFAULT_MIX:
            raise ValueError(f"mix belongs to {', '.join(DEFAULT_MIX)}; the loss is {self.loss}")
        if self.blend is not None and self.tail != "blend":
            raise ValueError(f"a share of sampled targets (blend) needs tail blend; the tail is {self.tail}")
        if self.loss != "forward-kl" and self.tail in _LINEAR_ONLY:
            raise ValueError(
                f"tail {self.tail} goes with forward-kl only: {_LINEAR_ONLY[self.tail]}; take tail bucket for "
                f"{self.loss}"
            )
        check_temperature(self.temperature, self.interpolate_tail)
        return self

    @property
    def mixing(self) -> float:
        """beta or lambda of the divergence, its default filled in; 0 for the plain ones."""
        return DEFAULT_MIX.get(self.loss, 0.0) if self.mix is None else self.mix

    @property
    def blending(self) -> float:
        """The share of sampled targets under tail = blend, its default filled in."""
        return DEFAULT_BLEND if self.blend is None else self.blend

    @property
    def uses_teachers(self) -> bool:
        """Whether the divergence has a share in any step."""
        return self.alpha < 1 or (self.alpha_end is not None and self.alpha_end < 1)

    @property
    def log_name(self) -> str:
        """What the divergence is called in logs, before a teacher's name."""
        return "kl" if self.loss == "forward-kl" else self.loss.replace("-", "_")

    def alpha_at(self, progress: float) -> float:
        """alpha at a point of the run: 0 at its first step, 1 at its last."""
        if self.alpha_end is None:
            return self.alpha
        return (1.0 - progress) * self.alpha + progress * self.alpha_end


def objective_of(**fields: Any) -> Objective:
    """An Objective; what is wrong with its fields comes as an InputError of one line."""
    try:
        return Objective(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{name}: {message} (found {first['input']!r})" if name else message) from None


def check_temperature(temperature: float, interpolate_tail: bool) -> None:
    """Raise InputError for a temperature that the stored tails cannot serve."""
    if temperature in EXACT_TEMPERATURES or (temperature > 1 and interpolate_tail):
        return
    if temperature > 1:
        raise InputError(
            f"temperature {temperature:g}: the stored tails are exact only at 1 and 2; take one of them, or "
            "--interpolate-tail for an interpolated tail with its error stated"
        )
    raise InputError(
        f"temperature {temperature:g}: the stored tails are exact only at 1 and 2 and cannot be bounded below 1; "
        "take 1 or more"
    )
