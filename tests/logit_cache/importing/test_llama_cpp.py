"""llama.cpp's base files, packed here by hand: whole distributions, reduced and sampled as a teacher's are."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from support.caches.imported import K, Known, V, imported, imports, known, tokenizer_folder, whole
from support.caches.small import dense_targets
from support.commands import in_process, refused, succeeded

from teachers.reduction.reduce import reduce_varopt
from teachers.reduction.varopt import random_numbers, sampling_of

CONTEXT, CHUNKS = 25, 4


@pytest.fixture(scope="module")
def data() -> Known:
    return known((CONTEXT,) * CHUNKS, scale=3.0)


def base_file(path: Path, data: Known, columns: int = V, drop: int = 0) -> Path:
    """Codes of 16 bits from the best log-prob down to 16 nats below it."""
    out = b"_logits_" + struct.pack("<3i", CONTEXT, columns, CHUNKS)
    out += np.concatenate(data.tokens).astype("<i4").tobytes()
    for number in range(CHUNKS):
        for row in data.logprobs[number][CONTEXT // 2 : CONTEXT - 1]:
            row = np.append(row, np.full(columns - V, -40.0))
            least = max(row.min(), row.max() - 16)
            scale = (row.max() - least) / 65535
            codes = np.clip(np.round((row - least) / scale), 0, 65535).astype("<u2")
            codes = np.append(codes, np.zeros(columns % 2, "<u2"))
            out += struct.pack("<2f", scale, least) + codes.tobytes()
    path.write_bytes(out[: len(out) - drop])
    return path


def test_whole_distributions_become_top_k_targets(data: Known, tmp_path: Path) -> None:
    entry = imported(tmp_path, base_file(tmp_path / "base.bin", data), "llama-cpp", "-k", K, "--encoding", "float32")
    targets = whole(entry)
    here = np.zeros(CHUNKS * CONTEXT, dtype=bool)
    for number, start in enumerate(data.starts):
        rows = slice(start + CONTEXT // 2, start + CONTEXT - 1)
        here[rows] = True
        known_rows = data.logprobs[number][CONTEXT // 2 : CONTEXT - 1]
        expected = dense_targets(known_rows, K, np.full(len(known_rows), -1))
        np.testing.assert_array_equal(targets.token_ids[rows], expected.token_ids)
        for name in ("logprobs", "log_tail", "log_tail_half", "entropy"):
            np.testing.assert_allclose(getattr(targets, name)[rows], getattr(expected, name), atol=4e-4, err_msg=name)
    np.testing.assert_array_equal(targets.kept > 0, here)
    record = entry.entry
    assert record.windowing.context_tokens == CONTEXT
    assert record.imported_from is not None
    assert (record.imported_from.values, record.imported_from.error_nats) == ("dense", 1.3e-4)
    assert "replaced by BOS" in record.imported_from.decisions[0]


def test_whole_distributions_are_sampled_as_a_teacher_s_are(data: Known, tmp_path: Path) -> None:
    """The same ids as the reducer draws from the same numbers, which is shown to be unbiased by its own tests."""
    options = ("-k", K, "--targets", "varopt", "--seed", 7, "--encoding", "float32")
    entry = imported(tmp_path, base_file(tmp_path / "base.bin", data), "llama-cpp", *options)
    targets = whole(entry)
    assert targets.log_tail is not None
    there = targets.kept > 0
    assert (targets.certain < targets.kept)[there].any()
    logits = torch.from_numpy(np.concatenate(data.logprobs).astype(np.float32))
    random = torch.from_numpy(random_numbers(entry.entry.targets, 0, len(entry)))
    labels = torch.full((len(logits),), -1)
    drawn = reduce_varopt(logits, V, K, labels, -2000.0, sampling_of(entry.entry.targets, random, None))
    np.testing.assert_array_equal(targets.kept[there], drawn.kept.numpy()[there])
    np.testing.assert_allclose(targets.log_tail[there], drawn.log_tail.numpy()[there], atol=4e-4)
    same = [
        set(targets.token_ids[row, : targets.kept[row]]) == set(drawn.token_ids[row, : targets.kept[row]].tolist())
        for row in np.flatnonzero(there)
    ]
    assert np.mean(same) > 0.9  # the codes of the file move a draw at a border


def test_columns_beyond_the_vocabulary_leave_the_distribution(data: Known, tmp_path: Path) -> None:
    path = base_file(tmp_path / "base.bin", data, columns=V + 6)
    options = ("-k", K, "--encoding", "float32")
    padded = whole(imported(tmp_path, path, "llama-cpp", *options))
    plain = whole(imported(tmp_path, base_file(tmp_path / "b.bin", data), "llama-cpp", *options, out="o"))
    np.testing.assert_array_equal(padded.token_ids, plain.token_ids)
    np.testing.assert_allclose(padded.logprobs, plain.logprobs, atol=4e-4)


def test_damaged_files_and_other_tokenizers(data: Known, tmp_path: Path) -> None:
    refused(imports(tmp_path, base_file(tmp_path / "a.bin", data, drop=7), "llama-cpp"), "it was cut off")
    (tmp_path / "b.bin").write_bytes(b"_logits_\0\0")
    refused(imports(tmp_path, tmp_path / "b.bin", "llama-cpp"), "begins with _logits_")
    whole_file = base_file(tmp_path / "c.bin", data)
    larger = tokenizer_folder(tmp_path, V + 9)
    refused(imports(tmp_path, whole_file, "llama-cpp", "--tokenizer", larger), "over 97 ids", "has 106")
    refused(imports(tmp_path, whole_file, "llama-cpp", "--values", "logprobs"), "whole distributions")
    found = succeeded(in_process("logit-cache", "import", whole_file, "--guess"))
    assert found.stdout.startswith("llama-cpp: llama.cpp's base file")
