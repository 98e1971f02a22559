"""Golden bytes of both versions of an entry: caches that were written once and must stay readable, to the same numbers.

`tests/golden` is never regenerated. `v1` also holds features that later versions write: sampled ids, pruned rows, an
ensemble, isolated documents, a loss mask, an entry that is not complete; `v2` a token stream of version 2, a sampling
order, rows without targets, a tail that is not known.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from support.commands import TESTS

from storage import LogitCache
from storage.cache.verify import verify
from storage.errors import IncompleteCache

GOLDEN = TESTS / "golden"
V, N, K = 50, 44, 4
POSITIONS = np.arange(N)
IDS = (POSITIONS[:, None] * 3 + np.arange(K) * 11) % V
LOGPROBS = -np.log(2.0) * (np.array([1, 3, 4, 5]) + (POSITIONS % 4)[:, None] * 0.25)
TAIL = np.log1p(-np.exp(LOGPROBS).sum(axis=1))
LABELS = -(0.5 + POSITIONS * 0.125)


@functools.cache
def golden(version: str) -> LogitCache:
    return LogitCache.open(str(GOLDEN / version))


@pytest.mark.parametrize(
    ("version", "names"),
    [("v1", ("codes", "exact", "incomplete", "sampled")), ("v2", ("all", "exact", "imported", "lean"))],
)
def test_the_stream(version: str, names: tuple[str, ...]) -> None:
    cache = golden(version)
    assert cache.tokens.read(0, N).tolist() == [(7 * position) % V for position in range(N)]
    assert cache.document_starts.tolist() == [0, 10, 29]
    assert cache.loss_mask is not None
    assert cache.loss_mask.read(0, N).tolist() == [position % 3 != 0 for position in range(N)]
    assert cache.tokenizer_files() == {"tokenizer.json": b'{"golden":"not a working tokenizer"}\n'}
    assert cache.teachers == names
    assert (cache.document_sources is None) == (version == "v1")
    assert verify(str(GOLDEN / version), deep=True).problems == []


@pytest.mark.parametrize("name", ["codes", "exact"])
def test_top_k(name: str) -> None:
    targets = golden("v1").teacher(name)
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


def test_the_exact_codes() -> None:
    codes = golden("v1").teacher("codes").stored(0, 4).arrays["logprob_codes"]
    # ln 2 · (2, 3, 4) in steps of 1/32 nat is 44.36, 66.54, 88.72: rounded sums, then their differences.
    assert codes.tolist() == [[0, 44, 23, 22]] * 4


def test_sampled_and_pruned_rows() -> None:
    entry = golden("v1").teacher("sampled").entry
    assert (entry.targets.method, entry.targets.seed, entry.targets.head_ids, entry.targets.top_p) == (
        "varopt", 7, 1, 0.95,
    )  # fmt: skip
    assert entry.teacher.combine == "logit-mean"
    assert [member.dtype for member in entry.teacher.members] == ["float32", "bfloat16"]
    read = golden("v1").teacher("sampled").read(0, N)
    kept = 2 + POSITIONS % 3
    assert read.kept.tolist() == kept.tolist()
    assert read.certain.tolist() == np.minimum(kept, 1 + POSITIONS % 2).tolist()
    used = np.arange(K) < kept[:, None]
    assert np.array_equal(read.token_ids[used], IDS[used])
    assert (read.token_ids[~used] == 65_535).all()
    assert np.allclose(read.logprobs[used], LOGPROBS[used], atol=1 / 64 + 1e-5)
    assert np.isneginf(read.logprobs[~used]).all()


def test_an_incomplete_entry() -> None:
    targets = golden("v1").teacher("incomplete")
    assert targets.missing() == [(0, 16), (32, 44)]
    assert np.array_equal(targets.read(16, 32).token_ids, IDS[16:32])
    with pytest.raises(IncompleteCache):
        targets.read(15, 32)


# The first four rows of the entry `all` of version 2, whose ids were sampled for temperature 2.
ARRAYS = {
    "ids": [[0, 11, 11, 11], [3, 14, 25, 11], [6, 17, 11, 11], [9, 20, 31, 11]],
    "kept": [4, 4, 4, 4],
    "certain": [1, 2, 1, 2],
    "certain_codes": [[0, 0, 0, 0], [0, 44, 0, 0], [0, 0, 0, 0], [0, 44, 0, 0]],
    "sampled_codes": [[0, 3, 4, 6], [0, 0, 6, 7], [0, 5, 6, 8], [0, 0, 8, 10]],
    "mass_code": [0, -3, 19, 17],
    "half_tail_code": [207, 193, 272, 265],
    "label_code": [-128, -160, -192, -224],
    "entropy_code": [256, 272, 288, 304],
}


def test_the_codes_of_version_2() -> None:
    stored = golden("v2").teacher("all").stored(0, 5).arrays
    assert {name: values[:4].tolist() for name, values in stored.items()} == ARRAYS
    without = {name: values[4].tolist() for name, values in stored.items() if values.ndim == 1}
    values = ("mass_code", "half_tail_code", "label_code", "entropy_code")
    assert without == {"kept": 0, "certain": 0, **dict.fromkeys(values, -(2**15))}


@pytest.mark.parametrize("name", ["all", "lean", "exact", "imported"])
def test_version_2(name: str) -> None:
    teacher = golden("v2").teacher(name)
    read, sampled = teacher.read(0, N), name in ("all", "lean")
    certain = 1 + POSITIONS % 2 if sampled else np.full(N, K)
    there = {"all": POSITIONS % 5 != 4, "imported": POSITIONS % 3 != 0}.get(name, np.ones(N, dtype=bool))
    assert read.kept.tolist() == np.where(there, K, 0).tolist()
    assert read.certain.tolist() == np.where(there, certain, 0).tolist()
    heads = np.arange(K) < certain[:, None]
    assert np.array_equal(read.token_ids[there & (certain == K)], IDS[there & (certain == K)])
    assert np.array_equal(np.sort(read.token_ids[there]), np.sort(IDS[there]))
    expected = LOGPROBS - (np.log(np.exp(LOGPROBS).sum(axis=1, keepdims=True)) if name == "imported" else 0)
    shown = heads & there[:, None]
    assert np.abs(read.logprobs - expected)[shown].max() <= (1e-6 if name == "exact" else 1.5 / 32 + 1e-6)
    tail = np.log1p(-np.where(heads, np.exp(LOGPROBS), 0).sum(axis=1))
    if name == "imported":
        assert read.log_tail is None
    else:
        assert np.allclose(read.log_tail[there], tail[there], rtol=0, atol=1e-6 if name == "exact" else 1 / 64 + 1e-6)
    if name in ("all", "exact"):
        labels = LABELS.copy()
        labels[[N - 1, 9, 28] if name == "exact" else [N - 1]] = np.nan
        error = 1e-6 if name == "exact" else 1 / 512 + 1e-6
        for found, given in (
            (read.log_tail_half, tail + 1.5), (read.entropy, 1 + POSITIONS * 0.0625), (read.label_logprob, labels),
        ):  # fmt: skip
            assert np.allclose(found[there], given[there], rtol=0, atol=error, equal_nan=True)
    order = teacher.sampling_order()
    assert order is None if name != "lean" else np.array_equal(order, (np.arange(V) * 7 + 3) % V)
