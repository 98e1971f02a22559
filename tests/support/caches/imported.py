"""What tests of imports share: known distributions, their tokens, and the check of an imported entry against them.

The distributions are float64 and dense. Each test writes its format's files from them by itself, and shares no code
with the importers. Documents are sampled from the distributions, so that labels are likely, as a teacher's are.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.caches.small import word_tokenizer
from support.commands import in_process, succeeded

from storage import LogitCache
from storage.cache.reader import TeacherTargets
from storage.cache.verify import verify
from storage.format.targets import SparseTargets

V, K = 97, 8


@dataclass
class Known:
    """Documents: tokens [L] of each, and log-probs float64 [L, V] whose row t is about token t + 1."""

    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]

    def top(self, number: int, k: int = K) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probs [L, k] of a document, most probable first."""
        order = np.argsort(-self.logprobs[number], axis=1, kind="stable")[:, :k]
        return order, np.take_along_axis(self.logprobs[number], order, axis=1)

    @property
    def starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.tokens)])[:-1]


def known(lengths: tuple[int, ...] = (23, 40, 9, 31), seed: int = 0, scale: float = 2.5) -> Known:
    rng = np.random.default_rng(seed)
    found = Known([], [])
    for length in lengths:
        logits = rng.normal(size=(length, V)) * scale
        logprobs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
        tokens = [int(rng.integers(2, V))]
        tokens += [int(rng.choice(V, p=np.exp(row))) for row in logprobs[:-1]]
        found.tokens.append(np.array(tokens))
        found.logprobs.append(logprobs)
    return found


def columns(data: Known, k: int = K, rows: int | None = -1) -> dict[str, list[Any]]:
    """The columns of a plain Parquet file: top-k log-probs after each token, but for the last one, or up to `rows`."""
    tops = [data.top(number, k) for number in range(len(data.tokens))]
    return {
        "input_ids": [tokens.tolist() for tokens in data.tokens],
        "token_ids": [ids[:rows].tolist() for ids, _ in tops],
        "logprobs": [values[:rows].tolist() for _, values in tops],
    }


def write(path: Path, found: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(found), path)
    return path


def tokenizer_folder(folder: Path, vocabulary_size: int = V) -> Path:
    path = folder / "tokenizer"
    path.mkdir(exist_ok=True)
    for name, data in word_tokenizer(vocabulary_size).items():
        (path / name).write_bytes(data)
    return path


def imports(
    folder: Path, source: Path, format: str, *options: object, out: str = "cache", name: str = "t"
) -> subprocess.CompletedProcess[str]:
    """`logit-cache import` into a new cache of the folder, with the tokenizer of `tokenizer_folder`."""
    tokenizer = ("--tokenizer", tokenizer_folder(folder)) if "--tokenizer" not in options else ()
    where = ("--out", folder / out, "--name", name)
    return in_process("logit-cache", "import", source, "--format", format, *where, *tokenizer, *options)


def imported(folder: Path, source: Path, format: str, *options: object, **names: str) -> TeacherTargets:
    """The entry that an import made, after a check of every byte."""
    succeeded(imports(folder, source, format, *options, **names))
    url = str(folder / names.get("out", "cache"))
    assert not verify(url, deep=True).problems
    return LogitCache.open(url).teacher(names.get("name", "t"))


def whole(entry: TeacherTargets) -> SparseTargets:
    return entry.read(0, len(entry))


def same_targets(
    entry: TeacherTargets,
    data: Known,
    rows: list[range] | None = None,
    k: int = K,
    atol: float = 2e-6,
    renormalised: bool = False,
) -> None:
    """Assert that the entry's rows are the `k` most probable ids of the known distributions, at the tokens `rows` of
    each document (all but the last by default), and that other positions have none.

    renormalised: log-probs are relative to the ids of the row, and nothing is known of the tail.
    """
    targets = whole(entry)
    rows = [range(len(tokens) - 1) for tokens in data.tokens] if rows is None else rows
    here = np.zeros(len(entry), dtype=bool)
    for number, start in enumerate(data.starts):
        ids, logprobs = data.top(number, k)
        tail = np.log(-np.expm1(np.logaddexp.reduce(logprobs, axis=1)))
        if renormalised:
            logprobs = logprobs - np.logaddexp.reduce(logprobs, axis=1)[:, None]
        for row in rows[number]:
            at = start + row
            here[at] = True
            assert targets.kept[at] == targets.certain[at] == k
            np.testing.assert_array_equal(targets.token_ids[at, :k], ids[row])
            np.testing.assert_allclose(targets.logprobs[at, :k], logprobs[row], atol=atol)
            if not renormalised:
                assert targets.log_tail is not None
                np.testing.assert_allclose(targets.log_tail[at], tail[row], atol=max(atol, 1e-4))
    np.testing.assert_array_equal(targets.kept > 0, here)
    assert (targets.log_tail is None) == renormalised
    tokens = LogitCache.open(entry.receipts.store.url).tokens.read(0, len(entry))
    np.testing.assert_array_equal(tokens, np.concatenate(data.tokens))
    np.testing.assert_array_equal(LogitCache.open(entry.receipts.store.url).document_starts, data.starts)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
