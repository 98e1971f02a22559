"""Windows as models read them, and collating them into batches of tensors.

Legend: `B` windows of a batch, `T` rows of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from storage.format.stored import StoredTargets
from student.labels import NOT_TRAINED
from student.target_batch import StoredBatch


class Piece(NamedTuple):
    """Positions of one document, or of the stream: their tokens and labels, int64 [n], and their targets by teacher."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    targets: dict[str, StoredTargets]


class Window(TypedDict):
    """One item of a data set of windows.

    input_ids, labels   int64 [T]; label -100 where there is no next token or it is not trained on
    position_ids        int64 [T], beginning at 0 with each document, where several may share a window
    targets             by teacher: those of each document in it, fewer positions than T where it was padded
    firsts              the rows of the first of these positions; one later where an id was put before a document
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NotRequired[NDArray[np.int64]]
    targets: dict[str, list[StoredTargets]]
    firsts: list[int]


def as_read(pieces: Sequence[Piece], window_tokens: int, begin_id: int | None, packed: bool = False) -> Window:
    """A window of some pieces, one behind the other, as a model reads it.

    Each comes after an id of its own, unless it begins with that; they are padded to `window_tokens` rows, or one more
    where there is such an id. packed: whether the window has positions.
    """
    rows = window_tokens + (begin_id is not None)
    # Padded with the last token and not with a padding id, which some models detect and warn about.
    ids, labels = np.full(rows, pieces[-1].tokens[-1]), np.full(rows, NOT_TRAINED)
    positions = np.empty(rows, dtype=np.int64)
    firsts, at = [], 0
    for piece in pieces:
        first = at + int(begin_id is not None and piece.tokens[0] != begin_id)
        stop = first + len(piece.tokens)
        if first > at:
            ids[at] = begin_id
        ids[first:stop], labels[first:stop] = piece.tokens, piece.labels
        positions[at:stop] = np.arange(stop - at)
        firsts.append(first)
        at = stop
    # As a document of its own; behind a single piece no mask is needed for it, and with none attention is cheaper.
    positions[at:] = np.arange(at, rows) if len(pieces) == 1 else np.arange(rows - at)
    targets = {name: [piece.targets[name] for piece in pieces] for name in pieces[0].targets}
    window: Window = {"input_ids": ids, "labels": labels, "targets": targets, "firsts": firsts}
    return {**window, "position_ids": positions} if packed else window


def collate(windows: Sequence[Window]) -> dict[str, Any]:
    """A batch of windows as tensors.

    input_ids, labels     int64 [B, T]; label -100 where there is no next token or it is not trained on
    shift_labels          the same tensor as labels, which are aligned already: transformers counts the tokens of an
                          optimizer step over this name as it is, and over `labels` as if it still had to shift them
    targets               by teacher: `student.target_batch.StoredBatch` of rows [B, T]
    position_ids          int64 [B, T], where several documents may share a window; and `use_cache` False with it, as
                          models with a cache attend across documents
    """
    labels = torch.from_numpy(np.stack([window["labels"] for window in windows]))
    firsts = [window["firsts"] for window in windows]
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.stack([window["input_ids"] for window in windows])),
        "labels": labels,
        "shift_labels": labels,
        "targets": {
            name: StoredBatch.of([window["targets"][name] for window in windows], labels.shape[1], firsts)
            for name in windows[0]["targets"]
        },
    }
    if "position_ids" in windows[0]:
        batch["position_ids"] = torch.from_numpy(np.stack([window["position_ids"] for window in windows]))
        batch["use_cache"] = False
    return batch


def read_by_model(batch: dict[str, Any]) -> dict[str, Any]:
    """Of a batch what a model reads: its arguments for the logits of all positions."""
    return {name: batch[name] for name in ("input_ids", "position_ids", "use_cache") if name in batch}
