"""A cache with one stream and two teacher entries, as codes and exact, which several test files read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.caches.small import make_corpus, make_entry, random_stream, write_entry
from support.caches.two_entries import K, N, Stream, V


@pytest.fixture(scope="module")
def stream() -> Stream:
    return random_stream(V, N, K)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, stream: Stream) -> Path:
    path = tmp_path_factory.mktemp("original") / "cache"
    record = make_corpus(str(path), stream[0], V)
    write_entry(path, "codes", make_entry(record, K, shard_tokens=256, chunk_tokens=64), stream[1])
    write_entry(path, "exact", make_entry(record, K, encoding="float32", shard_tokens=256, chunk_tokens=64), stream[1])
    return path


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "cache"))
