"""Plain Parquet, a row a document: `input_ids` [L], and for each token `token_ids` and `logprobs` [R][K].

Rows of the lists may differ in length and be empty; R may be L or less, from the first token on. `loss_mask` [L] says
which tokens are trained on, `attention_mask` [L] is 0 for padding. Names that published data sets have in place of
`token_ids` and `logprobs` are read too. Whether numbers are log-probs, probabilities or logits is decided by the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import Document, Format, Rows, Source
from logit_cache.importing.files import (
    id_columns,
    list_array,
    lists_array,
    once,
    parquet_columns,
    parquet_rows,
    token_array,
    wrong,
)

TOKENS = "input_ids"
# Columns of ids and of their numbers, by those who published them.
NAMES = (("token_ids", "logprobs"), ("token_ids", "top_values"), ("index", "exp_logits"))
_MASKS = ("loss_mask", "attention_mask")


def _names(columns: list[str]) -> tuple[str, str] | None:
    return next((names for names in NAMES if {TOKENS, *names} <= set(columns)), None)


def _documents(source: Source) -> Iterator[Document]:
    for number, path in enumerate(source.files):
        columns = parquet_columns(path)
        names = _names(columns)
        if names is None:
            wrong(str(path), f"columns {TOKENS}, {' and '.join(NAMES[0])}", ", ".join(columns) or "no Parquet file")
        masks = [name for name in _MASKS if name in columns]
        for where, row in parquet_rows(path, [TOKENS, *names, *masks]):
            yield _document(number, where, row, names)


def _document(file: int, where: str, row: dict[str, Any], names: tuple[str, str]) -> Document:
    ids = token_array(list_array(row[TOKENS], where), where, TOKENS)
    masks = {name: list_array(row[name], where) for name in _MASKS if name in row}
    for name, mask in masks.items():
        if len(mask) != len(ids):
            wrong(where, f"as many entries in {name} as tokens, {len(ids)}", len(mask))
    begin, end = _unpadded(masks.get("attention_mask"), len(ids), where)

    def rows() -> Rows:
        lists = [lists_array(row[name], where) for name in names]
        if len(lists[0][0]) > len(ids):
            wrong(where, f"at most one row for each of {len(ids)} tokens", f"{len(lists[0][0])} rows")
        found, values = id_columns(lists[0], lists[1], where)
        return Rows(0, found[begin:end], values[begin:end])

    trained = masks.get("loss_mask")
    return Document(file, where, ids[begin:end], once(rows), None if trained is None else trained[begin:end] != 0)


def _unpadded(mask: NDArray[Any] | None, length: int, where: str) -> tuple[int, int]:
    """The tokens between the padding at either end."""
    if mask is None:
        return 0, length
    here = np.flatnonzero(mask)
    if not len(here):
        return 0, 0
    begin, end = int(here[0]), int(here[-1]) + 1
    if len(here) != end - begin:
        wrong(where, "an attention_mask that is 0 at the ends of a row alone", "a 0 between others")
    if mask.max() > 1:
        wrong(where, "an attention_mask of 0 and 1", f"{int(mask.max())}; packed segments are --format distillkit")
    return begin, end


def _recognises(path: Path) -> bool:
    return _names(parquet_columns(path)) is not None


FORMAT = Format(
    name="parquet",
    about="Parquet with input_ids, token_ids and logprobs",
    suffixes=(".parquet",),
    recognises=_recognises,
    documents=_documents,
    values=("logprobs", "probabilities", "unnormalised"),
)
