"""One shard of one teacher entry: windows → logits → sparse targets.

Legend: `B` windows in a batch, `C` context tokens, `R` scored rows of a batch, `K` stored ids.

`score_shard` is a pure function of the job and the shard: the composition and shape of every batch follow from the
shard alone (the last batch is padded with windows that score nothing), because half-precision results change with
the batch's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from logit_cache.caching.pipeline import HostCopies
from logit_cache.caching.prepare import OpenJob, loss_mask
from logit_cache.caching.windows import Window, batch_inputs, windows
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.format.encoding import logprob_floor, token_id_dtype
from storage.format.manifest import TeacherEntry
from storage.format.pruning import prune
from storage.format.targets import SparseTargets, leading_columns
from teachers.base import Teacher
from teachers.reduction.reduce import InvalidLogits, ReducedRows, reduce_rows
from teachers.reduction.varopt import Sampling, random_numbers, sampling_of


def score_shard(opened: OpenJob, shard: int, progress: Callable[[int], None] | None = None) -> SparseTargets:
    """The targets of a shard's positions, all their fields as the teacher has them, on the CPU."""
    entry = opened.writer.entry
    start, stop = entry.layout.shard_range(shard, entry.positions)
    return score_range(opened.cache, opened.scorer, entry, start, stop, progress)


def score_range(
    cache: LogitCache,
    teacher: Teacher,
    entry: TeacherEntry,
    start: int,
    stop: int,
    progress: Callable[[int], None] | None = None,
) -> SparseTargets:
    """The targets of the positions `start .. stop` of an entry, which need not be stored; see `score_shard`.

    Ids are sampled in the order of the teacher's logits.
    """
    starts = cache.document_starts if entry.windowing.isolate_documents else None
    wanted = loss_mask(cache, cache.url).read(start, stop) if entry.targets.positions == "trained" else None
    rows = _Rows(entry, start, stop, wanted, teacher.order)
    copies = HostCopies(teacher.device, rows.put)
    plan = filter(rows.any_wanted, windows(start, stop, entry.positions, entry.windowing, starts))
    scored = 0
    while batch := list(islice(plan, entry.execution.batch_windows)):
        low = min(window.start for window in batch)
        high = min(max(window.stop for window in batch) + 1, entry.positions)
        tokens = cache.tokens.read(low, high).astype(np.int64)
        _score_batch(entry, teacher, batch, tokens, low, rows, copies)
        if progress is not None:
            progress(batch[-1].last - start - scored)
        scored = batch[-1].last - start
    copies.finish()
    if progress is not None and scored < stop - start:
        progress(stop - start - scored)
    return rows.targets()


def _score_batch(
    entry: TeacherEntry,
    teacher: Teacher,
    batch: list[Window],
    tokens: NDArray[np.int64],
    low: int,
    rows: _Rows,
    copies: HostCopies,
) -> None:
    """Score one batch of windows; `tokens` are the stream from position `low` on."""
    positions = [rows.wanted(window) for window in batch]
    read = [
        (tokens[window.start - low : window.stop - low], scored - window.start)
        for window, scored in zip(batch, positions, strict=True)
    ]
    inputs, indices = batch_inputs(read, entry.windowing, entry.execution.batch_windows)
    labels = []
    for window, scored in zip(batch, positions, strict=True):
        following = np.minimum(scored + 1, low + len(tokens) - 1)
        labels.append(np.where(scored + 1 < window.end, tokens[following - low], -1))
    position = np.concatenate(positions)
    label = torch.from_numpy(np.concatenate(labels)).to(teacher.device)
    index = torch.from_numpy(indices).to(teacher.device)
    done = 0
    for logits in teacher.score(torch.from_numpy(inputs).to(teacher.device), index):
        chunk = slice(done, done + len(logits))
        try:
            # The logits may be on another device than the windows.
            sampling = rows.sampling(position[chunk], logits.device)
            k, own_labels = entry.targets.k, label[chunk].to(logits.device)
            reduced = reduce_rows(logits, entry.vocabulary_size, k, own_labels, rows.floor, sampling, teacher.shard)
        except InvalidLogits as error:
            members = entry.teacher.members
            raise InputError(
                f"teacher {' + '.join(member.name for member in members)}: at position "
                f"{position[done + error.row]} its logits have no softmax ({error.found}); it diverged, or overflowed "
                f"in {members[0].dtype}: try --dtype float32 and another --name, or check its weights"
            ) from None
        copies.add(position[chunk], reduced.each(lambda values: values.to(teacher.device)))
        done += len(logits)
    assert done == len(position), "a teacher yields one row of logits per scored row"


class _Rows:
    """The arrays of a shard, filled row by row; of the positions that are not `wanted` [T], if it is given, none.

    order: the sampling order int64 [V] in which the logits come, or None.
    """

    def __init__(
        self, entry: TeacherEntry, start: int, stop: int, wanted: NDArray[np.bool_] | None, order: torch.Tensor | None
    ) -> None:
        count, k = stop - start, entry.targets.k
        self.floor = logprob_floor(entry.encoding.step_nats or 1.0)
        self._start = start
        self._targets = entry.targets
        self._wanted = wanted
        self._order = order
        self._random: NDArray[np.int64] | None = None
        if entry.targets.method == "varopt":
            self._random = random_numbers(entry.targets, start, stop)
        dtype = np.dtype(token_id_dtype(entry.vocabulary_size))
        self._token_ids = np.full((count, k), np.iinfo(dtype).max, dtype=dtype)
        self._kept = np.zeros(count, dtype=np.uint16)
        self._certain = np.zeros(count, dtype=np.uint16)
        self._logprobs = np.full((count, k), -np.inf, dtype=np.float32)
        self._floats: dict[str, Any] = {
            name: np.full(count, np.nan, dtype=np.float32)
            for name in ("log_tail", "log_tail_half", "label_logprob", "entropy")
        }

    def wanted(self, window: Window) -> NDArray[np.int64]:
        """The positions of a window that are scored, absolute and ascending."""
        scored = np.arange(window.first, window.last)
        return scored if self._wanted is None else scored[self._wanted[scored - self._start]]

    def any_wanted(self, window: Window) -> bool:
        return len(self.wanted(window)) > 0

    def sampling(self, position: NDArray[Any], device: torch.device) -> Sampling | None:
        """How the rows of some positions (absolute) are sampled; None for top-k."""
        if self._random is None:
            return None
        random = torch.from_numpy(self._random[position - self._start]).to(device)
        order = None if self._order is None else self._order.to(device)
        return sampling_of(self._targets, random, order)

    def put(self, position: NDArray[Any], reduced: ReducedRows) -> None:
        """Store the rows of some positions (absolute, ascending), which are on the CPU."""
        at = position - self._start
        kept = reduced.kept.numpy()
        is_kept = leading_columns(kept, self._targets.k)
        self._kept[at] = kept
        self._certain[at] = reduced.certain.numpy()
        self._token_ids[at] = np.where(is_kept, reduced.token_ids.numpy(), np.iinfo(self._token_ids.dtype).max)
        self._logprobs[at] = np.where(is_kept, reduced.logprobs.numpy(), -np.inf)
        for name, values in self._floats.items():
            values[at] = getattr(reduced, name).numpy()

    def targets(self) -> SparseTargets:
        """The rows as sparse targets, cut at a mass where the entry asks for that."""
        k, top_p = self._targets.k, self._targets.top_p
        targets = SparseTargets(
            start=self._start,
            token_ids=self._token_ids,
            kept=self._kept,
            certain=self._certain,
            logprobs=self._logprobs,
            **self._floats,
        )
        return targets if top_p is None else prune(targets, k, top_p, self.floor)
