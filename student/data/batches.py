"""Collating windows into batches of tensors, and flattening their targets to rows of positions.

Legend: `B` windows of a batch, `T` positions of a window, `P` = B·T positions, `K` stored ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from student.data.windows import Window


def collate(windows: Sequence[Window]) -> dict[str, Any]:
    """A batch of windows as tensors.

    input_ids, labels     int64 [B, T]; label -100 where there is no next token or it is not trained on
    shift_labels          the same tensor as labels, which are aligned already: transformers counts the tokens of an
                          optimizer step over this name as it is, and over `labels` as if it still had to shift them
    targets[name]         token_ids int32|int64 [B, T, K]; codes uint16 or logprobs float32 [B, T, K]; kept, certain
                          int32 [B, T]; top_logprob, log_tail, log_tail_half, entropy float32 [B, T]
    """
    labels = _stack([window["labels"] for window in windows])
    return {
        "input_ids": _stack([window["input_ids"] for window in windows]),
        "labels": labels,
        "shift_labels": labels,
        "targets": {
            name: {key: _stack([window["targets"][name][key] for window in windows]) for key in arrays}
            for name, arrays in windows[0]["targets"].items()
        },
    }


def flat_targets(targets: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Targets of a batch with the leading axes [B, T] flattened to [P], as the loss takes them."""
    return {name: {key: value.flatten(0, 1) for key, value in fields.items()} for name, fields in targets.items()}


def _stack(arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))
