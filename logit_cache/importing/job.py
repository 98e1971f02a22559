"""The configuration of `logit-cache import`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from logit_cache.caching.job import (
    DEFAULT_FIELDS,
    EntryName,
    FieldName,
    KeptIds,
    Positive,
    Seed,
    StepNats,
    stored_fields,
)
from storage.config import Settings
from storage.format.encoding import DEFAULT_STEP_NATS, DEFAULT_VALUE_STEP_NATS
from storage.format.layout import Profile
from storage.format.manifest.entry import TARGET_FIELDS, Encoding, Targets

# Of a format that holds whole distributions, as for cache-logits.
DEFAULT_DENSE_K = 64


class ImportJob(Settings):
    """The fields of `logit-cache import`.

    out: a new cache, or one whose token stream is the files'. k: at most so many ids of a row; by default all that a
    file has, and 64 of whole distributions. targets, seed: of whole distributions alone. values, alignment: what is
    otherwise decided by the data. column_suffix: of the columns of one teacher, in files of several. teacher: what the
    files' maker says of the model.
    """

    source: Annotated[str, Field(min_length=1)]
    out: Annotated[str, Field(min_length=1)]
    name: EntryName
    format: str
    tokenizer: str | None = None
    teacher: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    compression_config: str | None = None
    column_suffix: str | None = None
    values: Literal["logprobs", "probabilities", "logits"] | None = None
    alignment: Literal["after", "of"] | None = None
    k: KeptIds | None = None
    targets: Literal["topk", "varopt"] = "topk"
    seed: Seed | None = None
    encoding: Literal["codes", "float32"] = "codes"
    step_nats: StepNats | None = None
    profile: Profile = "small"
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None

    @model_validator(mode="after")
    def _options_agree(self) -> ImportJob:
        if self.encoding == "float32" and self.step_nats is not None:
            raise ValueError("--step-nats is a unit of codes, and --encoding float32 has none: leave one of them out")
        if self.seed is not None and self.targets == "topk":
            raise ValueError("--seed keys a sample, and --targets topk takes none: leave it out")
        return self

    def stored_encoding(self) -> Encoding:
        codes = self.encoding == "codes"
        return Encoding(
            kind=self.encoding,
            step_nats=(self.step_nats or DEFAULT_STEP_NATS) if codes else None,
            value_step_nats=DEFAULT_VALUE_STEP_NATS if codes else None,
        )

    def stored_targets(self, k: int, whole_rows: bool, dense: bool, tail: bool, label: bool) -> Targets:
        """What the entry stores: of whole distributions as `cache-logits` does by default, of others what is known."""
        known: tuple[FieldName, ...] = DEFAULT_FIELDS[self.targets] if dense else ("label",) if label else ()
        own: dict[str, Any] = {"method": "top-k"}
        if dense and self.targets == "varopt":
            own = {"method": "varopt", "seed": self.seed or 0, "sampling": "systematic", "order": "ids"}
            own["sample_size"] = "threshold"
        return Targets(
            k=k,
            **own,
            fields=stored_fields(known, TARGET_FIELDS, 1.0),
            positions="all" if whole_rows else "some",
            tail="exact" if tail else "unknown",
        )
