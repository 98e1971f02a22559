"""Caches are found below any URL that can be listed, and what is wrong with one does not hide the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest
from support.caches.two_entries import N, V
from support.commands import Run, refused
from support.servers.s3 import Bucket

from storage import LogitCache
from storage.cache.listing import caches_below
from storage.errors import CacheNotFound, InputError
from storage.stores import open_store


@pytest.fixture
def tree(cache: Path, tmp_path: Path) -> Path:
    """Caches in folders of any name, beside damaged ones, hidden ones and links."""
    top = tmp_path / "tree"
    for name in (
        "whole",
        "Some Runs/a cache é+%20",
        "damaged/record",
        "damaged/entry",
        "damaged/unfinished",
        ".hidden/x",
    ):
        shutil.copytree(cache, top / name)
    (top / "damaged/record/zarr.json").write_text("{")
    (top / "damaged/entry/teachers/codes/zarr.json").write_text("{}")
    (top / "damaged/unfinished/zarr.json").unlink()
    (top / "damaged/entry/teachers/exact/receipts/index.json").unlink(missing_ok=True)
    (top / "damaged/entry/teachers/exact/receipts/00000001.json").unlink()
    (top / "no cache").mkdir()
    (top / "no cache/notes.txt").write_text("nothing")
    return top


@pytest.fixture(params=["disk", "s3", "memory"])
def url(request: pytest.FixtureRequest, tree: Path) -> str:
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("moto_bucket")
        return bucket.upload(tree, "runs")
    if request.param == "memory":
        fsspec.filesystem("memory").put(f"{tree}/", "/listed", recursive=True)
        return "memory://listed"
    (tree / "again").symlink_to(tree)
    (tree / "linked").symlink_to(tree / "whole")
    return str(tree)


def test_every_cache_below_a_url(url: str) -> None:
    found = {cache.url.removeprefix(open_store(url).url + "/"): cache for cache in caches_below(url)}
    expected = ["Some Runs/a cache é+%20", "damaged/entry", "damaged/record", "damaged/unfinished", "whole"]
    assert list(found) == expected
    entry = LogitCache.open(f"{url}/whole").teacher("codes")
    for name in ("whole", expected[0]):
        assert (found[name].tokens, found[name].tokens_missing, found[name].vocabulary_size) == (N, 0, V)
        assert [item.name for item in found[name].entries] == ["codes", "exact"]
        assert (found[name].entries[0].positions, found[name].entries[0].bytes) == (N, entry.stored_bytes())
    codes, exact = found["damaged/entry"].entries
    assert codes.positions is None
    assert "not one of logit-cache" in str(codes.error)
    assert exact.positions == N - 256
    assert "not valid JSON" in str(found["damaged/record"].error)
    assert "no zarr.json" in str(found["damaged/unfinished"].error)
    assert [cache.url for cache in caches_below(f"{url}/whole")] == [found["whole"].url]


def test_where_nothing_can_be_listed(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound, match="no such folder"):
        list(caches_below(str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="cannot list"):
        open_store("https://example.invalid/runs").folders("")


def test_the_command(tree: Path, run: Run) -> None:
    done = run("logit-cache", "list", tree)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"{tree}/whole: {N:,} tokens, vocabulary of {V} ids, tokens included" in lines
    (size,) = {line.rpartition("complete  ")[2] for line in lines if line.startswith("  codes  complete")}
    assert size.endswith("B")
    assert f"  exact  {100 * (N - 256) / N - 0.05:.1f} %" in done.stdout
    assert sum("ERROR" in line for line in lines) == 3
    described = json.loads(run("logit-cache", "list", tree, "--json").stdout)
    assert [item["url"] for item in described] == [cache.url for cache in caches_below(str(tree))]
    assert run("logit-cache", "list", tree / "no cache").stdout == f"{tree / 'no cache'}: no cache below it\n"
    refused(run("logit-cache", "list", tree / "nowhere"), "no such folder")
