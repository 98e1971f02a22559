"""The cost of a caching job, forecast from a short probe of the real teacher on the real text. Nothing is written.

The probe processes a few pieces of the token stream, spread evenly over it, as `cache-logits` processes a shard: score,
reduce, encode, compress, hash, by the same functions. The rest is arithmetic on the format::

    bytes      chunks, at the probe's compressed bytes per position; exactly: shard indices, receipts, index, metadata
    objects    one for each array and shard, a receipt for each shard, one zarr.json for each array and the entry
    time       of a batch of windows, times the batches of a shard, and of encoding; on a CPU the two share the cores
               and are added, on an accelerator they overlap and the longer one counts
    epochs     until the cache has paid for itself: caching / (live - cached), all per position; `live` is a student's
               step with the teachers beside it, `cached` from the cache; without a student, the teachers' forward alone

A piece is as many whole chunks as a batch of windows fills, so that no pass is mostly padding. Where only some
positions have targets, those that the loss mask trains or in documents of some sources, all pieces have some, and the
bytes and batches of a piece are scaled from its share of them to the stream's. The live step reads the windows of a
student of the entry: documents that the teacher is to see alone share them.
"""

from __future__ import annotations

import logging
import math
import time
import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import PreparedJob, aligned_to, check_entry, prepare_job
from logit_cache.caching.score_shard import score_range
from logit_cache.caching.step_cost import (
    Meter,
    forward_cost,
    ids_of_student,
    new_student,
    reading_cost,
    student_cost,
    student_windows,
)
from logit_cache.caching.windows import windows
from storage.cache.positions import Positions
from storage.errors import FormatError, InputError
from storage.format.encoding import token_id_dtype
from storage.format.layout import COMPRESSION, entry_layout, group_metadata, metadata_bytes, teacher_arrays
from storage.format.manifest.entry import TeacherEntry
from storage.format.manifest.receipts import MAX_INDEX_BYTES, ReceiptIndex, ShardReceipt
from storage.format.manifest.shared import ATTRIBUTE, ArrayLayout
from storage.format.sealing import parse_json, sealed, sealed_bytes, unseal
from storage.format.shard import encode_objects, object_digest, shard_statistics, shard_values
from storage.format.targets import SparseTargets
from storage.progress import Track
from student.models.vocabulary import ids_in_common
from student.training.peak_memory import peak_device_bytes, peak_process_bytes
from teachers.base import Teacher

_PIECES = 4
_SHA = "0" * 64
# Receipts of the sample index that is parsed to measure the cost of opening.
_SAMPLE_INDEX = 32_768
# Names per page of a listing (S3).
_PAGE = 1_000


@dataclass(frozen=True)
class Question:
    """The options of `logit-cache plan` beside the job's own. `named`: the job's name was given, not made up."""

    named: bool = False
    tokens: int | None = None
    workers: int = 1
    runs: int = 1
    epochs: float = 1.0
    student: str | None = None
    probe_windows: int | None = None


@dataclass
class Probe:
    """Measurements of all pieces. Meters hold seconds; `chunk_bytes` sums the chunks of all pieces, by array.

    share, densest: of the stream's positions, and of the shard's that has most, those that will have targets; rows: how
    many of the probe's have some.
    """

    entry: TeacherEntry
    score: Meter
    encode: Meter
    share: float = 1.0
    densest: float = 1.0
    rows: int = 0
    positions: int = 0
    windows: int = 0
    batches: int = 0
    pieces: int = 0
    chunk_bytes: dict[str, int] = field(default_factory=dict)
    receipt_bytes: int = 0
    reading: float = 0.0
    first: SparseTargets | None = None

    @property
    def density(self) -> float:
        """How many positions with targets the stream has for each one of a piece as long."""
        return self.share * self.positions / self.rows

    def bytes_per_position(self, name: str) -> float:
        """Bytes of an array's chunks per position of the stream, without shard indices."""
        return self.density * self.chunk_bytes[name] / self.positions


def forecast(job: CacheJob, question: Question, track: Track) -> dict[str, Any]:
    """The whole forecast as JSON data. Seconds, bytes, positions; costs in paid seconds (see `step_cost`).

    `track` opens the probe's progress display. Raises InputError, IdentityMismatch,
    CacheNotFound and FormatError, as `cache-logits` would.
    """
    if job.is_served:
        raise InputError(
            f"{job.teacher[0]}: a plan is measured on a teacher in this process, and this is a server: run "
            f"cache-logits for a while, and see logit-cache status"
        )
    prepared = prepare_job(job)
    loading = time.process_time()
    if question.named:
        check_entry(job, prepared.entry)
    entry = _wanted_entry(job, prepared.entry, question.tokens)
    if question.student is not None:
        # Fails here rather than after the probe, which takes long.
        columns = ids_of_student(question.student, prepared.entry)
        if columns < entry.vocabulary_size:
            log = logging.getLogger(__name__).warning
            advice = "take a student with a column for it"
            source, begin = f"--student {question.student}", entry.windowing.begin_id
            ids_in_common(prepared.cache, columns, source, advice, log, begin)
        new_student(question.student, prepared.entry)
    probe = _probe(prepared, question.probe_windows, track)
    process_bytes, device_bytes = peak_process_bytes(), peak_device_bytes(prepared.teacher.device)
    speed = _speed(probe, entry)
    size = _size(probe, entry)
    cpu_seconds = entry.positions * speed["cpu_seconds_per_token"] + question.workers * loading
    # Of the rows of a shard in memory: ids, float32 log-probs, and a few numbers.
    row_bytes = entry.targets.k * (np.dtype(token_id_dtype(entry.vocabulary_size)).itemsize + 4) + 32
    return {
        "cache": job.cache,
        "teachers": list(job.teacher),
        "tokens": entry.positions,
        "tokens_in_the_cache": prepared.entry.positions,
        "entry": entry.model_dump(mode="json", include={"targets", "windowing", "encoding", "layout", "execution"}),
        "probe": {
            "device": str(prepared.teacher.device),
            "positions": probe.positions,
            "windows": probe.windows,
            "pieces": probe.pieces,
            "chunk_tokens": probe.entry.layout.chunk,
            "seconds_scoring": probe.score.seconds,
            "seconds_encoding": probe.encode.seconds,
        },
        "speed": speed,
        "time": {
            "workers": question.workers,
            "hours": entry.positions / (3600 * question.workers * speed["positions_per_second"]),
            "loading_cpu_seconds": loading,
            "cpu_hours": cpu_seconds / 3600,
        },
        "size": size,
        "opening": _opening(size["shards"], size["index_bytes"]),
        "memory": {
            "process_bytes": process_bytes,
            "device_bytes": device_bytes,
            "shard_rows_bytes": row_bytes * min(entry.layout.shard, entry.positions),
        },
        "break_even": _break_even(prepared, probe, question, speed, entry.positions),
    }


def _wanted_entry(job: CacheJob, entry: TeacherEntry, tokens: int | None) -> TeacherEntry:
    """The entry for a stream of `tokens` tokens, with the shards and chunks that cache-logits would choose."""
    if tokens is None:
        return entry
    try:
        aligned, compression = aligned_to(entry.windowing), COMPRESSION[job.profile]
        layout = entry_layout(tokens, job.stored_ids, aligned, compression, job.shard_tokens, job.chunk_tokens)
        layout.check_length(tokens)
    except ValueError as error:
        raise InputError(f"--tokens {tokens}: {error}: give larger --shard-tokens") from None
    return entry.model_copy(update={"positions": tokens, "layout": layout})


def _probe(prepared: PreparedJob[Teacher], most_windows: int | None, track: Track) -> Probe:
    cache, teacher, entry = prepared.cache, prepared.teacher, prepared.entry
    starts = cache.document_starts if entry.windowing.isolate_documents else None
    mask = cache.rows_with_targets(entry.targets)
    probed, pieces = _pieces(entry, starts, most_windows, mask)
    specs, size = teacher_arrays(probed), probed.layout.shard
    probe = Probe(probed, Meter(teacher.device), Meter(teacher.device), chunk_bytes=dict.fromkeys(specs, 0))
    if mask is not None:
        shards = -(-entry.positions // entry.layout.shard)
        edges = np.minimum(np.arange(shards + 1) * entry.layout.shard, entry.positions)
        before = mask.count_before(edges)
        probe.share = int(before[-1]) / entry.positions
        probe.densest = float((np.diff(before) / np.diff(edges)).max())
    # Warm-up: the first pass includes set-up that the others do not pay for.
    begin = next(iter(pieces)) * size
    warm = begin + probed.execution.batch_windows * entry.windowing.stride_tokens
    score_range(cache, teacher, probed, begin, min(warm, begin + size, entry.positions))
    with track("probe", len(pieces) * size, "positions") as advance:
        for slot, count in pieces.items():
            start, stop = probed.layout.shard_range(slot, entry.positions)
            with probe.score.running():
                targets = score_range(cache, teacher, probed, start, stop, advance)
            with probe.encode.running():
                stored = shard_values(probed, targets)
                broken = stored.broken_rule()
                if broken:
                    raise FormatError(f"{cache.url}: the positions {start}..{stop} could not be stored: {broken}")
                objects = encode_objects(specs, slot, stored.arrays)
                digests = {name: object_digest(specs[name], data) for name, data in objects.items()}
                statistics = shard_statistics(targets)
            probe.positions += stop - start
            probe.rows += statistics.positions
            probe.windows += count
            probe.batches += -(-count // probed.execution.batch_windows)
            probe.pieces += 1
            for name, data in objects.items():
                probe.chunk_bytes[name] += len(data) - specs[name].index_bytes
            if probe.first is None:
                receipt = ShardReceipt(
                    record_sha256=_SHA, shard=slot, start=start, stop=stop, objects=digests, statistics=statistics,
                    seconds=round(probe.score.seconds, 3), written_at="2026-01-01T00:00:00+00:00", host="a-host",
                )  # fmt: skip
                probe.receipt_bytes = len(sealed_bytes(receipt))
                probe.first = targets
                probe.reading = reading_cost(specs, objects, stop - start)
    return probe


def _pieces(
    entry: TeacherEntry, document_starts: NDArray[np.uint64] | None, most_windows: int | None, mask: Positions | None
) -> tuple[TeacherEntry, dict[int, int]]:
    """The probe's entry, in which a piece is a shard, and the windows of each piece, by the shard's number.

    mask: which positions have targets, None for all; a piece has some, and windows without any are not scored.
    """
    layout, stride, batch = entry.layout, entry.windowing.stride_tokens, entry.execution.batch_windows
    piece = min(layout.shard, max(1, -(-batch * stride // layout.chunk)) * layout.chunk)
    wanted = _PIECES * piece if most_windows is None else most_windows * stride
    while True:
        size, chunk, number = piece, layout.chunk, wanted // piece
        if not number:
            # Fewer windows than a piece has: smaller chunks, which compress a little worse.
            number = min(_PIECES, max(1, wanted // stride))
            size = max(1, wanted // number)
            size = chunk = size - size % stride if size > stride else size
        slots = np.arange(max(1, entry.positions // size))
        if mask is not None:
            edges = np.minimum(np.append(slots, len(slots)) * size, entry.positions)
            slots = np.flatnonzero(np.diff(mask.count_before(edges)))
            if not len(slots):
                raise InputError(
                    "no position of the stream is trained by its loss mask in the documents that the teacher is asked "
                    "for, so none would have targets"
                )
        number = min(number, len(slots))
        counts = {}
        for slot in slots[[(2 * i + 1) * len(slots) // (2 * number) for i in range(number)]].tolist():
            ends = slot * size, min((slot + 1) * size, entry.positions)
            plan = windows(*ends, entry.positions, entry.windowing, document_starts)
            counts[slot] = sum(1 for each in plan if mask is None or mask.read(each.first, each.last).any())
        if most_windows is None or sum(counts.values()) <= most_windows or size == 1:
            break
        # Every document has a window of its own, so there are more than positions alone say.
        wanted //= 2
    shape = ArrayLayout(shard=size, chunk=chunk, compression=layout.compression)
    at_once = batch if size == piece else min(batch, max(counts.values()))
    execution = entry.execution.model_copy(update={"batch_windows": at_once})
    return entry.model_copy(update={"layout": shape, "execution": execution}), counts


def _speed(probe: Probe, entry: TeacherEntry) -> dict[str, float]:
    """Speed and cost per position of the entry: a shard's windows form whole batches, the last one padded, or rows that
    are filled as far as they go."""
    passes = probe.density
    if entry.execution.rows is None:
        shard, at_once = min(entry.layout.shard, entry.positions), probe.entry.execution.batch_windows
        batches = math.ceil(probe.density * probe.windows / probe.positions * shard / at_once)
        passes = batches * probe.positions / (probe.batches * shard)  # of this entry, for each pass of the probe
    score, encode = probe.score.seconds * passes / probe.positions, probe.encode.seconds / probe.positions
    seconds = score + encode if probe.score.device.type == "cpu" else max(score, encode)
    cpu = (probe.score.cpu_seconds * passes + probe.encode.cpu_seconds) / probe.positions
    paid = cpu if probe.score.device.type == "cpu" else seconds
    return {"positions_per_second": 1 / seconds, "cpu_seconds_per_token": cpu, "paid_seconds_per_token": paid}


def _size(probe: Probe, entry: TeacherEntry) -> dict[str, Any]:
    """Bytes and counts of all files of the finished entry, without its fidelity report, and by array."""
    specs = teacher_arrays(entry)
    shards = next(iter(specs.values())).shards
    full = min(entry.layout.shard, entry.positions)
    arrays = {
        name: probe.bytes_per_position(name) * entry.positions + shards * spec.index_bytes
        for name, spec in specs.items()
    }
    largest = max(specs, key=lambda name: probe.bytes_per_position(name))
    one, two = (len(sealed_bytes(_index(number, probe, round(sum(arrays.values()))))) for number in (1, 2))
    index = one + (two - one) * (shards - 1)
    records = [metadata_bytes(spec.metadata()) for spec in specs.values()]
    records.append(metadata_bytes(group_metadata({ATTRIBUTE: sealed(entry)})))
    total = sum(arrays.values()) + shards * probe.receipt_bytes + index + sum(map(len, records))
    return {
        "bytes": round(total),
        "bytes_per_token": total / entry.positions,
        "positions_with_targets": round(probe.share * entry.positions),
        "bytes_per_target": total / (probe.share * entry.positions),
        "array_bytes": {name: round(count) for name, count in arrays.items()},
        "receipts_bytes": shards * probe.receipt_bytes,
        "index_bytes": index,
        "shards": shards,
        "receipts": shards,
        "objects": shards * len(specs),
        "files": shards * (len(specs) + 1) + len(records) + 1,
        "largest_object_bytes": round(probe.densest / probe.share * probe.bytes_per_position(largest) * full)
        + specs[largest].index_bytes,
        "largest_object_bound_bytes": max(spec.most_object_bytes for spec in specs.values()),
    }


def _index(receipts: int, probe: Probe, object_bytes: int) -> ReceiptIndex:
    assert probe.first is not None
    return ReceiptIndex(
        record_sha256=_SHA, receipts=(_SHA,) * receipts, object_bytes=object_bytes,
        statistics=shard_statistics(probe.first), seconds=1234.567,
    )  # fmt: skip


def _opening(shards: int, index_bytes: int) -> dict[str, Any]:
    """A reader's cost of parsing the receipt index, scaled from a small one, and of listing before there is one."""
    number = min(shards, _SAMPLE_INDEX)
    data = sealed_bytes(ReceiptIndex(record_sha256=_SHA, receipts=(_SHA,) * number, object_bytes=0))

    def read() -> None:
        unseal(ReceiptIndex, parse_json(data, "the index", MAX_INDEX_BYTES), "the index")

    read()
    began = time.process_time()
    read()
    seconds = time.process_time() - began
    tracemalloc.start()
    read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "index_bytes": index_bytes,
        "cpu_seconds": seconds * shards / number,
        "memory_bytes": round((peak + len(data)) * shards / number),
        "listing_requests_while_incomplete": -(-shards // _PAGE),
    }


def _break_even(
    prepared: PreparedJob[Teacher], probe: Probe, question: Question, speed: dict[str, float], positions: int
) -> dict[str, Any]:
    """Caching once and reading, against the teachers beside the student, in paid hours (see `step_cost`)."""
    assert probe.first is not None
    entry, teacher, start = prepared.entry, prepared.teacher, probe.first.start
    tokens = prepared.cache.tokens.read(start, min(start + len(probe.first) + 1, entry.positions)).astype(np.int64)
    starts: NDArray[np.uint64] | None = None
    if entry.windowing.isolate_documents:
        inside = prepared.cache.document_starts.astype(np.int64) - start
        starts = np.append(0, inside[(inside > 0) & (inside < len(tokens))]).astype(np.uint64)
    read = student_windows(entry, tokens, probe.first, starts)
    forward = forward_cost(teacher, read[: probe.entry.execution.batch_windows])
    step: dict[str, Any] | None = None
    cached, live = probe.reading, forward
    if question.student is not None:
        context = entry.windowing.context_tokens
        if starts is None and len(tokens) <= context:
            raise InputError(
                f"--student needs text for a window of {context} tokens and one more, there are {len(tokens)} tokens"
            )
        step = student_cost(question.student, teacher, entry, read)
        cached, live = step["cached"] + probe.reading, step["live"]
    caching = speed["paid_seconds_per_token"]
    epochs = question.runs * question.epochs
    hours = positions / 3600
    return {
        "paid_for": "processor time" if teacher.device.type == "cpu" else f"time of {teacher.device}",
        "teacher_forward_seconds_per_token": forward,
        "reading_cpu_seconds_per_token": probe.reading,
        "student": step,
        "runs": question.runs,
        "epochs": question.epochs,
        "caching_hours": caching * hours,
        "cached_hours": (caching + epochs * cached) * hours,
        "live_hours": epochs * live * hours,
        "epochs_until_paid": caching / (live - cached) if live > cached else None,
    }
