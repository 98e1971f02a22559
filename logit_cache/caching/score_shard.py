"""One shard of one teacher entry: windows → reduced rows → sparse targets.

Legend: `B` windows in a batch, `C` context tokens, `R` scored rows of a batch, `K` stored ids.

What is between windows and rows is a `Scorer`: the logits of a teacher, reduced here, or the answers of one behind a
server, which come reduced. Windows, the arrays of a shard and all that follows know nothing of it.

Of logits, `score_shard` is a pure function of the job and the shard: the composition and shape of every batch follow
from the shard alone (of windows of one length, the last batch is padded with windows that score nothing), because
half-precision results change with the batch's shape. The batches of a server are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from logit_cache.caching.packing import Row, one_by_one, packed
from logit_cache.caching.pipeline import HostCopies
from logit_cache.caching.prepare import OpenJob
from logit_cache.caching.windows import Read, Window, row_inputs, windows
from storage.cache.reader import LogitCache
from storage.errors import InputError
from storage.format.encoding import logprob_floor
from storage.format.layout import VALUES
from storage.format.manifest.entry import TeacherEntry
from storage.format.pruning import prune
from storage.format.targets import SparseTargets, TargetRows
from teachers.base import Teacher
from teachers.reduction.reduce import InvalidLogits, ReducedRows, reduce_rows
from teachers.reduction.varopt import Sampling, random_numbers, sampling_of
from teachers.served.protocols import Prompt
from teachers.served.teacher import ServedTeacher, reduced_rows

_PADDING_SHARDS = 8


class Scorer(Protocol):
    """What turns windows into rows: of a shard, or of a part of one.

    order    the sampling order int64 [V] of the teacher's logits, or None
    unknown  fields of the rows that it does not know, which are NaN in all of them
    """

    @property
    def order(self) -> torch.Tensor | None: ...

    @property
    def unknown(self) -> tuple[str, ...]: ...

    def score(self, cache: LogitCache, entry: TeacherEntry, plan: Iterator[Window], rows: Rows) -> Iterator[int]:
        """Put the wanted rows of every window of the plan into `rows`; yields the number of positions that are done,
        and 0 now and then where it waits."""


def score_shard(opened: OpenJob, shard: int, progress: Callable[[int], None] | None = None) -> SparseTargets:
    """The targets of a shard's positions, all their fields as the teacher has them, on the CPU."""
    entry = opened.writer.entry
    start, stop = entry.layout.shard_range(shard, entry.positions)
    return score_range(opened.cache, opened.scorer, entry, start, stop, progress)


def score_range(
    cache: LogitCache,
    teacher: Teacher | ServedTeacher,
    entry: TeacherEntry,
    start: int,
    stop: int,
    progress: Callable[[int], None] | None = None,
) -> SparseTargets:
    """The targets of the positions `start .. stop` of an entry, which need not be stored; see `score_shard`.

    Ids are sampled in the order of the teacher's logits.
    """
    scorer: Scorer = ServedScorer(teacher) if isinstance(teacher, ServedTeacher) else LogitScorer(teacher)
    wanted = _wanted(cache, entry, start, stop)
    rows = Rows(entry, start, stop, wanted, scorer)
    scored = 0
    # Windows without a scored position are in no batch; with the next one, or the end, they are done.
    for done in scorer.score(cache, entry, _plan(cache, entry, start, stop, wanted), rows):
        if progress is not None:
            progress(done)
        scored += done
    if progress is not None and scored < stop - start:
        progress(stop - start - scored)
    return rows.targets()


def padding_share(cache: LogitCache, entry: TeacherEntry) -> float:
    """The share of padding among the tokens that a teacher reads for an entry, by some of its shards."""
    shards, lead = -(-entry.positions // entry.layout.shard), entry.windowing.begin_id is not None
    read = inside = 0
    for number in range(min(shards, _PADDING_SHARDS)):
        start, stop = entry.layout.shard_range(number * shards // min(shards, _PADDING_SHARDS), entry.positions)
        for batch in _batches(entry, _plan(cache, entry, start, stop, _wanted(cache, entry, start, stop))):
            read += batch.count * batch.length
            inside += sum(window.stop - window.start + lead for row in batch.rows for window in row)
    return 1 - inside / read if read else 0.0


def _wanted(cache: LogitCache, entry: TeacherEntry, start: int, stop: int) -> NDArray[np.bool_] | None:
    """Which of the positions `start .. stop` have targets; None: all."""
    with_targets = cache.rows_with_targets(entry.targets)
    return None if with_targets is None else with_targets.read(start, stop)


def _plan(
    cache: LogitCache, entry: TeacherEntry, start: int, stop: int, wanted: NDArray[np.bool_] | None
) -> Iterator[Window]:
    """The windows that score the wanted ones of the positions `start .. stop`."""
    starts = cache.document_starts if entry.windowing.isolate_documents else None
    for window in windows(start, stop, entry.positions, entry.windowing, starts):
        if wanted is None or wanted[window.first - start : window.last - start].any():
            yield window


@dataclass(frozen=True)
class _Batch:
    """Rows of windows that are read together, padded to `count` rows of `length` tokens."""

    rows: list[Row]
    length: int
    count: int


def _batches(entry: TeacherEntry, plan: Iterator[Window]) -> Iterator[_Batch]:
    windowing, execution = entry.windowing, entry.execution
    if execution.rows is None:
        while batch := list(islice(plan, execution.batch_windows)):
            yield _Batch([(window,) for window in batch], windowing.input_tokens, execution.batch_windows)
        return
    lead = windowing.input_tokens - windowing.context_tokens
    batch_tokens = execution.batch_windows * windowing.input_tokens
    if execution.rows == "packed":
        found = packed(list(plan), execution.row_tokens or (), lead)
    else:
        found = one_by_one(list(plan), windowing.input_tokens, lead, batch_tokens)
    for length, rows in found:
        count = max(1, batch_tokens // length)
        for first in range(0, len(rows), count):
            some = rows[first : first + count]
            yield _Batch(some, length, len(some))


class LogitScorer:
    """Reduces a teacher's logits, batch by batch."""

    unknown: tuple[str, ...] = ()

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self.order = teacher.order

    def score(self, cache: LogitCache, entry: TeacherEntry, plan: Iterator[Window], rows: Rows) -> Iterator[int]:
        """See `Scorer`."""
        copies = HostCopies(self._teacher.device, rows.put)
        for batch in _batches(entry, plan):
            _score_batch(entry, self._teacher, batch, cache, rows, copies)
            yield sum(window.last - window.first for row in batch.rows for window in row)
        copies.finish()


class ServedScorer:
    """Asks for the rows of each window, and of as many at once as the teacher's servers take."""

    order = None
    unknown = ("log_tail_half", "entropy")

    def __init__(self, teacher: ServedTeacher) -> None:
        self._teacher = teacher

    def score(self, cache: LogitCache, entry: TeacherEntry, plan: Iterator[Window], rows: Rows) -> Iterator[int]:
        """See `Scorer`."""

        def prompts() -> Iterator[tuple[Prompt, tuple[Window, NDArray[np.int64]]]]:
            for window in plan:
                scored = rows.wanted(window)
                tokens = cache.tokens.read(window.start, min(window.stop + 1, entry.positions)).astype(np.int64)
                yield prompt_of(window, tokens, scored, entry.windowing.begin_id), (window, scored)

        for answer in self._teacher.rows(prompts()):
            if answer is None:
                yield 0
                continue
            (window, scored), found = answer
            has_label = scored + 1 < window.end
            rows.put(scored, reduced_rows(found, has_label, entry.vocabulary_size, rows.floor))
            yield window.last - window.first


def prompt_of(window: Window, tokens: NDArray[np.int64], scored: NDArray[np.int64], begin: int | None) -> Prompt:
    """What a server is asked for the positions `scored` (absolute, ascending) of a window.

    tokens: from the window's start on, int64. begin: the id that is put before windows which do not begin with it. The
    prompt ends with the token after the last of these positions, whose row that token's place is; behind the end of a
    segment any token serves, since no row sees it.
    """
    stop = int(scored[-1]) + 1 - window.start
    following = tokens[stop] if window.start + stop < window.end else tokens[stop - 1]
    lead = [begin] if begin is not None and tokens[0] != begin else []
    ids = np.concatenate([np.array(lead, dtype=np.int64), tokens[:stop], [following]])
    return Prompt(ids, scored - window.start + len(lead))


def _score_batch(
    entry: TeacherEntry,
    teacher: Teacher,
    batch: _Batch,
    cache: LogitCache,
    rows: Rows,
    copies: HostCopies,
) -> None:
    """Score one batch."""
    in_batch = [window for row in batch.rows for window in row]
    low = min(window.start for window in in_batch)
    tokens = cache.tokens.read(low, min(max(window.stop for window in in_batch) + 1, entry.positions)).astype(np.int64)
    positions, labels = [], []
    read: list[list[Read]] = []
    for row in batch.rows:
        read.append([])
        for window in row:
            scored = rows.wanted(window)
            following = np.minimum(scored + 1, low + len(tokens) - 1)
            labels.append(np.where(scored + 1 < window.end, tokens[following - low], -1))
            positions.append(scored)
            read[-1].append((tokens[window.start - low : window.stop - low], scored - window.start))
    # Padding behind a row's one window needs no mask: a dense one costs the square of the row. But the model may have
    # positions for no more than a window.
    needs = any(len(row) > 1 for row in batch.rows) or batch.length > entry.windowing.input_tokens
    packs = entry.execution.rows == "packed" and needs
    inputs = row_inputs(read, entry.windowing.begin_id, batch.length, batch.count, packs)
    position = np.concatenate(positions)
    label = torch.from_numpy(np.concatenate(labels)).to(teacher.device)
    done = 0
    for logits in teacher.score(*inputs.tensors(teacher.device)):
        chunk = slice(done, done + len(logits))
        try:
            # The logits may be on another device than the windows.
            sampling = rows.sampling(position[chunk], logits.device)
            k, own_labels = max(1, entry.targets.k), label[chunk].to(logits.device)
            reduced = reduce_rows(logits, entry.vocabulary_size, k, own_labels, rows.floor, sampling, teacher.shard)
        except InvalidLogits as error:
            members = entry.teacher.loaded
            raise InputError(
                f"teacher {' + '.join(member.name for member in members)}: at position "
                f"{position[done + error.row]} its logits have no softmax ({error.found}); it diverged, or overflowed "
                f"in {members[0].dtype}: try --dtype float32 and another --name, or check its weights"
            ) from None
        copies.add(position[chunk], reduced.each(lambda values: values.to(teacher.device)))
        done += len(logits)
    assert done == len(position), "a teacher yields one row of logits per scored row"


class Rows:
    """The arrays of a shard, filled row by row; of the positions that are not `wanted` [T], if it is given, none."""

    def __init__(
        self, entry: TeacherEntry, start: int, stop: int, wanted: NDArray[np.bool_] | None, scorer: Scorer
    ) -> None:
        known = [name for name in VALUES.values() if name not in scorer.unknown]
        self._rows = TargetRows(start, stop, entry.targets.k, entry.vocabulary_size, known)
        self.floor = logprob_floor(entry.encoding.step_nats or 1.0)
        self._start = start
        self._targets = entry.targets
        self._wanted = wanted
        self._order = scorer.order
        self._random: NDArray[np.int64] | None = None
        if entry.targets.method == "varopt":
            self._random = random_numbers(entry.targets, start, stop)

    def wanted(self, window: Window) -> NDArray[np.int64]:
        """The positions of a window that are scored, absolute and ascending."""
        scored = np.arange(window.first, window.last)
        return scored if self._wanted is None else scored[self._wanted[scored - self._start]]

    def sampling(self, position: NDArray[Any], device: torch.device) -> Sampling | None:
        """How the rows of some positions (absolute) are sampled; None for top-k."""
        if self._random is None:
            return None
        random = torch.from_numpy(self._random[position - self._start]).to(device)
        order = None if self._order is None else self._order.to(device)
        return sampling_of(self._targets, random, order)

    def put(self, position: NDArray[Any], reduced: ReducedRows) -> None:
        """Store the rows of some positions (absolute), which are on the CPU."""
        rows = {name: values.numpy() for name, values in vars(reduced).items()}
        if not self._targets.k:
            # The reducer finds one id at least, and a server gives one.
            rows |= {"token_ids": rows["token_ids"][:, :0], "logprobs": rows["logprobs"][:, :0]}
            rows |= dict.fromkeys(("kept", "certain"), np.zeros(len(position), dtype=np.uint16))
        self._rows.put(position, rows)

    def targets(self) -> SparseTargets:
        """The rows as sparse targets, cut at a mass where the entry asks for that."""
        k, top_p, targets = self._targets.k, self._targets.top_p, self._rows.targets()
        return targets if top_p is None else prune(targets, k, top_p, self.floor)
