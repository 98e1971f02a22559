"""An entry as files of others, read by readers written here, and imported again: the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from support.caches.imported import Known, V, imported, known, tokenizer_folder, whole
from support.caches.small import (
    dense_targets,
    make_corpus,
    make_entry_2,
    random_sample,
    random_stream,
    without_rows,
    write_entry,
)
from support.commands import in_process, refused, succeeded

from storage import LogitCache
from storage.cache.reader import TeacherTargets
from storage.format.manifest.entry import Windowing
from storage.format.targets import SparseTargets

K = 8
FORMATS = ("parquet", "axolotl", "distillkit")


@pytest.fixture(scope="module")
def data() -> Known:
    """One document ends with the padding id, and one is a single token."""
    found = known((23, 40, 9, 1, 31))
    found.tokens[0][-1] = 0
    return found


def make(folder: Path, data: Known, encoding: str, holes: bool = False, mask: bool = False) -> TeacherTargets:
    """A cache of isolated documents; with holes, every row of a document but the last has targets."""
    tokens, starts = np.concatenate(data.tokens).astype(np.uint16), data.starts.astype(np.uint64)
    trained = np.arange(len(tokens)) % 4 != 1 if mask else None
    record = make_corpus(
        str(folder / "cache"), tokens, V, starts, trained, tokenizer_files=files_of(tokenizer_folder(folder))
    )
    longest = max(map(len, data.tokens))
    windowing = Windowing(context_tokens=longest, stride_tokens=longest, isolate_documents=True)
    entry = make_entry_2(
        record, K, encoding=encoding, windowing=windowing, positions="some" if holes else "all",
        shard_tokens=80, chunk_tokens=40,
    )  # fmt: skip
    targets = dense_targets(np.concatenate(data.logprobs), K, np.full(len(tokens), -1))
    if holes:
        last = np.zeros(len(tokens), dtype=bool)
        last[[*(data.starts[1:] - 1), len(tokens) - 1]] = True
        targets = without_rows(targets, last)
    write_entry(folder / "cache", "t", entry, targets)
    return LogitCache.open(folder / "cache").teacher("t")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exports(folder: Path, format: str, out: str = "out") -> Any:
    return in_process(
        "logit-cache", "export", folder / "cache", "--name", "t", "--format", format, "--out", folder / out, "--json"
    )


def by_id(targets: SparseTargets, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs of rows by ascending id: those of equal codes may come in another order."""
    order = np.argsort(targets.token_ids[rows], axis=1)
    return np.take_along_axis(targets.token_ids[rows], order, 1), np.take_along_axis(targets.logprobs[rows], order, 1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("encoding", ["float32", "codes"])
@pytest.mark.parametrize("holes", [False, True])
def test_what_was_exported_is_imported_again(
    format: str, encoding: str, holes: bool, data: Known, tmp_path: Path
) -> None:
    """Exact entries to the rounding of float32, codes as the same codes."""
    entry = make(tmp_path, data, encoding, holes, mask=format != "distillkit")
    done = json.loads(succeeded(exports(tmp_path, format)).stdout)
    ends = {*(data.starts[1:] - 1).tolist(), len(entry) - 1}
    assert (done["windows"], done["tokens"], done["left_out"]) == (len(data.tokens), len(entry), 0)
    again = imported(tmp_path, tmp_path / "out", format, "--encoding", encoding, out="again")
    before, after = whole(entry), whole(again)
    rows = np.arange(len(entry))
    np.testing.assert_array_equal(before.kept[rows], after.kept[rows])
    atol = {"float32": 1e-6, "codes": 1e-5}[encoding]
    (ids, logprobs), (ids_after, logprobs_after) = by_id(before, rows), by_id(after, rows)
    np.testing.assert_array_equal(ids_after, ids)
    np.testing.assert_allclose(logprobs_after, logprobs, atol=atol)
    np.testing.assert_allclose(after.log_tail[rows], before.log_tail[rows], atol=10 * atol)  # type: ignore[index]
    caches = [LogitCache.open(tmp_path / name) for name in ("cache", "again")]
    tokens = [cache.tokens.read(0, len(entry)) for cache in caches]
    np.testing.assert_array_equal(*tokens)
    np.testing.assert_array_equal(caches[0].document_starts, caches[1].document_starts)
    if format != "distillkit":
        masks = [cache.loss_mask.read(0, len(entry)) for cache in caches]  # type: ignore[union-attr]
        inside = np.array([position not in ends for position in range(len(entry))])
        np.testing.assert_array_equal(masks[0] & inside, masks[1])


def test_plain_parquet_as_others_read_it(data: Known, tmp_path: Path) -> None:
    make(tmp_path, data, "float32")
    succeeded(exports(tmp_path, "parquet"))
    rows = pq.read_table(tmp_path / "out" / "data_0.parquet").to_pylist()
    for number, row in enumerate(rows):
        ids, values = data.top(number)
        assert row["input_ids"] == data.tokens[number].tolist()
        np.testing.assert_array_equal(row["token_ids"], ids)
        np.testing.assert_allclose(row["logprobs"], values, atol=2e-6)


def test_axolotl_rows_are_about_the_next_tokens(data: Known, tmp_path: Path) -> None:
    make(tmp_path, data, "float32", mask=True)
    succeeded(exports(tmp_path, "axolotl"))
    rows = pq.read_table(tmp_path / "out" / "data_0.parquet").to_pylist()
    for number, row in enumerate(rows):
        ids, values = data.top(number)
        assert row["target_mask"] == [[1] * K] * len(ids)
        np.testing.assert_array_equal(row["target_token_ids"], ids)
        np.testing.assert_allclose(row["target_logprobs"], values, atol=2e-6)
        start = data.starts[number]
        expected = [-100, *np.where(np.arange(start, start + len(ids) - 1) % 4 != 1, data.tokens[number][1:], -100)]
        assert row["labels"] == expected


def test_distillkit_bytes_by_hand(data: Known, tmp_path: Path) -> None:
    make(tmp_path, data, "float32")
    succeeded(exports(tmp_path, "distillkit"))
    settings = yaml.safe_load((tmp_path / "out" / "compression_config.yaml").read_text())
    assert (settings["d"], settings["k"], settings["exact_k"], settings["delta_encoding"]) == (V, K, K, False)
    rows = pq.read_table(tmp_path / "out" / "data_0.parquet").to_pylist()
    for number, row in enumerate(rows):
        ids, values = data.top(number)
        assert set(row["attention_mask"]) == {1}
        found = np.frombuffer(bytes(b for one in row["compressed_logprobs"] for b in one), dtype="<f4").reshape(-1, K)
        np.testing.assert_allclose(found, values, atol=2e-6)
        bits = "".join(f"{byte:08b}" for byte in row["bytepacked_indices"][0])
        assert [int(bits[7 * place : 7 * place + 7], 2) for place in range(K)] == ids[0].tolist()


def test_windows_of_one_stream_become_rows(tmp_path: Path) -> None:
    """Of a stream that is read across documents, each window is a text of its own."""
    tokens, targets = random_stream(V, 100, K)
    record = make_corpus(str(tmp_path / "cache"), tokens, V)
    write_entry(tmp_path / "cache", "t", make_entry_2(record, K, encoding="float32"), targets)
    succeeded(exports(tmp_path, "parquet"))
    rows = pq.read_table(tmp_path / "out" / "data_0.parquet").to_pylist()
    assert [len(row["input_ids"]) for row in rows] == [16] * 6 + [4]
    np.testing.assert_array_equal(np.concatenate([row["input_ids"] for row in rows]), tokens)
    np.testing.assert_array_equal(np.concatenate([row["token_ids"] for row in rows]), targets.token_ids)


@pytest.mark.parametrize(
    ("format", "change", "said"),
    [
        ("none", {}, "there is parquet, axolotl, distillkit"),
        ("parquet", {"windowing": Windowing(context_tokens=16, stride_tokens=8)}, "overlap"),
        ("parquet", {"windowing": Windowing(context_tokens=16, stride_tokens=16, begin_id=1)}, "an id before each"),
        ("distillkit", {"tail": "unknown"}, "--format parquet or axolotl"),
        ("distillkit", {"positions": "some"}, "some positions have no targets"),
        ("parquet", {"method": "varopt"}, "are a sample"),
        ("parquet", {"missing": (1,)}, "lacks"),
    ],
)
def test_what_a_format_cannot_say_is_refused(format: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    tokens, targets = random_stream(V, 100, K)
    record = make_corpus(str(tmp_path / "cache"), tokens, V)
    missing = change.pop("missing", ())
    if change.get("method") == "varopt":
        targets = random_sample(100, V, K)
    if change.get("positions") == "some":
        targets = without_rows(targets, np.arange(100) % 7 == 2)
    entry = make_entry_2(record, K, shard_tokens=16, chunk_tokens=16, encoding="float32", **change)
    write_entry(tmp_path / "cache", "t", entry, targets, missing)
    refused(exports(tmp_path, format), said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_nothing_is_replaced(data: Known, tmp_path: Path) -> None:
    make(tmp_path, data, "codes")
    succeeded(exports(tmp_path, "parquet"))
    refused(exports(tmp_path, "axolotl"), "is there already")


def test_targets_without_a_tail_stay_without_one(data: Known, tmp_path: Path) -> None:
    tokens, targets = (
        np.concatenate(data.tokens).astype(np.uint16),
        dense_targets(np.concatenate(data.logprobs), K, np.full(sum(map(len, data.tokens)), -1)),
    )
    record = make_corpus(
        str(tmp_path / "cache"), tokens, V, data.starts, tokenizer_files=files_of(tokenizer_folder(tmp_path))
    )
    windowing = Windowing(context_tokens=40, stride_tokens=40, isolate_documents=True)
    entry = make_entry_2(record, K, windowing=windowing, tail="unknown", made="imported", encoding="codes")
    write_entry(tmp_path / "cache", "t", entry, targets)
    before = whole(LogitCache.open(tmp_path / "cache").teacher("t"))
    succeeded(exports(tmp_path, "parquet"))
    again = imported(tmp_path, tmp_path / "out", "parquet", out="again")
    assert again.entry.targets.tail == "unknown"
    np.testing.assert_allclose(whole(again).logprobs, before.logprobs, atol=1e-5)
