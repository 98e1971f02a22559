"""The documents of all sources, in the order in which these were given; and the rows that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.documents import Chunk, Document, Tokens, UnfitTokenizer
from logit_cache.corpus.rows import Form, RowReader
from logit_cache.corpus.sources.find import Source
from logit_cache.corpus.sources.names import SourceNames
from logit_cache.corpus.sources.row_files import read_rows
from logit_cache.corpus.sources.text_files import cut_at, decoded, read_blocks
from storage.errors import InputError
from storage.progress import Advance

_EXAMPLES = 5


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


def check_column(sources: Iterable[Source], config: CorpusConfig) -> None:
    """Raise InputError where a column is to name the sources of rows, and there is none of a file, or no use for it."""
    column = config.source_column
    if column is None:
        return
    unnamed = [source for source in sources if not source.named]
    if not unnamed:
        raise InputError(f"--source-column {column}: every --text has a name of its own: leave one of the two out")
    for source in unnamed:
        if source.kind == "text":
            raise InputError(
                f"{source.location}: a text has no column {column!r}: name it, with --text NAME={source.location}"
            )


def read_sources(
    sources: Sequence[Source],
    config: CorpusConfig,
    make: Make,
    advance: Advance,
    skipped: SkippedRows,
    names: SourceNames,
) -> Iterator[Chunk | Tokens]:
    """What `make` makes of the documents of all sources; `advance` receives the bytes that were read, `names` the names
    of the sources, whose numbers documents have.

    Raises InputError naming the file and the byte, line or row that is wrong. A row that cannot be read, or for which
    `make` raises, goes to `skipped` instead, where the config says so and other rows of the source can be read.
    """
    numbers = [_number(source, config, names) for source in sources]
    for number, source in zip(numbers, sources, strict=True):
        if source.kind != "text":
            yield from _rows(number, source, config, make, advance, skipped, names)
        else:
            assert number is not None, "check_column has looked at it"
            yield from _text(number, source, config.document_separator, advance)


def _number(source: Source, config: CorpusConfig, names: SourceNames) -> int | None:
    """The number of a source; None where its rows name theirs."""
    if source.named:
        return names.of_name(source.name)
    return names.of_file(source.name) if config.source_column is None else None


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
    number: int | None,
    source: Source,
    config: CorpusConfig,
    make: Make,
    advance: Advance,
    skipped: SkippedRows,
    names: SourceNames,
) -> Iterator[Chunk | Tokens]:
    # A form is chosen by naming its field, too.
    forms: tuple[Form, ...] = ("text", "messages")
    named = [name for name in forms if f"{name}_field" in config.model_fields_set]
    form = config.row_form or (named[0] if len(named) == 1 else None)
    reader = RowReader(
        config.text_field, config.messages_field, form, None if number is not None else config.source_column
    )
    from_arrow = source.kind not in ("jsonl", "csv", "tsv")
    read = bad = 0
    first: InputError | None = None
    for where, row in read_rows(source, reader, config.split, advance):
        try:
            values = row()
            name = None if number is not None else reader.source_of(values, where)
            made = [*make(reader.document(number or 0, values, where, from_arrow))]
        except UnfitTokenizer:
            raise
        except InputError as error:
            if not config.skip_bad_rows:
                raise InputError(f"{error} (--skip-bad-rows leaves such rows out)") from None
            first = first or error
            bad += 1
            skipped.add(error)
        else:
            read += 1
            if name is not None:
                made = [replace(item, source=names.of_name(name)) for item in made]
            yield from made
    if bad and not read:
        raise InputError(
            f"{source.location}: none of its {bad:,} rows can be read, and --skip-bad-rows is for single ones. The "
            f"first: {first}"
        )
