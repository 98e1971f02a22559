"""Who made an entry: models that were loaded, one behind a server, or one that somebody names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from storage.format.manifest.shared import ADDED, Count, Positive, Sha256, Text
from storage.format.sealing import Record

MOST_PROBES = 64


class TeacherIdentity(Record):
    """One model that was loaded. `source` is a hub id or the last part of a local path; the digests alone identify it.

    `adapter`: the last part of the path of a LoRA that is merged into that model, `adapter_sha256` and
    `adapter_config_sha256` its digests; None without one.
    """

    source: Text
    revision: Text | None = None
    architecture: Text
    weights_sha256: Sha256
    config_sha256: Sha256
    dtype: Literal["float32", "bfloat16", "float16"]
    head_columns: Positive
    parameters: Count
    trust_remote_code: bool = False
    adapter: Text | None = ADDED
    adapter_sha256: Sha256 | None = ADDED
    adapter_config_sha256: Sha256 | None = ADDED

    @property
    def name(self) -> str:
        return self.source if self.adapter is None else f"{self.source} with {self.adapter}"

    @property
    def digest_fields(self) -> tuple[str, ...]:
        adapter = ("adapter_sha256", "adapter_config_sha256")
        return ("weights_sha256", "config_sha256", *(adapter if self.adapter is not None else ()))


class ServedIdentity(Record):
    """A model behind a server, by what the server says and answers; nobody has seen its weights.

    source        the name under which it is served
    model         what the server says that is: a hub id, or the last part of a path
    engine        whose protocol the server speaks; its version is in the entry's `created_with`
    tokenizer     whether the ids that it gives probes of text are those texts to the cache's, or it could not be asked
    probe         nats: its log-probs of tokens 1, 2, … of the stream after those before them, by which a server is
                  known again; other numbers for the same weights only within its own noise
    mass_error    its log-probs are sums in float32: the mass outside the stored ids is off by so much, at most
    """

    source: Text
    model: Text | None
    engine: Literal["vllm", "sglang"]
    weights: Literal["not verified"] = "not verified"
    tokenizer: Literal["compared on probes", "not compared"]
    probe: Annotated[tuple[float, ...], Field(max_length=MOST_PROBES)]
    mass_error: Annotated[float, Field(gt=0, lt=1)]

    @property
    def name(self) -> str:
        return self.source


class NamedIdentity(Record):
    """A model of which nothing is known but what somebody says of it, as that of an imported entry."""

    source: Text

    @property
    def name(self) -> str:
        return self.source


class Teacher(Record):
    """One model, or an ensemble whose members read the same batch. A model that was not loaded is alone."""

    combine: Literal["single", "logit-mean", "mixture"] = "single"
    members: Annotated[tuple[TeacherIdentity | ServedIdentity | NamedIdentity, ...], Field(min_length=1, max_length=64)]
    weights: Annotated[tuple[float, ...], Field(max_length=64)] = (1.0,)

    @property
    def served(self) -> ServedIdentity | None:
        """The model behind a server, where it is one."""
        member = self.members[0]
        return member if isinstance(member, ServedIdentity) else None

    @property
    def loaded(self) -> tuple[TeacherIdentity, ...]:
        """The models that were loaded in process: all members, or none."""
        return tuple(member for member in self.members if isinstance(member, TeacherIdentity))

    @model_validator(mode="after")
    def _agrees(self) -> Teacher:
        if len(self.weights) != len(self.members) or (self.combine == "single") != (len(self.members) == 1):
            raise ValueError("one weight per member, and 'single' for exactly one member")
        if len(self.loaded) < len(self.members) != 1:
            raise ValueError("a model that was not loaded is no member of an ensemble")
        return self
