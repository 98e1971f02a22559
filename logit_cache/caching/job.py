"""The configuration of `cache-logits`: its fields, their defaults, and checks that they fit together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from storage.config import Settings
from storage.format.encoding import DEFAULT_STEP_NATS, MAX_STEP_NATS, MAX_UINT16, MIN_STEP_NATS
from storage.format.layout import Profile
from storage.format.manifest import TEACHER_NAME, Targets

Positive = Annotated[int, Field(ge=1)]
Source = Annotated[str, Field(min_length=1)]
EntryName = Annotated[str, Field(pattern=f"^{TEACHER_NAME}$")]
KeptIds = Annotated[int, Field(ge=1, le=MAX_UINT16)]
Mass = Annotated[float, Field(gt=0, le=1)]
StepNats = Annotated[float, Field(ge=MIN_STEP_NATS, le=MAX_STEP_NATS)]


class CacheJob(Settings):
    """The fields of `cache-logits`, as flags or in a YAML file. Lengths are in tokens, steps in nats.

    Several teachers form one ensemble; `weight` and `revision` are given once for each of them, or not at all. A
    `top_p` alone selects top-k targets, which it truncates; else the default is varopt (docs/decisions/0012).
    `fidelity_positions`, the size of a complete entry's fidelity report, is no part of the entry's identity.
    """

    cache: str
    teacher: Annotated[tuple[Source, ...], Field(min_length=1, max_length=64)]
    combine: Literal["logit-mean", "mixture"] | None = None
    weight: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    name: EntryName
    targets: Literal["topk", "varopt"] = "varopt"
    k: KeptIds = 64
    top_p: Mass | None = None
    head_ids: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 48)] | None = None
    target_temperature: float | None = None
    context_tokens: Positive = 128
    stride_tokens: Positive | None = None
    isolate_documents: bool = False
    bos_each_window: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    max_memory: tuple[str, ...] = ()
    offload: Literal["cpu", "disk"] | None = None
    tensor_parallel: bool = False
    encoding: Literal["codes", "float32"] = "codes"
    step_nats: StepNats = DEFAULT_STEP_NATS
    profile: Profile = "small"
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None
    batch_windows: Positive | None = None
    fidelity_positions: Annotated[int, Field(ge=0, le=1 << 17)] = 2_048
    revision: tuple[str, ...] = ()
    attention: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _top_p_selects_topk(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("top_p") is not None and fields.get("targets") is None:
            return {**fields, "targets": "topk"}
        return fields

    @model_validator(mode="after")
    def _targets_agree(self) -> CacheJob:
        of_varopt = {"head_ids": self.head_ids, "seed": self.seed, "target_temperature": self.target_temperature}
        foreign = {"top_p": self.top_p} if self.targets == "varopt" else of_varopt
        for name, value in foreign.items():
            if value is not None:
                other = "topk" if self.targets == "varopt" else "varopt"
                raise ValueError(f"--{name.replace('_', '-')} goes with --targets {other}: leave one of them out")
        if self.target_temperature not in (None, 1.0, 2.0):
            raise ValueError(
                f"--target-temperature {self.target_temperature:g}: ids are sampled for temperature 1 or 2, at which "
                f"the stored tails are exact"
            )
        if self.head_ids is not None and self.head_ids >= self.k:
            raise ValueError(
                f"--head-ids {self.head_ids} leaves none of -k {self.k} ids to sample: give fewer, or --targets topk"
            )
        return self

    @model_validator(mode="after")
    def _ensemble_agrees(self) -> CacheJob:
        count = len(self.teacher)
        if count > 1 and self.combine is None:
            raise ValueError(f"{count} times --teacher: combine them with --combine logit-mean or --combine mixture")
        if count == 1 and (self.combine or self.weight):
            given = "--combine" if self.combine else "--weight"
            raise ValueError(f"{given} goes with several teachers: repeat --teacher for each of them, or leave it out")
        for name in ("weight", "revision"):
            if len(getattr(self, name)) not in (0, count):
                raise ValueError(
                    f"--{name} is given {len(getattr(self, name))} times, --teacher {count} times: give it once for "
                    f"each teacher, in their order, or not at all"
                )
        return self

    @model_validator(mode="after")
    def _devices_agree(self) -> CacheJob:
        spread = "--tensor-parallel" if self.tensor_parallel else "--device-map" if self.device_map else None
        if spread and self.device != "auto":
            raise ValueError(f"--device names one device and {spread} takes several: leave one of them out")
        if self.tensor_parallel and self.device_map:
            raise ValueError(
                "--device-map spreads layers within one process and --tensor-parallel each layer over several: leave "
                "one of them out"
            )
        if self.tensor_parallel and len(self.teacher) > 1:
            raise ValueError(
                "--tensor-parallel takes one --teacher: cache each alone, and train from several entries, or use "
                "--device-map for an ensemble"
            )
        for name in ("max_memory", "offload"):
            if getattr(self, name) and not self.device_map:
                raise ValueError(f"--{name.replace('_', '-')} goes with --device-map: give it, or leave this out")
        return self

    @model_validator(mode="after")
    def _stride_fits(self) -> CacheJob:
        if self.stride > self.context_tokens:
            raise ValueError(
                f"--stride-tokens {self.stride} is larger than --context-tokens {self.context_tokens}: "
                f"positions between the windows would have no teacher"
            )
        return self

    @property
    def stride(self) -> int:
        """Tokens from one window to the next; the context length unless given."""
        return self.stride_tokens or self.context_tokens

    def stored_targets(self) -> Targets:
        """The targets record of the entry: the method, its parameters, and the ids stored per position."""
        if self.targets == "topk":
            return Targets(k=self.k, top_p=self.top_p)
        return Targets(
            method="varopt",
            k=self.k,
            head_ids=self.head_ids or None,
            seed=self.seed or 0,
            temperature=self.target_temperature or 1.0,
        )
