"""The documents of all sources, in the order in which these were given; and the rows that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from logit_cache.corpus.documents import Chunk, Document, Tokens, UnfitTokenizer
from logit_cache.corpus.rows import RowReader
from logit_cache.corpus.sources.find import Source
from logit_cache.corpus.sources.row_files import read_rows
from logit_cache.corpus.sources.text_files import cut_at, decoded, read_blocks
from storage.errors import InputError
from storage.progress import Advance

_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Reading:
    """How sources are read: the rows of data sets, the split of those of the hub, and where plain text is cut."""

    rows: RowReader
    split: str
    document_separator: str | None


@dataclass(slots=True)
class SkippedRows:
    """The rows that were left out: how many, and the errors of the first of them."""

    count: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, error: InputError) -> None:
        self.count += 1
        if len(self.errors) < _EXAMPLES:
            self.errors.append(str(error))


# Text or tokens out of a document; raises InputError where it has none to give.
Make = Callable[[Document], Iterable[Chunk | Tokens]]


def read_sources(
    sources: Iterable[Source], reading: Reading, make: Make, advance: Advance, skipped: SkippedRows | None
) -> Iterator[Chunk | Tokens]:
    """What `make` makes of the documents of all sources; `advance` receives the bytes that were read.

    Raises InputError naming the file and the byte, line or row that is wrong. A row that cannot be read, or for which
    `make` raises, goes to `skipped` instead, where there is one and other rows of the source can be read.
    """
    for index, source in enumerate(sources):
        if source.kind == "text":
            yield from _text(index, source, reading.document_separator, advance)
        else:
            yield from _rows(index, source, reading, make, advance, skipped)


def _text(index: int, source: Source, separator: str | None, advance: Advance) -> Iterator[Chunk]:
    blocks = decoded(read_blocks(source.location, advance), source.location)
    if separator is None:
        for block in blocks:
            yield Chunk(index, block, False)
        yield Chunk(index, "", True)
    else:
        for text, ends in cut_at(separator, blocks):
            yield Chunk(index, text, ends)


def _rows(
    index: int, source: Source, reading: Reading, make: Make, advance: Advance, skipped: SkippedRows | None
) -> Iterator[Chunk | Tokens]:
    from_arrow = source.kind not in ("jsonl", "csv", "tsv")
    read = bad = 0
    first: InputError | None = None
    for where, row in read_rows(source, reading.rows, reading.split, advance):
        try:
            made = [*make(reading.rows.document(index, row(), where, from_arrow))]
        except UnfitTokenizer:
            raise
        except InputError as error:
            if skipped is None:
                raise InputError(f"{error} (--skip-bad-rows leaves such rows out)") from None
            first = first or error
            bad += 1
            skipped.add(error)
        else:
            read += 1
            yield from made
    if bad and not read:
        raise InputError(
            f"{source.location}: none of its {bad:,} rows can be read, and --skip-bad-rows is for single ones. The "
            f"first: {first}"
        )
