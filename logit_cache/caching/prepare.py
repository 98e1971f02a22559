"""Preparation of a caching job: its cache, teachers and entry are loaded and checked before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from logit_cache.caching.contexts import windowing_of
from logit_cache.caching.job import CacheJob
from logit_cache.caching.packing import row_lengths
from logit_cache.caching.windows import windows
from storage.cache.checked_array import Stream
from storage.cache.inventory import ROOT_KEY
from storage.cache.positions import source_numbers
from storage.cache.reader import LogitCache
from storage.cache.records import read_record, teacher_folder
from storage.cache.writer import EntryWriter, refuse_other
from storage.errors import CacheNotFound, IdentityMismatch, InputError
from storage.format.layout import COMPRESSION, entry_layout
from storage.format.manifest.entry import Execution, TeacherEntry, Windowing
from storage.format.manifest.shared import ArrayLayout, Versions
from storage.format.manifest.teacher import MOST_PROBES
from storage.format.manifest.teacher import Teacher as TeacherRecord
from storage.progress import silent
from storage.stores import open_store

if TYPE_CHECKING:
    from torch import Tensor

    from teachers.base import Teacher
    from teachers.huggingface.teacher import HuggingFaceTeacher
    from teachers.ranks import Ranks
    from teachers.served.teacher import ServedTeacher


AnyTeacher = TypeVar("AnyTeacher", bound="Teacher | ServedTeacher")


@dataclass(frozen=True)
class PreparedJob(Generic[AnyTeacher]):
    """A job that has passed every check, with nothing written yet; `entry` is the one to create or resume.

    remarks: lines for the log of whoever creates the entry.
    """

    cache: LogitCache
    teacher: AnyTeacher
    entry: TeacherEntry
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class OpenJob:
    """A checked job with its writer open: ready to score shards. `scorer`: the teacher in the sampling order."""

    cache: LogitCache
    teacher: Teacher | ServedTeacher
    scorer: Teacher | ServedTeacher
    writer: EntryWriter


def load_teachers(job: CacheJob, ranks: Ranks | None = None) -> tuple[HuggingFaceTeacher, ...]:
    """The job's teachers on their devices, checked as far as possible without a token stream.

    ranks: the processes of a tensor-parallel job, all of which call this.
    Raises InputError.
    """
    import torch

    from teachers.huggingface.device_map import DeviceMap
    from teachers.huggingface.teacher import DEFAULT_LOGIT_BUDGET_BYTES, HuggingFaceTeacher

    if job.tensor_parallel and ranks is None:
        raise InputError(
            "--tensor-parallel is for cache-logits itself, started by torchrun: leave it out here, or use --device-map"
        )
    device = job.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # float32 on a CPU, where bfloat16 is often emulated; bfloat16 on CUDA devices, which are built for it.
    dtype = job.dtype if job.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
    teachers = tuple(
        HuggingFaceTeacher.load(
            source,
            dtype=dtype,
            device=device,
            revision=revision or None,
            attention=job.attention,
            trust_remote_code=job.trust_remote_code,
            # Members hold a chunk of logits each, all at the same time.
            logit_budget_bytes=DEFAULT_LOGIT_BUDGET_BYTES // len(job.teacher),
            device_map=DeviceMap(job.device_map, job.max_memory, job.offload) if job.device_map else None,
            ranks=ranks,
            on_message=None if ranks is None or ranks.rank == 0 else silent,
        )
        for source, revision in zip(job.teacher, job.revision or ("",) * len(job.teacher), strict=True)
    )
    for source, teacher in zip(job.teacher, teachers, strict=True):
        if job.context_tokens is not None:
            teacher.check_context(job.context_tokens, job.bos_each_window)
        if job.stored_ids > teacher.head_columns:
            raise InputError(
                f"--k {job.stored_ids} is larger than the head of {source} ({teacher.head_columns} columns)"
            )
    return teachers


def open_job(job: CacheJob, teachers: Sequence[HuggingFaceTeacher] = ()) -> OpenJob:
    """Run every check, load the teachers unless given, then create the entry or resume it.

    Nothing is written before all checks have passed. Raises InputError, IdentityMismatch, CacheNotFound.
    """
    if job.is_served:
        return _open_served(job)
    prepared = prepare_job(job, teachers)
    writer = open_writer(job, prepared)
    teacher = prepared.teacher
    return OpenJob(prepared.cache, teacher, in_order(teacher, stored_order(writer, teacher.output_embeddings)), writer)


def _open_served(job: CacheJob) -> OpenJob:
    served = prepare_served(job)
    try:
        writer = open_writer(job, served)
    except IdentityMismatch:
        # Another worker may just have created the entry, with what the servers told it: they are compared with that.
        served = prepare_served(job)
        writer = open_writer(job, served)
    return OpenJob(served.cache, served.teacher, served.teacher, writer)


def stored_order(writer: EntryWriter, embeddings: Callable[[], Tensor]) -> NDArray[np.uint32] | None:
    """The sampling order of an entry, uint32 [V], which is made where there is none yet; None where ids are it.

    embeddings: those of the teacher's head, asked for only where the order is made.
    """
    from teachers.reduction.sampling_order import sampling_order

    return writer.sampling_order(lambda: sampling_order(embeddings()[: writer.entry.vocabulary_size]).numpy())


def in_order(teacher: Teacher, order: NDArray[np.uint32] | None) -> Teacher:
    """A teacher in a sampling order, uint32 [V]; as it is without one."""
    import torch

    return teacher if order is None else teacher.in_order(torch.from_numpy(order.astype(np.int64)))


def check_entry(job: CacheJob, entry: TeacherEntry) -> None:
    """Raise IdentityMismatch where the cache has another entry under the job's name."""
    stored = stored_entry(job.cache, job.name)
    if stored is not None:
        refuse_other(open_store(job.cache), job.name, stored, entry)


def check_stream(job: CacheJob) -> LogitCache:
    """The job's cache, after the checks that need no teacher. Raises InputError, CacheNotFound."""
    cache = LogitCache.open(job.cache)
    vocabulary_size = cache.vocabulary_size
    if job.stored_ids > vocabulary_size:
        raise InputError(
            f"--k {job.stored_ids} is larger than the vocabulary of {job.cache} ({vocabulary_size} ids): "
            f"give at most {vocabulary_size}"
        )
    missing = cache.missing_tokens()
    if missing:
        raise InputError(
            f"{job.cache}: its token stream is not complete ({missing[0][0]}..{missing[-1][1]} is missing): "
            f"run the same logit-cache tokenize command again first"
        )
    if job.sources:
        source_numbers(cache.record, job.sources, job.cache)
    layout_of(job, cache, windowing_of(job, cache, stored_entry(job.cache, job.name))[0])
    return cache


def layout_of(job: CacheJob, cache: LogitCache, windowing: Windowing) -> ArrayLayout:
    """The shards and chunks of a job's entry. Raises InputError for sizes that do not fit together."""
    sizes = job.shard_tokens, job.chunk_tokens
    positions, aligned = cache.record.corpus.positions, aligned_to(windowing)
    try:
        return entry_layout(positions, job.stored_ids, aligned, COMPRESSION[job.profile], *sizes)
    except ValueError as error:
        raise InputError(str(error)) from None


def prepare_job(job: CacheJob, teachers: Sequence[HuggingFaceTeacher] = ()) -> PreparedJob[Teacher]:
    """Run the checks of `open_job`, except the one against a stored entry of that name; returns cache, teacher, entry.

    Writes nothing. For teachers in this process. Raises InputError, IdentityMismatch, CacheNotFound.
    """
    from student.models.tokenizer import begin_id
    from teachers.batch_size import choose_batch_windows
    from teachers.ensemble import EnsembleTeacher
    from teachers.vocabulary import common_vocabulary

    cache = check_stream(job)
    teachers = teachers or load_teachers(job)
    begin = begin_id(job.cache) if job.bos_each_window else None
    vocabulary_size = common_vocabulary(cache, job.teacher, teachers, begin)
    teacher: Teacher = teachers[0]
    if job.combine is not None:
        teacher = EnsembleTeacher(teachers, job.combine, vocabulary_size, job.weight or None)
    recorded = stored_entry(job.cache, job.name)
    limits = [each.max_positions - (begin is not None) for each in teachers if each.max_positions is not None]
    windowing, remark = windowing_of(job, cache, recorded, begin, min(limits, default=None))
    for each in teachers:
        each.check_context(windowing.context_tokens, begin is not None)  # a context that the job did not give
    layout = layout_of(job, cache, windowing)
    batch_windows = job.batch_windows or (recorded.execution.batch_windows if recorded else None)
    rows = _rows(cache, teacher, windowing, layout, recorded)
    execution = execution_of(
        teacher,
        batch_windows or choose_batch_windows(teacher, windowing.input_tokens, rows.get("rows") == "packed"),
        rows,
    )
    identity = teacher.identity
    entry = _wanted_entry(job, cache, recorded, windowing, layout, execution, identity, vocabulary_size, "cached")
    return PreparedJob(cache, teacher, entry, () if remark is None else (remark,))


def prepare_served(job: CacheJob) -> PreparedJob[ServedTeacher]:
    """`prepare_job` of a teacher behind servers. Also raises ServersLost."""
    from student.models.tokenizer import begin_id
    from teachers.served.teacher import ServedTeacher

    cache = check_stream(job)
    limits = (job.requests, job.request_seconds, job.patience_seconds)
    teacher = ServedTeacher.connect(job.teacher, job.served_model, max(1, job.stored_ids), *limits)
    begin = begin_id(job.cache) if job.bos_each_window else None
    recorded = stored_entry(job.cache, job.name)
    limit = None if teacher.max_positions is None else teacher.max_positions - (begin is not None)
    windowing, remark = windowing_of(job, cache, recorded, begin, limit)
    teacher.check_context(windowing.context_tokens, begin is not None)
    check_tokenizer(teacher, cache, "Make a cache with this model's tokenizer (logit-cache tokenize --tokenizer)")
    identity = teacher.identify(first_tokens(cache, windowing), recorded.teacher.served if recorded else None)
    layout = layout_of(job, cache, windowing)
    # One window a request; how requests share a batch is the server's, and no two runs do it alike.
    execution = Execution(device_type="server", batch_windows=1, attention="server", head="general")
    size = cache.vocabulary_size
    entry = _wanted_entry(
        job, cache, recorded, windowing, layout, execution, identity, size, "served", teacher.versions
    )
    return PreparedJob(cache, teacher, entry, () if remark is None else (remark,))


def check_tokenizer(teacher: ServedTeacher, cache: LogitCache, remedy: str) -> None:
    """Raise IdentityMismatch where servers tokenize otherwise than the cache was, by probes and texts of its stream."""
    from student.models.tokenizer import tokenizer_of
    from teachers.served.teacher import stream_samples

    samples = stream_samples(cache.tokens.read, cache.record.corpus.positions)
    teacher.check_tokenizer(tokenizer_of(cache.tokenizer_files(), cache.url), samples, remedy)


def first_tokens(cache: LogitCache, windowing: Windowing) -> NDArray[np.int64]:
    """The tokens by which a served teacher is known again: the first of the stream, no more than a window has."""
    stop = min(MOST_PROBES + 1, windowing.context_tokens, cache.record.corpus.positions)
    return cache.tokens.read(0, stop).astype(np.int64)


def _wanted_entry(
    job: CacheJob,
    cache: LogitCache,
    recorded: TeacherEntry | None,
    windowing: Windowing,
    layout: ArrayLayout,
    execution: Execution,
    teacher: TeacherRecord,
    vocabulary_size: int,
    made: Literal["cached", "served"],
    versions: Mapping[str, str] | None = None,
) -> TeacherEntry:
    """The record of the job's entry. recorded: the stored one, which decides what the job does not; versions: of
    programs beside those of this process."""
    targets = job.stored_targets(recorded, cache.record.corpus.has_loss_mask, windowing.context_tokens)
    version: Literal[1, 2] = job.version(recorded)
    if targets.positions == "trained":
        loss_mask(cache, job.cache)
    entry = TeacherEntry(
        format_version=version,
        positions=cache.record.corpus.positions,
        vocabulary_size=vocabulary_size,
        stream_sha256=cache.record.corpus.stream_sha256,
        tokenizer_fingerprint=cache.record.tokenizer.fingerprint,
        teacher=teacher,
        targets=targets,
        windowing=windowing,
        encoding=job.stored_encoding(targets, recorded),
        layout=layout,
        execution=execution,
        made=None if version == 1 else made,
        created_with=Versions(libraries=Versions.of_this_process().libraries | dict(versions or {})),
    )
    if recorded is not None and job.shard_tokens in (None, recorded.layout.shard) and job.chunk_tokens is None:
        # Another version of this program may have chosen others.
        layout = recorded.layout.model_copy(update={"compression": layout.compression})
        entry = entry.model_copy(update={"layout": layout})
    return entry


def aligned_to(windowing: Windowing) -> int:
    """Positions of which chunks are multiples, so that no window is cut; documents end where they do."""
    return 1 if windowing.isolate_documents else windowing.stride_tokens


def loss_mask(cache: LogitCache, url: str) -> Stream:
    """Which positions are trained. Raises InputError for a cache, named by its URL, that has no loss mask."""
    mask = cache.loss_mask
    if mask is None:
        raise InputError(f"--positions trained: {url} has no loss mask, so all its positions are trained: leave it out")
    return mask


def _rows(
    cache: LogitCache, teacher: Teacher, windowing: Windowing, layout: ArrayLayout, recorded: TeacherEntry | None
) -> dict[str, Any]:
    """How documents that must not see each other are read: fields of `Execution`; none for an entry that was begun with
    a window for each of them."""
    before = None if recorded is None else recorded.execution
    if not windowing.isolate_documents or (before is not None and before.rows is None):
        return {}
    if before is not None and before.rows == "sorted":
        return {"rows": "sorted"}
    lengths = None if before is None else before.row_tokens
    if lengths is None:
        positions, lead = cache.record.corpus.positions, windowing.input_tokens - windowing.context_tokens
        first = windows(0, min(layout.shard, positions), positions, windowing, cache.document_starts)
        sizes = [window.stop - window.start + lead for window in first]
        lengths = row_lengths(windowing.input_tokens, sizes)
    return {"rows": "packed", "row_tokens": lengths} if teacher.packs(lengths[-1]) else {"rows": "sorted"}


def execution_of(teacher: Teacher, batch_windows: int, rows: Mapping[str, Any]) -> Execution:
    """How a teacher runs here: what an entry records of it, as it can change the last bits of targets."""
    return Execution(
        device_type=teacher.device.type,
        batch_windows=batch_windows,
        attention=teacher.attention,
        head=teacher.head,
        tensor_parallel=None if teacher.shard is None else teacher.shard.ranks.size,
        **rows,
    )


def open_writer(job: CacheJob, prepared: PreparedJob[Any]) -> EntryWriter:
    """Create the entry of a prepared job, or resume it. Raises IdentityMismatch for another entry of that name."""
    entry = prepared.entry
    try:
        writer = EntryWriter.open(job.cache, job.name, entry)
        for remark in prepared.remarks if writer.created else ():
            logging.getLogger(__name__).warning("%s: %s", job.cache, remark)
        return writer
    except IdentityMismatch:
        stored = stored_entry(job.cache, job.name)
        if stored is None or job.batch_windows is not None:
            raise
    # Another worker has just created the entry, with the batch size that suits its device.
    execution = entry.execution.model_copy(update={"batch_windows": stored.execution.batch_windows})
    return EntryWriter.open(job.cache, job.name, entry.model_copy(update={"execution": execution}))


def stored_entry(url: str, name: str) -> TeacherEntry | None:
    """The record of an entry; None where there is none of that name."""
    try:
        return read_record(open_store(url), f"{teacher_folder(name)}{ROOT_KEY}", TeacherEntry)
    except CacheNotFound:
        return None
