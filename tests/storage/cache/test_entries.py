"""Entries removed and renamed: all of one and nothing else, and sound however often it is interrupted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run, refused
from support.servers.s3 import Bucket

from storage import LogitCache
from storage.cache.entries import remove_entry, rename_entry
from storage.cache.leases import leases_in
from storage.cache.verify import verify
from storage.errors import InputError
from storage.stores import open_store
from storage.stores.base import Store


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, cache: Path) -> str:
    """A cache of the entries `codes` and `exact`, which a killed worker has left something in."""
    (cache / "teachers/codes/receipts/00000001.claim").write_bytes(b"")
    if request.param == "disk":
        return str(cache)
    bucket: Bucket = request.getfixturevalue("moto_bucket")
    return bucket.upload(cache, "cache")


def below(url: str, folder: str) -> dict[str, bytes]:
    store = open_store(url)
    return {key.removeprefix(folder): store.read(key) for key in store.walk(folder) if not key.endswith(".claim")}


def sound(url: str) -> bool:
    return verify(url, deep=True).problems == []


def test_an_entry_is_removed_and_nothing_else(url: str) -> None:
    before = below(url, "")
    assert remove_entry(url, "codes") > 0
    assert below(url, "") == {key: data for key, data in before.items() if not key.startswith("teachers/codes/")}
    assert LogitCache.open(url).teachers == ("exact",)
    assert sound(url)


def test_an_entry_under_another_name_is_the_same_entry(url: str) -> None:
    before = below(url, "teachers/codes")
    rename_entry(url, "codes", "receipts")
    assert LogitCache.open(url).teachers == ("exact", "receipts")
    assert below(url, "teachers/receipts") == before
    assert open_store(url).walk("teachers/codes") == {}
    assert sound(url)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("act", [lambda url: remove_entry(url, "codes"), lambda url: rename_entry(url, "codes", "k33")])
def test_whatever_is_interrupted_is_sound_and_can_be_repeated(
    act: Callable[[str], Any], moto_bucket: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at more and more of its steps, one after the other; objects and receipts lie in the order of writing."""
    monkeypatch.setattr("storage.cache.entries._AT_ONCE", 1)
    url = moto_bucket.upload(cache, "cache")
    expected = below(url, "teachers/codes")
    store: Any = type(open_store(url))
    for steps in itertools.count(1, 11):
        left = steps

        def dies(method: Any) -> Any:
            def step(self: Store, *arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return method(self, *arguments)

            return step

        with monkeypatch.context() as patched:
            patched.setattr(store, "remove", dies(store.remove))
            patched.setattr(store, "publish", dies(store.publish))
            try:
                act(url)
                break
            except Killed:
                pass
        assert verify(url, deep=True).problems == [], steps
        for name in LogitCache.open(url).teachers:
            LogitCache.open(url).teacher(name).missing()
    assert steps > 11
    assert "codes" not in LogitCache.open(url).teachers
    assert below(url, "teachers/k33") in ({}, expected)
    assert sound(url)


def test_what_cannot_be_done_is_refused(cache: Path) -> None:
    leases = leases_in(open_store(str(cache)), "teachers/codes/receipts")
    assert leases.take(1)
    for act, words in (
        (lambda: remove_entry(str(cache), "codes"), "a worker is at work on codes (shard 1)"),
        (lambda: rename_entry(str(cache), "codes", "k33"), "a worker is at work on codes (shard 1)"),
        (lambda: remove_entry(str(cache), "code"), "no entry 'code'; it has codes, exact"),
        (lambda: remove_entry(str(cache), "../x"), "no entry '../x'"),
        (lambda: rename_entry(str(cache), "exact", "codes"), "codes is another entry"),
        (lambda: rename_entry(str(cache), "exact", "exact"), "exact is another entry"),
        (lambda: rename_entry(str(cache), "exact", "A b"), "'A b' is no name of an entry"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            act()
    leases.release(1)
    assert LogitCache.open(str(cache)).teachers == ("codes", "exact")


def test_the_commands(cache: Path, run: Run) -> None:
    refused(run("logit-cache", "remove", cache, "codes"), "give --yes")
    done = run("logit-cache", "rename", cache, "codes", "k33")
    assert done.stdout == f"{cache}: codes is now k33\n"
    done = run("logit-cache", "remove", cache, "k33", "--yes")
    assert re.fullmatch(rf"{re.escape(str(cache))}: k33 is removed, [\d.]+ kB\n", done.stdout), done.stderr
    refused(run("logit-cache", "remove", cache, "k33", "--yes"), "no entry 'k33'; it has exact")
