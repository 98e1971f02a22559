"""How faithful are an entry's stored targets? The teacher rescores a sample, compared over the full vocabulary.

The error of a cache cannot be computed from the cache alone, so it is measured while the teacher is loaded: once an
entry is complete, `cache-logits` rescores some `--fidelity-positions` and stores a report beside the entry
(`storage.format.fidelity`), with figures that `logit_cache.fidelity.metrics` defines. Stored values are read through
`LogitCache`, so the quantisation is in them.

The positions follow from the entry alone, and have targets. `samples.sample_windows` samples windows, one from each of
as many equal parts of the stream, seeded by the digest of the entry's record; each window gives the same number of
positions, sampled likewise: its probability grows with its length, that of its positions does not, so long documents
are not over-represented. The report holds no time and no host, so a second run, or a second worker, makes the same
bytes where sums are added in the same order; else the first report is kept.

Cost: N positions at the entry's own cost, but at least `_LEAST_WINDOWS` windows, because one window is one document's
page, and at most `_SPREAD_WINDOWS` where a batch has room for them; batches have the entry's recorded shape, in which
half precision repeats its values. Memory: a few tiles of `_TILE_LOGITS` float64, and the decoded chunks of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from logit_cache.caching.prepare import OpenJob
from logit_cache.caching.windows import Window, batch_inputs
from logit_cache.fidelity.metrics import Measures, StoredRows, tidy
from logit_cache.fidelity.rescore import scored_tiles
from logit_cache.fidelity.samples import Sample, TargetRows, sample_windows, take_sample
from storage.cache.reader import LogitCache, TeacherTargets
from storage.errors import InputError
from storage.format.fidelity import FidelityReport, NeededIds, Size, Spread, Treatment
from storage.format.manifest.entry import TeacherEntry
from teachers.base import Teacher
from teachers.served.teacher import ServedTeacher

_LEAST_WINDOWS = 8
_SPREAD_WINDOWS = 64
# About ten arrays of this many float64 live at a time: a third of a gigabyte.
_TILE_LOGITS = 1 << 22
_QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99, "maximum": 1.0}


@dataclass(frozen=True)
class _Picked:
    """The measured part of a window: its tokens int64 [<= C], and of r positions that it scores their offset in it and
    the next tokens (-1: none), int64 [r], and the stored rows [r, K] as a reader decodes them."""

    tokens: NDArray[np.int64]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    stored: StoredRows


def is_wanted(opened: OpenJob, positions: int) -> bool:
    """Whether a report of so many positions is to be made: the entry is complete, has targets and no report, and the
    teacher gives whole distributions, as servers do not. Without ids nothing of a distribution is stored.

    Raises CorruptCache, FormatError for a damaged report.
    """
    if not positions or isinstance(opened.teacher, ServedTeacher):
        return False
    targets = _targets(opened)[1]
    if not targets.entry.targets.k:
        return False
    return not targets.missing() and targets.fidelity() is None and _share(targets) > 0


def measure(opened: OpenJob, positions: int, progress: Callable[[int], None] | None = None) -> FidelityReport:
    """The report of a complete entry, from about so many positions, at least one and no more than `positions`.

    `progress` receives the positions done since its last call. Raises CacheNotFound, IncompleteCache, CorruptCache and
    FormatError as the cache's reader does, and InputError for a teacher whose logits have no softmax.
    """
    assert not isinstance(opened.teacher, ServedTeacher)
    return measure_entry(*_targets(opened), opened.teacher, positions, progress)


def measure_entry(
    cache: LogitCache,
    targets: TeacherTargets,
    teacher: Teacher,
    positions: int,
    progress: Callable[[int], None] | None = None,
) -> FidelityReport:
    """`measure` of an entry that is only read; all ranks of a teacher that is sharded over several call this."""
    entry = targets.entry
    windows = _windows(cache, targets, positions)
    rng = np.random.default_rng([_seed(targets), 1])
    device = torch.device("cpu") if teacher.device.type == "mps" else teacher.device  # mps has no float64
    most = positions // len(windows)
    picked = [_pick(take_sample(cache, targets.name, window), most, rng, device) for window in windows]
    counts = sum(np.bincount(item.tokens, minlength=entry.vocabulary_size) for item in picked) + 1
    found = Measures(
        torch.from_numpy(counts).to(device, torch.float64), entry.encoding.step_nats or 0.0, _treatments(entry)
    )
    at_once = entry.execution.batch_windows
    for first in range(0, len(picked), at_once):
        batch = picked[first : first + at_once]
        _add_batch(found, teacher, entry, batch, device)
        if progress is not None:
            progress(sum(len(item.labels) for item in batch))
    return _report(targets, found, [window.first // entry.layout.shard for window in windows])


def _targets(opened: OpenJob) -> tuple[LogitCache, TeacherTargets]:
    # Opened again: the job's own reader looked at the entry before it was complete.
    cache = LogitCache.open(opened.cache.url)
    return cache, cache.teacher(opened.writer.name)


def _treatments(entry: TeacherEntry) -> tuple[Treatment, ...]:
    """The treatments that a student can use at temperature 1; see `storage.format.fidelity`.

    Ids that were sampled for another temperature are no sample at 1.
    """
    targets = entry.targets
    if not targets.has("tail"):
        return ("renormalise",)
    is_sample = targets.method == "varopt"
    found: tuple[Treatment, ...] = ("bucket", "renormalise", "none")
    if is_sample and not targets.has("sampled-logprobs"):
        found = ()
    return (*found, "sampled") if is_sample and targets.temperature == 1.0 else found


def _share(targets: TeacherTargets) -> float:
    """The share of a complete entry's positions that have targets."""
    statistics, _ = targets.statistics()
    return 1.0 if statistics is None else statistics.positions / targets.entry.positions


def _seed(targets: TeacherTargets) -> int:
    return int(targets.record_sha256, 16)


def _windows(cache: LogitCache, targets: TeacherTargets, positions: int) -> list[Window]:
    entry = targets.entry
    starts = cache.document_starts if entry.windowing.isolate_documents else None
    length = entry.windowing.stride_tokens
    if starts is not None:
        length = min(length, max(1, entry.positions // len(starts)))
    length = max(1, round(length * _share(targets)))
    spread = max(_LEAST_WINDOWS, min(entry.execution.batch_windows, _SPREAD_WINDOWS))
    count = min(positions, max(spread, -(-positions // length)))
    rows = TargetRows(targets)
    return sample_windows(entry, rows.counts(), starts, count, np.random.default_rng(_seed(targets)), rows.row)


def _pick(sample: Sample, most: int, rng: np.random.Generator, device: torch.device) -> _Picked:
    """At most `most` of a window's positions that have targets, at random."""
    window, stored = sample.window, sample.stored
    there = np.flatnonzero(stored.kept)
    rows = there[np.sort(rng.permutation(len(there))[:most])]
    tail = np.full(len(stored), -np.inf) if stored.log_tail is None else stored.log_tail

    def at_rows(values: NDArray[Any], dtype: torch.dtype) -> Tensor:
        wide = values[rows].astype(np.int64 if dtype == torch.int64 else np.float64)
        return torch.from_numpy(wide).to(device)

    return _Picked(
        tokens=sample.tokens,
        offsets=window.first - window.start + rows,
        labels=sample.labels[rows],
        stored=StoredRows(
            ids=at_rows(stored.token_ids, torch.int64),
            logprobs=at_rows(stored.logprobs, torch.float64),
            kept=at_rows(stored.kept, torch.int64),
            certain=at_rows(stored.certain, torch.int64),
            log_tail=at_rows(tail, torch.float64),
        ),
    )


def _add_batch(
    found: Measures, teacher: Teacher, entry: TeacherEntry, batch: list[_Picked], device: torch.device
) -> None:
    read = [(item.tokens, item.offsets) for item in batch]
    inputs = batch_inputs(read, entry.windowing, entry.execution.batch_windows)
    labels = np.concatenate([item.labels for item in batch])
    stored = StoredRows.together([item.stored for item in batch])
    for here, logits in scored_tiles(teacher, entry, inputs, _TILE_LOGITS):
        tile = logits.to(device, torch.float64)
        if not bool(torch.isfinite(tile.amax(1)).all()):
            raise InputError(
                "the teacher's logits have no softmax (NaN, or an infinity) where they had one when the entry was "
                "made: its weights or its device changed: run logit-cache audit to check the entry"
            )
        found.add(tile, stored.rows(here), labels[here])


def _report(targets: TeacherTargets, found: Measures, shards: list[int]) -> FidelityReport:
    residual = found.per_position("residual").clip(0, 1)
    for_residual, for_forward, curve = found.needed()
    size = _size(targets, found, shards)

    def priced(item: NeededIds) -> NeededIds:
        wanted = targets.entry.targets
        if wanted.method != "top-k" or wanted.top_p is not None or not wanted.k / 4 <= item.k <= wanted.k * 4:
            return item
        cost = tidy(size.overhead_bytes_per_token + _share(targets) * item.k * size.bytes_per_id)
        return item.model_copy(update={"bytes_per_token": cost})

    return FidelityReport(
        format_version=targets.entry.format_version,
        record_sha256=targets.record_sha256,
        positions=found.positions,
        windows=len(shards),
        labelled=int((found.labels >= 0).sum()),
        residual_mass=Spread(
            mean=tidy(residual.mean()), **{n: tidy(np.quantile(residual, q)) for n, q in _QUANTILES.items()}
        ),
        quantisation=tidy(max(0.0, found.per_position("quantisation").mean())),
        divergences=found.divergences(),
        gradients=found.gradients(),
        calibration=found.calibration(),
        size=size,
        k_for_residual_mass=tuple(map(priced, for_residual)),
        k_for_forward=tuple(map(priced, for_forward)),
        curve=curve,
    )


def _size(targets: TeacherTargets, found: Measures, shards: list[int]) -> Size:
    """From the index; its division between ids and positions from the receipts of the sample's shards."""
    bytes_per_token = targets.stored_bytes() / targets.entry.positions
    per_id = whole = 0
    for shard in sorted(set(shards)):
        receipt = targets.receipts.recent(shard)
        assert receipt is not None, "the sample was read from this shard"
        whole += sum(item.bytes for item in receipt.objects.values())
        per_id += sum(item.bytes for name, item in receipt.objects.items() if len(targets.specs[name].shape) == 2)
    mean_kept, share = float(found.per_position("kept").mean()), _share(targets)
    for_ids = bytes_per_token * per_id / whole
    return Size(
        mean_kept=tidy(mean_kept),
        bytes_per_token=tidy(bytes_per_token),
        bytes_per_id=tidy(for_ids / (share * mean_kept)),
        overhead_bytes_per_token=tidy(bytes_per_token - for_ids),
        bytes_per_target=None if share == 1.0 else tidy(bytes_per_token / share),
    )
