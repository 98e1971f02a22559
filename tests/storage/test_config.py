"""Job files: YAML scalars as people mean them, and errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from storage.config import build_config, parse_yaml, read_yaml
from storage.errors import InputError


class Job(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shard_tokens: int = 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E3", 1000.0),
        ("-0.5", -0.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("1e", "1e"),
        ("v1.5", "v1.5"),
        ("[1, 2e0]", [1, 2.0]),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_flags_override_the_file_and_dashes_are_underscores(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\nshard-tokens: 7\n")
    assert build_config(Job, str(path), {"name": None, "shard_tokens": None}, "test") == Job(name="a", shard_tokens=7)
    assert build_config(Job, str(path), {"name": "b", "shard_tokens": 9}, "test") == Job(name="b", shard_tokens=9)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n", ["mapping", "list"]),
        ("name: [\n", ["not valid YAML"]),
        ("name: a\nshard_token: 3\n", ["shard_token", "did you mean 'shard_tokens'"]),
        ("shard_tokens: x\nname: a\n", ["--shard-tokens", "'x'"]),
        ("shard_tokens: 1\n", ["--name is missing"]),
        ("name: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
    ],
)
def test_errors_name_the_field(tmp_path: Path, content: str, words: list[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        build_config(Job, str(path), {}, "test")
    for word in words:
        assert word in str(error.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml"):
        read_yaml(str(tmp_path / "none.yaml"))
