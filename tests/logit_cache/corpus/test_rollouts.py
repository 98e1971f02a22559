"""Rows that say which model sampled them: one model's stream or nobody's, with its name in the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support.commands import Run

from storage import LogitCache
from storage.cache.corpus_writer import write_corpus
from storage.format.manifest.cache import Rollouts

ROLLOUT = {
    "source": "s", "weights_sha256": "a" * 64, "config_sha256": "b" * 64, "temperature": 0.8, "top_p": 1.0, "top_k": 0,
    "max_new_tokens": 8, "seed": 3,
}  # fmt: skip
ROW = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1], "rollout": ROLLOUT}


def made(folder: Path, run: Run, tokenizer: Path, *rows: dict[str, Any], beside: tuple[object, ...] = ()) -> Any:
    """`logit-cache tokenize` of rows in the folder's file, and of other text beside them."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [word for text in (folder / "rows.jsonl", *beside) for word in ("--text", text)]
    return run("logit-cache", "tokenize", *texts, "--tokenizer", tokenizer, "--out", folder / "cache")


@pytest.mark.parametrize("adapted", [False, True])
def test_the_record_says_whose_rollouts_a_stream_is(
    tmp_path: Path, run: Run, small_cache: Path, text_file: Path, adapted: bool
) -> None:
    rollout = {**ROLLOUT, **({"adapter_sha256": "c" * 64, "adapter_config_sha256": "d" * 64} if adapted else {})}
    done = made(tmp_path, run, small_cache, {**ROW, "rollout": rollout}, {**ROW, "rollout": rollout})
    assert done.returncode == 0, done.stderr
    assert "its trained tokens are rollouts of s (weights aaaaaaaaaaaaaaaa…, temperature 0.8" in done.stderr
    cache = LogitCache.open(str(tmp_path / "cache"))
    assert cache.record.corpus.rollouts == Rollouts(**rollout)
    # The position before a sampled token is trained, and no other.
    assert cache.loss_mask.read(0, 8).tolist() == [False, True, True, False] * 2
    table = pyarrow.Table.from_pylist(
        [{**ROW, "rollout": {**rollout, "adapter_sha256": rollout.get("adapter_sha256")}}]
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    line = ("--text", tmp_path / "rows.parquet", "--tokenizer", small_cache, "--out", tmp_path / "parquet")
    assert run("logit-cache", "tokenize", *line).returncode == 0
    assert LogitCache.open(str(tmp_path / "parquet")).record.corpus.rollouts == Rollouts(**rollout)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            [{**ROW, "rollout": {**ROLLOUT, "weights_sha256": "e" * 64}}],
            "found rollouts of s (weights eeeeeeeeeeeeeeee…",
        ),
        ([{**ROW, "rollout": {**ROLLOUT, "seed": 4}}], "seed 4"),
        ([{"input_ids": [5, 6]}], "found text that no model is said to have sampled"),
        ([{"text": "words"}], "found text that no model is said to have sampled"),
        (
            [{**ROW, "rollout": {**ROLLOUT, "top_p": 2}}],
            "'rollout' does not say which model sampled the row, and how (top_p",
        ),
        ([{**ROW, "rollout": "me"}], "'rollout' does not say which model"),
        ([{"text": "words", "rollout": ROLLOUT}], "'rollout' ({'source': 's'"),
    ],
    ids=str,
)
def test_nothing_else_is_in_a_stream_of_rollouts(
    tmp_path: Path, run: Run, small_cache: Path, others: list[dict[str, Any]], said: str
) -> None:
    done = made(tmp_path, run, small_cache, ROW, *others)
    assert done.returncode == 2
    assert said in done.stderr, done.stderr
    assert done.stderr.startswith("error: ")
    assert "rows.jsonl" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_text_file_beside_rollouts_is_refused(tmp_path: Path, run: Run, small_cache: Path, text_file: Path) -> None:
    done = made(tmp_path, run, small_cache, ROW, beside=(text_file,))
    assert done.returncode == 2
    assert "library.txt: a stream holds the rollouts of one model" in done.stderr


def test_a_stream_of_version_1_holds_no_rollouts(tmp_path: Path, run: Run, small_cache: Path) -> None:
    """Its record could not say so."""
    assert made(tmp_path, run, small_cache, {**ROW, "rollout": None}).returncode == 0
    cache = LogitCache.open(str(tmp_path / "cache"))
    streams = {"tokens": cache.tokens, "document_starts": cache.document_starts, "loss_mask": cache.loss_mask}
    arrays, files = {name: stream[0 : len(stream)] for name, stream in streams.items()}, cache.tokenizer_files()
    kept = {"begins_with_bos": None, "document_sources": None}
    corpus = cache.record.corpus.model_copy(update=kept)
    record = cache.record.model_copy(update={"format_version": 1, "corpus": corpus})
    shutil.rmtree(tmp_path / "cache")
    write_corpus(str(tmp_path / "cache"), record, files, arrays)
    done = made(tmp_path, run, small_cache, ROW)
    assert done.returncode == 2
    assert "holds a stream of version 1, which does not say whose rollouts it is" in done.stderr
