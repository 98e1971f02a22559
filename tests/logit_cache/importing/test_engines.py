"""Answers of vLLM and SGLang as they are served, written by hand from known distributions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.imported import K, Known, imported, imports, known, same_targets, whole, write_lines
from support.commands import in_process, refused, succeeded

from logit_cache.fidelity.plausibility import plausibility
from logit_cache.importing import files
from logit_cache.importing.document import Source
from logit_cache.importing.registry import FORMATS
from storage.cache.reader import TeacherTargets
from storage.errors import InputError


@pytest.fixture(scope="module")
def data() -> Known:
    return known()


def vllm_entries(data: Known, number: int, ranks: bool = True) -> list[Any]:
    """Of token i by the row before it: K best in no order, and the token that is there."""
    entries: list[Any] = [None]
    for row, token in enumerate(data.tokens[number][1:]):
        logprobs = data.logprobs[number][row]
        order = np.argsort(-logprobs, kind="stable")
        ids = [int(i) for i in order[:K]]
        if token not in ids:
            ids.append(int(token))
        ids = ids[::-1] if row % 2 else ids[-1:] + ids[:-1]
        rank = {int(index): place + 1 for place, index in enumerate(order)}
        entries.append({str(i): {"logprob": float(logprobs[i]), "decoded_token": f"t{i}"} for i in ids})
        for i in ids if ranks else ():
            entries[-1][str(i)]["rank"] = rank[i]
    return entries


def vllm(data: Known, number: int) -> dict[str, Any]:
    return {"prompt_token_ids": data.tokens[number].tolist(), "prompt_logprobs": vllm_entries(data, number)}


def labels_are_known(entry: TeacherTargets, data: Known) -> None:
    found = whole(entry).label_logprob
    assert found is not None
    for number, start in enumerate(data.starts):
        tokens = data.tokens[number]
        expected = data.logprobs[number][np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(found[start : start + len(tokens) - 1], expected, atol=2e-6)
        assert np.isnan(found[start + len(tokens) - 1])


def test_vllm_completions_chats_and_single_prompts(data: Known, tmp_path: Path) -> None:
    """The token that is there beside the best ids is the label, and is not stored among them."""
    rows = [vllm(data, number) for number in range(len(data.tokens))]
    completions = {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": i, **rows[i]} for i in (0, 1)]}
    chat = {"id": "chat-1", "object": "chat.completion", "choices": [{"message": {}}], **rows[2]}
    path = write_lines(tmp_path / "a.jsonl", [completions, chat, rows[3]])
    entry = imported(tmp_path, path, "vllm", "--encoding", "float32")
    same_targets(entry, data)
    labels_are_known(entry, data)
    checks = plausibility(str(tmp_path / "cache"), windows=100).checks
    assert {name: check.broken for name, check in checks.items()} == dict.fromkeys(
        ("distinct", "masses", "outside", "label"), 0
    )
    found = json.loads(succeeded(in_process("logit-cache", "import", path, "--guess", "--json")).stdout)
    assert found == {"format": "vllm"}


def test_logits_of_an_engine_give_no_label(data: Known, tmp_path: Path) -> None:
    """One without the normaliser is no log-prob."""
    rows = [vllm(data, number) for number in range(len(data.tokens))]
    for item in (item for row in rows for entry in row["prompt_logprobs"][1:] for item in entry.values()):
        item["logprob"] += 7.5
    path = write_lines(tmp_path / "a.jsonl", rows)
    entry = imported(tmp_path, path, "vllm", "--encoding", "float32", "--values", "logits")
    same_targets(entry, data, renormalised=True)
    assert entry.entry.targets.fields == ()


def test_vllm_without_ranks_and_with_clamped_numbers(data: Known, tmp_path: Path) -> None:
    rows = [vllm(data, number) for number in range(len(data.tokens))]
    for row in rows:
        for entry in row["prompt_logprobs"][1:]:
            for item in entry.values():
                del item["rank"]
    first = rows[0]["prompt_logprobs"][4]
    last = min(first, key=lambda token: first[token]["logprob"])
    first[last]["logprob"] = -9999.0
    targets = whole(imported(tmp_path, write_lines(tmp_path / "a.jsonl", rows), "vllm", "--encoding", "float32"))
    ids, _ = data.top(0)
    np.testing.assert_array_equal(targets.token_ids[2], ids[2])
    # What has no probability is left out; the row lost its label or its last id.
    assert targets.kept[3] in (K - 1, K)
    assert (targets.logprobs[targets.logprobs > -np.inf] > -100).all()


def test_vllm_flat_arrays(data: Known, tmp_path: Path) -> None:
    """The token that is there comes first, and again where it is one of the best."""
    rows = []
    for number in range(len(data.tokens)):
        row: dict[str, Any] = {"prompt_token_ids": data.tokens[number].tolist()}
        flat: dict[str, list[Any]] = {
            "start_indices": [],
            "end_indices": [],
            "token_ids": [],
            "logprobs": [],
            "ranks": [],
        }
        for entry, there in zip(vllm_entries(data, number), data.tokens[number].tolist(), strict=True):
            flat["start_indices"].append(len(flat["token_ids"]))
            best = [(token, item) for token, item in (entry or {}).items() if item["rank"] <= K]
            for token, item in [(str(there), entry[str(there)]), *best] if entry else ():
                flat["token_ids"].append(int(token))
                flat["logprobs"].append(item["logprob"])
                flat["ranks"].append(item["rank"])
            flat["end_indices"].append(len(flat["token_ids"]))
        rows.append(row | flat)
    path = write_lines(tmp_path / "a.jsonl", rows)
    entry = imported(tmp_path, path, "vllm", "--encoding", "float32")
    same_targets(entry, data)
    labels_are_known(entry, data)


def sglang(data: Known, number: int) -> dict[str, Any]:
    tokens, logprobs = data.tokens[number], data.logprobs[number]
    ids, values = data.top(number)
    top = [
        None,
        *([[float(v), int(i), None] for v, i in zip(*pair, strict=True)] for pair in zip(values, ids, strict=True)),
    ]
    own = [None, *(float(logprobs[row, token]) for row, token in enumerate(tokens[1:]))]
    return {
        "text": "",
        "meta_info": {
            "prompt_tokens": len(tokens),
            "input_token_logprobs": [[value, int(token), None] for value, token in zip(own, tokens, strict=True)],
            "input_top_logprobs": top[: len(tokens)],
        },
    }


def test_sglang(data: Known, tmp_path: Path) -> None:
    rows = [sglang(data, number) for number in range(len(data.tokens))]
    path = write_lines(tmp_path / "a.jsonl", [rows[0], rows[1:3], rows[3]])
    entry = imported(tmp_path, path, "sglang", "--encoding", "float32")
    same_targets(entry, data)
    labels_are_known(entry, data)
    found = json.loads(succeeded(in_process("logit-cache", "import", path, "--guess", "--json")).stdout)
    assert found == {"format": "sglang"}


def test_rows_moved_by_one_are_refused(data: Known, tmp_path: Path) -> None:
    """An answer whose first entry was dropped, as some do, is about the next token: the format says otherwise."""
    rows = [vllm(data, number) for number in range(len(data.tokens))]
    for row in rows:
        row["prompt_logprobs"] = [*row["prompt_logprobs"][1:], None]
    path = write_lines(tmp_path / "a.jsonl", rows)
    refused(imports(tmp_path, path, "vllm"), "that follows", "vllm files say", "moved by one")


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("vllm", {"prompt_token_ids": None}, "return_token_ids"),
        ("vllm", {"prompt_logprobs": None}, "it has no prompt_logprobs"),
        ("vllm", {"prompt_logprobs": [None]}, "cut off"),
        ("vllm", {"prompt_logprobs": 5}, "a list of prompt_logprobs"),
        ("vllm", {"error": "out of memory"}, "out of memory"),
        ("sglang", {"meta_info": {}}, "logprob_start_len 0"),
        ("sglang", {"meta_info": {"input_token_logprobs": [[None, 5, None]], "input_top_logprobs": []}}, "an entry"),
        (
            "sglang",
            {"meta_info": {"input_token_logprobs": [], "input_top_logprobs": [], "prompt_tokens": 9}},
            "all 9 tokens",
        ),
    ],
)
def test_answers_without_what_is_needed(
    format: str, change: dict[str, Any], words: str, data: Known, tmp_path: Path
) -> None:
    make = vllm if format == "vllm" else sglang
    path = write_lines(tmp_path / "a.jsonl", [make(data, 0), make(data, 1) | change])
    refused(imports(tmp_path, path, format), "a.jsonl line 2", words)


def test_a_file_that_was_cut_off(data: Known, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [vllm(data, 0), vllm(data, 1)])
    path.write_text(path.read_text()[:-100])
    refused(imports(tmp_path, path, "vllm"), "a.jsonl line 2", "not valid JSON")


TOKENS = {"prompt_token_ids": [1, 2]}
AXOLOTL = {"input_ids": [1, 2], "target_token_ids": [[3], [4]], "target_logprobs": [[-1.0], [-1.0]]}
NEMO = {
    "tokens": [1],
    "labels": [2],
    "loss_mask": [1],
    "topk_token_ids": [[3]],
    "topk_logits": [[1.0]],
    "log_sum_exp_logits": [2.0],
}


def sglang_answer(top: Any = None, label: Any = -1.0) -> dict[str, Any]:
    there = [[None, 1, None], [label, 2, None]]
    return {"meta_info": {"input_token_logprobs": there, "input_top_logprobs": [None, top or [[-1.0, 3, None]]]}}


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("vllm", TOKENS | {"prompt_logprobs": [None, {"3": {"logprob": 10**400}}]}),
        ("vllm", TOKENS | {"prompt_logprobs": [None, {"3": {"logprob": -1.0, "rank": "a"}}]}),
        ("vllm", {"prompt_token_ids": [1.5, 2], "prompt_logprobs": [None, None]}),
        ("sglang", sglang_answer(7)),
        ("sglang", sglang_answer([[-1.0, 1.5, None]])),
        ("sglang", sglang_answer([[-1.0]])),
        ("sglang", sglang_answer(label={})),
        ("nemo", NEMO | {"loss_mask": True}),
        ("nemo", NEMO | {"loss_mask": ["a"]}),
        ("nemo", NEMO | {"topk_token_ids": [[1.5]]}),
        ("axolotl", AXOLOTL | {"labels": True}),
        ("axolotl", AXOLOTL | {"target_mask": [["x"], [1]]}),
        ("axolotl", AXOLOTL | {"target_token_ids": [[1.5], [4]]}),
        ("axolotl", AXOLOTL | {"attention_mask": [1, [2]]}),
    ],
)
def test_values_of_any_kind_are_refused_with_their_line(format: str, row: dict[str, Any], tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    documents = FORMATS[format].documents(Source([path], None))
    with pytest.raises(InputError, match=r"a\.jsonl line 1"):
        _ = [list(document.parts()) for document in documents]


def test_a_line_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_LINE_BYTES", 64)
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": "x" * 64}])
    with pytest.raises(InputError, match=r"a\.jsonl line 2: expected at most 64 bytes"):
        list(files.json_rows(path))
