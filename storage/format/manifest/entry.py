"""The record of a teacher's entry: what its targets are, how they were made, and how they are stored."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from storage.format.encoding import MAX_STEP_NATS, MAX_UINT16, MIN_STEP_NATS, MIN_VALUE_STEP_NATS
from storage.format.manifest.cache import MAX_SOURCES
from storage.format.manifest.imported import ImportedFrom
from storage.format.manifest.projected import ProjectedFrom
from storage.format.manifest.shared import ADDED, MAX_OBJECT_BYTES, ArrayLayout, Count, Positive, Sha256, Text, Versions
from storage.format.manifest.teacher import Teacher
from storage.format.sealing import Record

MAX_ORDERED_IDS = 1 << 22  # of a sampling order, which is one object
MOST_SHRUNK = 16  # samples from which a sample was sampled

# What an entry of version 2 may store of a row beside its ids, the certain ones' log-probs and the mass outside them.
TargetField = Literal["entropy", "half-tail", "label", "sampled-logprobs"]
TARGET_FIELDS: tuple[TargetField, ...] = get_args(TargetField)
LongDocuments = Literal["truncate", "drop"]


class Shrunk(Record):
    """A sample that was sampled again to fewer ids: its K and seed before."""

    k: Annotated[int, Field(ge=1, le=MAX_UINT16)]
    seed: Count


class Targets(Record):
    """Which ids are stored for a position, and what of them.

    `method` none: no ids, k = 0, and the log-prob of the label alone.
    `head_ids`: number of ids kept with certainty before sampling starts; `top_p`: the mass at which a row is pruned;
    `seed` keys the sampling by absolute position; `temperature`: the one that ids were sampled for.

    Version 1 has `has_label_logprob`, version 2 in its place: `fields`, what is stored beside the ids, in alphabetical
    order; `positions`: which rows have targets, all, those that the loss mask trains, or some; `sources`: of these rows
    only those in documents of the sources of these names, in alphabetical order; `long_documents`: of documents of more
    than `document_tokens` tokens, only so many first rows (truncate), or none (drop); `tail`: whether the mass
    outside the ids is known; of VarOpt, `sampling`, the way in which ids are sampled, `order`, the one in which
    they lie then, of their ids or of the teacher's output embeddings (array `sampling_order`), `sample_size`, where
    a row holds as many ids as a threshold of 1 / K of its mass asks for, and not K, and `shrunk_from`, the earlier
    samples that this one was sampled from, the first one first.
    """

    method: Literal["top-k", "varopt", "none"] = "top-k"
    k: Annotated[int, Field(ge=0, le=MAX_UINT16)]
    head_ids: Count | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Count | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    has_label_logprob: bool | None = ADDED
    fields: Annotated[tuple[TargetField, ...], Field(max_length=len(TARGET_FIELDS))] | None = ADDED
    positions: Literal["all", "trained", "some"] | None = ADDED
    sources: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_SOURCES)] | None = ADDED
    long_documents: LongDocuments | None = ADDED
    document_tokens: Positive | None = ADDED
    tail: Literal["exact", "unknown"] | None = ADDED
    sampling: Literal["systematic", "pivotal"] | None = ADDED
    order: Literal["ids", "embeddings"] | None = ADDED
    sample_size: Literal["threshold"] | None = ADDED
    shrunk_from: Annotated[tuple[Shrunk, ...], Field(max_length=MOST_SHRUNK)] | None = ADDED

    def has(self, field: str) -> bool:
        """Whether a field is stored: one of `TARGET_FIELDS`, the tail, or ids. Version 1 lacks at most the label's."""
        if field == "tail":
            return self.tail != "unknown"
        if field == "ids":
            return self.k > 0
        if self.fields is None:
            return field != "label" or bool(self.has_label_logprob)
        return field in self.fields

    @property
    def in_every_row(self) -> bool:
        """Whether every row has targets."""
        return self.positions in (None, "all") and self.sources is None and self.long_documents is None

    @property
    def whole_rows(self) -> bool:
        """Whether every row with targets holds K ids."""
        return self.top_p is None and self.sample_size is None

    def without(self, field: TargetField) -> Targets:
        if self.fields is None:
            assert field == "label"
            return self.model_copy(update={"has_label_logprob": False})
        return self.model_copy(update={"fields": tuple(name for name in self.fields if name != field)})

    def of_version(self, version: int) -> None:
        """Raises ValueError where the record is not one of that version of an entry."""
        later = {name: getattr(self, name) for name in ("fields", "positions", "tail")}
        varopt = {name: getattr(self, name) for name in ("sampling", "order")}
        chosen = {name: getattr(self, name) for name in ("sources", "long_documents", "document_tokens")}
        if self.sample_size is not None and (self.method != "varopt" or version == 1):
            raise ValueError("sample_size goes with varopt of version 2")
        if (self.method == "none") != (self.k == 0):
            raise ValueError("a k of 0 goes with the method none, and with it only")
        if self.method == "none" and (self.fields, self.tail, self.top_p) != (("label",), "unknown", None):
            raise ValueError("without ids the label alone is stored, and nothing of the mass outside them")
        if version == 1:
            wrong = [name for name, value in {**later, **varopt, **chosen}.items() if value is not None]
            if wrong or self.has_label_logprob is None:
                raise ValueError(f"targets of version 1 have has_label_logprob, and no {wrong or 'fields'}")
            return
        if self.has_label_logprob is not None or None in later.values():
            raise ValueError("targets of version 2 have fields, positions and tail, and no has_label_logprob")
        if (self.method == "varopt") != (None not in varopt.values()):
            raise ValueError("sampling and order go with varopt, and with it only")
        if list(self.fields or ()) != sorted(set(self.fields or ())):
            raise ValueError("fields are in alphabetical order, each once")
        if (self.long_documents is None) != (self.document_tokens is None) or (
            self.long_documents and self.positions == "some"
        ):
            raise ValueError("long_documents and document_tokens go together, with all or trained positions")
        if list(self.sources or ()) != sorted(set(self.sources or ())) or (self.sources and self.positions == "some"):
            raise ValueError("sources are in alphabetical order, each once, and go with all or trained positions")
        if self.method != "varopt" and self.has("sampled-logprobs"):
            raise ValueError("sampled-logprobs go with varopt: of other methods every id is certain")
        if self.tail == "unknown" and (self.method == "varopt" or self.has("half-tail")):
            raise ValueError("a tail that is not known goes with neither varopt nor half-tail")
        if self.method == "varopt" and self.temperature not in (1.0, 2.0):
            raise ValueError(f"ids are sampled for temperature 1 or 2, not {self.temperature:g}")
        if self.method == "varopt" and self.temperature != 1.0 and not self.has("half-tail"):
            raise ValueError(
                f"ids sampled for temperature {self.temperature:g} weigh by the half-tail, which is missing"
            )


class Windowing(Record):
    """The windows that a teacher read: see `storage.format`, "Windows"."""

    context_tokens: Positive
    stride_tokens: Positive
    isolate_documents: bool = False
    begin_id: Count | None = ADDED

    @property
    def input_tokens(self) -> int:
        """Tokens that a teacher reads of a window: its context, and the id put before it."""
        return self.context_tokens + (self.begin_id is not None)

    @model_validator(mode="after")
    def _stride_fits(self) -> Windowing:
        if self.stride_tokens > self.context_tokens:
            raise ValueError(f"stride {self.stride_tokens} is larger than context {self.context_tokens}")
        return self


class Encoding(Record):
    """`codes`: log-probs as uint16 differences in units of `step_nats`; `float32`: as they are.

    Version 1: floats per position keep `mantissa_bits` explicit bits. Version 2: with codes they are codes too, the
    mass in units of `step_nats`, the others of `value_step_nats`; log-probs of sampled ids of `sampled_step_nats`.
    """

    kind: Literal["codes", "float32"] = "codes"
    step_nats: Annotated[float, Field(ge=MIN_STEP_NATS, le=MAX_STEP_NATS)] | None
    mantissa_bits: Annotated[int, Field(ge=8, le=23)] | None = ADDED
    value_step_nats: Annotated[float, Field(ge=MIN_VALUE_STEP_NATS, le=MAX_STEP_NATS)] | None = ADDED
    sampled_step_nats: Annotated[float, Field(ge=MIN_STEP_NATS, le=MAX_STEP_NATS)] | None = ADDED

    @model_validator(mode="after")
    def _agrees(self) -> Encoding:
        if (self.kind == "codes") != (self.step_nats is not None):
            raise ValueError("step_nats goes with codes, and with them only")
        return self

    def of_version(self, version: int, targets: Targets) -> None:
        """Raises ValueError where the record is not one of that version of an entry."""
        if (version == 1) != (self.mantissa_bits is not None):
            raise ValueError("mantissa_bits goes with version 1 of an entry, and with it only")
        codes = version == 2 and self.kind == "codes"
        if codes != (self.value_step_nats is not None):
            raise ValueError("value_step_nats goes with codes of version 2, and with them only")
        if (codes and targets.has("sampled-logprobs")) != (self.sampled_step_nats is not None):
            raise ValueError("sampled_step_nats goes with codes of sampled-logprobs, and with them only")
        # Log-probs of sampled ids are counted from a threshold that is itself a code, with `step_nats` to spare.
        if self.sampled_step_nats is not None and (self.value_step_nats or 0) > (self.step_nats or 0):
            raise ValueError("value_step_nats is larger than step_nats, from which sampled log-probs are counted")


class Execution(Record):
    """The settings that can change the last bits of a result: all workers of an entry must agree on them.

    `tensor_parallel`: the number of ranks that the teacher was sharded over. `rows`, of isolated documents: packed,
    where several share a row, of a length in `row_tokens`, kept apart by their positions; sorted, where each has a row
    of its own and those of about equal length are read together; absent where each was padded to the context.
    """

    device_type: Text
    batch_windows: Positive
    attention: Text
    compile_mode: Text | None = None
    head: Literal["fast", "general"]
    tensor_parallel: Positive | None = ADDED
    rows: Literal["packed", "sorted"] | None = ADDED
    row_tokens: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=32)] | None = ADDED

    @model_validator(mode="after")
    def _rows_agree(self) -> Execution:
        lengths = self.row_tokens or ()
        if (self.rows == "packed") != bool(lengths) or list(lengths) != sorted(set(lengths)):
            raise ValueError("packed rows, and they only, have row_tokens, ascending")
        return self


class TeacherEntry(Record):
    """attributes["logit_cache"] of teachers/<name>; written once, never rewritten.

    `vocabulary_size` is the V of its targets: the tokenizer's, or fewer ids where the teacher has no column for the
    last ones. No token of the stream is one of those. `made`, since version 2: how the targets were made, by a teacher
    in process (cached), by one behind a server, from somebody's file, from an entry of another vocabulary, or from
    another entry of this one. `imported_from`: that file, also of an entry that was made from an imported one;
    `projected_from`: that entry of another vocabulary, likewise.
    """

    format_version: Literal[1, 2] = 1
    kind: Literal["teacher"] = "teacher"
    positions: Positive
    vocabulary_size: Annotated[int, Field(ge=1, le=1 << 31)]
    stream_sha256: Sha256
    tokenizer_fingerprint: Sha256
    teacher: Teacher
    targets: Targets
    windowing: Windowing
    encoding: Encoding
    layout: ArrayLayout
    execution: Execution
    made: Literal["cached", "served", "imported", "projected", "recompressed"] | None = ADDED
    derived_from: Sha256 | None = None
    imported_from: ImportedFrom | None = ADDED
    projected_from: ProjectedFrom | None = ADDED
    created_with: Versions

    @model_validator(mode="after")
    def _agrees(self) -> TeacherEntry:
        if (self.format_version == 1) != (self.made is None):
            raise ValueError("version 2 of an entry states how it was made, and version 1 does not")
        if self.made in (None, "cached") and not self.teacher.loaded:
            raise ValueError("an entry that its teacher made states the digests of that model")
        if (self.made == "projected") != (self.projected_from is not None):
            raise ValueError("a projected entry states what it was projected from, and no other does")
        self.targets.of_version(self.format_version)
        self.encoding.of_version(self.format_version, self.targets)
        if self.targets.k > self.vocabulary_size:
            raise ValueError(f"k {self.targets.k} is larger than the vocabulary {self.vocabulary_size}")
        if (self.windowing.begin_id or 0) >= self.vocabulary_size:
            raise ValueError(f"begin_id {self.windowing.begin_id} is not in the vocabulary of {self.vocabulary_size}")
        if self.targets.order == "embeddings" and self.vocabulary_size > MAX_ORDERED_IDS:
            raise ValueError(f"an order of embeddings is one of at most {MAX_ORDERED_IDS} ids")
        # Sizes are bounded before anything is allocated from them.
        if 4 * max(self.targets.k, 1) * self.layout.shard > MAX_OBJECT_BYTES:
            raise ValueError(f"a shard of {self.layout.shard} positions with k {self.targets.k} exceeds one object")
        self.layout.check_length(self.positions)
        return self
