"""A passage of held-out text as a model reads it: the likeliest next ids at each position.

Legend: `n` positions of the passage, `V` vocabulary, `W` columns of the model's head (W >= V).
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
    labels = torch.from_numpy(following[:PASSAGE_POSITIONS])
    first, n = window["firsts"][0], len(labels)
    logits = logits_of(collate([window]))[0, first : first + n].cpu().to(torch.float64)
    logprobs = logits.log_softmax(1)
    top = logprobs[:, : windows.vocabulary_size].topk(min(PASSAGE_IDS, windows.vocabulary_size))
    columns = (
        top.indices,
        top.values.exp().clamp(max=1),
        torch.special.entr(logprobs.exp()).sum(1).clamp(min=0),
        logprobs.gather(1, labels[:, None])[:, 0].clamp(max=0),
    )
    return Passage(
        stream_sha256=windows.record.corpus.stream_sha256,
        start=start,
        expected=tuple(
            Expected(
                likeliest=tuple(zip(ids, (round(p, 6) for p in probabilities), strict=True)),
                entropy=round(entropy, 6),
                label_logprob=round(label, 6),
            )
            for ids, probabilities, entropy, label in zip(*(each.tolist() for each in columns), strict=True)
        ),
    )
