"""What `cache-logits` is asked to do, and how a job becomes an entry, a teacher and a writer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from storage.cache.inventory import ROOT_KEY
from storage.cache.reader import LogitCache
from storage.cache.records import read_record, teacher_folder
from storage.cache.writer import EntryWriter, refuse_other
from storage.errors import CacheNotFound, IdentityMismatch, InputError
from storage.format.encoding import DEFAULT_STEP_NATS, MAX_STEP_NATS, MAX_UINT16, MIN_STEP_NATS
from storage.format.identity import differing_entries
from storage.format.layout import COMPRESSION, Profile, entry_layout
from storage.format.manifest import TEACHER_NAME, Encoding, Execution, Targets, TeacherEntry, Versions, Windowing
from storage.stores import open_store

if TYPE_CHECKING:
    from teachers.base import Teacher
    from teachers.huggingface.teacher import HuggingFaceTeacher
    from teachers.ranks import Ranks

Positive = Annotated[int, Field(ge=1)]
Source = Annotated[str, Field(min_length=1)]


class CacheJob(BaseModel):
    """The fields of `cache-logits`, as flags or in a YAML file. Lengths are in tokens, steps in nats.

    Several teachers are one ensemble; `weight` and `revision` are given once for each of them, or not at all. A `top_p`
    alone asks for top-k targets, which it cuts; else the default is varopt (docs/decisions/0012).
    `fidelity_positions`, of the report on a complete entry, is no part of the entry's identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: str
    teacher: Annotated[tuple[Source, ...], Field(min_length=1, max_length=64)]
    combine: Literal["logit-mean", "mixture"] | None = None
    weight: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    name: Annotated[str, Field(pattern=f"^{TEACHER_NAME}$")]
    targets: Literal["topk", "varopt"] = "varopt"
    k: Annotated[int, Field(ge=1, le=MAX_UINT16)] = 64
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    head_ids: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 48)] | None = None
    target_temperature: float | None = None
    context_tokens: Positive = 128
    stride_tokens: Positive | None = None
    isolate_documents: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    max_memory: tuple[str, ...] = ()
    offload: Literal["cpu", "disk"] | None = None
    tensor_parallel: bool = False
    encoding: Literal["codes", "float32"] = "codes"
    step_nats: Annotated[float, Field(ge=MIN_STEP_NATS, le=MAX_STEP_NATS)] = DEFAULT_STEP_NATS
    profile: Profile = "small"
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None
    batch_windows: Positive | None = None
    fidelity_positions: Annotated[int, Field(ge=0, le=1 << 17)] = 2_048
    revision: tuple[str, ...] = ()
    attention: str | None = None
    trust_remote_code: bool = False

    @field_validator("teacher", "weight", "revision", "max_memory", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value

    @model_validator(mode="before")
    @classmethod
    def _a_mass_cuts_top_k(cls, fields: Any) -> Any:
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
                f"--target-temperature {self.target_temperature:g}: ids are drawn for temperature 1 or 2, at which "
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
            raise ValueError(f"{count} times --teacher: say with --combine logit-mean or mixture what is made of them")
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
        """The record of what is stored for a position."""
        if self.targets == "topk":
            return Targets(k=self.k, top_p=self.top_p)
        return Targets(
            method="varopt",
            k=self.k,
            head_ids=self.head_ids or None,
            seed=self.seed or 0,
            temperature=self.target_temperature or 1.0,
        )


@dataclass(frozen=True)
class PreparedJob:
    """A job that has passed every check, before anything is written; `entry` is what it would make, or go on with."""

    cache: LogitCache
    teacher: Teacher
    entry: TeacherEntry


@dataclass(frozen=True)
class OpenJob:
    """A job whose inputs have been checked: ready to build shards."""

    cache: LogitCache
    teacher: Teacher
    writer: EntryWriter


def load_teachers(job: CacheJob, ranks: Ranks | None = None) -> tuple[HuggingFaceTeacher, ...]:
    """The job's teachers on their devices, checked as far as that goes without a token stream.

    ranks: the processes of a tensor-parallel job, all of which call this.
    Raises InputError, and IdentityMismatch for members of an ensemble whose tokenizers differ.
    """
    from teachers.huggingface.device_map import DeviceMap
    from teachers.huggingface.teacher import DEFAULT_LOGIT_BUDGET_BYTES, HuggingFaceTeacher

    if job.tensor_parallel and ranks is None:
        raise InputError(
            "--tensor-parallel is for cache-logits itself, started by torchrun: leave it out here, or use --device-map"
        )
    device_type, dtype = _device_and_dtype(job)
    teachers = tuple(
        HuggingFaceTeacher.load(
            source,
            dtype=dtype,
            device=device_type if job.device == "auto" else job.device,
            revision=revision or None,
            attention=job.attention,
            trust_remote_code=job.trust_remote_code,
            # Members hold a chunk of logits each, all at the same time.
            logit_budget_bytes=DEFAULT_LOGIT_BUDGET_BYTES // len(job.teacher),
            device_map=DeviceMap(job.device_map, job.max_memory, job.offload) if job.device_map else None,
            ranks=ranks,
            on_message=None if ranks is None or ranks.rank == 0 else _say_nothing,
        )
        for source, revision in zip(job.teacher, job.revision or ("",) * len(job.teacher), strict=True)
    )
    for source, teacher in zip(job.teacher, teachers, strict=True):
        teacher.check_context(job.context_tokens)
        if job.k > teacher.head_columns:
            raise InputError(f"--k {job.k} is larger than the head of {source} ({teacher.head_columns} columns)")
    named = [(source, teacher.vocabulary()) for source, teacher in zip(job.teacher, teachers, strict=True)]
    known = [(source, vocabulary) for source, vocabulary in named if vocabulary is not None]
    for source, vocabulary in known[1:]:
        _check_vocabulary(
            known[0][1], vocabulary, source, known[0][0], "Members of an ensemble must share their tokenizer's ids."
        )
    return teachers


def _say_nothing(message: str) -> None:
    """What rank 0 remarks need not be said by the others."""


def open_job(job: CacheJob, teachers: Sequence[HuggingFaceTeacher] = ()) -> OpenJob:
    """Check everything that can be wrong, load the teachers unless given, then create the entry or go on with it.

    Nothing is written before all checks have passed. Raises InputError, IdentityMismatch, CacheNotFound.
    """
    prepared = prepare_job(job, teachers)
    return OpenJob(prepared.cache, prepared.teacher, open_writer(job, prepared.entry))


def check_entry(job: CacheJob, entry: TeacherEntry) -> None:
    """Raise IdentityMismatch where the cache has another entry under the job's name."""
    stored = _stored_entry(job)
    if stored is not None:
        refuse_other(open_store(job.cache), job.name, stored, entry)


def check_stream(job: CacheJob) -> LogitCache:
    """The job's cache, after the checks that need no teacher. Raises InputError, CacheNotFound."""
    cache = LogitCache.open(job.cache)
    vocabulary_size = cache.vocabulary_size
    if job.k > vocabulary_size:
        raise InputError(
            f"--k {job.k} is larger than the vocabulary of {job.cache} ({vocabulary_size} ids): "
            f"give at most {vocabulary_size}"
        )
    missing = cache.missing_tokens()
    if missing:
        raise InputError(
            f"{job.cache}: its token stream is not complete ({missing[0][0]}..{missing[-1][1]} is missing): "
            f"run the same logit-cache tokenize command again first"
        )
    return cache


def prepare_job(job: CacheJob, teachers: Sequence[HuggingFaceTeacher] = ()) -> PreparedJob:
    """The checks of `open_job`, but for the one against an entry of that name, and what follows from them.

    Writes nothing.
    """
    from teachers.batch_size import choose_batch_windows

    cache = check_stream(job)
    vocabulary_size = cache.vocabulary_size
    try:
        layout = entry_layout(
            cache.record.corpus.positions,
            job.k,
            job.stride,
            COMPRESSION[job.profile],
            job.shard_tokens,
            job.chunk_tokens,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    teacher = _one_teacher(job, cache, teachers or load_teachers(job))
    entry = TeacherEntry(
        positions=cache.record.corpus.positions,
        vocabulary_size=vocabulary_size,
        stream_sha256=cache.record.corpus.stream_sha256,
        tokenizer_fingerprint=cache.record.tokenizer.fingerprint,
        teacher=teacher.identity,
        targets=job.stored_targets(),
        windowing=Windowing(
            context_tokens=job.context_tokens, stride_tokens=job.stride, isolate_documents=job.isolate_documents
        ),
        encoding=Encoding(
            kind=job.encoding,
            step_nats=job.step_nats if job.encoding == "codes" else None,
            mantissa_bits=12 if job.encoding == "codes" else 23,
        ),
        layout=layout,
        execution=Execution(
            device_type=teacher.device.type,
            batch_windows=job.batch_windows
            or _recorded_batch_windows(job)
            or choose_batch_windows(teacher, job.context_tokens),
            attention=teacher.attention,
            head=teacher.head,
            tensor_parallel=None if teacher.shard is None else teacher.shard.ranks.size,
        ),
        created_with=Versions.of_this_process(),
    )
    return PreparedJob(cache, teacher, entry)


def open_writer(job: CacheJob, entry: TeacherEntry) -> EntryWriter:
    """Create the entry that a prepared job would make, or go on with it. Raises IdentityMismatch."""
    try:
        return EntryWriter.open(job.cache, job.name, entry)
    except IdentityMismatch:
        recorded = _recorded_batch_windows(job)
        if job.batch_windows is not None or recorded in (None, entry.execution.batch_windows):
            raise
    # Another worker made the entry at this moment, and its device made it choose otherwise.
    execution = entry.execution.model_copy(update={"batch_windows": recorded})
    return EntryWriter.open(job.cache, job.name, entry.model_copy(update={"execution": execution}))


def _recorded_batch_windows(job: CacheJob) -> int | None:
    """The batch of an entry that is there already; None where there is none."""
    stored = _stored_entry(job)
    return None if stored is None else stored.execution.batch_windows


def _stored_entry(job: CacheJob) -> TeacherEntry | None:
    try:
        return read_record(open_store(job.cache), f"{teacher_folder(job.name)}{ROOT_KEY}", TeacherEntry)
    except CacheNotFound:
        return None


def _device_and_dtype(job: CacheJob) -> tuple[str, Literal["float32", "bfloat16", "float16"]]:
    import torch

    device = job.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # float32 on a CPU, where bfloat16 is often emulated; bfloat16 where it is what the hardware is built for.
    return device, job.dtype if job.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")


def _one_teacher(job: CacheJob, cache: LogitCache, teachers: Sequence[HuggingFaceTeacher]) -> Teacher:
    """The teacher, or the ensemble of them, after a check that each can score the ids of the cache.

    A model without tokenizer files can only be checked by its head.
    """
    from logit_cache.corpus import cache_vocabulary
    from teachers.ensemble import EnsembleTeacher

    vocabulary_size, ours = cache.vocabulary_size, None
    for source, teacher in zip(job.teacher, teachers, strict=True):
        if teacher.head_columns < vocabulary_size:
            raise InputError(
                f"{source}: its head has {teacher.head_columns} columns, the tokenizer of {job.cache} has "
                f"{vocabulary_size} ids; a teacher must be able to score every id: use the teacher that this "
                f"tokenizer belongs to, or make a cache with the teacher's tokenizer"
            )
        theirs = teacher.vocabulary()
        if theirs is not None:
            ours = ours or cache_vocabulary(cache)
            remedy = f"Make a cache with this teacher's tokenizer: logit-cache tokenize --tokenizer {source}"
            _check_vocabulary(ours, theirs, source, job.cache, remedy)
    if job.combine is None:
        return teachers[0]
    return EnsembleTeacher(teachers, job.combine, vocabulary_size, job.weight or None)


def _check_vocabulary(ours: dict[str, int], theirs: dict[str, int], source: str, other: str, remedy: str) -> None:
    if ours != theirs:
        raise IdentityMismatch(
            f"{source}: its tokenizer is not the one of {other}", differing_entries(ours, theirs), remedy
        )
