"""The files of somebody else that an entry was made from, and how they were read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from storage.format.manifest.shared import Count, Sha256, Text
from storage.format.sealing import Record

MAX_IMPORTED_FILES = 2_048  # of an entry: their names and digests stay within the size of a record


class SourceFile(Record):
    """A file that an entry was imported from: its name, without folders, and its content."""

    name: Annotated[str, Field(max_length=255)]
    bytes: Count
    sha256: Sha256


class Alignment(Record):
    """Whether a row of a file is about the token that follows (after) or its own (of), and the evidence.

    `after_nats` and `of_nats`: over the `rows` for which both readings name a token, its mean log-prob by either; of a
    row that does not hold it, the least one of the row. `given`: whether whoever imported the file said which it is.
    """

    reading: Literal["after", "of"]
    given: bool
    rows: Count
    after_nats: float
    of_nats: float


class ImportedFrom(Record):
    """The files of somebody else that an entry's targets are from, and how they were read.

    `format`: the name of the importer. `values`: what the numbers in them are: log-probs over the whole vocabulary,
    probabilities over it, numbers that lack the normaliser (logits, or what was normalised among the ids of a row), or
    the whole distribution (dense). `dropped_ids`: ids that were left out because they had no finite log-prob, or are
    none of the vocabulary; `dropped_mass`: the largest share of a row's mass that ids outside the vocabulary had.
    `error_nats`: of a log-prob as the files have it, where their format rounds. `decisions`: what else was found, and
    how often.
    """

    format: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")]
    files: Annotated[tuple[SourceFile, ...], Field(min_length=1, max_length=MAX_IMPORTED_FILES)]
    values: Literal["logprobs", "probabilities", "unnormalised", "dense"]
    alignment: Alignment
    dropped_ids: Count
    dropped_mass: Annotated[float, Field(ge=0, le=1)]
    error_nats: Annotated[float, Field(ge=0)] | None = None
    decisions: Annotated[tuple[Text, ...], Field(max_length=16)] = ()
