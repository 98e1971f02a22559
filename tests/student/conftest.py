"""What the tests of training, of sweeps and of the loss share."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches and model configurations of `make_world`. To be read only."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    return folder
