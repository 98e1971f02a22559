"""The training objective of a student: the options of the loss as frozen, validated data; imports no torch.

The equations are in `student.loss.distillation`, `student.loss.teacher_targets`, `student.loss.divergences` and
`student.loss.on_policy`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from storage.config import Settings, explained
from storage.errors import InputError

DivergenceName = Literal["forward-kl", "reverse-kl", "jsd", "skew-forward-kl", "skew-reverse-kl"]
LossName = Literal[DivergenceName, "tail-aware-kl", "lightning-opd"]
LIGHTNING_OPD: Final = "lightning-opd"
Tail = Literal["auto", "bucket", "sampled", "controlled", "blend", "renormalise", "none"]

EXACT_TEMPERATURES = (1.0, 2.0)
# In names of figures: the cross-entropy to a teacher whose entropy, by which it exceeds the KL, is not stored.
TEACHER_CROSS_ENTROPY = "teacher_ce"
DEFAULT_MIX = {"jsd": 0.5, "skew-forward-kl": 0.1, "skew-reverse-kl": 0.1}
DEFAULT_BLEND = 0.75
# The best of those that Dasgupta, Cohn and Baldwin (2026, arXiv:2602.20816) tried.
DEFAULT_HEAD_IDS = 10
DEFAULT_TAIL_WEIGHT = 2.0

SCHEDULED = ("alpha", "temperature", "mix")
"""The fields that may change during a run, each to the value of the field of its name with `_end`."""

SAMPLED_TAILS = ("sampled", "controlled", "blend")
"""The treatments of the tail that need sampled ids."""

# The reasons why these tails work with forward KL alone.
_SAMPLED = "sampled targets are unbiased only where the loss is linear in the teacher's probabilities"
_LINEAR_ONLY = {
    "sampled": _SAMPLED,
    "controlled": _SAMPLED,
    "blend": _SAMPLED,
    "renormalise": "a student renormalised to the stored ids is not compared outside them",
    "none": "the stored ids without their tail are no distribution to diverge from",
}

_Share = Annotated[float, Field(gt=0, lt=1)]


class Objective(Settings):
    """``alpha * CE + (1 - alpha) * tau**2 * loss(teacher, student)``.

    loss               the divergence between teacher and student; or lightning-opd, of the student's own samples
                       (`student.loss.on_policy`), which leaves nothing else of this open
    mix, mix_end       beta of jsd [0.5], lambda of the skewed divergences [0.1]; between 0 and 1
    head_ids           of tail-aware-kl: a position's likeliest ids, so many, are its head, the others its tail [10]
    tail_weight        of tail-aware-kl: beta, the weight of the tail, over the mean of its mass in a sequence [2]
    tail               treatment of the ids that are not stored. bucket: one outcome, a lower bound of the dense loss.
                       sampled: the sampled ids of a VarOpt entry, unbiased. controlled: these with a control variate
                       (`student.loss.control_variate`), for entries with their log-probs. blend: sampled and bucket.
                       renormalise, none: the stored ids alone, biased. auto: sampled for entries with sampled ids and
                       loss forward-kl, bucket elsewhere
    blend              share of `sampled` in tail = blend [0.75]
    alpha, alpha_end   share of the cross-entropy
    temperature, temperature_end   tau; 1 and 2 are exact, others above 1 need `interpolate_tail`
    interpolate_tail   interpolate the mass of the tail at other temperatures, within reported bounds
    loss_scale         token: both terms are means over the trained positions. babyllama: the divergence is summed
                       over a window's positions, the cross-entropy is a mean over all of them but the last
    min_entropy        nats; the divergence counts only where the teacher's entropy is at least this

    A field with an `_end` changes linearly, from its own value at the first optimizer step to that at the last: `at`
    has the objective of a step.

    Raises pydantic's ValidationError for fields that do not fit together; `objective_of` turns it into InputError.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    loss: LossName = "forward-kl"
    mix: _Share | None = None
    mix_end: _Share | None = None
    head_ids: Annotated[int, Field(ge=1)] | None = None
    tail_weight: Annotated[float, Field(gt=0)] | None = None
    tail: Tail = "auto"
    blend: _Share | None = None
    alpha: Annotated[float, Field(ge=0, le=1)]
    alpha_end: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: float = 1.0
    temperature_end: float | None = None
    interpolate_tail: bool = False
    loss_scale: Literal["token", "babyllama"] = "token"
    min_entropy: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Objective:
        for name in ("mix", "mix_end"):
            if getattr(self, name) is not None and self.loss not in DEFAULT_MIX:
                raise ValueError(f"{name} belongs to {', '.join(DEFAULT_MIX)}; the loss is {self.loss}")
        for name in ("head_ids", "tail_weight"):
            if getattr(self, name) is not None and self.loss != "tail-aware-kl":
                raise ValueError(f"{name} belongs to tail-aware-kl; the loss is {self.loss}")
        if self.blend is not None and self.tail != "blend":
            raise ValueError(f"a share of sampled targets (blend) needs tail blend; the tail is {self.tail}")
        if self.loss != "forward-kl" and self.tail in _LINEAR_ONLY:
            raise ValueError(
                f"tail {self.tail} goes with forward-kl only: {_LINEAR_ONLY[self.tail]}; take tail bucket for "
                f"{self.loss}"
            )
        for temperature in self.temperatures:
            check_temperature(temperature, self.interpolate_tail)
        if len(self.temperatures) > 1 and not self.interpolate_tail:
            first, last = self.temperatures
            raise InputError(
                f"temperature {first:g} to {last:g}: the steps between them have temperatures at which the stored "
                "tails are not exact; add --interpolate-tail for an interpolated tail with its error stated"
            )
        if self.loss == LIGHTNING_OPD:
            for name, field in Objective.model_fields.items():
                if name not in ("loss", "alpha") and getattr(self, name) != field.default:
                    raise ValueError(f"{name} {getattr(self, name)}: loss {self.loss} is of the sampled tokens alone")
            if self.alpha != 0:
                raise ValueError(f"alpha {self.alpha:g}: the cross-entropy of a student's own samples teaches nothing")
        return self

    @property
    def divergence(self) -> DivergenceName:
        """The loss as a divergence of two whole distributions. Raises InputError where it is none."""
        if self.loss == LIGHTNING_OPD:
            raise InputError(f"loss {self.loss} is of cached log-probs of sampled tokens: take reverse-kl here")
        if self.loss == "tail-aware-kl":
            raise InputError(f"loss {self.loss} is of top-k targets of whole sequences: take another here")
        return self.loss

    @property
    def mixing(self) -> float:
        """beta or lambda of the divergence, with its default; 0 for the plain ones."""
        return DEFAULT_MIX.get(self.loss, 0.0) if self.mix is None else self.mix

    @property
    def blending(self) -> float:
        """The share of sampled targets under tail = blend, with its default."""
        return DEFAULT_BLEND if self.blend is None else self.blend

    @property
    def head_size(self) -> int:
        """`head_ids`, with its default."""
        return DEFAULT_HEAD_IDS if self.head_ids is None else self.head_ids

    @property
    def tail_weighting(self) -> float:
        """`tail_weight`, with its default."""
        return DEFAULT_TAIL_WEIGHT if self.tail_weight is None else self.tail_weight

    @property
    def uses_teachers(self) -> bool:
        """Whether alpha is below 1 at any step, so that the divergence counts."""
        return self.alpha < 1 or (self.alpha_end is not None and self.alpha_end < 1)

    @property
    def log_name(self) -> str:
        """The divergence's prefix to a teacher's name in metric names, such as ``kl`` in ``kl_<teacher>``."""
        return "kl" if self.loss == "forward-kl" else self.loss.replace("-", "_")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperature, or the two between which all those of a schedule lie, the first step's first."""
        if self.temperature_end in (None, self.temperature):
            return (self.temperature,)
        return (self.temperature, self.temperature_end)

    @property
    def scheduled(self) -> tuple[str, ...]:
        """The names of the fields that change during the run."""
        return tuple(name for name in SCHEDULED if getattr(self, f"{name}_end") is not None)

    def at(self, progress: float) -> Self:
        """The objective at a point of the run, without schedules: progress 0 is its first step, 1 its last."""
        now: dict[str, float | None] = {}
        for name in self.scheduled:
            first = self.mixing if name == "mix" else getattr(self, name)
            now[name] = (1.0 - progress) * first + progress * getattr(self, f"{name}_end")
            now[f"{name}_end"] = None
        return self.model_copy(update=now)


def objective_of(**fields: Any) -> Objective:
    """An Objective. Raises InputError, in one line, for invalid fields."""
    try:
        return Objective(**fields)
    except ValidationError as error:
        raise InputError(explained(Objective, error.errors()[0], "the loss", "")) from None


def check_temperature(temperature: float, interpolate_tail: bool) -> None:
    """Raise InputError unless the temperature is 1 or 2 (stored tails), or above 1 with `interpolate_tail`."""
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
