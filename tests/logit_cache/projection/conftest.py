"""The caches of `support.caches.projection`, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.caches.projection import write_cache, write_entries


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches `gpt2`, `llama3` and `llama2` of one text; that of gpt2 has entries."""
    folder = tmp_path_factory.mktemp("projection")
    for kind in ("gpt2", "llama3", "llama2"):
        write_cache(folder, kind)
    write_entries(folder / "gpt2")
    return folder


@pytest.fixture
def caches(world: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of them, to write to."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(world / kind, tmp_path / kind))

    return copy
