"""NeMo-Aligner's items: logits with their normaliser, padded to a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.imported import K, Known, imported, imports, known, same_targets, write_lines
from support.commands import in_process, refused, succeeded

from storage import LogitCache

PROMPT, LENGTH = 3, 50


@pytest.fixture(scope="module")
def data() -> Known:
    return known()


def item(data: Known, number: int) -> dict[str, Any]:
    """The collator leaves the last token out of `tokens` and the first out of `labels`; both are padded."""
    tokens = data.tokens[number]
    ids, values = data.top(number)
    count, shift = len(tokens) - 1, 11.25 + np.arange(len(tokens))
    logits = values + shift[:, None]

    def padded(rows: list[Any], fill: Any) -> list[Any]:
        return rows + [fill] * (LENGTH - len(rows))

    return {
        "tokens": padded(tokens[:-1].tolist(), 2),
        "labels": padded(tokens[1:].tolist(), 2),
        "loss_mask": padded([0.0] * PROMPT + [1.0] * (count - PROMPT), 0.0),
        "topk_logits": padded(logits[:-1].tolist(), [9.0] * K),
        "topk_token_ids": padded(ids[:-1].tolist(), [0] * K),
        "log_sum_exp_logits": padded(shift[:-1].tolist(), 1.0),
        "index": number,
    }


def test_logits_with_their_normaliser(data: Known, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [item(data, number) for number in range(len(data.tokens))])
    entry = imported(tmp_path, path, "nemo", "--encoding", "float32")
    same_targets(entry, data)
    mask = LogitCache.open(tmp_path / "cache").loss_mask
    assert mask is not None
    expected = [np.arange(len(tokens)) >= PROMPT for tokens in data.tokens]
    for one in expected:
        one[-1] = False
    np.testing.assert_array_equal(mask.read(0, len(mask)), np.concatenate(expected))
    found = succeeded(in_process("logit-cache", "import", path, "--guess", "--json"))
    assert json.loads(found.stdout) == {"format": "nemo"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"log_sum_exp_logits": None}, "it has no log_sum_exp_logits"),
        ({"log_sum_exp_logits": [0.0] * LENGTH}, "more than 1"),
        ({"labels": [5] * LENGTH}, "labels that are the next tokens"),
        ({"topk_logits": [[1.0]] * LENGTH}, "as many logits as ids"),
        ({"tokens": [5]}, "of each of 1 tokens"),
    ],
)
def test_items_without_sense(change: dict[str, Any], said: str, data: Known, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [item(data, 0), item(data, 1) | change])
    refused(imports(tmp_path, path, "nemo"), "a.jsonl line 2", said)
