"""What `cache-logits` is asked to do, and how a job becomes an entry, a teacher and a writer."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.encoding import DEFAULT_STEP_NATS, MAX_STEP_NATS, MAX_UINT16, MIN_STEP_NATS
from storage.errors import IdentityMismatch, InputError
from storage.format import entry_layout
from storage.manifest import TEACHER_NAME, Encoding, Execution, Targets, TeacherEntry, Versions, Windowing
from storage.reader import LogitCache
from storage.vocabulary import differing_entries
from storage.writer import EntryWriter

if TYPE_CHECKING:
    from teachers.base import Teacher
    from teachers.huggingface import HuggingFaceTeacher

Positive = Annotated[int, Field(ge=1)]

_LIBRARIES = ("logit-cache", "torch", "transformers", "tokenizers", "zarr", "numcodecs", "numpy")
# Tokens in one forward pass. On a CPU larger batches only cost memory; on a GPU they fill it.
_BATCH_TOKENS = {"cpu": 4_096, "cuda": 32_768}


class CacheJob(BaseModel):
    """The fields of `cache-logits`, as flags or in a YAML file. Lengths are in tokens, steps in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: str
    teacher: str
    name: Annotated[str, Field(pattern=f"^{TEACHER_NAME}$")]
    k: Annotated[int, Field(ge=1, le=MAX_UINT16)] = 64
    context_tokens: Positive = 128
    stride_tokens: Positive | None = None
    isolate_documents: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    encoding: Literal["codes", "float32"] = "codes"
    step_nats: Annotated[float, Field(ge=MIN_STEP_NATS, le=MAX_STEP_NATS)] = DEFAULT_STEP_NATS
    compression: Literal["zstd", "lz4"] = "zstd"
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None
    batch_windows: Positive | None = None
    revision: str | None = None
    attention: str | None = None
    trust_remote_code: bool = False

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


@dataclass(frozen=True)
class OpenJob:
    """A job whose inputs have been checked: ready to build shards."""

    cache: LogitCache
    teacher: Teacher
    writer: EntryWriter


def load_teacher(job: CacheJob) -> HuggingFaceTeacher:
    """The job's teacher on its device, checked as far as that goes without a token stream. Raises InputError."""
    from teachers.huggingface import HuggingFaceTeacher

    device_type, dtype = _device_and_dtype(job)
    teacher = HuggingFaceTeacher.load(
        job.teacher,
        dtype=dtype,
        device=device_type if job.device == "auto" else job.device,
        revision=job.revision,
        attention=job.attention,
        trust_remote_code=job.trust_remote_code,
    )
    teacher.check_context(job.context_tokens)
    if job.k > teacher.head_columns:
        raise InputError(f"--k {job.k} is larger than the head of {job.teacher} ({teacher.head_columns} columns)")
    return teacher


def open_job(job: CacheJob, teacher: HuggingFaceTeacher | None = None) -> OpenJob:
    """Check everything that can be wrong, load the teacher unless it is given, then create the entry or go on with it.

    Nothing is written before all checks have passed. Raises InputError, IdentityMismatch, CacheNotFound.
    """
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
    try:
        layout = entry_layout(
            cache.record.corpus.positions, job.k, job.stride, job.compression, job.shard_tokens, job.chunk_tokens
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    teacher = teacher or load_teacher(job)
    if teacher.head_columns < vocabulary_size:
        raise InputError(
            f"{job.teacher}: its head has {teacher.head_columns} columns, the tokenizer of {job.cache} has "
            f"{vocabulary_size} ids; a teacher must be able to score every id: use the teacher that this tokenizer "
            f"belongs to, or make a cache with the teacher's tokenizer"
        )
    _check_vocabulary(job, cache, teacher.vocabulary())
    entry = TeacherEntry(
        positions=cache.record.corpus.positions,
        vocabulary_size=vocabulary_size,
        stream_sha256=cache.record.corpus.stream_sha256,
        tokenizer_fingerprint=cache.record.tokenizer.fingerprint,
        teacher=teacher.identity,
        targets=Targets(k=job.k),
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
            or max(1, _BATCH_TOKENS.get(teacher.device.type, _BATCH_TOKENS["cpu"]) // job.context_tokens),
            attention=teacher.attention,
            head=teacher.head,
        ),
        created_with=library_versions(),
    )
    return OpenJob(cache, teacher, EntryWriter.open(job.cache, job.name, entry))


def _device_and_dtype(job: CacheJob) -> tuple[str, Literal["float32", "bfloat16", "float16"]]:
    import torch

    device = job.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # float32 on a CPU, where bfloat16 is often emulated; bfloat16 where it is what the hardware is built for.
    return device, job.dtype if job.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")


def _check_vocabulary(job: CacheJob, cache: LogitCache, theirs: dict[str, int] | None) -> None:
    """Refuse a teacher of another tokenizer; a model without tokenizer files can only be checked by its head."""
    if theirs is None:
        return
    from logit_cache.corpus import cache_vocabulary

    ours = cache_vocabulary(cache)
    if ours != theirs:
        raise IdentityMismatch(
            f"{job.teacher}: its tokenizer is not the one of {job.cache}",
            differing_entries(ours, theirs),
            "Make a cache with this teacher's tokenizer: logit-cache tokenize --tokenizer " + job.teacher,
        )


def library_versions() -> Versions:
    """Versions of what a result depends on, for the record."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Versions(libraries=found)
