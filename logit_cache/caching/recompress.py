"""A teacher entry rewritten smaller, without its teacher: fewer ids, coarser codes, another codec, other shards.

The new entry names its source (`derived_from`, the digest of the source's record), and is written shard by shard like
any other: a killed run resumes where it stopped. Dropped information cannot be restored, so a larger K, a larger mass
or finer log-probs are refused.

The new entry has no fidelity report: the source's does not hold for other targets, and measuring their distance from
the teacher takes the teacher.

A step is kept, or at least doubled. Kept, codes stay as they are; doubled or more, the rounding errors of all steps
that a value went through (half a step each) sum to less than the last step. So in every derived entry a log-prob, and a
tail that absorbed some of them, is within one whole `step_nats` of the teacher's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import model_validator

from logit_cache.caching.job import EntryName, KeptIds, Mass, Positive, StepNats
from storage.cache.reader import LogitCache, TeacherTargets
from storage.cache.writer import EntryWriter, check_destination
from storage.config import Settings
from storage.errors import IdentityMismatch, IncompleteCache, InputError
from storage.format.encoding import DEFAULT_STEP_NATS, MAX_STEP_NATS, logprob_floor
from storage.format.layout import COMPRESSION, Profile, entry_layout
from storage.format.manifest import Encoding, TeacherEntry, Versions
from storage.format.pruning import prune
from storage.format.sealing import digest
from storage.text import ranges_in_words


class RecompressJob(Settings):
    """The fields of `logit-cache recompress`. A field that is None keeps the source's value."""

    cache: str
    name: EntryName
    to: EntryName
    out: str | None = None
    k: KeptIds | None = None
    top_p: Mass | None = None
    profile: Profile | None = None
    encoding: Literal["codes", "float32"] | None = None
    step_nats: StepNats | None = None
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None

    @model_validator(mode="after")
    def _step_fits_encoding(self) -> RecompressJob:
        if self.encoding == "float32" and self.step_nats is not None:
            raise ValueError("--step-nats is the unit of codes, and --encoding float32 has none: leave one of them out")
        return self

    @property
    def destination(self) -> str:
        """The cache that receives the new entry."""
        return self.out or self.cache


@dataclass(frozen=True)
class Recompressed:
    """The source and the new entry, compared. Bytes are of all array objects; head masses are means over positions."""

    cache: str
    name: str
    derived_from: str
    positions: int
    k_before: int
    k_after: int
    bytes_before: int
    bytes_after: int
    head_mass_before: float | None
    head_mass_after: float | None


def recompress(job: RecompressJob, progress: Callable[[int], None] | None = None) -> Recompressed:
    """Write the new entry, or resume an interrupted one; `progress` receives the positions written since its last call.

    Raises InputError for a change that the source does not allow, IncompleteCache when shards of it are missing, and
    IdentityMismatch when the destination is a cache of other tokens, or has another entry of that name. Nothing is
    written before all of these checks.
    """
    source = LogitCache.open(job.cache).teacher(job.name)
    _check_destination(job, source)
    entry = derived_entry(source.entry, job)
    writer = EntryWriter.open(job.destination, job.to, entry)
    floor = logprob_floor(entry.encoding.step_nats or MAX_STEP_NATS)
    for shard in writer.pending():
        began = time.monotonic()
        targets = source.read(*entry.layout.shard_range(shard, entry.positions))
        writer.commit(shard, prune(targets, entry.targets.k, entry.targets.top_p, floor), began)
        if progress is not None:
            progress(len(targets))
    writer.finish()
    made = LogitCache.open(job.destination).teacher(job.to)
    return Recompressed(
        cache=job.destination,
        name=job.to,
        derived_from=source.record_sha256,
        positions=entry.positions,
        k_before=source.entry.targets.k,
        k_after=entry.targets.k,
        bytes_before=source.stored_bytes(),
        bytes_after=made.stored_bytes(),
        head_mass_before=_head_mass(source),
        head_mass_after=_head_mass(made),
    )


def derived_entry(source: TeacherEntry, job: RecompressJob) -> TeacherEntry:
    """The record of the new entry. Raises InputError for a change that the source does not allow, and for no change."""
    if source.targets.method != "top-k":
        kinds = {"-k": job.k, "--top-p": job.top_p, "--encoding": job.encoding, "--step-nats": job.step_nats}
        for option, value in kinds.items():
            if value is not None:
                raise InputError(
                    f"{option} cannot be applied to {job.name}: its ids are a sample ({source.targets.method}), which "
                    f"is unbiased only as a whole; only --profile, --shard-tokens and --chunk-tokens can change"
                )
    changes: dict[str, Any] = {
        "targets": source.targets.model_copy(update={"k": _k(source, job), "top_p": _top_p(source, job)}),
        "encoding": _encoding(source, job),
    }
    changes["layout"] = _layout(source, job, changes["targets"].k)
    if all(getattr(source, name) == value for name, value in changes.items()):
        raise InputError(
            f"{job.name} is already as asked for: give a smaller -k, --top-p, a larger --step-nats, another "
            f"--profile, other --shard-tokens or --chunk-tokens; logit-cache push copies an entry as it is"
        )
    fields = dict(source) | changes | {"derived_from": digest(source), "created_with": Versions.of_this_process()}
    return TeacherEntry.model_validate(fields)


def _k(source: TeacherEntry, job: RecompressJob) -> int:
    if job.k is not None and job.k > source.targets.k:
        raise InputError(
            f"-k {job.k}: {job.name} holds {source.targets.k} ids per position: give at most {source.targets.k}"
        )
    return job.k or source.targets.k


def _top_p(source: TeacherEntry, job: RecompressJob) -> float | None:
    before = source.targets.top_p
    if job.top_p is not None and before is not None and job.top_p > before:
        raise InputError(f"--top-p {job.top_p:g}: the rows of {job.name} were already cut at a mass of {before:g}")
    return job.top_p or before


def _encoding(source: TeacherEntry, job: RecompressJob) -> Encoding:
    before = source.encoding
    kind = job.encoding or ("codes" if job.step_nats is not None else before.kind)
    if kind == "float32":
        if before.kind == "codes":
            raise InputError(
                f"--encoding float32: {job.name} stores codes of {before.step_nats:g} nat; float32 would cost more "
                f"bytes and be no more exact"
            )
        return before
    step = job.step_nats or before.step_nats or DEFAULT_STEP_NATS
    if before.step_nats is not None and step != before.step_nats and step < 2 * before.step_nats:
        raise InputError(
            f"--step-nats {step:g}: {job.name} stores codes of {before.step_nats:g} nat; keep them, or take at least "
            f"{2 * before.step_nats:g}, so that the errors of both stay below one step"
        )
    return Encoding(kind="codes", step_nats=step, mantissa_bits=min(12, before.mantissa_bits or 12))


def _layout(source: TeacherEntry, job: RecompressJob, k: int) -> Any:
    compression = COMPRESSION[job.profile] if job.profile else source.layout.compression
    if job.shard_tokens is None and job.chunk_tokens is None:
        return source.layout.model_copy(update={"compression": compression})
    stride = source.windowing.stride_tokens
    try:
        return entry_layout(source.positions, k, stride, compression, job.shard_tokens, job.chunk_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None


def _check_destination(job: RecompressJob, source: TeacherTargets) -> None:
    if job.to == job.name and job.out is None:
        raise InputError(f"--to {job.to}: that is the entry itself, which is never rewritten: give the new one a name")
    missing = source.missing()
    if missing:
        raise IncompleteCache(
            f"{job.cache}: {job.name} lacks {ranges_in_words(missing)}: complete it with the same cache-logits command "
            f"first"
        )
    check_destination(job.destination, job.to)
    cache, entry = LogitCache.open(job.destination), source.entry
    pairs = {
        "stream_sha256": (entry.stream_sha256, cache.record.corpus.stream_sha256),
        "tokenizer_fingerprint": (entry.tokenizer_fingerprint, cache.record.tokenizer.fingerprint),
    }
    differing = [f"{name}: {job.name} has {a!r}, the cache {b!r}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise IdentityMismatch(
            job.destination,
            differing,
            "An entry belongs to the tokens that its teacher read: give --out a cache of the same stream, or leave it "
            "out and push the new entry afterwards",
        )
    if entry.targets.has_label_logprob and not cache.record.corpus.tokens_included:
        raise InputError(
            f"{job.destination} was shared without its tokens, and {job.name} holds label_logprob, which reveals many "
            f"of them: make the new entry beside its source, then logit-cache push --without-tokens"
        )


def _head_mass(targets: TeacherTargets) -> float | None:
    statistics, _ = targets.statistics()
    return statistics.head_mass / statistics.positions if statistics is not None else None
