"""Paths and URLs as people write them: which folder they name, or one line that says why none."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from support.caches.small import make_corpus

from storage import LogitCache
from storage.cache.verify import verify
from storage.errors import InputError
from storage.files import local_path
from storage.stores import open_store
from storage.transfer.copy import CopyJob, prepare
from student import DistillationWindows


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home folder and the current one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("~/run/cache", "HOME/run/cache"),
        ("~", "HOME"),
        (PurePosixPath("~/run"), "HOME/run"),
        (PurePosixPath("run/cache"), "HERE/run/cache"),
        ("file:///a/my%20cache", "/a/my cache"),
        ("file:///a/caf%C3%A9%23%3F%25", "/a/café#?%"),
        ("file:///a/b#c?d", "/a/b#c?d"),
        ("file:///a/100%", "/a/100%"),
        ("file://localhost/a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("FILE:///a/b", "/a/b"),
        ("/a/my%20cache", "/a/my%20cache"),
        ("my cache#1?a:b", "HERE/my cache#1?a:b"),
        ("a~/~b", "HERE/a~/~b"),
        ("./~", "HERE/~"),
        ("./C:\\caches", "HERE/C:\\caches"),
        ("./s3:/bucket", "HERE/s3:/bucket"),
    ],
)
def test_the_folder_that_is_meant(home: Path, url: Any, folder: str) -> None:
    expected = folder.replace("HOME", str(home)).replace("HERE", os.getcwd())
    assert str(open_store(url).local_path) == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file://host/a", "file:///absolute/path"),
        ("file:relative", "file:///absolute/path"),
        ("file://relative", "file:///absolute/path"),
        ("file:///a%00b", "null character"),
        ("a\0b", "null character"),
        ("C:\\caches\\a", r"\./C:"),
        ("~no-such-user-9/a", "no home folder"),
        (PurePosixPath("s3://bucket/cache"), "s3://"),
        ("hf:/datasets/a/b", "hf://"),
        ("", "not a location of a cache"),
        ("memory://a::memory://b", "not a location of a cache"),
        ("nonsense://x", "nonsense"),
    ],
)
def test_what_names_no_folder_is_one_line(home: Path, url: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        open_store(url)
    assert "\n" not in str(raised.value)


def test_schemes_are_read_in_either_case() -> None:
    assert open_store("MEMORY://a/b").url == open_store("memory://a/b").url


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, a number for a user has neither HOME nor a line in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])
    with pytest.raises(InputError, match="no home folder"):
        local_path("~/cache")


def test_any_path_is_taken_where_a_url_is(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "my cache"
    tokens = np.arange(40, dtype=np.uint16)
    make_corpus(path, tokens, 41)  # type: ignore[arg-type]
    for url in (path, PurePosixPath(path), str(path), path.as_uri()):
        assert np.array_equal(LogitCache.open(url).tokens.read(0, 40), tokens)
        assert verify(url).sound
        assert len(DistillationWindows(url, [], window_tokens=8)) == 5
    with prepare(CopyJob(source=path, target=tmp_path / "copy")) as transfer:
        assert transfer.contents.record == LogitCache.open(path).record
    LogitCache.open(path).save_tokenizer("~/tokenizer")
    assert (home / "tokenizer").is_dir()
