"""The configuration of a sweep: the parameters with their distributions, sampler and pruner. Data, no torch.

Optuna samples one raw number or choice per parameter (`student.sweep.study`), and `value` maps it to the parameter's
value. The two differ for distributions that Optuna lacks: a log-normal one is sampled as a quantile, and `one_minus`
searches 1 − x where that is the scale that matters (Adam's betas).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from storage.config import Settings, explained, read_yaml
from storage.errors import InputError
from student.foreign_errors import closest

Scalar = bool | int | float | str

# Bounds of a log-normal distribution where none are given, in standard deviations.
_REACH = 3.0


class _Frozen(Settings):
    model_config = ConfigDict(allow_inf_nan=False)


class Choices(_Frozen):
    """A categorical parameter: one of some values, without an order."""

    choices: Annotated[tuple[Scalar, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Choices:
        if len(set(map(repr, self.choices))) < len(self.choices):
            raise ValueError(f"each choice is given once, found {list(self.choices)}")
        return self

    def value(self, raw: Any) -> Scalar:
        found: Scalar = raw
        return found

    def probes(self) -> tuple[Scalar, ...]:
        """Values to check before a sweep starts: all of them, or the ends of a range."""
        return self.choices


class Real(_Frozen):
    """A number between `low` and `high`, uniform on its own scale or on that of its logarithm.

    one_minus: 1 − value is sampled, so `low` and `high` bound 1 − value.
    """

    distribution: Literal["uniform", "log_uniform"]
    low: float
    high: float
    one_minus: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Real:
        _check_bounds(self.distribution, self.low, self.high, self.distribution == "log_uniform")
        return self

    def value(self, raw: Any) -> Scalar:
        return 1.0 - float(raw) if self.one_minus else float(raw)

    def probes(self) -> tuple[Scalar, ...]:
        return self.value(self.low), self.value(self.high)


class Whole(_Frozen):
    """An integer between `low` and `high`, both included: uniform in steps, or on the scale of its logarithm."""

    distribution: Literal["int", "log_int"]
    low: int
    high: int
    step: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> Whole:
        _check_bounds(self.distribution, self.low, self.high, self.distribution == "log_int")
        if self.distribution == "log_int" and self.step != 1:
            raise ValueError("log_int has no step: leave it out, or take int")
        if (self.high - self.low) % self.step:
            raise ValueError(f"steps of {self.step} from {self.low} do not reach {self.high}")
        return self

    def value(self, raw: Any) -> Scalar:
        return int(raw)

    def probes(self) -> tuple[Scalar, ...]:
        return self.low, self.high


class LogNormal(_Frozen):
    """exp of a normal number of mean `mu` and deviation `sigma`, within `low .. high` (by default 3 deviations).

    log_normal_int rounds it to a whole number, at least 1.
    """

    distribution: Literal["log_normal", "log_normal_int"]
    mu: float
    sigma: Annotated[float, Field(gt=0)]
    low: Annotated[float, Field(gt=0)] | None = None
    high: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> LogNormal:
        low, high = self._bounds()
        _check_bounds(self.distribution, low, high, True)
        first, last = self.quantiles()
        if not first < last:
            raise ValueError(f"nothing of this distribution lies between {low:g} and {high:g}")
        return self

    def _bounds(self) -> tuple[float, float]:
        low = math.exp(self.mu - _REACH * self.sigma) if self.low is None else self.low
        high = math.exp(self.mu + _REACH * self.sigma) if self.high is None else self.high
        return low, high

    def quantiles(self) -> tuple[float, float]:
        """The quantiles of the bounds, between which a trial's is sampled."""
        normal = NormalDist(self.mu, self.sigma)
        low, high = (normal.cdf(math.log(bound)) for bound in self._bounds())
        return low, high

    def value(self, raw: Any) -> Scalar:
        low, high = self._bounds()
        # Only rounding can put a quantile at 0 or 1, which have no finite value, or its value beyond a bound.
        quantile = min(max(float(raw), 1e-12), 1 - 1e-12)
        found = min(max(math.exp(NormalDist(self.mu, self.sigma).inv_cdf(quantile)), low), high)
        return max(1, round(found)) if self.distribution == "log_normal_int" else found

    def probes(self) -> tuple[Scalar, ...]:
        low, high = self.quantiles()
        return self.value(low), self.value(high)


Parameter = Choices | Real | Whole | LogNormal

_DISTRIBUTIONS: dict[str, type[BaseModel]] = {
    name: kind for kind in (Real, Whole, LogNormal) for name in get_args(kind.model_fields["distribution"].annotation)
}


class Pruner(_Frozen):
    """The pruner, which ends poor trials early by their evaluations during training.

    name               none; hyperband (successive halving in brackets); median (worse than the median at that point)
    min_evaluations    that a trial makes in any case
    reduction_factor   hyperband: one in so many trials is kept at each rung
    max_evaluations    hyperband: the most that a trial makes; by default taken from the trials that ended
    startup_trials     median: trials that end before any is pruned
    """

    name: Literal["none", "hyperband", "median"] = "none"
    min_evaluations: Annotated[int, Field(ge=1)] = 1
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    max_evaluations: Annotated[int, Field(ge=1)] | None = None
    startup_trials: Annotated[int, Field(ge=1)] = 5


class Search(_Frozen):
    """The block `sweep:` of a sweep's file.

    backend           optuna; sweeps of an earlier version may have ray
    trials            how many; trials that failed count
    metric            a held-out figure as the evaluation logs name it; loss is the cross-entropy
    direction         by default to maximise accuracy and to minimise the others
    seed              of the proposals; the runs themselves have the job's
    sampler           tpe (Bayesian: it learns from the trials before) or random
    pruner            by name, or with its settings
    timeout_seconds   no trial starts after that
    storage           URL of a database that the processes of the sweep share; by default a file in its folder
    pairs             folder of minimal pairs to score each finished trial on; `pairs_limit`: the first so many of each
                      paradigm only
    keep_checkpoints  of trials that have ended; by default where `save_strategy` is among the job's training fields
    parameters        the searched parameters, by name
    """

    title: str | None = None
    backend: Literal["optuna", "ray"] = "optuna"
    trials: Annotated[int, Field(ge=1)]
    metric: str = "loss"
    direction: Literal["minimize", "maximize"] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Pruner = Pruner()
    timeout_seconds: Annotated[float, Field(gt=0)] | None = None
    storage: str | None = None
    pairs: str | None = None
    pairs_limit: Annotated[int, Field(ge=1)] | None = None
    keep_checkpoints: bool | None = None
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]

    @field_validator("pruner", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("parameters", mode="before")
    @classmethod
    def _parse_parameters(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("expected names with their ranges, as learning_rate: {choices: [1e-3, 3e-3]}")
        return {name: _parse_parameter(str(name), item) for name, item in value.items()}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.pairs_limit is not None and self.pairs is None:
            raise ValueError(f"pairs_limit {self.pairs_limit} is of pairs: give their folder, or leave it out")
        return self

    @property
    def figure(self) -> str:
        """The metric under the name that evaluations log: with the prefix `eval_`."""
        return "eval_" + self.metric.removeprefix("eval_")

    @property
    def aim(self) -> Literal["minimize", "maximize"]:
        """The direction, its default filled in."""
        if self.direction is None:
            return "maximize" if self.figure == "eval_accuracy" else "minimize"
        return self.direction


def read_sweep(path: str) -> tuple[dict[str, Any], Search]:
    """The fields of the job that is common to all trials, and the search. Raises InputError naming file and field."""
    fields = read_yaml(path)
    block = fields.pop("sweep", None)
    if not isinstance(block, dict):
        raise InputError(f"{path}: a sweep's file has a block `sweep:` with trials and parameters, found {block!r}")
    try:
        return fields, Search.model_validate(block)
    except ValidationError as error:
        raise InputError(explained(Search, error.errors()[0], path, "sweep.")) from None


def _parse_parameter(name: str, data: Any) -> Parameter:
    if isinstance(data, (Choices, Real, Whole, LogNormal)):
        return data
    if not isinstance(data, Mapping) or ("choices" in data) == ("distribution" in data):
        raise ValueError(f"{name}: expected either choices or a distribution, found {data!r}")
    kind: type[BaseModel] = Choices
    if "distribution" in data:
        asked = str(data["distribution"])
        if asked not in _DISTRIBUTIONS:
            hint = closest(asked, _DISTRIBUTIONS) or f"; there are {', '.join(_DISTRIBUTIONS)}"
            raise ValueError(f"{name}: there is no distribution {asked!r}{hint}")
        kind = _DISTRIBUTIONS[asked]
    try:
        parsed: Any = kind.model_validate(data)
    except ValidationError as error:
        raise ValueError(explained(kind, error.errors()[0], name, "")) from None
    found: Parameter = parsed
    return found


def _check_bounds(distribution: str, low: float, high: float, logarithmic: bool) -> None:
    if not low < high:
        raise ValueError(f"low {low:g} is not below high {high:g}")
    if logarithmic and low <= 0:
        raise ValueError(f"{distribution} needs a low above 0, found {low:g}")
