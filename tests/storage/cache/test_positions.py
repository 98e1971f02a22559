"""Positions of documents and of a loss mask, against plain NumPy over whole arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.caches.small import make_corpus

from storage import LogitCache
from storage.cache import positions as chosen
from storage.cache.positions import Positions, in_documents
from storage.cache.verify import verify
from storage.errors import CorruptCache, InputError

N = 101


@pytest.mark.parametrize("seed", range(4))
def test_positions_of_chosen_documents(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "_BLOCK", 16)
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.sort(rng.choice(np.arange(1, N), 12, replace=False))]).astype(np.uint64)
    documents, mask = rng.random(13) < 0.5, rng.random(N) < 0.7
    whole = documents[np.searchsorted(starts, np.arange(N), side="right") - 1] & mask
    found = Positions(N, [in_documents(starts, documents), lambda start, stop: mask[start:stop]])
    for start in (0, *starts[1:4].astype(int).tolist(), 50, N):
        for stop in (start, min(start + 1, N), (start + N) // 2, N):
            assert found.read(start, stop).tolist() == whole[start:stop].tolist()
    edges = rng.integers(0, N + 1, (3, 5))
    assert np.array_equal(found.count_before(edges), np.concatenate([[0], np.cumsum(whole)])[edges])
    assert np.array_equal(Positions(N, []).count_before(edges), edges)


def test_sources_are_named_or_refused(tmp_path: Path) -> None:
    tokens, starts = np.zeros(9, dtype=np.uint16), np.array([0, 2, 5])
    make_corpus(str(tmp_path / "named"), tokens, 7, starts, document_sources=("web", "math", "web"))
    cache = LogitCache.open(str(tmp_path / "named"))
    assert cache.positions(trained=True, sources=["web"]).read(0, 9).tolist() == [True] * 2 + [False] * 3 + [True] * 4
    with pytest.raises(InputError, match=r"no document is from the source 'code'; there is: 'math', 'web'$"):
        cache.positions(trained=False, sources=["web", "code"])
    make_corpus(str(tmp_path / "old"), tokens, 7, starts)
    with pytest.raises(InputError, match="does not say where its documents are from"):
        LogitCache.open(str(tmp_path / "old")).positions(trained=False, sources=["made-up"])


def test_a_flipped_bit_of_the_sources_is_found(tmp_path: Path) -> None:
    starts = np.array([0, 2, 5])
    make_corpus(str(tmp_path), np.zeros(9, dtype=np.uint16), 7, starts, document_sources=("web", "math", "web"))
    path = tmp_path / "document_sources/c/0"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CorruptCache):
            LogitCache.open(str(tmp_path)).positions(trained=False, sources=["web"])
        assert any("document_sources" in problem for problem in verify(tmp_path, deep=True).problems)
