"""Pushing a cache to the hub and reading it there, by the real client libraries against an imitation of the hub.

The hub is `tests/support/servers/fake_hub.py`, over HTTP; every push is a process of its own with nothing in it
replaced. Not shown here is the hub's chunk store (Xet), to which the real hub directs large files.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.commands import environment, refused, succeeded
from support.jobs import files
from support.servers.fake_hub import TOKEN, FakeHub

from logit_cache.sharing.card import card_text
from logit_cache.sharing.hub import parse_hub_url, push_to_hub
from storage import LogitCache
from storage.cache.verify import verify
from storage.errors import CacheNotFound, InputError

V, N, K = 61, 600, 4
URL = "hf://datasets/lab/cache"
PUSH = """
import sys
from pathlib import Path
from logit_cache.sharing.hub import push_to_hub
from storage.errors import one_line_errors
with one_line_errors():
    push_to_hub(Path(sys.argv[1]), sys.argv[2], lambda size: print(size))
"""
COMMAND = """
import sys
from logit_cache.cli.main import main
main(sys.argv[1:])
"""
READ = """
import sys
from storage import LogitCache
cache = LogitCache.open(sys.argv[1])
targets = cache.teacher("a").read(100, 110)
print(cache.record_sha256, targets.token_ids.tolist(), cache.tokens.read(0, 5).tolist())
"""
VERIFY = """
import sys
from storage.cache.verify import verify
found = verify(sys.argv[1])
print(found.sound, found.problems, found.leftovers, found.missing)
"""


def write_targets(path: Path, name: str, seed: int) -> None:
    record = LogitCache.open(str(path)).record
    logits = np.random.default_rng(seed).normal(size=(N, V)) * 3
    labels = np.append(np.arange(1, N) % V, -1)
    write_entry(path, name, make_entry(record, K, shard_tokens=256, chunk_tokens=64), dense_targets(logits, K, labels))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    make_corpus(str(path), np.arange(N).astype(np.uint16) % V, V)
    write_targets(path, "a", 0)
    (path / "README.md").write_text(card_text(LogitCache.open(str(path)), license="mit"))
    (path / "model.sig").write_text("{}")
    return path


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub.serving() as served:
        yield served


@pytest.fixture
def on_hub(hub: FakeHub, tmp_path: Path) -> Any:
    """Runs a Python program with that hub in place of the real one."""

    def call(program: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        settings = {
            **environment(),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": TOKEN,
            "LOGIT_CACHE_LOCAL_DIR": str(tmp_path / "local"),
            **variables,
        }
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            capture_output=True, text=True, env=settings, timeout=120, check=False,
        )  # fmt: skip

    return call


def pushed(hub: FakeHub, revision: str = "main") -> dict[str, bytes]:
    return {key: data for key, data in hub.files["lab/cache"][revision].items() if key != ".gitattributes"}


@pytest.mark.parametrize("xet", [True, False], ids=["pipeline", "lfs"])
def test_a_pushed_cache_is_the_cache(hub: FakeHub, on_hub: Any, cache: Path, xet: bool) -> None:
    hub.lfs = not xet
    before = files(cache)
    done = succeeded(on_hub(PUSH, cache, URL, **({} if xet else {"HF_HUB_DISABLE_XET": "1"})))
    assert pushed(hub) == before
    assert files(cache) == before, "the folder is left as it was"
    assert sum(map(int, done.stdout.split())) == sum(map(len, before.values()))
    assert hub.private == {"lab/cache": True}
    if not xet:
        objects = {hashlib.sha256(before[key]).hexdigest() for key in before if "/c/" in key}
        assert set(hub.uploads) == objects
    assert TOKEN not in done.stdout + done.stderr


def test_a_pushed_cache_reads_and_verifies(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    assert on_hub(PUSH, cache, URL).returncode == 0
    there, here = on_hub(READ, URL), on_hub(READ, cache)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout
    assert verify(str(cache)).sound
    there = on_hub(VERIFY, URL)
    assert there.stdout == "True [] [] {}\n", there.stderr


def test_the_command_pushes_with_a_card_and_leaves_nothing_behind(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    before = files(cache)
    done = succeeded(on_hub(COMMAND, "push", cache, URL, "--teacher", "a", "--license", "cc-by-4.0"))
    card = pushed(hub)["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    unlisted = {"README.md", "model.sig"}
    assert {key: data for key, data in pushed(hub).items() if key not in unlisted} == {
        key: data for key, data in before.items() if key not in unlisted
    }
    assert files(cache) == before
    assert [path.name for path in cache.parent.iterdir() if path.name.startswith(".")] == []
    assert TOKEN not in done.stdout + done.stderr + card


def test_objects_come_before_receipts_and_the_root_record_last(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    assert on_hub(PUSH, cache, URL).returncode == 0
    order = [stage(key) for _, _, keys in hub.commits for key in [keys] if key]
    assert [kinds for kinds in order if len(kinds) > 1] == [], "no commit mixes the stages"
    assert [min(kinds) for kinds in order] == sorted(min(kinds) for kinds in order)
    assert hub.commits[-1][2] == ["model.sig", "zarr.json"]


def stage(keys: list[str]) -> set[int]:
    return {2 if key in ("zarr.json", "model.sig") else 1 if "receipts/" in key else 0 for key in keys}


def test_an_interrupted_push_shows_no_cache_and_resumes(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    """Refused at the second commit, the one of the receipts."""
    hub.refuse = lambda method, path: 403 if "/commit/" in path and len(hub.commits) == 1 else None
    done = on_hub(PUSH, cache, URL)
    refused(done, URL, "the hub refused")
    assert "zarr.json" not in pushed(hub)
    assert not any("receipts/" in key for key in pushed(hub))
    assert on_hub(READ, URL).returncode != 0
    sent = len(hub.commits)
    hub.refuse = lambda method, path: None
    assert on_hub(PUSH, cache, URL).returncode == 0
    assert pushed(hub) == files(cache)
    again = [key for _, _, keys in hub.commits[sent:] for key in keys]
    assert stage(again) == {1, 2}, "files that were committed are not committed again"


def test_a_second_entry_follows_and_nothing_else_is_sent_again(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    assert on_hub(PUSH, cache, URL).returncode == 0
    sent = len(hub.commits)
    write_targets(cache, "b", 1)
    assert on_hub(PUSH, cache, URL).returncode == 0
    assert pushed(hub) == files(cache)
    again = [key for _, _, keys in hub.commits[sent:] for key in keys]
    assert again
    assert all(key.startswith("teachers/b/") for key in again)
    sent = len(hub.commits)
    assert on_hub(PUSH, cache, URL).returncode == 0
    assert len(hub.commits) == sent


def test_a_revision_is_a_branch_that_is_created_if_needed(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    for _ in range(2):
        assert on_hub(PUSH, cache, f"{URL}@k-64").returncode == 0
    assert pushed(hub, "k-64") == files(cache)
    assert pushed(hub) == {}
    assert on_hub(READ, f"{URL}@k-64").stdout == on_hub(READ, cache).stdout


def test_a_wrong_token_is_refused_and_not_shown(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    wrong = "hf_not-this-one"
    done = on_hub(PUSH, cache, URL, HF_TOKEN=wrong)
    refused(done, URL, "the hub refused", "hf auth login")
    assert wrong not in done.stderr
    assert hub.files == {}


def test_a_hub_that_is_not_there_is_one_clear_error(on_hub: Any, cache: Path) -> None:
    done = on_hub(PUSH, cache, URL, HF_ENDPOINT="http://127.0.0.1:9")
    refused(done, URL, "not everything was uploaded", "run the command again")


def test_a_card_that_the_hub_does_not_take_is_refused_first(hub: FakeHub, on_hub: Any, cache: Path) -> None:
    (cache / "README.md").write_text("---\njust words\n---\n")
    refused(on_hub(PUSH, cache, URL), URL, "Invalid metadata in README.md")
    assert pushed(hub) == {}


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("hf://datasets/lab/cache", ("lab/cache", None)),
        ("hf://datasets/lab/cache/", ("lab/cache", None)),
        ("hf://datasets/Lab-1/c.a_che@v1", ("Lab-1/c.a_che", "v1")),
        ("hf://datasets/lab/cache@refs%2Fpr%2F3", ("lab/cache", "refs/pr/3")),
        ("hf://datasets/lab/cache@refs/pr/3", ("lab/cache", "refs/pr/3")),
    ],
)
def test_urls_of_data_sets(url: str, found: tuple[str, str | None]) -> None:
    assert parse_hub_url(url) == found


@pytest.mark.parametrize(
    "url",
    ["hf://lab/cache", "hf://datasets/lab", "hf://datasets/lab/cache/folder", "hf://datasets/lab/cache@", "s3://a/b"],
)
def test_urls_of_anything_else_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hf://datasets/ORG/NAME"):
        push_to_hub(tmp_path, url)


def test_a_folder_without_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound, match=r"no zarr\.json"):
        push_to_hub(tmp_path, URL)
