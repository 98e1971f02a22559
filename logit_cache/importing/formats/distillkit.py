"""DistillKit's Parquet files: the current form, packed or not, and the legacy form.

Current: `input_ids` [L], `compressed_logprobs` and `bytepacked_indices`, a row of bytes for each token but the last.
The settings of the bytes are not in the file: they are in `compression_config.yaml` beside it, or given. A text shorter
than the longest that the writer took got one padding id at its end, so that its last token has a row: that id is cut
here. `messages` and `text` are columns of a variant that appends none. `labels` [L], which some have, are -100 where
nothing is trained.

Packed: the same, with `attention_mask` [L]: not a mask, but the number of the segment that a token belongs to, from 1.
Each segment is a document; there are as many rows as tokens, and the last one of a segment is about a token that is
not there any more.

Legacy: `packed_indices`, `exact_values`, `coeffs`. Its numbers may be log-probs or mean-centred logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from logit_cache.importing.document import Document, Format, Rows, Source, segments
from logit_cache.importing.files import (
    list_array,
    lists_array,
    once,
    parquet_columns,
    parquet_rows,
    token_array,
    trained_by_labels,
    wrong,
)
from logit_cache.importing.formats.distillkit_bytes import (
    LegacySettings,
    Settings,
    decoded_values,
    legacy_ids,
    legacy_values,
    unpacked_ids,
)
from storage.config import read_yaml
from storage.errors import InputError

CONFIG = "compression_config.yaml"
TOKENS, VALUES, IDS, SEGMENTS = "input_ids", "compressed_logprobs", "bytepacked_indices", "attention_mask"
_LEGACY = ("packed_indices", "exact_values", "coeffs")
UNPADDED = {"messages", "text"}
_LABELS = "labels"

AnySettings = TypeVar("AnySettings", bound=BaseModel)
Decode = Callable[[slice], Rows]
"""The rows of a file's row in a range."""


def _settings(source: Source, kind: type[AnySettings]) -> AnySettings:
    """Those in the settings file, at its top or one level below. Raises InputError for other ones."""
    path = source.settings
    assert path is not None
    found = read_yaml(str(path))
    inner = [each for each in found.values() if isinstance(each, dict) and "exact_k" in each]
    if "exact_k" not in found and len(inner) == 1:
        found = inner[0]
    if kind is LegacySettings and "d" in found:
        found = {"vocab_size": found["d"], **found}
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the settings"
        raise InputError(f"{path}: {field}: {first['msg']}; expected the settings of DistillKit's writer") from None


def _documents(source: Source) -> Iterator[Document]:
    settings = _settings(source, Settings)
    packed, unpadded = _columns_of(source.files[0])
    longest = 0 if packed or unpadded else max(_longest(path) for path in source.files)
    for file, path in enumerate(source.files):
        for where, ids, row in _token_rows(path, (VALUES, IDS), packed):
            decode, rows = partial(_rows, settings, row, where), len(row[VALUES])
            if packed:
                yield from _segments(file, where, ids, rows, row, decode)
                continue
            if rows != len(ids) - 1:
                wrong(where, f"a row for each of {len(ids)} tokens but the last", f"{rows} rows")
            end = len(ids)
            if end < longest and int(ids[-1]) == _pad_id(source.tokenizer):
                end -= 1
                source.note("documents end with the padding id that DistillKit appends, which was cut")
            trained = _trained(row, ids[:end], where)
            yield Document(file, where, ids[:end], once(where, partial(decode, slice(None))), trained)


def _token_rows(
    path: Path, columns: tuple[str, ...], packed: bool
) -> Iterator[tuple[str, NDArray[np.uint32], dict[str, Any]]]:
    """Where each row is, its tokens, and its columns."""
    found = parquet_columns(path)
    if not {TOKENS, *columns} <= set(found):
        wrong(str(path), f"columns {', '.join((TOKENS, *columns))}, as in the first file", list(found))
    more = [name for name in (SEGMENTS, _LABELS) if name in found and (packed or name != SEGMENTS)]
    for where, row in parquet_rows(path, [TOKENS, *columns, *more]):
        yield where, token_array(list_array(row[TOKENS], where), where, TOKENS), row


def _rows(settings: Settings, row: dict[str, Any], where: str, part: slice) -> Rows:
    values = _bytes(row[VALUES], settings.value_bytes, f"{where}, {VALUES}")[part]
    ids = _bytes(row[IDS], settings.id_bytes, f"{where}, {IDS}")[part]
    return Rows(0, unpacked_ids(ids, settings), decoded_values(values, settings), exact=settings.exact_k)


def _columns_of(path: Path) -> tuple[bool, bool]:
    """Whether rows are packed, and whether they are of the variant without an appended id."""
    columns = set(parquet_columns(path))
    return SEGMENTS in columns, columns >= UNPADDED


def _pad_id(tokenizer: Any) -> int | None:
    found: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if found is None else found


def _longest(path: Path) -> int:
    """Tokens of the longest row of a file."""
    return max((len(row[TOKENS]) for _, row in parquet_rows(path, [TOKENS])), default=0)


def _bytes(scalar: Any, width: int, where: str) -> NDArray[np.uint8]:
    lengths, flat = lists_array(scalar, where)
    if len(lengths) and (lengths != width).any():
        other = int(lengths[lengths != width][0])
        raise InputError(
            f"{where}: rows of {other} bytes, and the settings make {width} of them: they are not those that the file "
            f"was written with (k, exact_k, dtypes, terms, bins, d)"
        )
    return flat.astype(np.uint8, copy=False).reshape(len(lengths), width)


def _trained(row: dict[str, Any], ids: NDArray[np.uint32], where: str, start: int = 0) -> NDArray[np.bool_] | None:
    """Which of the tokens `ids` of a row, from `start` on, are trained on; None for all."""
    if _LABELS not in row:
        return None
    labels = list_array(row[_LABELS], where)[start : start + len(ids)]
    if len(labels) != len(ids):
        wrong(where, "a label for each of its tokens", f"{len(labels)} for {len(ids)}")
    return trained_by_labels(ids, labels, where)


def _segments(
    file: int, where: str, ids: NDArray[np.uint32], rows: int, row: dict[str, Any], decode: Decode
) -> Iterator[Document]:
    """The segments of a packed row."""
    numbers = list_array(row[SEGMENTS], where)
    if len(numbers) != len(ids) or rows != len(ids):
        wrong(where, f"a segment and a row for each of {len(ids)} tokens", f"{len(numbers)} and {rows}")
    for number, part in segments(numbers):
        at = f"{where} segment {number}"
        yield Document(file, at, ids[part], once(at, partial(decode, part)), _trained(row, ids[part], at, part.start))


def _legacy_documents(source: Source) -> Iterator[Document]:
    settings = _settings(source, LegacySettings)
    packed, _ = _columns_of(source.files[0])
    for file, path in enumerate(source.files):
        for where, ids, row in _token_rows(path, _LEGACY, packed):
            decode, rows = partial(_legacy_rows, settings, row, where), len(row[_LEGACY[0]])
            if packed:
                yield from _segments(file, where, ids, rows, row, decode)
                continue
            if not len(ids) - 1 <= rows <= len(ids):
                wrong(where, f"a row for each of {len(ids)} tokens, or all but the last", f"{rows} rows")
            yield Document(file, where, ids, once(where, partial(decode, slice(None))), _trained(row, ids, where))


def _legacy_rows(settings: LegacySettings, row: dict[str, Any], where: str, part: slice) -> Rows:
    words, exact, coefficients = (
        _numbers(row[name], width, f"{where}, {name}")[part]
        for name, width in zip(_LEGACY, (settings.words, settings.exact_k, settings.coefficients), strict=True)
    )
    ids = legacy_ids(words.astype(np.uint64), settings)
    return Rows(0, ids, legacy_values(exact, coefficients, settings), exact=settings.exact_k)


def _numbers(scalar: Any, width: int | None, where: str) -> NDArray[Any]:
    """[R, width] from lists; None: of any width that is the same for all."""
    lengths, flat = lists_array(scalar, where)
    expected = (int(lengths[0]) if len(lengths) else 0) if width is None else width
    if (lengths != expected).any():
        wrong(where, f"{expected} numbers in each row, by the settings", int(lengths[lengths != expected][0]))
    return flat.reshape(len(lengths), expected)


FORMAT = Format(
    name="distillkit",
    about="DistillKit's Parquet with compressed_logprobs, packed or not",
    suffixes=(".parquet",),
    recognises=lambda path: {TOKENS, VALUES, IDS} <= set(parquet_columns(path)),
    documents=_documents,
    reading="after",
    settings=CONFIG,
    slack_nats=0.1,
)
LEGACY = Format(
    name="distillkit-legacy",
    about="DistillKit's Parquet of the legacy form, with packed_indices, exact_values and coeffs",
    suffixes=(".parquet",),
    recognises=lambda path: {TOKENS, *_LEGACY} <= set(parquet_columns(path)),
    documents=_legacy_documents,
    values=("logprobs", "unnormalised"),
    reading="after",
    settings=CONFIG,
    slack_nats=0.1,
)
