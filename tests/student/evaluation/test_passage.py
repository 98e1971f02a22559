"""What a model expects in the first document, against a dense softmax over the tokens as they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import make_corpus

from student.data.batches import read_by_model
from student.data.windows import DistillationWindows
from student.evaluation.passage import expected_passage

V, W, N = 53, 64, 400
TABLE = 3 * torch.randn(2, 256, W, generator=torch.Generator().manual_seed(0))


def logits_of(batch: dict[str, Any]) -> torch.Tensor:
    """Logits of a model that looks at an id and at its position in the document."""
    read = read_by_model(batch)
    rows = read["input_ids"].shape[1]
    return TABLE[0][read["input_ids"]] + TABLE[1][read.get("position_ids", torch.arange(rows)[None])]


@pytest.mark.parametrize(
    ("isolated", "bos", "window", "number"), [(False, False, 200, 128), (True, False, 64, 20), (True, True, 64, 20)]
)
def test_it_is_the_softmax_over_the_first_document(
    tmp_path: Path, isolated: bool, bos: bool, window: int, number: int
) -> None:
    tokens = np.random.default_rng(1).integers(2, V, N).astype(np.uint16)
    record = make_corpus(str(tmp_path), tokens, V, np.array([0, 21, 25, 80, 300]), np.arange(N) % 2 > 0)
    windows = DistillationWindows(tmp_path, (), window, isolate_documents=isolated, bos_each_window=bos)
    found = expected_passage(windows, logits_of)
    assert (found.stream_sha256, found.start) == (record.corpus.stream_sha256, 0)
    assert len(found.expected) == number, "of a document of 21 tokens, or of the stream"
    for row, one in enumerate(found.expected):
        logprobs = (TABLE[0][int(tokens[row])] + TABLE[1][row + bos]).double().log_softmax(0).numpy()
        p = np.exp(logprobs)
        order = np.argsort(-p[:V])[:10].tolist()
        assert [i for i, _ in one.likeliest] == order, "ids below V alone"
        assert [q for _, q in one.likeliest] == pytest.approx(p[order], abs=1e-6), "of the softmax over all columns"
        assert one.entropy == pytest.approx(-(p * logprobs).sum(), abs=1e-5)
        assert one.label_logprob == pytest.approx(logprobs[tokens[row + 1]], abs=1e-5), "trained on or not"
