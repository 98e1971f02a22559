"""Sources of text: plain text, JSON lines, Parquet, and data sets of the Hugging Face hub.

Everything is read as a stream of documents (`logit_cache.corpus.documents`), in the order in which the sources were
given; no file is ever held whole. What a row means is in `logit_cache.corpus.rows`. Text is kept as it is, carriage
returns included; only a byte-order mark at the start of a file is left out. Files that end in .gz, .bz2 or .xz are
decompressed on the way.

=============================  =======================================================================
`hub:NAME[:CONFIG][@REVISION]` a data set of the hub, streamed; its split is an option
`*.jsonl`, `*.ndjson`, `*.json`  one JSON object per line: a document or a conversation each
`*.parquet`                    one row per document or conversation
any other file                 UTF-8 text: one document, or as many as the document separator makes of it
a folder                       all files below it, sorted by path, without hidden ones
a pattern with `*`, `?`, `[`   the files that it matches, sorted by path; `**` crosses folders
=============================  =======================================================================
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from logit_cache.corpus.documents import Chunk, Document
from logit_cache.corpus.rows import RowReader
from storage.errors import InputError
from storage.files import local_path

BLOCK_BYTES = 1 << 20

COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_HUB = re.compile(r"^hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?$")
_PARQUET_ROWS = 256
_LINES = "write each row as one line"


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set. `name` is its name in the cache record: a base name or hub id, never a folder."""

    name: str
    kind: Literal["text", "jsonl", "parquet", "hub"]
    location: str
    file_bytes: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """How sources are read: the rows of data sets, the split of those of the hub, and where plain text is cut."""

    rows: RowReader
    split: str
    document_separator: str | None


@dataclass(slots=True)
class Meter:
    """How many bytes of input have been read: of the files, or of the text where a hub data set has no size."""

    read_bytes: int = 0


def find_sources(text: Iterable[str]) -> list[Source]:
    """The sources that paths, patterns, folders and hub names stand for; raises InputError for any that names none."""
    return [source for item in text for source in _find(item)]


def read_sources(sources: Iterable[Source], reading: Reading, meter: Meter) -> Iterator[Document]:
    """All documents of all sources. Raises InputError naming the file and the byte, line or row that is wrong."""
    for index, source in enumerate(sources):
        if source.kind == "text":
            yield from _read_text(index, source, reading.document_separator, meter)
        else:
            rows = {"jsonl": _json_rows, "parquet": _parquet_rows, "hub": _hub_rows}[source.kind]
            for row in rows(source, reading, meter):
                yield reading.rows.document(index, *row, from_arrow=source.kind != "jsonl")


def _find(item: str) -> list[Source]:
    if item.startswith("hub:"):
        if not _HUB.match(item):
            raise InputError(f"{item!r}: expected hub:NAME, hub:NAME:CONFIG or hub:NAME@REVISION")
        return [Source(item, "hub", item, None)]
    if "://" in item:
        raise InputError(f"{item}: text is read from files of this machine or from hub:NAME; copy it here first")
    path = local_path(item)
    if path.is_dir():
        below = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        found = sorted(
            p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts) and p.is_file()
        )
        if not found:
            raise InputError(f"{item}: the folder holds no files; give files or a folder with some")
    elif path.exists():
        found = [path]
    elif glob.has_magic(item):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise InputError(f"{item}: the pattern matches no file here ({os.getcwd()}); check its spelling")
    else:
        raise InputError(f"{item}: no such file; give a file, a folder, a pattern, or hub:NAME for a hub data set")
    return [_file_source(p) for p in found]


def _file_source(path: Path) -> Source:
    ending = Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.lower()
    kind: Literal["text", "jsonl", "parquet"] = (
        "jsonl" if ending in _JSON_LINES else "parquet" if ending == ".parquet" else "text"
    )
    # A name that is not UTF-8 must still fit into JSON.
    name = os.fsencode(path.name).decode("utf-8", "replace")
    return Source(name, kind, str(path), path.stat().st_size)


@dataclass
class _MeteredFile:
    """A file read in binary, decompressed according to its suffix, that counts its own bytes on the disk."""

    source: Source
    meter: Meter
    _counted: int = field(default=0, init=False)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        where = self.source.location
        opener = COMPRESSED.get(Path(where).suffix)
        try:
            with open(where, "rb") as self._raw:
                if opener is None:
                    yield self._raw
                else:
                    with cast(IO[bytes], opener(self._raw, "rb")) as file:
                        yield file
        except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"{where}: cannot be decompressed ({error}); the file is damaged or cut short") from None
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error})") from None

    def count(self) -> None:
        position = self._raw.tell()
        self.meter.read_bytes += position - self._counted
        self._counted = position


def _read_text(index: int, source: Source, separator: str | None, meter: Meter) -> Iterator[Chunk]:
    blocks = _text_blocks(source, meter)
    if separator is None:
        for block in blocks:
            yield Chunk(index, block, False)
        yield Chunk(index, "", True)
    else:
        for text, ends in _split(blocks, separator):
            yield Chunk(index, text, ends)


def decoded(blocks: Iterable[bytes], where: str) -> Iterator[str]:
    """The text of a UTF-8 file that is read in blocks, without a byte-order mark at its start.

    Raises InputError that names `where` and the byte that is wrong, counted from the start of the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, started = 0, False
    for block in itertools.chain(blocks, (b"",)):
        if b"\0" in block:
            raise InputError(
                f"{where}: byte {offset + block.index(0)} is 0, so this is no UTF-8 text file; "
                f"leave it out, or convert it"
            )
        carried = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {offset - carried + error.start} is not valid UTF-8 ({error.reason}); "
                f"convert the file to UTF-8"
            ) from None
        yield text if started else text.removeprefix("\ufeff")
        started = started or bool(text)
        offset += len(block)


def _text_blocks(source: Source, meter: Meter) -> Iterator[str]:
    file = _MeteredFile(source, meter)

    def blocks(stream: IO[bytes]) -> Iterator[bytes]:
        while True:
            block = stream.read(BLOCK_BYTES)
            file.count()
            if not block:
                return
            yield block

    with file.open() as stream:
        yield from decoded(blocks(stream), source.location)


def _split(blocks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """`"".join(blocks).split(separator)` as a stream of (text, ends), whatever the blocks.

    A line feed of the separator also matches one with a carriage return before it.
    """
    lines = separator.replace("\r\n", "\n").split("\n")
    pattern = re.compile("\r?\n".join(re.escape(line) for line in lines))
    longest = len(separator) + len(lines) - 1
    buffer = ""
    for block in blocks:
        buffer += block
        # A match that starts after this point may become longer, or start earlier, with the next block.
        limit = len(buffer) - longest
        position = 0
        for match in pattern.finditer(buffer):
            if match.start() > limit:
                break
            yield buffer[position : match.start()], True
            position = match.end()
        if limit > position:
            yield buffer[position:limit], False
        buffer = buffer[max(position, limit, 0) :]
    for text in (parts := pattern.split(buffer))[:-1]:
        yield text, True
    yield parts[-1], True


def _json_rows(source: Source, reading: Reading, meter: Meter) -> Iterator[tuple[dict[str, Any], str]]:
    # Line by line rather than through Arrow, which would give every message the fields of all others (as nulls, and
    # templates test for fields), refuse a file whose rows differ in kind, and name no line in its errors.
    file = _MeteredFile(source, meter)
    with file.open() as stream:
        for number in itertools.count(1):
            line = stream.readline()
            file.count()
            if not line:
                return
            where = f"{source.location} line {number}"
            try:
                text = line.decode()
                row = json.loads(text.removeprefix("\ufeff") if number == 1 else text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: byte {error.start} of it is not valid UTF-8 ({error.reason})") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: expected one JSON object per line ({error}); {_LINES}") from None
            if row is None and not text.strip():
                continue
            if not isinstance(row, dict):
                raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}; {_LINES}")
            yield row, where


def _parquet_rows(source: Source, reading: Reading, meter: Meter) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    where = source.location
    try:
        with parquet.ParquetFile(where) as file:
            names = file.schema_arrow.names
            columns = reading.rows.columns_of(names, where)
            done, counted, rows = 0, 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    yield row, f"{where} row {done}"
                    done += 1
                reached = (source.file_bytes or 0) * done // rows
                meter.read_bytes += reached - counted
                counted = reached
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{where}: cannot be read as Parquet ({_one_line(error)})") from None


def _hub_rows(source: Source, reading: Reading, meter: Meter) -> Iterator[tuple[dict[str, Any], str]]:
    import datasets

    parts = _HUB.match(source.location)
    assert parts is not None, "find_sources has checked it"
    done = 0
    try:
        rows = datasets.load_dataset(
            parts["name"], parts["config"], split=reading.split, revision=parts["revision"], streaming=True
        )
        columns = [name for name in rows.column_names or () if name in reading.rows.columns]
        for row in rows.select_columns(columns) if columns else rows:
            yield row, f"{source.name} row {done}"
            done += 1
            text = row.get(reading.rows.text_field)
            meter.read_bytes += len(text) if isinstance(text, str) else 0
    except InputError:
        raise
    except Exception as error:
        # The library raises its own errors and those of several others: for an unknown name, config or split, for
        # a gated data set, and for network failures.
        at = f" after {done} rows" if done else ""
        raise InputError(
            f"{source.name}, split {reading.split!r}: cannot be read{at} ({_one_line(error)}); "
            f"check name, config, split and network"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
