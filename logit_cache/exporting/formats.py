"""The formats of `logit-cache export`: how some windows become a table of Parquet.

Legend: `L` tokens of a window, `K` ids of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.exporting.documents import Exported
from logit_cache.importing.files import IGNORED_LABEL
from logit_cache.importing.formats import axolotl, distillkit, parquet
from logit_cache.importing.formats.distillkit_bytes import Settings, packed_ids
from storage.errors import InputError

if TYPE_CHECKING:
    import pyarrow


@dataclass
class Export:
    """What is exported: K and V of the entry, and how many targets the format left out."""

    k: int
    vocabulary_size: int
    every_row: bool
    left_out: int = 0


@dataclass(frozen=True)
class Writer:
    """A format: windows → table, and the files of settings beside the data. tail_needed: whether it can only state
    log-probs over the whole vocabulary. All store the log-probs that the entry gives, as float32."""

    table: Callable[[Sequence[Exported], Export], pyarrow.Table]
    beside: Callable[[Export], dict[str, Any]] = field(default=lambda _: {})
    tail_needed: bool = False


def lists(rows: Sequence[NDArray[Any]]) -> Any:
    """A column of lists from arrays [L], or of lists of lists of one length from arrays [L, K]."""
    import pyarrow as pa

    flat = np.concatenate(rows)
    inner = pa.array(flat.reshape(-1))
    if flat.ndim == 2:
        inner = pa.ListArray.from_arrays(np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1], inner)
    return pa.ListArray.from_arrays(np.cumsum([0, *map(len, rows)]).astype(np.int32), inner)


def _plain(windows: Sequence[Exported], export: Export) -> pyarrow.Table:
    """Ids and log-probs of the token after each one; rows without targets are empty."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(len(window.ids) for window in windows)]).astype(np.int32)
    kept = np.concatenate([window.targets.kept for window in windows]).astype(np.int32)
    inner = np.cumsum(np.append(np.int32(0), kept), dtype=np.int32)
    columns = {parquet.PLAIN.tokens: lists([window.ids for window in windows])}
    for name, array in ((parquet.PLAIN.ids, "token_ids"), (parquet.PLAIN.values, "logprobs")):
        values = np.concatenate([getattr(window.targets, array)[window.targets.is_kept] for window in windows])
        rows = pa.ListArray.from_arrays(inner, pa.array(values))
        columns[name] = pa.ListArray.from_arrays(offsets, rows)
    return _with_mask(columns, windows)


def _with_mask(columns: dict[str, Any], windows: Sequence[Exported]) -> pyarrow.Table:
    import pyarrow as pa

    trained = [window.trained for window in windows if window.trained is not None]
    return pa.table(columns | ({"loss_mask": lists(trained)} if trained else {}))


def _as_trained(windows: Sequence[Exported], export: Export) -> pyarrow.Table:
    """axolotl: its trainer compares entry i with what the student predicts after token i."""
    import pyarrow as pa

    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in (axolotl.TOKENS, "attention_mask", "labels", axolotl.IDS, axolotl.VALUES, axolotl.MASK)
    }
    for window in windows:
        targets = window.targets
        here = targets.is_kept
        trained = np.ones(len(window.ids), dtype=bool) if window.trained is None else window.trained
        found: dict[str, NDArray[Any]] = {
            axolotl.TOKENS: window.ids.astype(np.int64),
            "attention_mask": np.ones(len(window.ids), dtype=np.int8),
            "labels": np.where(trained, window.ids.astype(np.int64), IGNORED_LABEL),
            axolotl.IDS: np.where(here, targets.token_ids.astype(np.int64), 0),
            axolotl.VALUES: np.where(here, targets.logprobs, np.float32(0)),
            axolotl.MASK: here.astype(np.int8),
        }
        for name, values in found.items():
            columns[name].append(values)
    return pa.table({name: lists(values) for name, values in columns.items()})


def settings(export: Export) -> Settings:
    """All log-probs exact: nothing is fitted."""
    return Settings(d=max(2, export.vocabulary_size), k=export.k, exact_k=export.k, delta_encoding=False)


def _bytes(windows: Sequence[Exported], export: Export) -> pyarrow.Table:
    """DistillKit: a row for each token, as of a packed file, where all have targets; else for all but the last."""
    import pyarrow as pa

    chosen = settings(export)
    columns: dict[str, list[NDArray[Any]]] = {
        name: [] for name in (distillkit.TOKENS, distillkit.VALUES, distillkit.IDS)
    }
    if export.every_row:
        columns[distillkit.SEGMENTS] = []
    for window in windows:
        count = len(window.ids) - (not export.every_row)
        if not window.has_row[:count].all():
            raise InputError(
                "some positions have no targets, and DistillKit's files have none without: take --format parquet, or "
                "axolotl, which have masks"
            )
        export.left_out += int(window.has_row[count:].sum())
        targets, here = window.targets, window.targets.is_kept[:count]
        ids = np.where(here, targets.token_ids[:count].astype(np.int64), 0)
        values = np.where(here, targets.logprobs[:count], -np.inf).astype("<f4")
        columns[distillkit.TOKENS].append(window.ids.astype(np.uint64))
        columns[distillkit.VALUES].append(values.view(np.uint8))
        columns[distillkit.IDS].append(packed_ids(ids, chosen))
        if export.every_row:
            columns[distillkit.SEGMENTS].append(np.ones(count, dtype=np.int64))
    # As of the variant whose last id is none that the writer appended.
    texts = {} if export.every_row else dict.fromkeys(sorted(distillkit.UNPADDED), [""] * len(windows))
    return pa.table({name: lists(values) for name, values in columns.items()} | texts)


def _settings_file(export: Export) -> dict[str, Any]:
    return {distillkit.CONFIG: settings(export).model_dump(mode="json") | {"error_diffusion": False}}


WRITERS = {
    "parquet": Writer(_plain),
    "axolotl": Writer(_as_trained),
    "distillkit": Writer(_bytes, _settings_file, tail_needed=True),
}
