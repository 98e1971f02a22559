"""The files of an import: which ones a path stands for, their digests, and readers that formats share.

Legend: `R` rows of a document, `K` their ids.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import NO_ID, Document, Rows, Source, ragged
from storage.errors import InputError, error_text
from storage.files import local_path
from storage.format.manifest.imported import MAX_IMPORTED_FILES, SourceFile
from storage.progress import Advance

_BLOCK = 1 << 22
_BATCH_ROWS = 16
_MOST_LINE_BYTES = 1 << 30
# In labels: not trained on.
IGNORED_LABEL = -100


def source_files(source: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a path, a folder or a pattern, numbers in their names in order. Raises InputError for none."""
    path = local_path(source)
    if path.is_dir():
        found = [item for item in path.iterdir() if item.is_file() and item.suffix in suffixes]
    elif path.exists():
        found = [path]
    else:
        found = [Path(item) for item in glob.glob(str(path)) if Path(item).is_file()] if glob.has_magic(source) else []
    if not found:
        raise InputError(
            f"{source}: no file to import is there; give a file, a pattern, or a folder with files that end in "
            f"{', '.join(sorted(set(suffixes)))}"
        )
    if len(found) > MAX_IMPORTED_FILES:
        raise InputError(
            f"{source}: {len(found):,} files, at most {MAX_IMPORTED_FILES:,} of an entry are recorded: import parts"
        )
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """data_2 before data_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(path))]


def digests(files: list[Path], advance: Advance) -> tuple[SourceFile, ...]:
    """Name, length and sha256 of each file."""
    found = []
    for path in files:
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    size += len(block)
                    advance(len(block))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        found.append(SourceFile(name=path.name[-255:], bytes=size, sha256=digest.hexdigest()))
    return tuple(found)


def parquet_columns(path: Path) -> dict[str, int]:
    """The columns of a Parquet file, and how many lists deep the values of each are; none of a file of another kind."""
    import pyarrow
    import pyarrow.parquet

    try:
        return {field.name: _depth(field.type) for field in pyarrow.parquet.read_schema(path)}
    except (pyarrow.ArrowException, OSError):
        return {}


def _depth(kind: Any) -> int:
    """How many lists deep values of a type of pyarrow are."""
    import pyarrow

    types = pyarrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return 1 + _depth(kind.value_type) if is_list else 0


def parquet_rows(path: Path, columns: list[str], nulls: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row: where it is, and its columns as pyarrow scalars. Raises InputError for a file that is damaged, and for
    a value that is missing, unless there may be `nulls`."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # What is read ahead stays in memory until the file is closed.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for index in range(batch.num_rows):
                    row = {name: batch.column(name)[index] for name in columns}
                    where = f"{path} row {number}"
                    number += 1
                    missing = [name for name, value in row.items() if not value.is_valid]
                    if missing and not nulls:
                        raise InputError(f"{where}: it has no {missing[0]}")
                    yield where, row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error_text(error, 300)}); fetch it again") from None


def list_array(scalar: Any, where: str) -> NDArray[Any]:
    """A list of numbers as an array, without Python objects between. Raises InputError for other lists."""
    return numbers(_values(scalar, where), where)


def _values(scalar: Any, where: str) -> Any:
    """What a list holds, as an array of pyarrow."""
    if not _depth(scalar.type):
        raise InputError(f"{where}: expected lists of numbers, found {scalar.type}")
    return scalar.values


def numbers(values: Any, where: str) -> NDArray[Any]:
    if values.null_count:
        raise InputError(f"{where}: a number in one of its lists is missing")
    found: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if len(found) and found.dtype.kind not in "iufb":
        raise InputError(f"{where}: expected lists of numbers, found {values.type}")
    return found


def lists_array(scalar: Any, where: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A list of lists of numbers: the length of each, int64 [R], and all numbers one after the other."""
    lengths, flat = list_lengths(_values(scalar, where), where)
    return lengths, numbers(flat, where)


def list_lengths(lists: Any, where: str) -> tuple[NDArray[np.int64], Any]:
    """The length of each list in an array of pyarrow, int64 [R], and an array of what all of them hold, one after the
    other. One that is missing is empty. Raises InputError for other arrays."""
    import pyarrow
    import pyarrow.compute

    if not len(lists):
        return np.zeros(0, dtype=np.int64), pyarrow.array([], pyarrow.float64())
    if not _depth(lists.type):
        raise InputError(f"{where}: expected a list of numbers for each of its tokens, found one list")
    lengths = pyarrow.compute.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, lists.flatten()


def id_columns(
    ids: tuple[NDArray[np.int64], NDArray[Any]], values: tuple[NDArray[np.int64], NDArray[Any]], where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids int64 [R, K] and their numbers float64 [R, K] from lists; raises InputError where these differ in length."""
    if not np.array_equal(ids[0], values[0]):
        raise InputError(f"{where}: its lists of ids and of numbers differ in length; the file is damaged")
    if ids[1].dtype.kind == "f" and (ids[1] % 1 != 0).any():
        wrong(where, "whole numbers as ids", "others")
    return (
        ragged(ids[0], ids[1].astype(np.int64), NO_ID),
        ragged(values[0], values[1].astype(np.float64), -np.inf),
    )


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line of a file of JSON lines that is not empty: where it is, and its value."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE_BYTES + 1), b""), 1):
                if len(line) > _MOST_LINE_BYTES:
                    wrong(f"{path} line {number}", f"at most {_MOST_LINE_BYTES:,} bytes", "more: are these JSON lines?")
                if line.strip():
                    yield f"{path} line {number}", _parsed(line, f"{path} line {number}")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line, parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}); was it cut off?") from None


def first_object(path: Path) -> dict[str, Any]:
    """The first JSON object of a file of lines; an empty one for another file."""
    try:
        with path.open("rb") as file:
            start = file.read(1)
            file.seek(0)
            line = file.readline(_MOST_LINE_BYTES) if start == b"{" else b""
        found = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def starts_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False


def token_array(values: Any, where: str, name: str) -> NDArray[np.uint32]:
    """Token ids uint32 [L]; raises InputError for what is none."""
    try:
        found = np.asarray(values)
        if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
            raise ValueError("expected whole numbers in a list")
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < 1 << 31:
            raise ValueError("an id is negative or far too large")
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{where}: {name} is no list of token ids ({error})") from None
    return found.astype(np.uint32)


def trained_by_labels(ids: NDArray[np.uint32], labels: NDArray[Any], where: str) -> NDArray[np.bool_] | None:
    """Which tokens are trained on, bool [L], by labels [L]: the tokens, or those after them, and -100 where nothing is.

    None where all are. Raises InputError for labels that are neither.
    """
    here = labels != IGNORED_LABEL
    if bool((~here | (labels == ids)).all()):
        trained = here
    elif bool((~here[:-1] | (labels[:-1] == ids[1:])).all()):
        trained = np.append(True, here[:-1])
    else:
        wrong(where, f"labels that are its tokens, the next ones, or {IGNORED_LABEL}", "others")
    return None if trained[1:].all() else trained


def wrong(where: str, expected: str, found: object) -> NoReturn:
    raise InputError(f"{where}: expected {expected}, found {str(found)[:80]!r}")


def documents_of(
    source: Source,
    rows: Callable[[Path], Iterator[tuple[str, Any]]],
    read: Callable[[int, str, Any], Iterator[Document]],
) -> Iterator[Document]:
    """The documents that are read from each of the rows of each file: by its number, where it is, and its values."""
    for file, path in enumerate(source.files):
        for where, row in rows(path):
            with of_any_kind(where):
                found = list(read(file, where, row))
            yield from found


def once(where: str, make: Callable[[], Rows]) -> Callable[[], Iterator[Rows]]:
    """`Document.parts` of rows that are made at once, when they are asked for."""

    def parts() -> Iterator[Rows]:
        with of_any_kind(where):
            made = make()
        yield made

    return parts


@contextlib.contextmanager
def of_any_kind(where: str) -> Iterator[None]:
    """JSON holds anything: raise InputError where a value is of a kind of which a number or a list cannot be made."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{where}: a value is not of the kind that the format has there ({error_text(error, 100)})"
        ) from None


def whole_numbers(values: Any) -> NDArray[np.int64]:
    """Ids, or numbers of a mask, of any shape. Raises ValueError for others, which numpy would round."""
    found = np.array(values)
    if found.size and found.dtype.kind not in "iub":
        raise ValueError(f"expected whole numbers, found {found.dtype}")
    return found.astype(np.int64)
