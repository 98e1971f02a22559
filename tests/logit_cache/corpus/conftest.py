"""What the tests of token streams share."""

from __future__ import annotations

import pytest
from support.models.saved import tiny_tokenizer


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a byte-level tokenizer that loses nothing."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_tokenizer("gpt2").save_pretrained(folder)
    return str(folder)
