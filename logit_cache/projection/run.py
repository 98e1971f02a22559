"""`logit-cache project`: an entry of one cache → an entry of another, which has the same text in other tokens.

The texts are compared, and the boundaries that both streams share found, before anything is written. Then the entry is
written shard by shard. The same command again finds the same boundaries, compares what it found with the record, and
writes what is missing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logit_cache.projection.alignment import NOWHERE, Alignment, agreement, align
from logit_cache.projection.arithmetic import Projected, projected
from logit_cache.projection.first_tokens import FirstTokens, first_tokens
from logit_cache.projection.job import ProjectJob, check_source, projected_entry
from logit_cache.projection.spelling import Spelling
from storage.cache.reader import LogitCache, TeacherTargets
from storage.cache.writer import EntryWriter, check_destination
from storage.errors import CacheNotFound, IncompleteCache
from storage.format.encoding import logprob_floor
from storage.format.layout import VALUES
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.projected import NextTokens, ProjectedFrom
from storage.format.targets import SparseTargets, TargetRows
from storage.progress import Track, untracked
from storage.text import ranges_in_words

_IDS_AT_ONCE = 1 << 20  # of the source's rows in memory, each some 100 bytes in the sums
_SURVEYED_SPANS, _SPAN_POSITIONS = 64, 1024
_COUNTED_POSITIONS = 1 << 18


@dataclass(frozen=True)
class Done:
    """The entry that was made, or completed: its positions, and how many of them have targets."""

    cache: str
    name: str
    positions: int
    with_targets: int
    entry: TeacherEntry


def project_entry(job: ProjectJob, track: Track = untracked) -> Done:
    """Make the entry, or resume it.

    Raises InputError where texts differ or targets cannot be projected, IncompleteCache where the source lacks shards,
    IdentityMismatch where the destination has another entry of that name. Nothing is written before these checks.
    """
    teacher, student = LogitCache.open(job.source), LogitCache.open(job.to)
    source = teacher.teacher(job.name)
    _check(job, teacher, student, source)
    spellings = (_spelling(teacher), _spelling(student))
    first = first_tokens(*spellings)
    with track("align", student.record.corpus.positions, "tokens") as advance:
        alignment = align(teacher, student, spellings, advance)
    first = first.with_turn_ends(alignment.turn_ends)
    rows = SourceRows(source, alignment, first, student.vocabulary_size, job.most_uncertain)
    made = _survey(teacher, student, rows)
    writer = EntryWriter.open(job.to, job.entry_name, projected_entry(job, source.entry, student, spellings, made))
    with track(f"project {job.name}", writer.entry.positions, "positions") as advance:
        for shard in writer.pending():
            began = time.monotonic()
            start, stop = writer.entry.layout.shard_range(shard, writer.entry.positions)
            writer.commit(shard, rows.shard(writer.entry, start, stop).targets(), began)
            advance(stop - start)
    writer.finish()
    statistics, _ = LogitCache.open(job.to).teacher(job.entry_name).statistics()
    with_targets = 0 if statistics is None else statistics.positions
    return Done(job.to, job.entry_name, writer.entry.positions, with_targets, writer.entry)


def _check(job: ProjectJob, teacher: LogitCache, student: LogitCache, source: TeacherTargets) -> None:
    missing = source.missing()
    if missing:
        raise IncompleteCache(f"{job.source}: {job.name} lacks {ranges_in_words(missing)}: complete it first")
    for cache in (teacher, student):
        if not cache.record.corpus.tokens_included:
            raise CacheNotFound(f"{cache.url} was shared without its tokens, by which texts are aligned")
        lacking = cache.missing_tokens()
        if lacking:
            raise IncompleteCache(f"{cache.url}: its tokens lack {ranges_in_words(lacking)}: complete it first")
    check_source(job, source, student.vocabulary_size)
    check_destination(job.to, job.entry_name)


def _spelling(cache: LogitCache) -> Spelling:
    return Spelling(cache.tokenizer_files(), cache.vocabulary_size, cache.url)


@dataclass(frozen=True)
class SourceRows:
    """The rows of the source in the student's vocabulary, by positions of the student's stream."""

    source: TeacherTargets
    alignment: Alignment
    first: FirstTokens
    vocabulary_size: int
    most_uncertain: float

    def project(self, at: NDArray[np.int64]) -> Projected:
        """The rows of some positions of the source, ascending [R]."""
        low = int(at[0])
        targets = self.source.read(low, int(at[-1]) + 1)
        some = {name: values[at - low] for name, values in targets.arrays().items()}
        return projected(SparseTargets(low, **some), self.first, self.vocabulary_size)

    def pieces(self, start: int, stop: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The positions of `start .. stop` that share a boundary, and the source's, some at a time."""
        found = self.alignment.rows(start, stop)
        here = np.flatnonzero(found != NOWHERE)
        if not len(here):
            return []
        # What is read of the source are all of its rows from the first to the last.
        size = max(1, _IDS_AT_ONCE // self.source.entry.targets.k)
        edges = np.flatnonzero(np.diff(found[here] // size)) + 1
        return list(zip(np.split(start + here, edges), np.split(found[here], edges), strict=True))

    def shard(self, entry: TeacherEntry, start: int, stop: int) -> TargetRows:
        """The targets of the positions `start .. stop` of an entry."""
        names = [name for field, name in VALUES.items() if entry.targets.has(field)]
        made = TargetRows(start, stop, entry.targets.k, entry.vocabulary_size, names)
        floor = logprob_floor(entry.encoding.step_nats or 1.0)
        for positions, at in self.pieces(start, stop):
            rows = self.project(at)
            there = (rows.kept > 0) & (rows.stakes <= self.most_uncertain)
            tail = rows.log_tail
            values = {
                "token_ids": rows.ids[:, : entry.targets.k],
                "logprobs": np.maximum(rows.logprobs, floor)[:, : entry.targets.k],
                "kept": rows.kept,
                "certain": rows.certain,
                "log_tail": None if tail is None else np.where(np.isneginf(tail), tail, np.maximum(tail, floor)),
            }
            made.put(positions[there], {name: None if v is None else v[there] for name, v in values.items()})
        return made


def _survey(teacher: LogitCache, student: LogitCache, rows: SourceRows) -> ProjectedFrom:
    """What the record says of the alignment: counts of all positions, masses of some."""
    total = student.record.corpus.positions
    shared = trained = both = 0
    for start in range(0, total, _COUNTED_POSITIONS):
        stop = min(start + _COUNTED_POSITIONS, total)
        here = rows.alignment.rows(start, stop) != NOWHERE
        mask = np.ones(stop - start, dtype=bool) if student.loss_mask is None else student.loss_mask.read(start, stop)
        shared, trained, both = shared + int(here.sum()), trained + int(mask.sum()), both + int((here & mask).sum())
    agrees = agreement(rows.alignment, teacher, student, rows.first.ids, rows.first.uncertain)
    certain, uncertain = (NextTokens(positions=int(all_), right=int(right)) for all_, right in agrees)
    masses, outside = [np.empty(0)], [np.empty(0)]
    bounds = rows.source.entry.targets.method == "top-k"  # of certain ids; those that are sampled are unbiased
    for start in range(0, total, max(_SPAN_POSITIONS, total // _SURVEYED_SPANS)):
        for _, at in rows.pieces(start, min(start + _SPAN_POSITIONS, total)):
            found = rows.project(at)
            masses.append(found.uncertain[found.kept > 0])
            if bounds and found.log_tail is not None:
                outside.append(np.exp(found.log_tail[found.kept > 0]))
    surveyed, lacking = np.concatenate(masses), np.concatenate(outside)
    record = teacher.record
    return ProjectedFrom(
        entry_sha256=rows.source.record_sha256,
        stream_sha256=record.corpus.stream_sha256,
        tokenizer_fingerprint=record.tokenizer.fingerprint,
        vocabulary_sha256=record.tokenizer.vocabulary_sha256,
        vocabulary_size=record.tokenizer.vocabulary_size,
        shared_positions=shared,
        trained_positions=trained,
        shared_trained_positions=both,
        certain=certain,
        uncertain=uncertain,
        uncertain_mass=_mean_mass(surveyed) or 0.0,
        outside_mass=_mean_mass(lacking),
        sampled_positions=len(surveyed),
        most_uncertain=rows.most_uncertain,
        aligned="replies" if rows.alignment.replies else None,
    )


def _mean_mass(masses: NDArray[np.float64]) -> float | None:
    return round(float(masses.mean().clip(0, 1)), 6) if len(masses) else None
