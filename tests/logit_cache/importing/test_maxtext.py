"""MaxText's records: bytes of tf.train.Example written here by hand, in files of the array_record package."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.imported import K, Known, imported, imports, known, same_targets
from support.commands import in_process, refused, succeeded

from storage import LogitCache

array_record_module = pytest.importorskip(
    "array_record.python.array_record_module",
    reason="array_record is not installed: pip install 'logit-cache[maxtext]'",
)
LENGTH, PROMPT = 70, 4


@pytest.fixture(scope="module")
def data() -> Known:
    return known((23, 40, 9, 31, 17))


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: dict[str, Any]) -> bytes:
    """Lists of int64, or of float32 where the values are floats."""
    entries = b""
    for name, values in features.items():
        flat = np.asarray(values).reshape(-1)
        if flat.dtype.kind == "f":
            feature = field(2, field(1, struct.pack(f"<{len(flat)}f", *flat)))
        else:
            feature = field(3, field(1, b"".join(varint(int(value)) for value in flat)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def row(data: Known, numbers: list[int]) -> dict[str, Any]:
    """Packed documents, then padding. Targets are the row moved by one, also where another document begins."""
    found: dict[str, Any] = {name: [] for name in ("inputs", "inputs_segmentation", "inputs_position")}
    logits, indices = [], []
    for place, number in enumerate(numbers, 1):
        ids, values = data.top(number)
        found["inputs"] += data.tokens[number].tolist()
        found["inputs_segmentation"] += [place] * len(ids)
        found["inputs_position"] += list(range(len(ids)))
        logits.append(values + 9.0)
        indices.append(ids)
    rest = LENGTH - len(found["inputs"])
    found = {name: values + [0] * rest for name, values in found.items()}
    for name in ("inputs", "inputs_segmentation"):
        found[name.replace("inputs", "targets")] = [*found[name][1:], 0]
    found["top_k_logits"] = np.concatenate([*logits, np.zeros((rest, K))])
    found["top_k_indices"] = np.concatenate([*indices, np.zeros((rest, K), dtype=np.int64)])
    return found | {"sequence_hash": -5}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for each in rows:
        writer.write(example(each))
    writer.close()
    return path


def test_packed_rows_of_parts_and_hosts(data: Known, tmp_path: Path) -> None:
    """Parts come one after the other, in each its hosts; nothing is known outside the ids."""
    folder = tmp_path / "logits"
    folder.mkdir()
    for name, numbers in (("00010_host_000", [4]), ("00002_host_001", [2, 3]), ("00002_host_000", [0, 1])):
        write(folder / f"teacher_top_k_part_{name}.array_record", [row(data, numbers)])
    entry = imported(tmp_path, folder, "maxtext", "--encoding", "float32")
    same_targets(entry, data, [range(len(tokens)) for tokens in data.tokens], renormalised=True)
    assert LogitCache.open(tmp_path / "cache").loss_mask is None
    guessed = succeeded(in_process("logit-cache", "import", folder, "--guess", "--json"))
    assert json.loads(guessed.stdout) == {"format": "maxtext"}


def test_targets_that_are_not_trained_on(data: Known, tmp_path: Path) -> None:
    """Prompts are hidden in the targets, and have another token there."""
    found = row(data, [0, 1])
    for start in (0, 23):
        for name, hidden in (("targets", 5), ("targets_segmentation", 0)):
            found[name][start : start + PROMPT] = [hidden] * PROMPT
    entry = imported(tmp_path, write(tmp_path / "a.array_record", [found]), "maxtext", "--encoding", "float32")
    assert len(entry) == 63
    mask = LogitCache.open(tmp_path / "cache").loss_mask
    assert mask is not None
    hidden = [*range(PROMPT), 22, *range(23, 23 + PROMPT), 62]
    assert np.flatnonzero(~mask.read(0, 63)).tolist() == hidden


def test_records_without_segments_are_a_document_each(data: Known, tmp_path: Path) -> None:
    rows = []
    for number, tokens in enumerate(data.tokens):
        ids, values = data.top(number)
        rows.append({"inputs": tokens, "top_k_logits": values, "top_k_indices": ids})
    entry = imported(tmp_path, write(tmp_path / "a.array_record", rows), "maxtext", "--encoding", "float32")
    same_targets(entry, data, [range(len(tokens)) for tokens in data.tokens], renormalised=True)
    assert entry.entry.imported_from is not None
    assert "5 records do not say where documents" in entry.entry.imported_from.decisions[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_k_logits": [1.0]}, ("record 1", "as many logits and indices for each of 70")),
        ({"targets": [1, 2]}, ("record 1", "as many targets as tokens")),
        ({"targets": [3] * LENGTH}, ("record 1 segment 1", "not of one text")),
        ({"inputs": [1 << 40] * LENGTH}, ("record 1", "inputs is no list of token ids")),
    ],
)
def test_records_without_sense(change: dict[str, Any], said: tuple[str, ...], data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "a.array_record", [row(data, [0]), row(data, [1]) | change])
    refused(imports(tmp_path, path, "maxtext"), "a.array_record", *said)


def test_files_that_are_damaged_or_of_others(data: Known, tmp_path: Path) -> None:
    path = write(tmp_path / "a.array_record", [row(data, [0, 1])])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(imports(tmp_path, path, "maxtext"), "cut off")
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    refused(imports(tmp_path, path, "maxtext"), "cannot be read as ArrayRecord")
    write(path, [{"tokens": [1]}])
    refused(imports(tmp_path, path, "maxtext"), "record 0", "top_k_logits", "tokens")
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    writer.write(b"no message")
    writer.close()
    refused(imports(tmp_path, path, "maxtext"), "record 0", "no tf.train.Example")
    assert not (tmp_path / "cache").exists()


def test_without_the_package(data: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.array_record", [row(data, [0])])
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    refused(imports(tmp_path, path, "maxtext"), "pip install 'logit-cache[maxtext]'")
