"""The configuration of `logit-cache project`, and the record of the entry that it makes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from logit_cache.caching.job import EntryName, Positive
from logit_cache.projection.spelling import Spelling
from storage.cache.reader import LogitCache, TeacherTargets
from storage.config import Settings
from storage.errors import InputError
from storage.format.encoding import DEFAULT_VALUE_STEP_NATS
from storage.format.layout import COMPRESSION, Profile, entry_layout
from storage.format.manifest.entry import Encoding, Targets, TeacherEntry, Windowing
from storage.format.manifest.projected import ProjectedFrom
from storage.format.manifest.shared import Versions

DEFAULT_MOST_UNCERTAIN = 0.5


class ProjectJob(Settings):
    """The fields of `logit-cache project`.

    most_uncertain: a row has no targets where its certain ids have more mass than this whose first token is uncertain.
    """

    source: Annotated[str, Field(min_length=1)]
    name: EntryName
    to: Annotated[str, Field(min_length=1)]
    as_name: EntryName | None = None
    most_uncertain: Annotated[float, Field(ge=0, le=1)] = DEFAULT_MOST_UNCERTAIN
    profile: Profile = "small"
    shard_tokens: Positive | None = None
    chunk_tokens: Positive | None = None

    @property
    def entry_name(self) -> str:
        return self.as_name or self.name


def check_source(job: ProjectJob, source: TeacherTargets, vocabulary_size: int) -> None:
    """Raise InputError for an entry whose targets cannot be projected without a bias."""
    targets = source.entry.targets
    if not targets.k:
        raise InputError(
            f"{job.source}: {job.name} holds the log-probs of the text's own tokens alone (--targets none), and no ids "
            f"to project: cache its teacher with --targets varopt or topk"
        )
    if targets.method != "varopt":
        return
    if targets.temperature != 1.0:
        raise InputError(
            f"{job.source}: the ids of {job.name} were sampled for temperature {targets.temperature:g}, where sums of "
            f"probabilities are no targets of their own: project an entry that was sampled for temperature 1, or top-k"
        )
    if targets.k > vocabulary_size:
        raise InputError(
            f"{job.source}: {job.name} holds up to {targets.k} ids of a row, and the vocabulary of {job.to} has "
            f"{vocabulary_size}: make a smaller sample first (logit-cache recompress -k)"
        )


def projected_entry(
    job: ProjectJob, source: TeacherEntry, cache: LogitCache, spellings: tuple[Spelling, Spelling], made: ProjectedFrom
) -> TeacherEntry:
    """The record of the new entry: of the source what still holds."""
    record = cache.record
    targets = _targets(source.targets, record.tokenizer.vocabulary_size)
    try:
        layout = entry_layout(
            record.corpus.positions, targets.k, 1, COMPRESSION[job.profile], job.shard_tokens, job.chunk_tokens
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    changes: dict[str, Any] = {
        "format_version": 2,
        "positions": record.corpus.positions,
        "vocabulary_size": record.tokenizer.vocabulary_size,
        "stream_sha256": record.corpus.stream_sha256,
        "tokenizer_fingerprint": record.tokenizer.fingerprint,
        "targets": targets,
        "windowing": _windowing(source.windowing, *spellings),
        "encoding": _encoding(source.encoding),
        "layout": layout,
        "made": "projected",
        "derived_from": None,
        "projected_from": made,
        "created_with": Versions.of_this_process(),
    }
    return TeacherEntry.model_validate(dict(source) | changes)


def _targets(source: Targets, vocabulary_size: int) -> Targets:
    """Ids, the certain ones' log-probs, and the mass outside: what else a row has is no sum of probabilities."""
    sampled: dict[str, Any] = {}
    if source.method == "varopt":
        sampled = {
            "seed": source.seed,
            "sampling": source.sampling or "systematic",
            "order": "ids",
            "sample_size": source.sample_size,
            "shrunk_from": source.shrunk_from,
        }
    return Targets(
        method=source.method,
        k=min(source.k, vocabulary_size),
        top_p=source.top_p,
        fields=(),
        positions="some",
        tail=source.tail or "exact",
        **sampled,
    )


def _windowing(source: Windowing, teacher: Spelling, student: Spelling) -> Windowing:
    """The windows that the teacher read, in its own tokens; what they begin with is known by its role."""
    begin = student.bos if source.begin_id is not None and source.begin_id == teacher.bos else None
    return source.model_copy(update={"begin_id": begin})


def _encoding(source: Encoding) -> Encoding:
    codes = source.kind == "codes"
    return Encoding(
        kind=source.kind,
        step_nats=source.step_nats,
        value_step_nats=(source.value_step_nats or DEFAULT_VALUE_STEP_NATS) if codes else None,
    )
