"""`logit-cache import`: files of somebody else → a new cache, or an entry of one whose tokens are the same.

The files are read twice. The first pass writes nothing at the destination: it takes digests, spools the tokens, and
decides what the numbers are. The second writes the entry shard by shard. The same command again does the first pass
again, compares what it found with the record, and writes what is missing.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from logit_cache.corpus.record import stream_record
from logit_cache.corpus.spool import Spool
from logit_cache.corpus.tokenizer import stored_tokenizer
from logit_cache.importing.document import Format, Source
from logit_cache.importing.files import digests
from logit_cache.importing.job import DEFAULT_DENSE_K, ImportJob
from logit_cache.importing.registry import format_of
from logit_cache.importing.shards import CHANGED, ShardSource, write_shards
from logit_cache.importing.survey import Survey, Surveyed
from storage import LogitCache
from storage.cache.corpus_writer import check_destination, is_new, write_corpus
from storage.cache.writer import EntryWriter
from storage.cache.writer import check_destination as check_entry_destination
from storage.errors import IdentityMismatch, InputError
from storage.files import local_path
from storage.format.encoding import token_id_dtype
from storage.format.identity import stream_sha256, vocabulary_size
from storage.format.layout import COMPRESSION, entry_layout
from storage.format.manifest.entry import Execution, Targets, TeacherEntry, Windowing
from storage.format.manifest.imported import ImportedFrom, SourceFile
from storage.format.manifest.shared import Versions
from storage.format.manifest.teacher import NamedIdentity, Teacher
from storage.progress import Track, untracked
from storage.stores import open_store
from student.models.tokenizer import open_tokenizer

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Imported:
    """The entry that was made, or completed."""

    cache: str
    name: str
    format: str
    documents: int
    positions: int
    entry: TeacherEntry


def import_entry(job: ImportJob, track: Track = untracked) -> Imported:
    """Make a cache with the entry, or add the entry to one, or resume either.

    Raises InputError for files without sense, IdentityMismatch where the destination has other tokens, or another entry
    of that name, as of files that have changed since.
    """
    chosen, files = format_of(job.source, job.format)
    new = is_new(open_store(job.out))
    check_destination(job.out)
    if not new:
        check_entry_destination(job.out, job.name)
    tokenizer, tokenizer_files = _tokenizer(job, new)
    ids = vocabulary_size(tokenizer.get_vocab())
    source = Source(files, tokenizer, _settings(job, chosen, files), _column_suffix(job, chosen))
    documents = chosen.documents(source)
    every = [*files, *([source.settings] if source.settings is not None else [])]
    with track("digests", sum(path.stat().st_size for path in every), "bytes") as advance:
        found_files = digests(every, advance)
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        with Spool(Path(folder), token_id_dtype(ids)) as spool, track("read", None, "tokens") as advance:
            survey = Survey(job, chosen, source, ids, spool)
            for document in documents:
                survey.add(document)
                advance(len(document.ids))
            surveyed = survey.decided()
        arrays = spool.arrays()
        cache = _cache(job, spool, arrays, found_files, tokenizer, tokenizer_files)
        writer = EntryWriter.open(job.out, job.name, _entry(job, chosen, cache, surveyed, found_files))
        made = ShardSource(writer.entry, surveyed, arrays["document_starts"], chosen.slack_nats)
        with track(f"import {job.name}", cache.record.corpus.positions, "positions") as advance:
            check = partial(_check_unchanged, every, found_files)
            write_shards(writer, made, chosen.documents(source), check, advance)
        return Imported(job.out, job.name, chosen.name, spool.documents, spool.positions, writer.entry)


def _settings(job: ImportJob, chosen: Format, files: list[Path]) -> Path | None:
    """The file of settings that a format needs: the one that was given, or that beside the data."""
    if chosen.settings is None:
        if job.compression_config is not None:
            raise InputError(f"--compression-config: {chosen.name} files need no settings: leave it out")
        return None
    given = job.compression_config
    path = files[0].parent / chosen.settings if given is None else local_path(given)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, and {chosen.name} files cannot be read without the settings that they were written "
            f"with (k, exact_k, …): give them with --compression-config FILE, from the card or the program of the data"
        )
    return path


def _column_suffix(job: ImportJob, chosen: Format) -> str | None:
    if job.column_suffix is not None and not chosen.column_suffix:
        raise InputError(f"--column-suffix: {chosen.name} files have the columns of one teacher: leave it out")
    return job.column_suffix


def _tokenizer(job: ImportJob, new: bool) -> tuple[Any, dict[str, bytes]]:
    """The tokenizer that was given, or that of the cache at the destination."""
    if job.tokenizer is None and new:
        raise InputError(
            f"{job.out} is new, and the files hold ids without their tokenizer: give the --tokenizer of the teacher, a "
            f"folder, a cache or a hub id"
        )
    return stored_tokenizer(open_tokenizer(job.tokenizer or job.out))


def _cache(
    job: ImportJob,
    spool: Spool,
    arrays: dict[str, Any],
    files: tuple[SourceFile, ...],
    tokenizer: Any,
    tokenizer_files: dict[str, bytes],
) -> LogitCache:
    """The cache at the destination, made of the tokens where there is none yet.

    One that is there must have the same tokens and documents; its loss mask may be its own where the files have none.
    """
    there = None if is_new(open_store(job.out)) else LogitCache.open(job.out)
    if there is None or there.missing_tokens() or not there.record.corpus.tokens_included:
        names = [file.name for file in files[: max(spool.source_documents) + 1]]
        vocabulary, shown = tokenizer.get_vocab(), {"document_sources": True}
        record = stream_record(spool, arrays, names, vocabulary, tokenizer_files, None, shown)
        write_corpus(job.out, record, tokenizer_files, arrays)
    if there is None:
        return LogitCache.open(job.out)
    cache, corpus = there, there.record.corpus
    mask: Any = arrays["loss_mask"] if spool.has_mask else cache.loss_mask
    same = corpus.positions == spool.positions and corpus.documents == spool.documents
    found = stream_sha256(arrays["tokens"], arrays["document_starts"], mask) if same else ""
    differing = [
        f"{name}: the cache has {theirs:,}, the files {ours:,}"
        for name, theirs, ours in (
            ("tokens", corpus.positions, spool.positions),
            ("documents", corpus.documents, spool.documents),
        )
        if theirs != ours
    ]
    if same and found != corpus.stream_sha256:
        differing = [f"stream_sha256: the cache has {corpus.stream_sha256[:12]}…, the files {found[:12]}…"]
    if job.tokenizer is not None and open_tokenizer(job.out).get_vocab() != tokenizer.get_vocab():
        differing.append("tokenizer: the ids of --tokenizer stand for other strings than those of the cache")
    if differing:
        raise IdentityMismatch(
            job.out,
            differing,
            "An entry belongs to the tokens that its teacher read: give a new --out, or the cache of these tokens",
        )
    return cache


def _entry(
    job: ImportJob, chosen: Format, cache: LogitCache, surveyed: Surveyed, files: tuple[SourceFile, ...]
) -> TeacherEntry:
    """The record of the entry: nothing is stated of the teacher but what somebody says its name is."""
    record, dense = cache.record, surveyed.values == "dense"
    k = min(job.k or (DEFAULT_DENSE_K if dense else surveyed.k), surveyed.k)
    tail = surveyed.values != "unnormalised"
    targets: Targets = job.stored_targets(k, surveyed.whole_rows, dense, tail, surveyed.has_label)
    try:
        layout = entry_layout(
            record.corpus.positions, k, 1, COMPRESSION[job.profile], job.shard_tokens, job.chunk_tokens
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return TeacherEntry(
        format_version=2,
        positions=record.corpus.positions,
        vocabulary_size=record.tokenizer.vocabulary_size,
        stream_sha256=record.corpus.stream_sha256,
        tokenizer_fingerprint=record.tokenizer.fingerprint,
        teacher=Teacher(members=(NamedIdentity(source=job.teacher or UNKNOWN),)),
        targets=targets,
        windowing=Windowing(context_tokens=surveyed.longest, stride_tokens=surveyed.longest, isolate_documents=True),
        encoding=job.stored_encoding(),
        layout=layout,
        execution=Execution(device_type=UNKNOWN, batch_windows=1, attention=UNKNOWN, head="general"),
        made="imported",
        imported_from=ImportedFrom(
            format=chosen.name,
            files=files,
            values=surveyed.values,
            alignment=surveyed.alignment,
            dropped_ids=surveyed.dropped,
            dropped_mass=surveyed.strange,
            error_nats=chosen.error_nats,
            decisions=surveyed.decisions,
        ),
        created_with=Versions.of_this_process(),
    )


def _check_unchanged(files: list[Path], found: tuple[SourceFile, ...]) -> None:
    """Raise InputError where a file was changed between the passes, so that its shards are of other rows."""
    for path, file, again in zip(files, found, digests(files, lambda _: None), strict=True):
        if file != again:
            raise InputError(f"{path}: {CHANGED}")
