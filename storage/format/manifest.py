"""Provenance: frozen records of a cache's content and origin, and the receipts that commit its shards.

Every record is JSON that carries the sha256 of its own canonical form (sorted keys, no white space, without
the `sha256` field), so a changed byte shows. Records hold no paths: the key of every object follows from
the array's name and the shard's number.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, JsonValue, model_validator

from storage.format.encoding import MAX_STEP_NATS, MAX_UINT16, MIN_STEP_NATS, MIN_VALUE_STEP_NATS
from storage.format.sealing import Record

ATTRIBUTE = "logit_cache"
MAX_OBJECT_BYTES = 64 << 20
MAX_INDEX_BYTES = 1 << 28
MAX_SHARDS = 1 << 21  # limit of an index of receipts: 137 billion positions at 65,536 to a shard
MAX_CHUNKS = 1 << 16  # of a shard: its index is read whole
MAX_SOURCES = 4_096
MAX_ORDERED_IDS = 1 << 22  # of a sampling order, which is one object
MAX_IMPORTED_FILES = 2_048  # of an entry: their names and digests stay within the size of a record
MOST_SHRUNK = 16  # samples from which a sample was sampled
MOST_PROBES = 64
TEACHER_NAME = r"[a-z0-9][a-z0-9_-]{0,63}"

_LIBRARIES = ("logit-cache", "torch", "transformers", "tokenizers", "zarr", "numcodecs", "numpy")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Positive = Annotated[int, Field(ge=1, le=1 << 48)]


def _is_none(value: object) -> bool:
    return value is None


# The default of a field that a record gained: JSON leaves it out where it is None, so that records from before it keep
# their digests. A version that does not know the field refuses the record that has it.
ADDED: Any = Field(default=None, exclude_if=_is_none)


class CorpusSource(Record):
    """One file or data set that the text came from: its name only, never a path on somebody's machine."""

    name: Text
    documents: Count
    text_bytes: Count


class Corpus(Record):
    """The token stream. `stream_sha256` covers tokens (as uint32), document starts (uint64) and loss mask.

    Since version 2 of the CacheRecord, and None before: `begins_with_bos`: whether documents of text begin with the ids
    that the tokenizer puts before a text; `template_sha256`: of the chat templates that rendered conversations, joined
    by NUL characters; `template_variables` and `date`: what they were given; `skipped_rows`: rows left out because they
    cannot be read; `document_sources`: whether there is an array of that name.
    """

    positions: Positive
    documents: Positive
    text_bytes: Count
    stream_sha256: Sha256
    has_loss_mask: bool
    tokens_included: bool = True
    document_separator: Text | None
    sources: Annotated[tuple[CorpusSource, ...], Field(max_length=MAX_SOURCES)]
    begins_with_bos: bool | None = ADDED
    template_sha256: Sha256 | None = ADDED
    template_variables: Annotated[dict[Text, JsonValue], Field(max_length=256)] | None = ADDED
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = ADDED
    skipped_rows: Count | None = ADDED
    document_sources: bool | None = ADDED

    def added(self) -> dict[str, Any]:
        """What a record of version 1 does not have."""
        return {name: value for name, value in self.model_dump().items() if Corpus.model_fields[name].exclude_if}


class Tokenizer(Record):
    """`vocabulary_size` is V: the largest id + 1, added tokens included. `fingerprint` covers behaviour
    (merges, normaliser, pre-tokenizer), `vocabulary_sha256` only which id is which string."""

    vocabulary_size: Annotated[int, Field(ge=1, le=1 << 31)]
    vocabulary_sha256: Sha256
    fingerprint: Sha256


class ArrayLayout(Record):
    """How an array is cut: `shard` entries per object, `chunk` entries per compressed unit of it.

    At 8 bytes per entry no object exceeds `MAX_OBJECT_BYTES`; entries with more are bounded by their own record.
    """

    shard: Annotated[int, Field(ge=1, le=MAX_OBJECT_BYTES // 8)]
    chunk: Annotated[int, Field(ge=1, le=MAX_OBJECT_BYTES // 8)]
    compression: Literal["zstd", "lz4"]

    def shard_range(self, shard: int, entries: int) -> tuple[int, int]:
        """First entry of a shard and the first after it, in an array of `entries` entries."""
        start = shard * self.shard
        return start, min(start + self.shard, entries)

    def check_length(self, entries: int) -> None:
        """Raises ValueError for an array with more than `MAX_SHARDS` shards."""
        if -(-entries // self.shard) > MAX_SHARDS:
            raise ValueError(f"{entries} entries in shards of {self.shard} are more than {MAX_SHARDS} shards")

    @model_validator(mode="after")
    def _divides(self) -> ArrayLayout:
        if self.shard % self.chunk:
            raise ValueError(f"shard {self.shard} is not a multiple of chunk {self.chunk}")
        if self.shard // self.chunk > MAX_CHUNKS:
            raise ValueError(f"a shard of {self.shard} has more than {MAX_CHUNKS} chunks of {self.chunk}")
        return self


class Versions(Record):
    """Library versions, for the reader's information; never compared."""

    libraries: dict[str, Text]

    @classmethod
    def of_this_process(cls) -> Versions:
        """The installed versions of Python and of the libraries that a result depends on."""
        found = {"python": platform.python_version()}
        for name in _LIBRARIES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
        return cls(libraries=found)


class CacheRecord(Record):
    """attributes["logit_cache"] of the root group. Version 2 may have the fields that `Corpus` gained, 1 has none."""

    format_version: Literal[1, 2] = 1
    kind: Literal["cache"] = "cache"
    corpus: Corpus
    tokenizer: Tokenizer
    tokens_layout: ArrayLayout
    documents_layout: ArrayLayout
    created_with: Versions

    @model_validator(mode="after")
    def _bounded(self) -> CacheRecord:
        if self.corpus.documents > self.corpus.positions:
            raise ValueError(f"{self.corpus.documents} documents in {self.corpus.positions} tokens")
        if self.format_version == 1 and self.corpus.added():
            raise ValueError(f"a record of version 1 has no {min(self.corpus.added())}")
        self.tokens_layout.check_length(self.corpus.positions)
        self.documents_layout.check_length(self.corpus.documents)
        return self


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

    method: Literal["top-k", "varopt"] = "top-k"
    k: Annotated[int, Field(ge=1, le=MAX_UINT16)]
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
        """Whether a field is stored: one of `TARGET_FIELDS`, or the tail. Version 1 lacks at most the label's."""
        if field == "tail":
            return self.tail != "unknown"
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
        if self.method == "top-k" and self.has("sampled-logprobs"):
            raise ValueError("sampled-logprobs go with varopt: every id of top-k is certain")
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


class SourceFile(Record):
    """A file that an entry was imported from: its name, without folders, and its content."""

    name: Annotated[str, Field(max_length=255)]
    bytes: Count
    sha256: Sha256


class Alignment(Record):
    """Whether a row of a file is about the token that follows (after) or its own (of), and the evidence.

    `after_nats` and `of_nats`: over the `rows` for which both readings name a token, its mean log-prob by either; of a
    row that does not hold it, the least one of the row. `given`: whether whoever imported the file said which it is.
    """

    reading: Literal["after", "of"]
    given: bool
    rows: Count
    after_nats: float
    of_nats: float


class ImportedFrom(Record):
    """The files of somebody else that an entry's targets are from, and how they were read.

    `format`: the name of the importer. `values`: what the numbers in them are: log-probs over the whole vocabulary,
    probabilities over it, numbers that lack the normaliser (logits, or what was normalised among the ids of a row), or
    the whole distribution (dense). `dropped_ids`: ids that were left out because they had no finite log-prob, or are
    none of the vocabulary; `dropped_mass`: the largest share of a row's mass that ids outside the vocabulary had.
    `error_nats`: of a log-prob as the files have it, where their format rounds. `decisions`: what else was found, and
    how often.
    """

    format: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    files: Annotated[tuple[SourceFile, ...], Field(min_length=1, max_length=MAX_IMPORTED_FILES)]
    values: Literal["logprobs", "probabilities", "unnormalised", "dense"]
    alignment: Alignment
    dropped_ids: Count
    dropped_mass: Annotated[float, Field(ge=0, le=1)]
    error_nats: Annotated[float, Field(ge=0)] | None = None
    decisions: Annotated[tuple[Text, ...], Field(max_length=16)] = ()


class TeacherEntry(Record):
    """attributes["logit_cache"] of teachers/<name>; written once, never rewritten.

    `vocabulary_size` is the V of its targets: the tokenizer's, or fewer ids where the teacher has no column for the
    last ones. No token of the stream is one of those. `made`, since version 2: how the targets were made, by a teacher
    in process (cached), by one behind a server, from somebody's file, from an entry of another vocabulary, or from
    another entry of this one. `imported_from`: that file, also of an entry that was made from an imported one.
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
    created_with: Versions

    @model_validator(mode="after")
    def _agrees(self) -> TeacherEntry:
        if (self.format_version == 1) != (self.made is None):
            raise ValueError("version 2 of an entry states how it was made, and version 1 does not")
        if self.made in (None, "cached") and not self.teacher.loaded:
            raise ValueError("an entry that its teacher made states the digests of that model")
        self.targets.of_version(self.format_version)
        self.encoding.of_version(self.format_version, self.targets)
        if self.targets.k > self.vocabulary_size:
            raise ValueError(f"k {self.targets.k} is larger than the vocabulary {self.vocabulary_size}")
        if (self.windowing.begin_id or 0) >= self.vocabulary_size:
            raise ValueError(f"begin_id {self.windowing.begin_id} is not in the vocabulary of {self.vocabulary_size}")
        if self.targets.order == "embeddings" and self.vocabulary_size > MAX_ORDERED_IDS:
            raise ValueError(f"an order of embeddings is one of at most {MAX_ORDERED_IDS} ids")
        # Sizes are bounded before anything is allocated from them.
        if 4 * self.targets.k * self.layout.shard > MAX_OBJECT_BYTES:
            raise ValueError(f"a shard of {self.layout.shard} positions with k {self.targets.k} exceeds one object")
        self.layout.check_length(self.positions)
        return self


class ObjectDigest(Record):
    """One stored object: its length, its sha256, and its seal, which is checked without reading all of it:
    the sha256 of the shard index at its end followed by the last 4 bytes (crc32c) of every chunk."""

    bytes: Annotated[int, Field(ge=0, le=2 * MAX_OBJECT_BYTES)]
    sha256: Sha256
    seal_sha256: Sha256


class FileDigest(Record):
    """Length and sha256 of one file that is no Zarr array (the tokenizer's)."""

    bytes: Annotated[int, Field(ge=0, le=MAX_OBJECT_BYTES)]
    sha256: Sha256


class ShardStatistics(Record):
    """Sums over the positions of a shard, so that a summary needs no array. Nats, and counts of positions.

    `positions` are those with targets. `entropy_nats` is None where whoever wrote the shard did not know it.
    """

    positions: Count
    labelled: Count
    label_nats: float
    entropy_nats: float | None
    head_mass: float
    head_mass_below_half: Count
    head_mass_below_90: Count
    head_mass_below_99: Count

    def __add__(self, other: ShardStatistics) -> ShardStatistics:
        sums: dict[str, Any] = {}
        for name in ShardStatistics.model_fields:
            one, two = getattr(self, name), getattr(other, name)
            sums[name] = None if one is None or two is None else one + two
        return ShardStatistics(**sums)


class ShardReceipt(Record):
    """Commits one shard of the arrays named in `objects`; `record_sha256` is the record it belongs to."""

    format_version: Literal[1] = 1
    kind: Literal["shard"] = "shard"
    record_sha256: Sha256
    shard: Count
    start: Count
    stop: Positive
    objects: Annotated[dict[str, ObjectDigest], Field(min_length=1, max_length=16)]
    statistics: ShardStatistics | None = None
    seconds: Annotated[float, Field(ge=0)] = 0.0
    written_at: Text
    host: Text


class FilesReceipt(Record):
    """Commits the tokenizer's files."""

    format_version: Literal[1] = 1
    kind: Literal["files"] = "files"
    files: Annotated[dict[str, FileDigest], Field(min_length=1, max_length=64)]


class ReceiptIndex(Record):
    """The sha256 of every receipt in order, and sums over them; written when the last shard is committed."""

    format_version: Literal[1] = 1
    kind: Literal["receipt_index"] = "receipt_index"
    record_sha256: Sha256
    receipts: tuple[Sha256, ...]
    object_bytes: Count
    statistics: ShardStatistics | None = None
    seconds: Annotated[float, Field(ge=0)] = 0.0
