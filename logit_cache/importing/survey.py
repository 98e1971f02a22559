"""The first pass over the files: their tokens, and what their numbers are, decided before anything is written.

Legend: `L` tokens of a document, `R` rows, `K` ids of a row, `V` vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from logit_cache.corpus.documents import Tokens
from logit_cache.corpus.pieces import Piece
from logit_cache.corpus.spool import Spool
from logit_cache.fidelity.readings import Evidence
from logit_cache.fidelity.row_bounds import log_sums
from logit_cache.importing.alignment import alignment
from logit_cache.importing.document import Document, Format, Rows, Source, Values
from logit_cache.importing.job import ImportJob
from logit_cache.importing.row_values import MOST_DROPPED_MASS, Cleaned, ValueKind, as_logs, cleaned
from storage.errors import InputError
from storage.format.manifest.imported import Alignment
from storage.text import counted


@dataclass(frozen=True)
class Surveyed:
    """What the files hold.

    k            ids of a row, at most; V of whole distributions
    whole_rows   whether every position has targets
    has_label    whether the log-prob of the token that a row is about is known of all rows
    longest      tokens of the longest document
    strange      the largest share of a row's mass that ids outside the vocabulary have
    """

    values: Values
    are_probabilities: bool
    alignment: Alignment
    k: int
    whole_rows: bool
    has_label: bool
    longest: int
    dropped: int
    strange: float
    decisions: tuple[str, ...]


class Survey:
    """Takes note of one document after the other, and puts its tokens into a spool."""

    def __init__(self, job: ImportJob, format: Format, source: Source, vocabulary_size: int, spool: Spool) -> None:
        self._job = job
        self._format = format
        self._source = source
        self._vocabulary_size = vocabulary_size
        self._spool = spool
        self._begin: int | None = getattr(source.tokenizer, "bos_token_id", None)
        asked: tuple[Values, ...] = format.values
        if job.values is not None:
            asked = ("unnormalised" if job.values == "logits" else job.values,)
        self._may_be_probabilities = "probabilities" in asked
        self._kind = ValueKind(asked, format.slack_nats, vocabulary_size)
        self._evidence = Evidence()
        self._dense = format.values == ("dense",)
        self._k = self._dropped = self._longest = 0
        self._labelled = True
        self._strange = 0.0
        self._every_token = True  # has a row that stands at it
        if self._dense and job.values is not None:
            raise InputError(f"--values: {format.name} files hold whole distributions: leave it out")
        if not self._dense and job.targets == "varopt":
            raise InputError(
                f"--targets varopt: {format.name} files hold a few ids of each row, and a sample is taken from whole "
                f"distributions: leave it out"
            )

    def add(self, document: Document) -> None:
        """Raises InputError for tokens that the tokenizer lacks, and rows without sense."""
        ids = document.ids
        if not len(ids):
            return
        if int(ids.max()) >= self._vocabulary_size:
            raise InputError(
                f"{document.where}: it holds the token {int(ids.max())}, and the tokenizer has "
                f"{counted(self._vocabulary_size, 'id')}: give the --tokenizer of the teacher that made the file"
            )
        if self._begin is not None and len(ids) > 1 and ids[0] == ids[1] == self._begin:
            self._source.note("documents begin with BOS twice, as their teacher read them")
        there = np.zeros(len(ids), dtype=bool)
        for rows in document.parts():
            kept = self._dense_rows(document, rows) if rows.dense is not None else self._sparse_rows(document, rows)
            inside = kept & (rows.start + np.arange(len(rows)) < len(ids))
            there[rows.start + np.flatnonzero(inside)] = True
        self._every_token &= bool(there.all())
        self._longest = max(self._longest, len(ids))
        text = self._source.tokenizer.decode(ids.tolist())
        tokens = Tokens(document.file, ids, document.trained, document.where, text)
        self._spool.add(
            Piece(document.file, text, 0, len(text), True, True, begins=False, tokens=tokens), ids, document.trained
        )

    def _sparse_rows(self, document: Document, rows: Rows) -> NDArray[np.bool_]:
        clean = cleaned(rows, self._vocabulary_size, document.where, self._may_be_probabilities)
        logprobs = self._kind.add(clean, rows.start, document.where)
        self._check_strange(document, rows, clean)
        self._evidence.add(document.ids, rows.start, clean.ids, logprobs)
        self._k = max(self._k, int(clean.kept.max(initial=0)))
        self._dropped += clean.dropped
        kept: NDArray[np.bool_] = clean.kept > 0
        self._labelled &= rows.label is not None and bool(np.isfinite(rows.label[kept]).all())
        return kept

    def _check_strange(self, document: Document, rows: Rows, clean: Cleaned) -> None:
        """Refuse ids outside the vocabulary that have mass, by what the row looks like."""
        looks = self._kind.looks_like_probabilities(clean)
        values = np.where(looks[:, None], as_logs(clean.values), clean.values)
        strange = np.where(looks, clean.strange[:, 1], clean.strange[:, 0])
        with np.errstate(invalid="ignore"):
            share = np.exp(strange - np.logaddexp(strange, log_sums(values)))
        self._check_share(document, rows.start, np.where(np.isneginf(strange), 0.0, share))

    def _check_share(self, document: Document, start: int, share: NDArray[np.float64]) -> None:
        self._strange = max(self._strange, float(share.max(initial=0.0)))
        if float(share.max(initial=0.0)) > MOST_DROPPED_MASS:
            row = start + int(share.argmax())
            raise InputError(
                f"{document.where}: in row {row}, {share.max():.1%} of the mass is of ids outside the vocabulary of "
                f"{counted(self._vocabulary_size, 'id')}: give the teacher's --tokenizer; or the settings with which "
                f"the file is read are not those that it was written with"
            )

    def _dense_rows(self, document: Document, rows: Rows) -> NDArray[np.bool_]:
        assert rows.dense is not None
        if rows.dense.shape[1] < self._vocabulary_size:
            raise InputError(
                f"{document.where}: its distributions are over {counted(rows.dense.shape[1], 'id')}, and the tokenizer "
                f"has {self._vocabulary_size:,}: give the --tokenizer of the teacher that made the file"
            )
        whole = log_sums(rows.dense)
        strange = np.exp(log_sums(rows.dense[:, self._vocabulary_size :]) - whole)
        self._check_share(document, rows.start, strange)
        at = rows.start + np.arange(len(rows))
        both = np.flatnonzero((at >= 1) & (at + 1 < len(document.ids)))
        own = document.ids[np.stack([at[both], at[both] + 1], axis=1)].astype(np.int64)
        values = np.take_along_axis(rows.dense[both], own, axis=1).astype(np.float64)
        if len(both):
            self._evidence.add(document.ids, int(at[both[0]]), own, values)
        return np.ones(len(rows), dtype=bool)

    def decided(self) -> Surveyed:
        """Raises InputError where it is not clear what the numbers are, or which tokens rows are about."""
        if not self._spool.positions:
            why = "".join(f": {sentence}" for sentence in self._decisions())
            raise InputError(f"{self._job.source}: there is no token in it{why}; give other files")
        if not self._dense and not self._kind.rows:
            raise InputError(f"{self._job.source}: no row of it has an id with a finite number; give other files")
        values: Values
        values, are_probabilities = ("dense", False) if self._dense else self._kind.decided()
        if values == "logprobs" and self._kind.scaled:
            self._source.note(
                "rows add up to more than 1 by their fits, which are scaled to what the exact numbers leave",
                self._kind.scaled,
            )
        aligned = alignment(self._evidence, self._format.reading, self._job.alignment, self._format.name)
        return Surveyed(
            values=values,
            are_probabilities=are_probabilities,
            alignment=aligned,
            k=self._vocabulary_size if self._dense else self._k,
            # Of rows about their own token, none is about the one after the last.
            whole_rows=self._every_token and aligned.reading == "after",
            has_label=self._labelled and values == "logprobs",
            longest=self._longest,
            dropped=self._dropped,
            strange=self._strange,
            decisions=self._decisions(),
        )

    def _decisions(self) -> tuple[str, ...]:
        return tuple(f"{count:,} {sentence}" for sentence, count in sorted(self._source.notes.items()))
