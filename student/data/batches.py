"""Windows as models read them, and collating them into batches of tensors.

Legend: `B` windows of a batch, `T` rows of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from storage.format.stored import StoredTargets
from student.labels import NOT_TRAINED
from student.target_batch import StoredBatch


class Window(TypedDict):
    """One item of a data set of windows.

    input_ids, labels   int64 [T]; label -100 where there is no next token or it is not trained on
    targets             by teacher: of the window's positions, fewer than T where it was padded
    first               the row of the first of these positions; 1 where an id was put before them
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    targets: dict[str, StoredTargets]
    first: int


def as_read(
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
    targets: dict[str, StoredTargets],
    window_tokens: int,
    begin_id: int | None,
) -> Window:
    """A window of at most `window_tokens` positions as a model reads it.

    After an id of its own, unless it begins with that, and padded: to `window_tokens` rows, or one more.
    """
    first = int(begin_id is not None and tokens[0] != begin_id)
    rows = window_tokens + (begin_id is not None)
    if rows > len(tokens):
        inside = slice(first, first + len(tokens))
        # With the last token and not with a padding id, which some models detect and warn about.
        read, trained = np.full(rows, tokens[-1]), np.full(rows, NOT_TRAINED)
        read[inside], trained[inside] = tokens, labels
        if first:
            read[0] = begin_id
        tokens, labels = read, trained
    return {"input_ids": tokens, "labels": labels, "targets": targets, "first": first}


def collate(windows: Sequence[Window]) -> dict[str, Any]:
    """A batch of windows as tensors.

    input_ids, labels     int64 [B, T]; label -100 where there is no next token or it is not trained on
    shift_labels          the same tensor as labels, which are aligned already: transformers counts the tokens of an
                          optimizer step over this name as it is, and over `labels` as if it still had to shift them
    targets               by teacher: `student.target_batch.StoredBatch` of rows [B, T]
    """
    labels = torch.from_numpy(np.stack([window["labels"] for window in windows]))
    firsts = [window["first"] for window in windows]
    return {
        "input_ids": torch.from_numpy(np.stack([window["input_ids"] for window in windows])),
        "labels": labels,
        "shift_labels": labels,
        "targets": {
            name: StoredBatch.of([window["targets"][name] for window in windows], labels.shape[1], firsts)
            for name in windows[0]["targets"]
        },
    }
