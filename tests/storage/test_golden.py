"""Golden bytes of format v1: a cache that was written once and must stay readable, to the same numbers.

`tests/golden/v1` is never regenerated. It also holds features that later versions write: sampled ids, pruned rows, an
ensemble, isolated documents, a loss mask, an entry that is not complete.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.commands import TESTS

from storage import LogitCache
from storage.errors import IncompleteCache

GOLDEN = TESTS / "golden" / "v1"
V, N, K = 50, 44, 4
POSITIONS = np.arange(N)
IDS = (POSITIONS[:, None] * 3 + np.arange(K) * 11) % V
LOGPROBS = -np.log(2.0) * (np.array([1, 3, 4, 5]) + (POSITIONS % 4)[:, None] * 0.25)
TAIL = np.log1p(-np.exp(LOGPROBS).sum(axis=1))
LABELS = -(0.5 + POSITIONS * 0.125)


@pytest.fixture(scope="module")
def cache() -> LogitCache:
    return LogitCache.open(str(GOLDEN))


def test_the_stream(cache: LogitCache) -> None:
    assert cache.tokens.read(0, N).tolist() == [(7 * position) % V for position in range(N)]
    assert cache.document_starts.tolist() == [0, 10, 29]
    assert cache.loss_mask is not None
    assert cache.loss_mask.read(0, N).tolist() == [position % 3 != 0 for position in range(N)]
    assert cache.tokenizer_files() == {"tokenizer.json": b'{"golden":"not a working tokenizer"}\n'}
    assert cache.teachers == ("codes", "exact", "incomplete", "sampled")


@pytest.mark.parametrize("name", ["codes", "exact"])
def test_top_k(cache: LogitCache, name: str) -> None:
    targets = cache.teacher(name)
    read = targets.read(0, N)
    exact = name == "exact"
    labels = LABELS.copy()
    labels[[N - 1, 9, 28] if exact else [N - 1]] = np.nan
    assert np.array_equal(read.token_ids, IDS)
    assert (read.kept == K).all()
    assert (read.certain == K).all()
    relative = 1e-6 if exact else 2**-13
    assert np.allclose(read.logprobs, LOGPROBS, rtol=1e-6, atol=0 if exact else 1 / 64 + 1e-5)
    assert np.allclose(read.logprobs[:, 0], LOGPROBS[:, 0], rtol=relative)
    assert np.allclose(read.log_tail, TAIL, rtol=relative)
    assert np.allclose(read.log_tail_half, TAIL + 1.5, rtol=2 * relative, atol=1e-4)
    assert np.allclose(read.entropy, 1 + POSITIONS * 0.0625, rtol=relative)
    assert np.allclose(read.label_logprob, labels, rtol=relative, equal_nan=True)
    assert targets.entry.windowing.isolate_documents == exact
    assert targets.statistics()[0] is not None


def test_the_exact_codes(cache: LogitCache) -> None:
    codes = cache.teacher("codes").stored(0, 4).arrays["logprob_codes"]
    # ln 2 · (2, 3, 4) in steps of 1/32 nat is 44.36, 66.54, 88.72: rounded sums, then their differences.
    assert codes.tolist() == [[0, 44, 23, 22]] * 4


def test_sampled_and_pruned_rows(cache: LogitCache) -> None:
    entry = cache.teacher("sampled").entry
    assert (entry.targets.method, entry.targets.seed, entry.targets.head_ids, entry.targets.top_p) == (
        "varopt", 7, 1, 0.95,
    )  # fmt: skip
    assert entry.teacher.combine == "logit-mean"
    assert [member.dtype for member in entry.teacher.members] == ["float32", "bfloat16"]
    read = cache.teacher("sampled").read(0, N)
    kept = 2 + POSITIONS % 3
    assert read.kept.tolist() == kept.tolist()
    assert read.certain.tolist() == np.minimum(kept, 1 + POSITIONS % 2).tolist()
    used = np.arange(K) < kept[:, None]
    assert np.array_equal(read.token_ids[used], IDS[used])
    assert (read.token_ids[~used] == 65_535).all()
    assert np.allclose(read.logprobs[used], LOGPROBS[used], atol=1 / 64 + 1e-5)
    assert np.isneginf(read.logprobs[~used]).all()


def test_an_incomplete_entry(cache: LogitCache) -> None:
    targets = cache.teacher("incomplete")
    assert targets.missing() == [(0, 16), (32, 44)]
    assert np.array_equal(targets.read(16, 32).token_ids, IDS[16:32])
    with pytest.raises(IncompleteCache):
        targets.read(15, 32)
