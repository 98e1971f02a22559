"""`logit-cache tokenize` as it is installed: its token streams, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support.commands import Run, refused

from storage import LogitCache


def test_conversations_get_a_loss_mask(small_cache: Path, run: Run, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    rows = tmp_path / "chat.jsonl"
    conversation = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]
    rows.write_text((json.dumps({"messages": conversation}) + "\n") * 3)
    out = tmp_path / "chat"
    done = run(
        "logit-cache", "tokenize", "--text", rows, "--tokenizer", small_cache / "tokenizer",
        "--chat-template", template, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from transformers import AutoTokenizer

    cache = LogitCache.open(str(out))
    tokens = cache.tokens.read(0, len(cache.tokens)).astype(np.int64)
    assert cache.loss_mask is not None
    trained = cache.loss_mask.read(0, len(tokens))
    assert len(cache.document_starts) == 3
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    assert tokenizer.decode(tokens[1:][trained[:-1]].tolist()).replace(" ", "") == "four</s>" * 3
    length, learnt = len(tokens) // 3, int(trained.sum())
    lines = [
        f"documents   {length} tokens in the median, 95 % at most {length}, the longest {length}",
        f"trained on  {learnt} tokens, by the loss mask",
    ]
    for printed in (done.stdout, run("logit-cache", "inspect", out).stdout):
        assert [line.strip() for line in printed.splitlines() if line.strip() in lines] == lines
    assert "3 conversations; the replies are found by its loop over the messages" in done.stderr
    training = ("--set", "max_steps=1", "--windows-per-step", 1, "--output-dir", tmp_path / "student")
    done = run("train-student", "--cache", out, "--model", "llama-tiny", "--window-tokens", len(tokens) - 1, *training)
    assert done.returncode == 0, done.stderr
    assert f" {learnt} tokens, of {len(tokens) - 1} read, in 1 step," in done.stdout


def test_wrong_input_is_one_line_and_leaves_nothing(
    small_cache: Path, text_file: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cases = [
        (("--text", tmp_path / "none.txt", "--tokenizer", small_cache / "tokenizer", "--out", out), ("none.txt",)),
        (("--text", text_file, "--out", out), ("--tokenizer", "--train-tokenizer")),
        (("--text", text_file, "--train-tokenizer", 10, "--out", out), ("--train-tokenizer", "10")),
        (("--train-tokenizer", 400, "--out", out), ("--text",)),
        (("--text", text_file, "--train-tokenizer", 400, "--document-separator", "\\x1", "--out", out), ("separator",)),
        (("--text", text_file, "--train-tokenizer", 400), ("--out",)),
    ]
    for arguments, words in cases:
        refused(run("logit-cache", "tokenize", *arguments), *words)
        assert not out.exists(), arguments


def test_a_folder_of_rows_with_bad_ones(small_cache: Path, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text("about it")
    (folder / "a.csv").write_text('text,id\n"one, two",1\ntoo,many,values\n')
    settings = tmp_path / "job.yaml"
    settings.write_text(f"text: ['{folder}']\nskip-bad-rows: true\n")
    line = ("logit-cache", "tokenize", "--tokenizer", small_cache / "tokenizer", "--out", tmp_path / "out")
    refused(run(*line, "--text", folder), f"{folder}/a.csv line 3: expected 2 values", "--skip-bad-rows")
    done = run(*line, "--config", settings)
    assert done.returncode == 0, done.stderr
    assert f"{folder}: 1 CSV file, {folder}/a.csv; left out: README.md" in done.stderr
    assert f"{folder}/a.csv line 3: expected 2 values" in done.stderr
    assert "skipped rows 1" in run("logit-cache", "inspect", tmp_path / "out").stdout
