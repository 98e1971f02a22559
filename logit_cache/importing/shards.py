"""The second pass over the files: their rows as the shards of an entry, one in memory at a time.

Legend: `T` positions of a shard, `R` rows, `K` stored ids, `V` vocabulary size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import Document, Rows
from logit_cache.importing.row_values import cleaned, normalised
from logit_cache.importing.survey import Surveyed
from storage.cache.writer import EntryWriter
from storage.errors import InputError
from storage.format.encoding import logprob_floor
from storage.format.layout import VALUES
from storage.format.manifest.entry import TeacherEntry
from storage.format.targets import TargetRows

CHANGED = "it was changed while it was imported: remove the entry, and import it again"


@dataclass(frozen=True)
class ShardSource:
    """Makes shards of an entry from documents, which come in the order of the stream. slack_nats: of their format."""

    entry: TeacherEntry
    surveyed: Surveyed
    document_starts: NDArray[np.uint64]
    slack_nats: float

    def shards(self, documents: Iterator[Document], pending: Collection[int]) -> Iterator[tuple[int, TargetRows]]:
        """Each pending shard and its arrays, in order; rows of documents that touch none of them are not read."""
        layout, positions = self.entry.layout, self.entry.positions
        wanted, edges = sorted(pending), np.append(self.document_starts, np.uint64(positions))
        current: TargetRows | None = None
        done = 0  # of `wanted`
        for number, document in enumerate(item for item in documents if len(item.ids)):
            first, stop = (int(edge) for edge in edges[number : number + 2]) if number + 1 < len(edges) else (0, 0)
            if stop - first != len(document.ids):
                raise InputError(f"{document.where}: {CHANGED}")
            while done < len(wanted) and layout.shard_range(wanted[done], positions)[1] <= first:
                yield wanted[done], current or self._empty(wanted[done])
                current, done = None, done + 1
            if done == len(wanted):
                return
            if stop <= layout.shard_range(wanted[done], positions)[0]:
                continue
            for rows in document.parts():
                at = self._positions(document, rows, first)
                while done < len(wanted):
                    current = current or self._empty(wanted[done])
                    inside = np.flatnonzero((at >= current.start) & (at < current.stop))
                    if len(inside):
                        self._put(current, document, rows, at, inside)
                    if not len(at) or int(at.max()) < current.stop:
                        break
                    yield wanted[done], current
                    current, done = None, done + 1
        while done < len(wanted):
            yield wanted[done], current or self._empty(wanted[done])
            current, done = None, done + 1

    def _empty(self, shard: int) -> TargetRows:
        targets = self.entry.targets
        names = [name for field, name in VALUES.items() if targets.has(field)]
        around = self.entry.layout.shard_range(shard, self.entry.positions)
        return TargetRows(*around, targets.k, self.entry.vocabulary_size, names)

    @property
    def _floor(self) -> float:
        """That of cache-logits: a code cannot say less."""
        return logprob_floor(self.entry.encoding.step_nats or 1.0)

    def _positions(self, document: Document, rows: Rows, first: int) -> NDArray[np.int64]:
        """The absolute position of each row [R]; -1 for rows about no position of the document."""
        shift = 0 if self.surveyed.alignment.reading == "after" else -1
        at = rows.start + shift + np.arange(len(rows))
        return np.where((at >= 0) & (at < len(document.ids)), first + at, -1)

    def _put(
        self,
        current: TargetRows,
        document: Document,
        rows: Rows,
        at: NDArray[np.int64],
        inside: NDArray[np.int64],
    ) -> None:
        if rows.dense is not None:
            self._put_dense(current, document, rows.dense[inside], at[inside])
            return
        entry, surveyed = self.entry, self.surveyed
        label = np.full(len(inside), np.nan) if rows.label is None else rows.label[inside]
        some = replace(rows, ids=rows.ids[inside], values=rows.values[inside])
        found = normalised(
            cleaned(some, entry.vocabulary_size, document.where, surveyed.are_probabilities),
            surveyed.values,
            surveyed.are_probabilities,
            entry.targets.k,
            entry.vocabulary_size,
            self.slack_nats,
        )
        follows, tail = self._follows(document, at[inside]), found.log_tail
        current.put(
            at[inside],
            {
                "token_ids": found.ids,
                "logprobs": np.maximum(found.logprobs, self._floor),
                "kept": found.kept,
                "certain": found.kept,
                "log_tail": None if tail is None else np.where(np.isneginf(tail), tail, np.maximum(tail, self._floor)),
                "label_logprob": np.maximum(np.where(follows, label, np.nan), self._floor),
            },
        )

    def _follows(self, document: Document, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether a token of the document follows each position."""
        number = int(np.searchsorted(self.document_starts, at[0], side="right")) - 1
        last = int(self.document_starts[number]) + len(document.ids) - 1
        found: NDArray[np.bool_] = at < last
        return found

    def _put_dense(
        self, current: TargetRows, document: Document, dense: NDArray[np.float32], at: NDArray[np.int64]
    ) -> None:
        """Whole distributions, reduced as a teacher's are."""
        import torch

        from teachers.reduction.reduce import reduce_rows
        from teachers.reduction.varopt import random_numbers, sampling_of

        entry = self.entry
        sampling = None
        if entry.targets.method == "varopt":
            random = random_numbers(entry.targets, int(at[0]), int(at[-1]) + 1)[at - at[0]]
            sampling = sampling_of(entry.targets, torch.from_numpy(random), None)
        labels = torch.full((len(at),), -1)
        logits = torch.from_numpy(np.ascontiguousarray(dense))
        reduced = reduce_rows(logits, entry.vocabulary_size, entry.targets.k, labels, self._floor, sampling, None)
        current.put(at, {name: value.numpy() for name, value in vars(reduced).items()})


def write_shards(
    writer: EntryWriter,
    source: ShardSource,
    documents: Iterator[Document],
    check: Callable[[], None],
    progress: Callable[[int], None],
) -> None:
    """Commit the shards that are missing, in order; what is committed is not read again.

    check: called before the last one, without which the entry is not complete.
    """
    began, pending = time.monotonic(), writer.pending()
    for shard, arrays in source.shards(documents, pending):
        if shard == max(pending):
            check()
        writer.commit(shard, arrays.targets(), began)
        progress(arrays.stop - arrays.start)
        began = time.monotonic()
    writer.finish()
