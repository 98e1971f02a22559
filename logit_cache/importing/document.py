"""The protocol of importers: a format yields documents, and each document the rows of its targets.

Legend: `L` tokens of a document, `R` rows, `K` ids of a row at most, `V` vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logit_cache.fidelity.readings import Reading

Values = Literal["logprobs", "probabilities", "unnormalised", "dense"]
"""What the numbers of a row are; see `storage.format.manifest.imported.ImportedFrom`."""

NO_ID = -1
"""In a column that a row does not have."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a document. Row r stands at its token `start + r`.

    ids      int64 [R, K]    in any order; NO_ID in columns that a row does not have
    values   float64 [R, K]  their numbers; -inf or NaN: the id has none, whatever it is, and is left out
    label    float64 [R]     the log-prob of the token that a row is about, whether the row holds it or not; NaN where
             it is not known; None where the format does not have it
    dense    float32 [R, V]  log-probs of all ids, in place of ids and values, which are then empty
    exact    the columns from this one on hold numbers of a fitted curve, which is off by nats, in the least ones above
             all; None: all are exact
    """

    start: int
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    label: NDArray[np.float64] | None = None
    dense: NDArray[np.float32] | None = None
    exact: int | None = None

    def __len__(self) -> int:
        return len(self.ids if self.dense is None else self.dense)


@dataclass(frozen=True)
class Document:
    """Tokens that were read by themselves: a row of a file, or a segment of a packed one.

    ids: uint32 [L]. trained: bool [L], which of them are trained on; None: all. file: the number of its file. where:
    names it in errors. parts: its rows, block by block; called once for each pass, and not at all where the rows are
    not needed.
    """

    file: int
    where: str
    ids: NDArray[np.uint32]
    parts: Callable[[], Iterator[Rows]]
    trained: NDArray[np.bool_] | None = None


@dataclass
class Source:
    """The files that are imported, in their order, and what an importer may need to read them.

    settings: the file of the format's settings, where it has one. column_suffix: of the columns to read, where a file
    has those of several teachers; None: not said. notes: for what an importer decides itself.
    """

    files: list[Path]
    tokenizer: Any
    settings: Path | None = None
    column_suffix: str | None = None
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, sentence: str, count: int = 1) -> None:
        """Count something that the record should say."""
        self.notes[sentence] = self.notes.get(sentence, 0) + count


@dataclass(frozen=True)
class Format:
    """A format and its importer.

    suffixes      of files that are looked for in a folder
    recognises    whether a file is one of this format, by its content; False for every other file
    documents     the documents of a source; what the files are is checked when it is called
    values        what the numbers can be by the format; several: the data decide
    reading       what rows are about by the format; None: the data alone decide
    settings      the file of settings that lies beside the data, without which they cannot be read; None: there is none
    column_suffix whether there may be columns of several teachers, told apart by a suffix
    slack_nats    by how much the log of a row's sum may exceed 0 through the format's own rounding
    error_nats    bound of the rounding of a log-prob in the format, where it has one
    """

    name: str
    about: str
    suffixes: tuple[str, ...]
    recognises: Callable[[Path], bool]
    documents: Callable[[Source], Iterator[Document]]
    values: tuple[Values, ...] = ("logprobs",)
    reading: Reading | None = None
    settings: str | None = None
    column_suffix: bool = False
    slack_nats: float = 0.01
    error_nats: float | None = None


def segments(numbers: NDArray[Any]) -> Iterator[tuple[int, slice]]:
    """The segments of a packed row by the number of each token's, [L]: the number, and the tokens; 0 is padding."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for start, stop in pairwise(edges):
        if stop > start and numbers[start]:
            yield int(numbers[start]), slice(start, stop)


def ragged(lengths: NDArray[np.int64], flat: NDArray[Any], missing: float) -> NDArray[Any]:
    """[R, K] from the R rows of `lengths` [R] that lie one after the other in `flat`; `missing` where a row ends."""
    columns = int(lengths.max(initial=0))
    if len(flat) == len(lengths) * columns:
        return flat.reshape(len(lengths), columns)
    found = np.full((len(lengths), columns), missing, dtype=flat.dtype)
    found[np.arange(columns) < lengths[:, None]] = flat
    return found
