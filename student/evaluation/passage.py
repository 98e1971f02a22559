"""A passage of held-out text as a model reads it: the likeliest next ids at each position.

Legend: `T` rows of a window, `V` vocabulary, `W` columns of the model's head (W >= V).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.report import PASSAGE_IDS, PASSAGE_POSITIONS, Expected, Passage


def expected_passage(windows: DistillationWindows, logits_of: Callable[[dict[str, Any]], Tensor]) -> Passage:
    """What a model expects after the first positions of the text's first document.

    logits_of: the model's logits [1, T, W] of a batch of one window. Probabilities are those of the softmax over all W
    columns, as in the held-out cross-entropy; ids are below V.
    """
    start, window, following = windows.opening()
    labels = following[:PASSAGE_POSITIONS].tolist()
    first = window["firsts"][0]
    logits = logits_of(collate([window]))[0, first : first + len(labels)]
    # Row by row: of a large vocabulary, all rows in float64 would be gigabytes.
    rows = (row.cpu().to(torch.float64).log_softmax(0) for row in logits)
    return Passage(
        stream_sha256=windows.record.corpus.stream_sha256,
        start=start,
        expected=tuple(_expected(row, label, windows.vocabulary_size) for row, label in zip(rows, labels, strict=True)),
    )


def _expected(logprobs: Tensor, label: int, vocabulary_size: int) -> Expected:
    """Of the log-probs [W] of one position, of which those of ids below V are listed."""
    top = logprobs[:vocabulary_size].topk(min(PASSAGE_IDS, vocabulary_size))
    probabilities = top.values.exp().clamp(max=1).tolist()
    return Expected(
        likeliest=tuple(zip(top.indices.tolist(), (round(p, 6) for p in probabilities), strict=True)),
        entropy=max(0.0, round(float(torch.special.entr(logprobs.exp()).sum()), 6)),
        label_logprob=min(0.0, round(float(logprobs[label]), 6)),
    )
