"""The configuration of `cache-logits`: its fields, their defaults, and checks that they fit together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from storage.config import Settings
from storage.format.encoding import (
    DEFAULT_SAMPLED_STEP_NATS,
    DEFAULT_STEP_NATS,
    DEFAULT_VALUE_STEP_NATS,
    MAX_STEP_NATS,
    MAX_UINT16,
    MIN_STEP_NATS,
)
from storage.format.layout import Profile
from storage.format.manifest.entry import TARGET_FIELDS, Encoding, TargetField, Targets, TeacherEntry
from storage.format.manifest.shared import TEACHER_NAME

Positive = Annotated[int, Field(ge=1)]
Source = Annotated[str, Field(min_length=1)]
EntryName = Annotated[str, Field(pattern=f"^{TEACHER_NAME}$")]
KeptIds = Annotated[int, Field(ge=1, le=MAX_UINT16)]
Mass = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 48)]
StepNats = Annotated[float, Field(ge=MIN_STEP_NATS, le=MAX_STEP_NATS)]
TargetKind = Literal["topk", "varopt", "none"]
FieldName = Literal["lean", "all", "entropy", "half-tail", "label", "sampled-logprobs"]


def _one_or_names(names: tuple[FieldName, ...]) -> tuple[FieldName, ...]:
    for name in ("lean", "all"):
        others = sorted(set(names) - {name})
        if name in names and others:
            raise ValueError(f"{name} names them all: leave out {', '.join(others)}")
    return names


FieldNames = Annotated[tuple[FieldName, ...], AfterValidator(_one_or_names)]

# By measurement (docs/decisions/0034).
DEFAULT_FIELDS: dict[TargetKind, tuple[FieldName, ...]] = {
    "varopt": ("entropy",),
    "topk": ("entropy", "half-tail"),
    "none": ("label",),
}
DEFAULT_K = 64
_METHODS: dict[TargetKind, Literal["top-k", "varopt", "none"]] = {"topk": "top-k", "varopt": "varopt", "none": "none"}
_OF_VAROPT = ("head_ids", "seed", "target_temperature", "sampling", "order", "sample_size", "sampled_step_nats")
# Options of targets that go with some kinds of them alone.
_OF_KINDS: dict[str, tuple[TargetKind, ...]] = {
    "k": ("topk", "varopt"),
    "top_p": ("topk",),
    "step_nats": ("topk", "varopt"),
    **dict.fromkeys(_OF_VAROPT, ("varopt",)),
}

# Of a teacher that runs in this process; and what a server does not tell, with the reason.
_IN_PROCESS = (
    *("combine", "weight", "revision", "attention", "trust_remote_code", "device_map", "max_memory", "offload"),
    *("tensor_parallel", "batch_windows"),
)
_SERVED_FIELDS: tuple[TargetField, ...] = ("label",)

_OF_VERSION_2 = (
    "fields",
    "positions",
    "sources",
    "long_documents",
    "sampling",
    "order",
    "sample_size",
    "sampled_step_nats",
)


def is_server(teacher: str) -> bool:
    """Whether a teacher, as the user names it, is the URL of a server."""
    return teacher.startswith(("http://", "https://"))


class CacheJob(Settings):
    """The fields of `cache-logits`, as flags or in a YAML file. Lengths are in tokens, steps in nats.

    Several teachers form one ensemble; `weight` and `revision` are given once for each of them, or not at all. A
    `top_p` alone selects top-k targets, which it truncates; else the default is varopt (docs/decisions/0012). Targets
    of the kind none have no ids: the log-prob of the label alone is stored (docs/decisions/0042).
    `fidelity_positions`, the size of a complete entry's fidelity report, is no part of the entry's identity.

    `fields`: what is stored beside ids, certain log-probs and masses: lean (what forward KL reads), all, or names
    of `storage.format.manifest.entry.TARGET_FIELDS`. `positions`: all rows, or those that the stream's loss mask
    trains; of these, `sources` leaves those in documents of the sources that are named. `long_documents`: those
    longer than the context are cut into windows, have targets at as many first positions (truncate) or none (drop),
    or are refused.
    Windows (`context_tokens`, `isolate_documents`) that are not given are chosen by `logit_cache.caching.contexts`.
    `sampling` and `order`: how ids are sampled, and in which order they lie then (docs/decisions/0034). What is not
    given is as an entry of that name has it, which may be one of version 1; else as docs/decisions/0034 says.

    A teacher that is a URL is behind a server (docs/decisions/0040); several of them serve one model. `served_model`:
    its name there; `requests`: in flight at each; `request_seconds`: for one of them; `patience_seconds`: without an
    answer of any server, until the job ends. None of these is part of the entry's identity.
    """

    cache: str
    teacher: Annotated[tuple[Source, ...], Field(min_length=1, max_length=64)]
    combine: Literal["logit-mean", "mixture"] | None = None
    weight: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    name: EntryName
    targets: TargetKind = "varopt"
    k: KeptIds | None = None
    top_p: Mass | None = None
    head_ids: Annotated[int, Field(ge=0)] | None = None
    seed: Seed | None = None
    target_temperature: float | None = None
    context_tokens: Positive | None = None
    stride_tokens: Positive | None = None
    isolate_documents: bool | None = None
    bos_each_window: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    max_memory: tuple[str, ...] = ()
    offload: Literal["cpu", "disk"] | None = None
    tensor_parallel: bool = False
    fields: FieldNames = ()
    positions: Literal["all", "trained"] | None = None
    sources: tuple[Source, ...] = ()
    long_documents: Literal["cut", "truncate", "drop", "refuse"] | None = None
    sampling: Literal["systematic", "pivotal"] | None = None
    order: Literal["ids", "embeddings"] | None = None
    sample_size: Literal["fixed", "threshold"] | None = None
    format_version: Literal[1, 2] | None = None
    encoding: Literal["codes", "float32"] = "codes"
    step_nats: StepNats | None = None
    sampled_step_nats: StepNats | None = None
    profile: Profile = "small"
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None
    batch_windows: Positive | None = None
    fidelity_positions: Annotated[int, Field(ge=0, le=1 << 17)] = 2_048
    revision: tuple[str, ...] = ()
    attention: str | None = None
    trust_remote_code: bool = False
    served_model: Source | None = None
    requests: Annotated[int, Field(ge=1, le=4_096)] = 16
    request_seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    patience_seconds: Annotated[float, Field(gt=0, le=604_800)] = 600.0

    @property
    def stored_ids(self) -> int:
        """K: the ids of a row."""
        return 0 if self.targets == "none" else self.k or DEFAULT_K

    @property
    def is_served(self) -> bool:
        """Whether the teacher is behind a server."""
        return is_server(self.teacher[0])

    @model_validator(mode="before")
    @classmethod
    def _servers_need_no_device(cls, fields: Any) -> Any:
        teachers = fields.get("teacher") if isinstance(fields, dict) else None
        first = teachers[0] if isinstance(teachers, list | tuple) and teachers else teachers
        if isinstance(first, str) and is_server(first) and "device" not in fields:
            return {**fields, "device": "cpu"}
        return fields

    @model_validator(mode="before")
    @classmethod
    def _top_p_selects_topk(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("top_p") is not None and fields.get("targets") is None:
            return {**fields, "targets": "topk"}
        return fields

    @model_validator(mode="after")
    def _served_agrees(self) -> CacheJob:
        if not self.is_served:
            if self.served_model is not None:
                raise ValueError("--served-model goes with a --teacher that is the URL of a server: leave it out")
            return self
        local = [teacher for teacher in self.teacher if not is_server(teacher)]
        if local or len(set(self.teacher)) < len(self.teacher):
            raise ValueError(
                "several times --teacher with a URL are several servers of one model: give each once, and no others"
            )
        for name in _IN_PROCESS:
            if getattr(self, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for a teacher in this process, and {self.teacher[0]} is a server: "
                    f"leave it out"
                )
        if self.device != "cpu" or self.dtype != "auto":
            name = "device" if self.device != "cpu" else "dtype"
            raise ValueError(f"--{name} is the server's to choose, and {self.teacher[0]} is one: leave it out")
        if self.targets == "varopt":
            raise ValueError(
                f"{self.teacher[0]}: a server gives its likeliest ids alone, and varopt samples from all of them: give "
                f"--targets topk, or none"
            )
        unknown = sorted(set(self.fields) & {"entropy", "half-tail"})
        if unknown or self.format_version == 1:
            raise ValueError(
                f"{unknown[0] if unknown else 'version 1 of the format'} takes whole distributions, of which a server "
                f"gives the likeliest ids alone: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _targets_agree(self) -> CacheJob:
        for name, kinds in _OF_KINDS.items():
            if self.targets not in kinds and getattr(self, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} goes with --targets {' or '.join(kinds)}: leave one of them out"
                )
        if self.target_temperature not in (None, 1.0, 2.0):
            raise ValueError(
                f"--target-temperature {self.target_temperature:g}: ids are sampled for temperature 1 or 2, at which "
                f"the stored tails are exact"
            )
        if self.head_ids is not None and self.head_ids >= self.stored_ids:
            raise ValueError(
                f"--head-ids {self.head_ids} leaves none of -k {self.stored_ids} ids to sample: give fewer, or "
                f"--targets topk"
            )
        return self

    @model_validator(mode="after")
    def _ensemble_agrees(self) -> CacheJob:
        if self.is_served:
            return self
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
    def _fields_agree(self) -> CacheJob:
        if self.targets == "topk" and "sampled-logprobs" in self.fields:
            raise ValueError("--fields sampled-logprobs goes with --targets varopt: every id of topk is certain")
        if self.targets == "none" and set(self.fields) - {"label", "all"}:
            raise ValueError(
                f"--fields {self.fields[0]} describes ids, and --targets none stores the label's log-prob alone: leave "
                f"one of them out"
            )
        if self.format_version == 1:
            for name in (*_OF_VERSION_2, *(["targets"] if self.targets == "none" else [])):
                if getattr(self, name):
                    raise ValueError(f"--{name.replace('_', '-')} is of version 2 of the format: leave out one of them")
        if self.encoding == "float32" and self.sampled_step_nats is not None:
            raise ValueError("--sampled-step-nats is a unit of codes, and --encoding float32 has none: leave one out")
        return self

    def stored_targets(self, recorded: TeacherEntry | None, has_loss_mask: bool, context_tokens: int) -> Targets:
        """The targets record of the entry: the method, its parameters, and what is stored per position.

        recorded: the entry of that name, if there is one, which decides what is not given. has_loss_mask: whether the
        stream has one; without it every position is trained.
        """
        kind: dict[str, Any] = {"method": _METHODS[self.targets], "temperature": self.target_temperature or 1.0}
        own: dict[str, Any] = {"k": self.stored_ids, "top_p": self.top_p}
        chosen: dict[str, Any] = {
            "fields": _SERVED_FIELDS if self.is_served else DEFAULT_FIELDS[self.targets],
            "positions": "trained" if has_loss_mask else "all",
            "sources": None,
            "long_documents": None,
        }
        if self.targets == "varopt":
            own |= {"head_ids": self.head_ids or None, "seed": self.seed or 0}
            chosen |= {"sampling": "systematic", "order": "ids", "sample_size": "threshold"}
        if self.version(recorded) == 1:
            return Targets(**kind, **own, has_label_logprob=True)
        if self.target_temperature == 2.0:
            # The constant by which a loss at temperature 2 is a KL is known from the sampled ids alone.
            chosen["fields"] += ("sampled-logprobs",)
        if recorded is not None and all(getattr(recorded.targets, name) == value for name, value in kind.items()):
            # An entry of the other kind is another job, whatever its fields are.
            stored = {name: getattr(recorded.targets, name) for name in chosen}
            # Of the sample's size, none is a value: K ids in every row.
            chosen |= {name: value for name, value in stored.items() if value is not None or name == "sample_size"}
        chosen |= {name: getattr(self, name) for name in chosen if getattr(self, name)}
        if self.sample_size == "fixed":
            chosen["sample_size"] = None
        if chosen["long_documents"] in ("cut", "refuse"):
            chosen["long_documents"] = None
        if chosen["long_documents"] is not None:
            chosen["document_tokens"] = context_tokens
        if self.sources:
            chosen["sources"] = tuple(sorted(set(self.sources)))
        possible = [field for field in TARGET_FIELDS if self.targets == "varopt" or field != "sampled-logprobs"]
        if self.is_served or self.targets == "none":
            possible = ["label"]
        chosen["fields"] = stored_fields(chosen["fields"], possible, self.target_temperature or 1.0)
        return Targets(**kind, **own, **chosen, tail="unknown" if self.targets == "none" else "exact")

    def version(self, recorded: TeacherEntry | None) -> Literal[1, 2]:
        """The version of the entry: the one that is asked for, the recorded one, or the latest."""
        if self.format_version is not None:
            return self.format_version
        later = self.targets == "none" or any(getattr(self, name) for name in _OF_VERSION_2)
        return 2 if recorded is None or later else recorded.format_version

    def stored_encoding(self, targets: Targets, recorded: TeacherEntry | None = None) -> Encoding:
        """The encoding record of the entry with these targets."""
        codes = self.encoding == "codes"
        step = self.step_nats or DEFAULT_STEP_NATS if codes else None
        if self.version(recorded) == 1:
            return Encoding(kind=self.encoding, step_nats=step, mantissa_bits=12 if codes else 23)
        before = None if recorded is None else recorded.encoding.sampled_step_nats
        sampled = self.sampled_step_nats or before or DEFAULT_SAMPLED_STEP_NATS
        return Encoding(
            kind=self.encoding,
            step_nats=step,
            value_step_nats=DEFAULT_VALUE_STEP_NATS if codes else None,
            sampled_step_nats=sampled if codes and targets.has("sampled-logprobs") else None,
        )


def stored_fields(
    names: tuple[FieldName, ...], possible: Iterable[TargetField], sampled_at: float
) -> tuple[TargetField, ...]:
    """The fields of a record that `names` stand for: all are the `possible` ones, lean is none of them.

    Ids that are sampled at temperature 2 weigh by the half-tail, which is stored with them always.
    """
    wanted = set(possible if "all" in names else names) | ({"half-tail"} if sampled_at == 2.0 else set())
    return tuple(field for field in TARGET_FIELDS if field in wanted)
