"""Layouts of data sets that people published, written here with pyarrow alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.caches.imported import K, Known, imported, imports, known, same_targets
from support.commands import in_process, refused, succeeded

from storage import LogitCache

LENGTH, PROMPT = 30, 5


@pytest.fixture(scope="module")
def data() -> Known:
    return known((LENGTH,) * 3)


def write(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def tops(data: Known) -> list[tuple[np.ndarray, np.ndarray]]:
    return [data.top(number) for number in range(len(data.tokens))]


def every_row(data: Known) -> list[range]:
    return [range(len(tokens)) for tokens in data.tokens]


def prompts_ignored(tokens: np.ndarray) -> list[int]:
    return [-100] * PROMPT + tokens[PROMPT:].tolist()


def pairs(data: Known) -> dict[str, Any]:
    """Log-probs and ids as numbers of one kind in one column."""
    targets = [np.stack([values, ids], axis=1).tolist() for ids, values in tops(data)]
    kind = pa.list_(pa.list_(pa.list_(pa.float32(), K), 2))
    return {
        "inputs": [tokens.tolist() for tokens in data.tokens],
        "targets": pa.array(targets, kind),
        "line_number": list(range(len(data.tokens))),
    }


def flat(data: Known) -> dict[str, Any]:
    """Probabilities and ids one after the other, labels that are the next tokens, and a mask of rows."""
    found = {
        "input_ids": [tokens.tolist() for tokens in data.tokens],
        "labels": [[-100] * (PROMPT - 1) + tokens[PROMPT:].tolist() + [7] for tokens in data.tokens],
        "teacher_probs_bpe": [np.exp(values).reshape(-1).tolist() for _, values in tops(data)],
        "teacher_ids_bpe": [ids.reshape(-1).tolist() for ids, _ in tops(data)],
        "teacher_mask_bpe": [[row != 3 for row in range(LENGTH)] for _ in data.tokens],
    }
    found["teacher_ids_bpe"][0][3 * K : 4 * K] = [0] * K  # what the mask hides has no sense
    return found


def filled(flat: list[Any], fill: float) -> list[Any]:
    """Lists of K numbers, one after the other, with two more in each."""
    return [number for row in np.reshape(flat, (-1, K)).tolist() for number in [*row, fill, fill]]


def normalised(data: Known, among: str) -> dict[str, Any]:
    """Logits, and probabilities of the same ids: over the vocabulary, or among the ids."""
    found: dict[str, Any] = {"input_ids": [tokens.tolist() for tokens in data.tokens], "token_ids": []}
    found |= {"attention_mask": [[1] * LENGTH for _ in data.tokens], "top_values": [], "normalized_logits": []}
    for ids, values in tops(data):
        whole = 0.0 if among == "vocabulary" else np.logaddexp.reduce(values, axis=1)[:, None]
        found["token_ids"].append(ids.tolist())
        found["top_values"].append((values + 11.0).tolist())
        found["normalized_logits"].append(np.exp(values - whole).tolist())
    return found


def teacher(data: Known, suffix: str) -> dict[str, Any]:
    """The columns of one of several teachers: logits, padded at the end."""
    found: dict[str, list[Any]] = {f"{name}{suffix}": [] for name in ("input_ids", "attention_mask", "labels")}
    found |= {f"topk_{name}_model{suffix}": [] for name in ("logits", "indices")}
    for tokens, (ids, values) in zip(data.tokens, tops(data), strict=True):
        found[f"input_ids{suffix}"].append([*tokens.tolist(), 0, 0])
        found[f"attention_mask{suffix}"].append([1] * len(tokens) + [0, 0])
        found[f"labels{suffix}"].append([*prompts_ignored(tokens), -100, -100])
        found[f"topk_logits_model{suffix}"].append((values + 7.0).tolist() + [[0.0] * K] * 2)
        found[f"topk_indices_model{suffix}"].append(ids.tolist() + [[0] * K] * 2)
    return found


def trained(folder: Path) -> np.ndarray:
    mask = LogitCache.open(folder / "cache").loss_mask
    assert mask is not None
    return mask.read(0, len(mask)).reshape(-1, LENGTH)


def test_pairs_of_log_probs_and_ids(data: Known, tmp_path: Path) -> None:
    entry = imported(tmp_path, write(tmp_path / "d.parquet", pairs(data)), "parquet", "--encoding", "float32")
    same_targets(entry, data, every_row(data))
    assert LogitCache.open(tmp_path / "cache").loss_mask is None


def test_flat_lists_labels_and_a_mask_of_rows(data: Known, tmp_path: Path) -> None:
    """Rows of one length are filled with an id of no probability, which comes twice, or thrice."""
    found = flat(data)
    for name, fill in (("teacher_probs_bpe", 0.0), ("teacher_ids_bpe", 5)):
        found[name] = [filled(row, fill) for row in found[name]]
    entry = imported(tmp_path, write(tmp_path / "d.parquet", found), "parquet", "--encoding", "float32")
    rows = [[row for row in range(LENGTH) if row != 3] for _ in data.tokens]
    same_targets(entry, data, rows)  # type: ignore[arg-type]
    assert (trained(tmp_path) == [PROMPT - 1 <= row < LENGTH - 1 for row in range(LENGTH)]).all()
    assert entry.entry.imported_from is not None
    assert entry.entry.imported_from.values == "probabilities"


@pytest.mark.parametrize("among", ["vocabulary", "ids"])
def test_normalised_numbers_are_taken_before_logits(among: str, data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", normalised(data, among))
    entry = imported(tmp_path, path, "parquet", "--encoding", "float32")
    same_targets(entry, data, every_row(data), renormalised=among == "ids")
    assert entry.entry.imported_from is not None
    assert "normalized_logits" in entry.entry.imported_from.decisions[0]


def test_one_of_several_teachers_is_chosen(tmp_path: Path) -> None:
    """Each has its own tokens. An import is not resumed with the numbers of another one."""
    each = {f"_{number}": known((LENGTH,) * 3, seed=number) for number in (1, 2, 3)}
    path = write(
        tmp_path / "d.parquet", {k: v for suffix, data in each.items() for k, v in teacher(data, suffix).items()}
    )
    refused(imports(tmp_path, path, "parquet"), "3 teachers", "--column-suffix _1 or _2 or _3")
    refused(imports(tmp_path, path, "parquet", "--column-suffix", "_4"), "there is '_1', '_2', '_3'")
    assert not (tmp_path / "cache").exists()
    entry = imported(tmp_path, path, "parquet", "--column-suffix", "_2", "--encoding", "float32")
    same_targets(entry, each["_2"], every_row(each["_2"]), renormalised=True)
    assert (trained(tmp_path) == [PROMPT - 1 <= row < LENGTH - 1 for row in range(LENGTH)]).all()
    refused(imports(tmp_path, path, "parquet", "--column-suffix", "_1"), "stream_sha256")


def test_teachers_of_the_same_tokens_are_different_entries(data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", teacher(data, "_a") | teacher(data, "_b"))
    imported(tmp_path, path, "parquet", "--column-suffix", "_a")
    refused(imports(tmp_path, path, "parquet", "--column-suffix", "_b"), "decisions", "another --name")


def test_a_suffix_is_of_parquet_alone(data: Known, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt_logprobs": [None], "prompt_token_ids": [1]}))
    refused(imports(tmp_path, path, "vllm", "--column-suffix", "_1"), "columns of one teacher")


@pytest.mark.parametrize("make", [pairs, flat, lambda data: normalised(data, "ids"), lambda data: teacher(data, "_1")])
def test_guess(make: Any, data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", make(data))
    done = succeeded(in_process("logit-cache", "import", path, "--guess", "--json"))
    assert json.loads(done.stdout) == {"format": "parquet"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"targets": [[[[1.0], [2.0], [3.0]]]] * 3},
            ("d.parquet row 0", "a list of numbers and one of ids", "3 lists"),
        ),
        ({"targets": [[[[-1.0, -2.0], [2.0]]]] * 3}, ("d.parquet row 0", "as many whole numbers")),
        ({"targets": [[[[-1.0], [2.5]]]] * 3}, ("d.parquet row 0", "as many whole numbers")),
        ({"inputs": ["a"] * 3, "targets": ["b"] * 3}, ("none of those",)),
        ({"labels": [[5] * LENGTH] * 3}, ("d.parquet row 0", "labels that are its tokens, the next ones")),
        ({"teacher_mask_indices": [[1]] * 3}, ("masked language model",)),
    ],
)
def test_what_is_none_of_these(change: dict[str, Any], said: tuple[str, ...], data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", pairs(data) | change)
    refused(imports(tmp_path, path, "parquet"), *said)
    assert not (tmp_path / "cache").exists()


def test_flat_lists_are_of_their_layout_alone(data: Known, tmp_path: Path) -> None:
    """A number for each token in other columns is no distribution, but often the log-prob of that token alone."""
    found = {"input_ids": [tokens.tolist() for tokens in data.tokens]}
    found |= {"token_ids": found["input_ids"], "logprobs": [[-1.0] * LENGTH for _ in data.tokens]}
    refused(imports(tmp_path, write(tmp_path / "d.parquet", found), "parquet"), "row 0", "found one list")


def test_flat_lists_of_another_length(data: Known, tmp_path: Path) -> None:
    found = flat(data)
    found["teacher_ids_bpe"][1].pop()
    refused(
        imports(tmp_path, write(tmp_path / "d.parquet", found), "parquet"), "row 1", "as many numbers for each of 30"
    )
