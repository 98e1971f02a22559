"""Files and data sets of rows: JSON lines, CSV, Parquet, Arrow, and the hub.

Each is read as pairs of a row's place, for errors, and a function that gives the row or raises InputError for it alone.
Values are those of the file: `datasets`, which reads the hub's data sets here, would make dates of texts in JSON, and
pyarrow's reader of CSV loses a block of rows to one wrong byte.
"""

from __future__ import annotations

import codecs
import csv
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from logit_cache.corpus.rows import Row, RowReader
from logit_cache.corpus.sources.find import HUB, Source
from logit_cache.corpus.sources.text_files import not_utf8, read_blocks
from storage.errors import InputError, error_text
from storage.progress import Advance

Rows = Iterator[tuple[str, Callable[[], Row]]]

_TABLE_ROWS = 256
_MOST_CHARACTERS = 1 << 28  # of a value in CSV
_LINES = "write each row as one line"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_rows(source: Source, reader: RowReader, split: str, advance: Advance) -> Rows:
    """The rows of a source that is no text. Raises InputError for what is wrong with all of it."""
    if source.kind == "hub":
        return _hub_rows(source, reader, split, advance)
    if source.kind == "jsonl":
        return _json_rows(source, advance)
    if source.kind in ("csv", "tsv"):
        return _csv_rows(source, reader, advance)
    return _table_rows(source, reader, advance)


def _json_rows(source: Source, advance: Advance) -> Rows:
    # Line by line rather than through Arrow, which would give every message the fields of all others (as nulls, and
    # templates test for fields), refuse a file whose rows differ in kind, and name no line in its errors.
    for number, line in enumerate(_lines(source, advance), 1):
        if line.strip():
            where = f"{source.location} line {number}"
            yield where, functools.partial(_json_object, line, where)


def _json_object(line: bytes, where: str) -> Row:
    text = _decoded(line, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected one JSON object per line ({error}); {_LINES}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}; {_LINES}")
    return row


def _lines(source: Source, advance: Advance) -> Iterator[bytes]:
    lines = read_blocks(source.location, advance, lines=True)
    yield next(lines, b"").removeprefix(codecs.BOM_UTF8)
    yield from lines


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(where, f"byte {error.start} of it is not valid UTF-8 ({error.reason})", line) from None


def _csv_rows(source: Source, reader: RowReader, advance: Advance) -> Rows:
    """Every value is the text that it is, without the quotes around it; a row may be on several lines."""
    where = source.location

    def lines() -> Iterator[str]:
        for number, line in enumerate(_lines(source, advance)):
            # A wrong byte must not break the quotes: it is found in the value that has it.
            yield line.decode("utf-8", "surrogateescape") if number else _decoded(line, f"{where} line 1")

    csv.field_size_limit(_MOST_CHARACTERS)
    table = csv.reader(lines(), delimiter="\t" if source.kind == "tsv" else ",", strict=True)
    try:
        names = next(filter(None, table), [])
        columns = frozenset(reader.columns_of(names, where) if names else ())
        start = table.line_num + 1
        for values in table:
            if values:
                at = f"{where} line {start}"
                yield at, functools.partial(_csv_row, names, columns, values, at)
            start = table.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{where} line {table.line_num}: not valid {source.kind.upper()} ({error}); a value with a quote, a "
            f"separator or a line feed in it is written in quotes, and its quotes are doubled"
        ) from None


def _csv_row(names: Sequence[str], columns: frozenset[str], values: Sequence[str], where: str) -> Row:
    if len(values) != len(names):
        raise InputError(
            f"{where}: expected {len(names)} values, as in the header, found {len(values)}; correct the row"
        )
    row = {name: value for name, value in zip(names, values, strict=True) if name in columns}
    for name, value in row.items():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: {name!r} is not valid UTF-8; correct or remove the row") from None
    return row


def _table_rows(source: Source, reader: RowReader, advance: Advance) -> Rows:
    import pyarrow

    where, size = source.location, source.file_bytes or 0
    batches = _parquet_batches if source.kind == "parquet" else _arrow_batches
    done = counted = 0
    try:
        for batch, share in batches(where, reader):
            for index in range(batch.num_rows):
                at = f"{where} row {done + index}"
                yield at, functools.partial(_table_row, batch.slice(index, 1), at)
            done += batch.num_rows
            advance(int(size * share) - counted)
            counted = int(size * share)
        advance(size - counted)
    except (pyarrow.ArrowException, OSError) as error:
        called, found = "Parquet" if source.kind == "parquet" else "Arrow", error_text(error, 300)
        raise InputError(f"{where}: cannot be read as {called} ({found}); fetch or make it again") from None


def _parquet_batches(where: str, reader: RowReader) -> Iterator[tuple[Any, float]]:
    """Batches of rows with the columns that are looked for, and the share of the file up to each one's end."""
    import pyarrow.parquet

    # What is read ahead stays in memory until the file is closed.
    with pyarrow.parquet.ParquetFile(where, pre_buffer=False) as file:
        columns = reader.columns_of(file.schema_arrow.names, where)
        done, rows = 0, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=_TABLE_ROWS, columns=columns):
            done += batch.num_rows
            yield batch, done / rows


def _arrow_batches(where: str, reader: RowReader) -> Iterator[tuple[Any, float]]:
    """The same of an Arrow file, or of a stream, which `datasets` writes."""
    import pyarrow

    with pyarrow.memory_map(where) as file:
        if file.read(6) == b"ARROW1":
            table = pyarrow.ipc.open_file(file)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            # Without it, a stream that is cut between two batches would read like a shorter one.
            file.seek(max(0, file.size() - len(_END_OF_STREAM)))
            if file.read() != _END_OF_STREAM:
                raise pyarrow.ArrowInvalid("the mark at its end is missing")
            file.seek(0)
            table = batches = pyarrow.ipc.open_stream(file)
        columns = reader.columns_of(table.schema.names, where)
        done = 0
        for batch in batches:
            done += batch.nbytes
            yield batch.select(columns), min(1.0, done / file.size())


def _table_row(batch: Any, where: str) -> Row:
    try:
        [row] = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError) as error:
        # A text that is no UTF-8, a map with a key twice, a date that Python has not.
        raise InputError(f"{where}: cannot be read ({error_text(error, 300)}); correct or remove the row") from None
    return dict(row)


def _hub_rows(source: Source, reader: RowReader, split: str, advance: Advance) -> Rows:
    import datasets

    parts = HUB.match(source.location)
    assert parts is not None, "find_sources has checked it"
    done = 0
    try:
        rows = datasets.load_dataset(
            parts["name"], parts["config"], split=split, revision=parts["revision"], streaming=True
        )
        columns = [name for name in rows.column_names or () if name in reader.columns]
        for row in rows.select_columns(columns) if columns else rows:
            yield f"{source.location} row {done}", functools.partial(dict, row)
            done += 1
            text = row.get(reader.text_field)
            advance(len(text) if isinstance(text, str) else 0)
    except Exception as error:
        # The library raises its own errors and those of several others: for an unknown name, config or split, for
        # a gated data set, and for network failures.
        at = f" after {done} rows" if done else ""
        raise InputError(
            f"{source.location}, split {split!r}: cannot be read{at} ({error_text(error, 300)}); "
            f"check name, config, split and network"
        ) from None
