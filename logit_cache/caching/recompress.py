"""A teacher entry rewritten smaller, without its teacher: fewer ids, fields or positions, coarser codes, another codec,
other shards; or in version 2 of the format.

The new entry names its source (`derived_from`, the digest of the source's record), and is written shard by shard like
any other: a killed run resumes where it stopped. Dropped information cannot be restored, so a larger K, a larger mass,
finer log-probs or a field that the source lacks are refused.

The new entry has no fidelity report: the source's does not hold for other targets, and measuring their distance from
the teacher takes the teacher.

The version is the source's, unless something is asked for that version 1 has not: fields, positions, codes of sampled
log-probs, and whatever changes the values of a sample. Of version 1, a sample is kept as it is or not at all: its
masses are rounded one by one, so that its weights do not sum to 1.

Errors. A step is kept, or at least doubled. Kept, codes stay as they are; doubled or more, the rounding errors of all
steps that a value went through (half a step each) sum to less than the last step. So in every derived entry of version
1 a log-prob, and a tail that absorbed some of them, is within one whole `step_nats` of the teacher's. Of version 2:

    certain log-probs    their distances along a row are within one `step_nats`, as in version 1, and the log-probs
                         move with the masses
    log(R / P)           is rounded again, by half a `step_nats` at most, each time that ids join R or the step changes
    sampled log-probs    are rounded again at random, by less than one `sampled_step_nats`, each time that the weight of
                         a sampled id or a step changes; the mean of 1 / p stays what it was
    label, entropy, half-tail   from version 1 by half a `value_step_nats`; from then on as they are

for P the mass of the certain ids of a row and R that outside them (`storage.format.version_2`). From an entry of
version 1 P and R, which sum to 1 but for their rounding there, are divided by their sum. What is stored as float32
stays exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray
from pydantic import model_validator

from logit_cache.caching.job import EntryName, FieldNames, KeptIds, Mass, Positive, Seed, StepNats, stored_fields
from logit_cache.caching.prepare import loss_mask
from storage.cache.checked_array import Stream
from storage.cache.reader import LogitCache, TeacherTargets
from storage.cache.writer import EntryWriter, check_destination
from storage.config import Settings
from storage.errors import IdentityMismatch, IncompleteCache, InputError
from storage.format.encoding import (
    DEFAULT_SAMPLED_STEP_NATS,
    DEFAULT_STEP_NATS,
    DEFAULT_VALUE_STEP_NATS,
    MAX_STEP_NATS,
    logprob_floor,
)
from storage.format.identity import other_tokens, same_sources
from storage.format.layout import COMPRESSION, Profile, entry_layout
from storage.format.manifest.entry import (
    MOST_SHRUNK,
    TARGET_FIELDS,
    Encoding,
    Shrunk,
    TargetField,
    Targets,
    TeacherEntry,
)
from storage.format.manifest.shared import Versions
from storage.format.pruning import prune, shrink, without_rows
from storage.format.sealing import digest
from storage.format.targets import SparseTargets
from storage.text import quoted, ranges_in_words


class RecompressJob(Settings):
    """The fields of `logit-cache recompress`. A field that is None or empty keeps the source's value."""

    cache: str
    name: EntryName
    to: EntryName
    out: str | None = None
    format_version: Literal[1, 2] | None = None
    fields: FieldNames = ()
    positions: Literal["trained"] | None = None
    k: KeptIds | None = None
    seed: Seed | None = None
    top_p: Mass | None = None
    profile: Profile | None = None
    encoding: Literal["codes", "float32"] | None = None
    step_nats: StepNats | None = None
    sampled_step_nats: StepNats | None = None
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None

    @model_validator(mode="after")
    def _options_agree(self) -> RecompressJob:
        for name in ("step_nats", "sampled_step_nats"):
            if self.encoding == "float32" and getattr(self, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is a unit of codes, and --encoding float32 has none: leave one of "
                    f"them out"
                )
        if self.seed is not None and self.k is None:
            raise ValueError("--seed keys the sample that -k takes from sampled ids: give both, or leave it out")
        return self

    @property
    def destination(self) -> str:
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
    cache = LogitCache.open(job.cache)
    source = cache.teacher(job.name)
    _check_source(job, source)
    entry = derived_entry(source.entry, job)
    trained = loss_mask(cache, job.cache) if _drops_rows(source.entry, job) else None
    order = source.sampling_order()
    _check_destination(job, entry, cache)
    writer = EntryWriter.open(job.destination, job.to, entry)
    if order is not None:
        writer.sampling_order(lambda: order)
    for shard in writer.pending():
        began = time.monotonic()
        targets = source.read(*entry.layout.shard_range(shard, entry.positions))
        writer.commit(shard, _fewer(targets, entry, trained, order), began)
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


def _fewer(
    targets: SparseTargets, entry: TeacherEntry, trained: Stream | None, order: NDArray[Any] | None
) -> SparseTargets:
    """What the new entry keeps of the source's targets; `trained` is the loss mask where only its positions stay, and
    `order` the one in which ids are sampled."""
    kept = entry.targets
    if trained is not None:
        targets = without_rows(targets, trained.read(targets.start, targets.stop))
    if kept.method == "varopt" and targets.k > kept.k:
        threshold = kept.sample_size == "threshold"
        targets = shrink(targets, kept.k, kept.temperature, kept.head_ids or 0, kept.seed or 0, order, threshold)
    return prune(targets, kept.k, kept.top_p, logprob_floor(entry.encoding.step_nats or MAX_STEP_NATS))


def derived_entry(source: TeacherEntry, job: RecompressJob) -> TeacherEntry:
    """The record of the new entry. Raises InputError for a change that the source does not allow, and for no change."""
    version = _version(source, job)
    targets = _targets(source, job, version)
    changes: dict[str, Any] = {
        "format_version": version,
        "targets": targets,
        "encoding": _encoding(source, job, targets, version),
        "layout": _layout(source, job, targets.k),
    }
    if all(getattr(source, name) == value for name, value in changes.items()) and not _drops_rows(source, job):
        raise InputError(
            f"{job.name} is already as asked for: give a smaller -k, --top-p, fewer --fields, a larger --step-nats, "
            f"another --profile, other --shard-tokens or --chunk-tokens; logit-cache push copies an entry as it is"
        )
    if version == 2:
        # What is said of projected targets, that an id may come twice, holds of those made from them.
        changes["made"] = "projected" if source.made == "projected" else "recompressed"
    fields = dict(source) | changes | {"derived_from": digest(source), "created_with": Versions.of_this_process()}
    return TeacherEntry.model_validate(fields)


def _version(source: TeacherEntry, job: RecompressJob) -> Literal[1, 2]:
    later = ["fields", "positions", "sampled_step_nats"]
    if source.targets.method == "varopt":
        later += ["k", "encoding", "step_nats"]
    asked = [name for name in later if getattr(job, name)]
    if job.format_version != 1:
        return 2 if asked or job.format_version == 2 else source.format_version
    if source.format_version == 2:
        raise InputError(f"--format-version 1: {job.name} has version 2, and there is no way back: leave it out")
    if asked:
        option = "-k" if asked[0] == "k" else f"--{asked[0].replace('_', '-')}"
        raise InputError(f"{option} makes an entry of version 2 of {job.name}: leave it out, or --format-version 1")
    return 1


def _targets(source: TeacherEntry, job: RecompressJob, version: int) -> Targets:
    targets, sampled = source.targets, source.targets.method == "varopt"
    if version != source.format_version:
        targets = _as_version_2(targets)
    _check_ids(targets, job)
    if job.k is not None and job.k > targets.k:
        raise InputError(f"-k {job.k}: {job.name} holds {targets.k} ids per position: give at most {targets.k}")
    changes: dict[str, Any] = {"k": job.k or targets.k, "top_p": _top_p(targets, job)}
    if sampled and changes["k"] < targets.k:
        changes |= _shrunk(targets, job)
    elif job.seed is not None:
        raise InputError(f"--seed {job.seed}: -k {job.k} takes no sample from {job.name}: leave it out")
    if targets.fields is not None:
        changes["fields"] = _fields(targets, job)
        if _drops_rows(source, job) and targets.positions == "all":
            changes["positions"] = "trained"
    return targets.model_copy(update=changes)


def _check_ids(targets: Targets, job: RecompressJob) -> None:
    asked = {"-k": job.k, "--top-p": job.top_p, "--fields lean": "lean" in job.fields}
    option = next((option for option, given in asked.items() if given), None)
    if not targets.k and option is not None:
        raise InputError(
            f"{option}: {job.name} holds the log-probs of the text's own tokens alone, of which nothing can be left out"
        )


def _as_version_2(targets: Targets) -> Targets:
    """The targets of an entry of version 1 in the words of version 2."""
    sampled = targets.method == "varopt"
    fields = [field for field in TARGET_FIELDS if targets.has(field) and (sampled or field != "sampled-logprobs")]
    of_varopt = {"sampling": "systematic", "order": "ids"} if sampled else {}
    update = {"has_label_logprob": None, "fields": tuple(fields), "positions": "all", "tail": "exact", **of_varopt}
    return targets.model_copy(update=update)


def _fields(targets: Targets, job: RecompressJob) -> tuple[TargetField, ...]:
    there = targets.fields or ()
    missing = [field for field in job.fields if field not in ("lean", "all", *there)]
    if missing:
        raise InputError(
            f"--fields {missing[0]}: {job.name} does not store it, and only a teacher could add it: it has "
            f"{', '.join(there) or 'none of the fields'}"
        )
    sampled_at = targets.temperature if targets.method == "varopt" else 1.0
    return stored_fields(job.fields or ("all",), there, sampled_at)


def _drops_rows(source: TeacherEntry, job: RecompressJob) -> bool:
    return job.positions == "trained" and source.targets.positions != "trained"


def _shrunk(targets: Targets, job: RecompressJob) -> dict[str, Any]:
    """What the record says of a sample that is sampled again."""
    before = targets.shrunk_from or ()
    if targets.temperature not in (1.0, 2.0):
        raise InputError(
            f"-k {job.k}: the ids of {job.name} were sampled for temperature {targets.temperature:g}; only at 1 and 2 "
            f"are the masses known by which they can be sampled again: leave it out"
        )
    if job.k is not None and job.k <= (targets.head_ids or 0):
        raise InputError(
            f"-k {job.k}: the {targets.head_ids} likeliest ids of every position of {job.name} stay certain: give more"
        )
    if len(before) == MOST_SHRUNK:
        raise InputError(f"-k {job.k}: {job.name} was sampled again {MOST_SHRUNK} times: take an entry of more ids")
    used = {targets.seed or 0, *(each.seed for each in before)}
    seed = max(used) + 1 if job.seed is None else job.seed
    if seed in used:
        raise InputError(
            f"--seed {seed}: {job.name} was sampled with it, and the same numbers again would not be independent of "
            f"its ids: give another seed, or leave it out"
        )
    return {"seed": seed, "shrunk_from": (*before, Shrunk(k=targets.k, seed=targets.seed or 0))}


def _top_p(targets: Targets, job: RecompressJob) -> float | None:
    before = targets.top_p
    if job.top_p is not None and targets.method != "top-k":
        raise InputError(
            f"--top-p cannot be applied to {job.name}: its ids are a sample ({targets.method}), which is unbiased only "
            f"as a whole: give -k, which samples it again"
        )
    if job.top_p is not None and before is not None and job.top_p > before:
        raise InputError(f"--top-p {job.top_p:g}: the rows of {job.name} were already cut at a mass of {before:g}")
    return job.top_p or before


def _encoding(source: TeacherEntry, job: RecompressJob, targets: Targets, version: int) -> Encoding:
    before = source.encoding
    of_codes = job.step_nats is not None or job.sampled_step_nats is not None
    kind = job.encoding or ("codes" if of_codes else before.kind)
    if kind == "float32":
        if before.kind == "codes":
            raise InputError(
                f"--encoding float32: {job.name} stores codes of {before.step_nats:g} nat; float32 would cost more "
                f"bytes and be no more exact"
            )
        return before if version == 1 else Encoding(kind="float32", step_nats=None)
    step = job.step_nats or before.step_nats or DEFAULT_STEP_NATS
    if before.step_nats is not None and step != before.step_nats and step < 2 * before.step_nats:
        raise InputError(
            f"--step-nats {step:g}: {job.name} stores codes of {before.step_nats:g} nat; keep them, or take at least "
            f"{2 * before.step_nats:g}, so that the errors of both stay below one step"
        )
    if version == 1:
        return Encoding(kind="codes", step_nats=step, mantissa_bits=min(12, before.mantissa_bits or 12))
    return Encoding(
        kind="codes",
        step_nats=step,
        value_step_nats=before.value_step_nats or DEFAULT_VALUE_STEP_NATS,
        sampled_step_nats=_sampled_step(before, job, targets),
    )


def _sampled_step(before: Encoding, job: RecompressJob, targets: Targets) -> float | None:
    step = job.sampled_step_nats
    if not targets.has("sampled-logprobs"):
        if step is not None:
            raise InputError(
                f"--sampled-step-nats {step:g}: the new entry has no log-probs of sampled ids: leave it out"
            )
        return None
    finest = before.sampled_step_nats or before.step_nats or 0.0
    if step is not None and step < finest:
        raise InputError(
            f"--sampled-step-nats {step:g}: {job.name} stores codes of {finest:g} nat of its sampled ids; give at "
            f"least that"
        )
    return step or before.sampled_step_nats or max(DEFAULT_SAMPLED_STEP_NATS, finest)


def _layout(source: TeacherEntry, job: RecompressJob, k: int) -> Any:
    compression = COMPRESSION[job.profile] if job.profile else source.layout.compression
    if job.shard_tokens is None and job.chunk_tokens is None:
        return source.layout.model_copy(update={"compression": compression})
    stride = source.windowing.stride_tokens
    try:
        return entry_layout(source.positions, k, stride, compression, job.shard_tokens, job.chunk_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None


def _check_source(job: RecompressJob, source: TeacherTargets) -> None:
    if job.to == job.name and job.out is None:
        raise InputError(f"--to {job.to}: that is the entry itself, which is never rewritten: give the new one a name")
    missing = source.missing()
    if missing:
        raise IncompleteCache(
            f"{job.cache}: {job.name} lacks {ranges_in_words(missing)}: complete it with the same cache-logits command "
            f"first"
        )


def _check_destination(job: RecompressJob, entry: TeacherEntry, source: LogitCache) -> None:
    check_destination(job.destination, job.to)
    cache = LogitCache.open(job.destination)
    pairs = other_tokens(entry, cache.record)
    differing = [f"{name}: {job.name} has {a!r}, the cache {b!r}" for name, (a, b) in pairs.items()]
    if not same_sources(entry, source.record, cache.record):
        differing.append(f"sources of documents: {job.name} has targets of {quoted(entry.targets.sources or ())}")
    if differing:
        raise IdentityMismatch(
            job.destination,
            differing,
            "An entry belongs to the tokens that its teacher read: give --out a cache of the same stream, or leave it "
            "out and push the new entry afterwards",
        )
    if entry.targets.has("label") and not cache.record.corpus.tokens_included:
        raise InputError(
            f"{job.destination} was shared without its tokens, and {job.name} holds log-probs of labels, which reveal "
            f"many of them: leave them out with --fields, or make the new entry beside its source, then logit-cache "
            f"push --without-tokens"
        )


def _head_mass(targets: TeacherTargets) -> float | None:
    statistics, _ = targets.statistics()
    if statistics is None or statistics.head_mass is None or not statistics.positions:
        return None
    return statistics.head_mass / statistics.positions
