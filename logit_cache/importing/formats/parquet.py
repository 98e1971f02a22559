"""Plain Parquet, a row a document: `input_ids` [L], and for each token `token_ids` and `logprobs` [R][k].

Rows of the lists may differ in length and be empty; R may be L or less, from the first token on. `loss_mask` [L] says
which tokens are trained on, `attention_mask` [L] is 0 for padding, and `labels` [L] are -100 where nothing is trained,
else the tokens or the next ones, of which the last one is no part of the document. Published data sets have other
names, which `LAYOUTS` lists, with a suffix for each teacher where there are several. Ids and numbers may also lie one
after the other in a list [L * k], or in one column [R][2][k], numbers first. Whether numbers are log-probs,
probabilities or logits is decided by the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import NO_ID, Document, Format, Rows, Source, ragged
from logit_cache.importing.files import (
    id_columns,
    list_array,
    list_lengths,
    lists_array,
    numbers,
    once,
    parquet_columns,
    parquet_rows,
    token_array,
    trained_by_labels,
    wrong,
)
from storage.errors import InputError

_MASKS = ("loss_mask", "attention_mask", "labels")
_MASKED_LM = "teacher_mask_indices"


@dataclass(frozen=True)
class Layout:
    """Names of columns: of tokens, ids and their numbers; where those two are one, pairs of lists. rows: that of a mask
    [L] of the tokens that have targets. flat: ids and numbers lie one after the other."""

    tokens: str
    ids: str
    values: str
    rows: str | None = None
    flat: bool = False

    @property
    def needed(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.tokens, self.ids, self.values, self.rows) if name))

    def is_in(self, columns: dict[str, int], suffix: str) -> bool:
        """Whether a file with these columns, each with the depth of its lists, has those of the layout."""
        pairs = self.ids != self.values or columns.get(self.ids + suffix) == 3
        return pairs and all(name + suffix in columns for name in self.needed)


PLAIN = Layout("input_ids", "token_ids", "logprobs")
# Of several that a file has, the first: numbers with their normaliser before those without.
LAYOUTS = (
    PLAIN,
    Layout("input_ids", "token_ids", "normalized_logits"),
    Layout("input_ids", "token_ids", "top_values"),
    Layout("input_ids", "index", "exp_logits"),
    Layout("input_ids", "topk_indices_model", "topk_logits_model"),
    Layout("input_ids", "teacher_ids_bpe", "teacher_probs_bpe", "teacher_mask_bpe", flat=True),
    Layout("inputs", "targets", "targets"),
)


def _layouts(path: Path) -> dict[str, Layout]:
    """By suffix, what can be read of a file. Raises InputError for targets that are of no next token."""
    columns = parquet_columns(path)
    if _MASKED_LM in columns:
        raise InputError(
            f"{path}: its column {_MASKED_LM} says that the teacher is a masked language model, whose targets are of "
            f"hidden tokens and not of next ones: nothing here can be trained on them"
        )
    found: dict[str, Layout] = {}
    for layout in LAYOUTS:
        for name in columns:
            suffix = name.removeprefix(layout.tokens)
            if name.startswith(layout.tokens) and layout.is_in(columns, suffix):
                found.setdefault(suffix, layout)
    return found


def _layout(path: Path, suffix: str | None) -> tuple[Layout, str]:
    """The layout of a file with a suffix; by default the one without, or the only one."""
    found = _layouts(path)
    if not found:
        expected = f"columns {', '.join(PLAIN.needed)}, or others of docs/sharing.md"
        wrong(str(path), expected, ", ".join(parquet_columns(path)) or "no Parquet file")
    if suffix is None and len(found) > 1 and "" not in found:
        raise InputError(
            f"{path}: it holds the targets of {len(found)} teachers: give one of them, --column-suffix "
            f"{' or '.join(sorted(found))}"
        )
    chosen = suffix if suffix is not None else min(found)  # the shortest name first
    if chosen not in found:
        raise InputError(f"{path}: --column-suffix {chosen}: there is {', '.join(map(repr, sorted(found)))}")
    return found[chosen], chosen


def _documents(source: Source) -> Iterator[Document]:
    layouts = [_layout(path, source.column_suffix) for path in source.files]
    return _read(source, layouts)


def _read(source: Source, layouts: list[tuple[Layout, str]]) -> Iterator[Document]:
    for number, (path, (layout, suffix)) in enumerate(zip(source.files, layouts, strict=True)):
        columns = parquet_columns(path)
        names = [*layout.needed, *(name for name in _MASKS if name + suffix in columns)]
        if layout != PLAIN or suffix:
            source.note(f"files are read by their columns {', '.join(name + suffix for name in layout.needed)}")
        for where, row in parquet_rows(path, [name + suffix for name in names]):
            yield _document(number, where, {name: row[name + suffix] for name in names}, layout)


def _document(file: int, where: str, row: dict[str, Any], layout: Layout) -> Document:
    ids = token_array(list_array(row[layout.tokens], where), where, layout.tokens)
    masks = {name: list_array(row[name], where) for name in (*_MASKS, layout.rows) if name in row}
    for name, mask in masks.items():
        if len(mask) != len(ids):
            wrong(where, f"as many entries in {name} as tokens, {len(ids)}", len(mask))
    begin, end = _unpadded(masks.get("attention_mask"), len(ids), where)

    def rows() -> Rows:
        found, values = _id_columns(row, layout, len(ids), where)
        if len(found) > len(ids):
            wrong(where, f"at most one row for each of {len(ids)} tokens", f"{len(found)} rows")
        if layout.rows:
            there = masks[layout.rows][: len(found), None] != 0
            found, values = np.where(there, found, NO_ID), np.where(there, values, -np.inf)
        return Rows(0, found[begin:end], values[begin:end])

    tokens = ids[begin:end]
    trained = masks["loss_mask"][begin:end] != 0 if "loss_mask" in masks else None
    if "labels" in masks:
        by_labels = trained_by_labels(tokens, masks["labels"][begin:end], where)
        trained = by_labels if trained is None else trained if by_labels is None else trained & by_labels
    return Document(file, where, tokens, once(where, rows), trained)


def _id_columns(
    row: dict[str, Any], layout: Layout, tokens: int, where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids int64 [R, k] and their numbers float64 [R, k] from a row of any of the three forms."""
    if layout.ids == layout.values:
        return _pairs(row[layout.ids], where)
    lists = [
        _flat(row[name], tokens, where) if layout.flat else lists_array(row[name], where)
        for name in (layout.ids, layout.values)
    ]
    return id_columns(lists[0], lists[1], where)


def _flat(scalar: Any, tokens: int, where: str) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Lengths and numbers of a list that has as many numbers for each token."""
    flat = list_array(scalar, where)
    each, rest = divmod(len(flat), max(tokens, 1))
    if rest:
        wrong(where, f"as many numbers for each of {tokens} tokens", f"{len(flat)} numbers")
    return np.full(tokens, each, dtype=np.int64), flat


def _pairs(scalar: Any, where: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and numbers of a list of pairs of lists, where ids are among numbers of their kind."""
    halves, inner = list_lengths(scalar.values, where)
    if (halves != 2).any():
        wrong(where, "a list of numbers and one of ids for each token", f"{int(halves[halves != 2][0])} lists")
    lengths, flat = list_lengths(inner, where)
    rows = ragged(lengths, numbers(flat, where).astype(np.float64), np.nan).reshape(len(halves), 2, -1)
    values, ids = rows[:, 0], rows[:, 1]
    if not np.array_equal(np.isnan(ids), np.arange(ids.shape[1]) >= lengths[::2, None]) or (ids % 1 > 0).any():
        wrong(where, "as many whole numbers, the ids, as numbers in each pair of lists", "others")
    return np.where(np.isnan(ids), NO_ID, ids).astype(np.int64), np.where(np.isnan(ids), -np.inf, values)


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


FORMAT = Format(
    name="parquet",
    about="Parquet with input_ids, token_ids and logprobs, or with columns of published data sets",
    suffixes=(".parquet",),
    recognises=lambda path: bool(_layouts(path)),
    documents=_documents,
    values=("logprobs", "probabilities", "unnormalised"),
    column_suffix=True,
)
