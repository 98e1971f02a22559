"""`verify` names every damaged object and every leftover, and `--repair` makes a cache whole again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.known import contents
from support.caches.small import write_entry
from support.caches.two_entries import K, N, Stream
from support.commands import Run

import storage.cache.verify
import storage.format.shard
from storage import LogitCache
from storage.cache.verify import verify
from storage.cache.zarr_store import decode_with_zarr
from storage.errors import MissingObject


def complete(cache: Path, stream: Stream) -> None:
    """What the command does that made the entry."""
    write_entry(cache, "codes", LogitCache.open(str(cache)).teacher("codes").entry, stream[1])


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_cache_is_sound(cache: Path, deep: bool) -> None:
    before = contents(cache)
    seen: list[int] = []
    found = verify(str(cache), deep=deep, progress=seen.append)
    assert (found.sound, found.problems, found.leftovers, found.missing, found.repaired) == (True, [], [], {}, [])
    objects = [key for key in before if "/c/" in key or key.startswith("tokenizer/")]
    assert found.objects == len(objects)
    assert found.bytes == sum(len(before[key]) for key in objects)
    assert sum(seen) == sum(len(before[key]) for key in objects if not key.startswith("tokenizer/"))
    assert contents(cache) == before


def test_every_file_that_is_missing_is_named(cache: Path) -> None:
    for key in contents(cache):
        data = (cache / key).read_bytes()
        # Without an index an entry is not complete, and without the root record not there, rather than damaged.
        if key == "zarr.json" or key.endswith("/index.json"):
            continue
        (cache / key).unlink()
        found = verify(str(cache))
        assert not found.sound, key
        assert any(str(cache / key) in problem or key.split("/")[0] in problem for problem in found.problems), key
        (cache / key).write_bytes(data)


def test_swapped_objects_are_found_by_a_quick_look(cache: Path) -> None:
    a, b = cache / "teachers/codes/token_ids/c/0/0", cache / "teachers/codes/token_ids/c/1/0"
    a_bytes, b_bytes = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_bytes)
    b.write_bytes(a_bytes)
    found = verify(str(cache))
    assert sorted(problem.split(":")[0] for problem in found.problems) == [str(a), str(b)]


def test_leftovers_are_reported_and_never_touched_without_repair(cache: Path) -> None:
    strays = [
        cache / name for name in ("teachers/codes/kept/c/0.4711-ab.partial", "teachers/codes/kept/c/99", "notes.txt")
    ]
    for stray in strays:
        stray.write_bytes(b"x")
    found = verify(str(cache))
    assert found.sound
    assert sorted(found.leftovers) == sorted(map(str, strays))
    assert all(stray.exists() for stray in strays)
    assert sorted(verify(str(cache), repair=True).repaired) == sorted(map(str, strays))
    assert verify(str(cache)).leftovers == []


def test_repair_leaves_alone_a_shard_that_a_worker_commits_meanwhile(
    cache: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects without a receipt when they are listed and checked, with one when they would be removed."""
    entry = cache / "teachers/codes"
    (entry / "receipts/index.json").unlink()
    (entry / "receipts/00000002.json").unlink()
    check = storage.cache.verify._Check.check_group

    def then_commit(self: Any, group: Any, pool: Any) -> None:
        check(self, group, pool)
        if group.name == "teachers/codes":
            complete(cache, stream)

    monkeypatch.setattr(storage.cache.verify._Check, "check_group", then_commit)
    found = verify(str(cache), repair=True)
    assert str(entry / "token_ids/c/2/0") in found.leftovers
    assert found.repaired == []
    monkeypatch.undo()
    after = verify(str(cache), deep=True)
    assert (after.sound, after.missing, after.leftovers) == (True, {}, [])


@pytest.mark.parametrize(
    "victim", ["token_ids/c/2/0", "entropy/c/0", "receipts/00000003.json", "receipts/index.json", "kept/c/3"]
)
@pytest.mark.parametrize("fault", ["emptied", "flipped", "deleted"])
def test_repair_and_the_same_command_make_it_whole(
    original: Path, cache: Path, stream: Stream, victim: str, fault: str
) -> None:
    path = cache / "teachers/codes" / victim
    if fault == "deleted":
        path.unlink()
    elif fault == "emptied":
        path.write_bytes(b"")
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(bytes(data))
    verify(str(cache), deep=True, repair=True)
    complete(cache, stream)
    found = verify(str(cache), deep=True)
    assert found.sound, found.problems
    assert (found.missing, found.leftovers) == ({}, [])
    arrays = {key: data for key, data in contents(cache).items() if "receipts/" not in key}
    assert arrays == {key: data for key, data in contents(original).items() if "receipts/" not in key}
    assert np.array_equal(LogitCache.open(str(cache)).teacher("codes").read(0, N).token_ids, stream[1].token_ids)


def test_the_command(cache: Path, run: Run) -> None:
    done = run("logit-cache", "verify", cache, "--deep", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sound"]
    (cache / "teachers/codes/kept/c/1").write_bytes(b"")
    done = run("logit-cache", "verify", cache)
    assert done.returncode == 1
    assert str(cache / "teachers/codes/kept/c/1") in done.stdout
    assert run("logit-cache", "verify", cache, "--repair").returncode == 1
    after = json.loads(run("logit-cache", "verify", cache, "--json").stdout)
    assert after["sound"]
    assert after["missing"] == {"teachers/codes": [[256, 512]]}
    assert run("logit-cache", "verify", cache / "nowhere").returncode == 2


def test_words_say_what_was_checked_and_repair_checks_all(cache: Path, run: Run) -> None:
    """A flipped chunk is seen by whoever reads it: a quick look does not say that it is sound, and a repair reads."""
    path = cache / "teachers/codes/token_ids/c/1/0"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))
    quick = run("logit-cache", "verify", cache)
    assert quick.returncode == 0
    assert "sound" not in quick.stdout
    assert "--deep checks every byte" in quick.stdout
    repaired = run("logit-cache", "verify", cache, "--repair")
    assert repaired.returncode == 1
    assert f"damaged: {path}" in repaired.stdout
    assert "1 damaged of" in repaired.stdout.splitlines()[-1]
    assert run("logit-cache", "verify", cache, "--deep").returncode == 0, "its receipt is gone, and it is missing"


def off_by_one(values: np.ndarray) -> np.ndarray:
    return values + np.ones(1, dtype=values.dtype)


def one_row_less(values: np.ndarray) -> np.ndarray:
    return values[:-1]


def swapped_bytes(values: np.ndarray) -> np.ndarray:
    return values.byteswap()


def refused(values: np.ndarray) -> np.ndarray:
    raise ValueError("planted")


@pytest.mark.parametrize("mistake", [off_by_one, one_row_less, swapped_bytes, refused])
@pytest.mark.parametrize("decoder", ["ours", "zarr"])
def test_a_mistake_of_one_decoder_is_found_and_nothing_is_removed_for_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any, decoder: str
) -> None:
    module = {"ours": storage.format.shard, "zarr": storage.cache.verify}[decoder]
    name = {"ours": "decode_chunk", "zarr": "decode_with_zarr"}[decoder]
    right = getattr(module, name)

    def wrong(spec: Any, *rest: Any) -> np.ndarray:
        values: np.ndarray = right(spec, *rest)
        return mistake(values) if spec.name == "kept" else values

    monkeypatch.setattr(module, name, wrong)
    before = contents(cache)
    assert verify(str(cache)).sound
    found = verify(str(cache), deep=True, repair=True)
    objects = [str(cache / key) for key in before if "/kept/c/" in key]
    assert sorted(problem.split(": ")[0] for problem in found.problems) == sorted(objects)
    assert (found.repaired, contents(cache)) == ([], before)


def test_zarr_raises_where_it_would_give_the_fill_value(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LogitCache.open(str(cache)).teacher("codes").specs["kept"]
    data = (cache / "teachers/codes/kept/c/1").read_bytes()
    assert (decode_with_zarr(spec, 1, data) == K).all()
    monkeypatch.setattr(type(spec), "shard_key", lambda self, shard: f"{self.name}/c/{shard + 1}")
    with pytest.raises(MissingObject, match="zarr looks for c/1"):
        decode_with_zarr(spec, 1, data)
