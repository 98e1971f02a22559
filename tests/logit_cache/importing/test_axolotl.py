"""axolotl's data sets: tokens as its trainer holds them, and conversations whose reply is found by its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.caches.imported import (
    K,
    Known,
    V,
    imported,
    imports,
    known,
    same_targets,
    tokenizer_folder,
    write_lines,
)
from support.commands import in_process, refused, succeeded

from storage import LogitCache

TURN, END = [2, 3], 4
FIRST_WORD = 20  # t0 and t1 are special tokens, which are found in t10, too
TEMPLATE = "{% for m in messages %}t2 t3 {{ m['content'] }} t4 {% endfor %}"
PROMPT, REPLY = 6, 20


@pytest.fixture(scope="module")
def data() -> Known:
    return known()


@pytest.fixture(scope="module")
def talks() -> Known:
    """Conversations of a prompt and a reply, tokenised by the template, which goes on after the reply."""
    rng = np.random.default_rng(3)
    found = Known([], [])
    for _ in range(3):
        tokens = [*TURN, *rng.integers(FIRST_WORD, V, PROMPT), END, *TURN, *[0] * REPLY, END]
        logits = rng.normal(size=(len(tokens), V)) * 3
        logprobs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
        first = PROMPT + 5
        for at in range(first, first + REPLY):
            top = np.argsort(-logprobs[at - 1])[:K]
            top = top[top >= FIRST_WORD]
            mass = np.exp(logprobs[at - 1][top])
            tokens[at] = int(rng.choice(top, p=mass / mass.sum()))
        found.tokens.append(np.array(tokens))
        found.logprobs.append(logprobs)
    return found


def chat_folder(folder: Path) -> Path:
    path = tokenizer_folder(folder)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return path


def words(tokens: np.ndarray) -> str:
    return " ".join(f"t{token}" for token in tokens)


def conversation(talks: Known, number: int, version: int) -> dict[str, Any]:
    tokens = talks.tokens[number]
    start = PROMPT + 5
    ids, values = talks.top(number)
    ids, values = ids[start - 1 : start - 1 + REPLY], values[start - 1 : start - 1 + REPLY]
    row: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": words(tokens[2 : 2 + PROMPT])},
            {"role": "assistant", "content": words(tokens[start : start + REPLY])},
        ]
    }
    if version == 2:
        return row | {"target_token_ids": ids.tolist(), "logprobs": values.tolist()}
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    entries = [[{"token": f"token_id:{i}", "logprob": v} for i, v in zip(*pair, strict=True)] for pair in pairs]
    return row | {"llm_text_generation_vllm_logprobs": entries}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("container", ["parquet", "jsonl"])
def test_the_reply_of_a_conversation_is_found_by_its_tokens(
    version: int, container: str, talks: Known, tmp_path: Path
) -> None:
    rows = [conversation(talks, number, version) for number in range(len(talks.tokens))]
    path = tmp_path / f"rows.{container}"
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_lines(path, rows)
    options = ("--tokenizer", chat_folder(tmp_path), "--encoding", "float32")
    entry = imported(tmp_path, path, "axolotl", *options)
    same_targets(entry, talks, [range(PROMPT + 4, PROMPT + 4 + REPLY)] * 3)
    mask = LogitCache.open(tmp_path / "cache").loss_mask
    assert mask is not None
    trained = mask.read(0, len(entry)).reshape(3, -1)
    assert trained[:, PROMPT + 4 : PROMPT + 4 + REPLY].all()
    assert trained.sum() == 3 * REPLY
    found = succeeded(in_process("logit-cache", "import", path, "--guess", "--json"))
    assert json.loads(found.stdout) == {"format": "axolotl"}


def test_a_reply_of_other_tokens_is_left_out_and_counted(talks: Known, tmp_path: Path) -> None:
    rows = [conversation(talks, number, 2) for number in range(len(talks.tokens))]
    rows[1]["target_token_ids"] = rows[0]["target_token_ids"]
    entry = imported(
        tmp_path, write_lines(tmp_path / "rows.jsonl", rows), "axolotl", "--tokenizer", chat_folder(tmp_path),
        "--encoding", "float32",
    )  # fmt: skip
    kept = Known([talks.tokens[0], talks.tokens[2]], [talks.logprobs[0], talks.logprobs[2]])
    same_targets(entry, kept, [range(PROMPT + 4, PROMPT + 4 + REPLY)] * 2)
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.decisions[0].startswith("1 conversations are left out")


def tokens_of(data: Known, number: int) -> dict[str, Any]:
    ids, values = data.top(number)
    return {
        "input_ids": [*data.tokens[number].tolist(), 0],
        "attention_mask": [1] * len(data.tokens[number]) + [0],
        "labels": [-100, -100, *data.tokens[number][2:].tolist(), -100],
        "target_token_ids": [[0] * K, *ids[:-1].tolist(), [0] * K],
        "target_logprobs": [[0.0] * K, *values[:-1].tolist(), [0.0] * K],
        "target_mask": [[0] * K, *[[1] * K for _ in ids[:-1]], [0] * K],
    }


def test_tokens_as_the_trainer_holds_them(data: Known, tmp_path: Path) -> None:
    rows = [tokens_of(data, number) for number in range(len(data.tokens))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    entry = imported(tmp_path, tmp_path / "rows.parquet", "axolotl", "--encoding", "float32")
    same_targets(entry, data)
    mask = LogitCache.open(tmp_path / "cache").loss_mask
    assert mask is not None
    assert not mask.read(0, 1)[0]
    assert mask.read(1, 2)[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_logprobs": None}, "not of the kind"),
        ({"target_token_ids": [[1, 2]]}, "differ in length"),
        ({"labels": [1]}, "a label for each"),
        ({"target_mask": [[1]]}, "target_mask like"),
    ],
)
def test_rows_without_sense(change: dict[str, Any], said: str, data: Known, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [tokens_of(data, 0), tokens_of(data, 1) | change])
    refused(imports(tmp_path, path, "axolotl"), "rows.jsonl line 2", said)


def test_conversations_need_a_template(talks: Known, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [conversation(talks, 0, 2)])
    refused(imports(tmp_path, path, "axolotl"), "no chat template")
