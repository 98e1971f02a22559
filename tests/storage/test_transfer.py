"""Copying a cache between stores: the same bytes, only missing objects, never a false state, whenever it is killed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches import known
from support.caches.small import make_corpus, make_entry, write_entry
from support.crash_disk import Crash, Disk

import storage.stores.remote
from storage import LogitCache
from storage.cache.verify import verify
from storage.errors import CacheNotFound, CorruptCache, IdentityMismatch, IncompleteCache, InputError
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.receipts import ShardReceipt
from storage.format.sealing import sealed_bytes, unseal
from storage.stores import open_store
from storage.stores.remote import RemoteStore
from storage.transfer.copy import CopyJob, Delivery, Transfer, prepare
from storage.transfer.staging import StagingFolder

pytestmark = pytest.mark.usefixtures("encoded_once")


@pytest.fixture(params=["folder", "memory"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "target") if request.param == "folder" else f"memory://{tmp_path.name}/target"


def copy(source: Path | str, target: Path | str, **options: Any) -> Delivery:
    with prepared(source, target, **options) as transfer:
        return transfer.deliver()


def prepared(source: Path | str, target: Path | str, **options: Any) -> contextlib.AbstractContextManager[Transfer]:
    return prepare(CopyJob(source=str(source), target=str(target), **options))


def at(url: str) -> dict[str, bytes]:
    """Every object below a URL, by key."""
    store = open_store(url)
    return {key: store.read(key) for key in store.walk()}


def sound(url: str, missing: Any = None) -> None:
    found = verify(url, deep=True)
    assert (found.problems, found.leftovers, found.missing) == ([], [], missing or {})


# --- copied objects --------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_bytes_and_a_second_one_copies_nothing(source: Path, target: str) -> None:
    seen: list[int] = []
    with prepared(source, target) as transfer:
        size = transfer.contents.size
        done = transfer.deliver(seen.append)
        assert not list(transfer.source.snapshot.local_path.rglob("c")), "data is not kept twice"
    assert at(target) == known.contents(source)
    objects = {key: data for key, data in known.contents(source).items() if "/c/" in key}
    assert (done.copied, done.copied_bytes, done.kept) == (len(objects), sum(map(len, objects.values())), 0)
    assert sum(seen) == size == done.copied_bytes
    assert (done.teachers, done.missing, done.tokens_included) == (["a", "b", "v2"], {}, True)
    again = copy(source, target)
    assert (again.copied, again.kept) == (0, len(objects))
    assert at(target) == known.contents(source)


def test_objects_without_a_receipt_are_not_copied(source: Path, target: str) -> None:
    wanted = known.contents(source)
    for key in ("notes.txt", "teachers/a/kept/c/99", "teachers/a/kept/c/0.77-x.partial", "teachers/a/receipts/x.json"):
        (source / key).write_bytes(b"x")
    copy(source, target)
    assert at(target) == wanted


def test_one_entry_then_the_other(source: Path, target: str) -> None:
    assert copy(source, target, teachers=["b"]).teachers == ["b"]
    sound(target)
    assert LogitCache.open(target).teachers == ("b",)
    done = copy(source, target, teachers=["a", "v2"])
    assert done.kept > 0, "the token stream was there"
    assert at(target) == known.contents(source)
    with pytest.raises(CacheNotFound, match="there is: a, b, v2"):
        copy(source, target, teachers=["d"])


def test_an_entry_joins_a_cache_that_was_made_elsewhere(source: Path, target: str, tmp_path: Path) -> None:
    """The same text and tokenizer, tokenized by other versions: the streams are one, the records are not."""
    record = known.write_stream(tmp_path / "theirs")
    own = tmp_path / "own"
    tokens, mask = known.stream()
    made = make_corpus(str(own), tokens, known.V, known.STARTS, mask, known.TOKENIZER_FILES)
    assert made != record
    copy(own, target)
    before = at(target)
    assert copy(source, target).kept == 0, "nothing of the stream was looked at"
    after = at(target)
    assert {key: after[key] for key in before} == before
    assert {key for key in after if key not in before} == {
        key for key in known.contents(source) if "teachers/" in key
    } - {"teachers/zarr.json"}
    sound(target)


@pytest.mark.parametrize("shards", [[], [0], [2, 0]])
def test_an_entry_that_is_not_complete_is_copied_as_far_as_it_goes(
    shards: list[int], target: str, tmp_path: Path
) -> None:
    source = tmp_path / "part"
    writer = known.write_shards(source, shards)
    done = copy(source, target)
    ranges = LogitCache.open(str(source)).teacher("a").missing()
    assert done.missing == {"teachers/a": ranges}
    sound(target, done.missing)
    assert at(target) == known.contents(source)
    known.complete(writer)
    assert copy(source, target).missing == {}
    assert at(target) == known.contents(source)


def test_two_halves_make_a_whole_with_an_index(target: str, tmp_path: Path) -> None:
    halves = [tmp_path / "even", tmp_path / "odd"]
    for half, shards in zip(halves, ([0, 2], [1]), strict=True):
        entry = known.write_shards(half, shards).entry
        copy(half, target)
    assert LogitCache.open(target).teacher("a").receipts.index is not None
    sound(target)
    assert known.shard_part("a", entry, 1).outcome(LogitCache.open(target)) is None


def test_the_same_shards_made_by_two_machines_are_one_entry(source: Path, target: str, tmp_path: Path) -> None:
    """Equal objects under receipts of other times: the target keeps its own, and its index lists what it has."""
    other = tmp_path / "other"
    known.write_shards(other, [1])
    path = other / "teachers/a/receipts/00000001.json"
    receipt = unseal(ShardReceipt, json.loads(path.read_text()), str(path))
    path.write_bytes(sealed_bytes(receipt.model_copy(update={"written_at": "2001-01-01T00:00:00+00:00"})))
    copy(other, target)
    before = at(target)["teachers/a/receipts/00000001.json"]
    copy(source, target, teachers=["a"])
    assert at(target)["teachers/a/receipts/00000001.json"] == before
    sound(target)


def test_an_object_that_the_target_lost_is_brought_back(source: Path, target: str) -> None:
    copy(source, target)
    store = open_store(target)
    store.remove("teachers/a/kept/c/1")
    store.replace("teachers/b/entropy/c/0", b"short")
    done = copy(source, target)
    assert done.copied == 2
    assert at(target) == known.contents(source)


def test_an_object_without_a_receipt_is_not_trusted_for_its_length(source: Path, target: str) -> None:
    copy(source, target, teachers=["b"])
    key = "teachers/a/kept/c/0"
    open_store(target).replace(key, bytes(len(known.contents(source)[key])))
    copy(source, target)
    assert at(target) == known.contents(source)


# --- refused copies -------------------------------------------------------------------------------------------------


def test_another_text_or_tokenizer_is_refused(source: Path, target: str, tmp_path: Path) -> None:
    make_corpus(target, np.arange(90, dtype=np.uint16) % known.V, known.V)
    before = at(target)
    with pytest.raises(IdentityMismatch) as caught:
        copy(source, target)
    assert [field.split(":")[0] for field in caught.value.fields] == [
        "corpus.stream_sha256",
        "corpus.positions",
        "corpus.documents",
    ]
    assert at(target) == before


def test_another_entry_of_the_same_name_is_refused(source: Path, target: str, tmp_path: Path) -> None:
    record = known.write_stream(target)
    other = make_entry(record, known.K, weights_sha256="f" * 64)
    write_entry(target, "a", other, known.targets())
    before = at(target)
    with pytest.raises(IdentityMismatch, match="weights_sha256"):
        copy(source, target)
    assert at(target) == before
    assert copy(source, target, teachers=["b"]).teachers == ["b"]


def test_another_run_s_shard_is_refused_and_not_replaced(source: Path, target: str) -> None:
    entry = known.write_shards(target, [1], variant=1).entry
    before = at(target)
    with pytest.raises(CorruptCache, match=r"teachers/a/receipts/00000001\.json: .* other bytes"):
        copy(source, target)
    assert {key: at(target)[key] for key in before} == before
    assert known.shard_part("a", entry, 1, variant=1).outcome(LogitCache.open(target)) is None


@pytest.mark.parametrize("variant", [0, 1])
def test_shards_committed_meanwhile_are_not_replaced(
    source: Path, tmp_path: Path, variant: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a store that ignores the condition of a put."""
    target = f"memory://{tmp_path.name}/target"
    entry = known.entries(known.write_stream(target))["a"]
    walk, put, written = RemoteStore.walk, RemoteStore._put, []

    def then_commit(self: RemoteStore, prefix: str = "") -> dict[str, int]:
        listed = walk(self, prefix)
        known.write_shards(target, [1], variant)
        monkeypatch.setattr(RemoteStore, "walk", walk)
        monkeypatch.setattr(RemoteStore, "_put", careless)
        return listed

    def careless(self: RemoteStore, key: str, data: bytes, **mode: str) -> None:
        written.append(key)
        put(self, key, data)

    monkeypatch.setattr(RemoteStore, "walk", then_commit)
    refused = contextlib.nullcontext() if variant == 0 else pytest.raises(CorruptCache, match="other bytes")
    with refused:
        copy(source, target, teachers=["a"], workers=1)
    assert known.shard_part("a", entry, 1, variant).outcome(LogitCache.open(target)) is None
    assert not [key for key in written if key.startswith("teachers/a/") and key.endswith(("c/1", "c/1/0", "1.json"))]


def test_a_target_that_holds_something_else_is_refused(source: Path, target: str, tmp_path: Path) -> None:
    open_store(target).publish("photo.jpg", b"x")
    with pytest.raises(InputError, match=r"photo\.jpg and is not a cache"):
        copy(source, target)
    assert at(target) == {"photo.jpg": b"x"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError):
        copy(source, tmp_path / "file")
    for inside in (source, source / "below", source.parent):
        with pytest.raises(InputError):
            copy(source, inside)


@pytest.mark.parametrize(("key", "other"), [("token_ids/c/1/0", "token_ids/c/0/0"), ("entropy/c/2", "entropy/c/1")])
@pytest.mark.parametrize("fault", ["flipped", "short", "gone", "swapped"])
def test_a_damaged_source_is_named_and_nothing_of_it_arrives(
    source: Path, target: str, key: str, other: str, fault: str
) -> None:
    path = source / "teachers/a" / key
    original = path.read_bytes()
    damaged = {
        "flipped": original[:40] + bytes([original[40] ^ 4]) + original[41:],
        "short": original[:-1],
        "swapped": (source / "teachers/a" / other).read_bytes(),
    }
    path.unlink()
    if fault in damaged:
        assert damaged[fault] != original
        path.write_bytes(damaged[fault])
    with pytest.raises(CorruptCache, match=f"{source}/teachers/a/{key}"):
        copy(source, target, workers=1)
    with pytest.raises(CacheNotFound):
        LogitCache.open(target)
    path.write_bytes(original)
    done = copy(source, target)
    assert at(target) == known.contents(source)
    assert done.copied + done.kept == sum("/c/" in key for key in at(target))


def test_objects_damaged_in_transfer_from_a_remote_source_are_retried(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}/far"
    copy(source, url)
    read, failures = RemoteStore.read, iter([b"", b"flipped"])

    def unreliable(self: RemoteStore, key: str, *limit: int) -> bytes:
        return next(failures, None) or read(self, key, *limit) if key.endswith("kept/c/1") else read(self, key, *limit)

    monkeypatch.setattr(RemoteStore, "read", unreliable)
    monkeypatch.setattr(storage.stores.remote, "_INSIST_PAUSE_S", 0.0)
    copy(url, tmp_path / "near")
    assert known.contents(tmp_path / "near") == known.contents(source)


# --- what a target is before ------------------------------------------------------------------------------------------


def nothing_yet(target: str) -> None:
    return


def an_empty_folder(target: str) -> None:
    Path(target).mkdir()


def the_stream(target: str) -> None:
    known.write_stream(target)


def a_part(target: str) -> None:
    known.write_shards(target, [1])


BEFORE = [nothing_yet, the_stream, a_part]
NO_CACHE = (nothing_yet, an_empty_folder)


# --- the staging folder ---------------------------------------------------------------------------------------------


def test_leftovers_of_another_copy_are_not_published(source: Path, tmp_path: Path) -> None:
    """Foreign files, other bytes under our keys, and links through which a copy would write elsewhere."""
    target, left = tmp_path / "target", tmp_path / "target.incoming" / "cache"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c").mkdir()
    (left / "teachers/a/kept/c").mkdir(parents=True)
    (left / "teachers/a/kept/c/0").write_bytes((source / "teachers/a/kept/c/1").read_bytes())
    (left / "teachers/zzz").mkdir()
    (left / "teachers/zzz/zarr.json").write_text("{}")
    (left / ".zgroup").write_text("{}")
    (left / "tokens").symlink_to(elsewhere)
    copy(source, target)
    assert known.contents(target) == known.contents(source)
    assert not list((elsewhere / "c").iterdir())
    assert not (tmp_path / "target.incoming").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_two_copies_to_one_target_at_once(source: Path, tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "target"
    if exists:
        target.mkdir()
    with prepared(source, target) as transfer:
        with pytest.raises(InputError, match="another push or pull"):
            copy(source, target)
        transfer.deliver()
    assert copy(source, target).copied == 0


def mount_point(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be renamed, and no file into it or out of it; nothing can be made beside it."""
    target.mkdir(exist_ok=True)

    def inside(path: Any) -> bool:
        return target in Path(path).parents

    def crossing(function: Any) -> Any:
        def call(a: Any, b: Any) -> None:
            if Path(b) == target:
                raise OSError(errno.EBUSY, "Device or resource busy", str(a), None, str(b))
            if inside(a) != inside(b):
                raise OSError(errno.EXDEV, "Invalid cross-device link", str(a), None, str(b))
            function(a, b)

        return call

    def mkdir(path: Any, *others: Any, **named: Any) -> None:
        if Path(path).parent == target.parent and not os.path.exists(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        make(path, *others, **named)

    make = os.mkdir
    monkeypatch.setattr(os, "rename", crossing(os.rename))
    monkeypatch.setattr(os, "replace", crossing(os.replace))
    monkeypatch.setattr(os, "mkdir", mkdir)


@pytest.mark.parametrize("before", [an_empty_folder, the_stream, a_part])
def test_a_mount_point_can_be_a_target(
    source: Path, tmp_path: Path, before: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    before(str(target))
    mount_point(target, monkeypatch)
    copy(source, target)
    assert data_of(known.contents(target)) == data_of(known.contents(source))
    sound(str(target))


def test_a_copy_staged_beside_a_target_that_exists_is_resumed_inside(source: Path, tmp_path: Path) -> None:
    """As earlier versions staged it, or this one before the target existed."""
    target, beside = tmp_path / "target", tmp_path / "target.incoming"
    target.mkdir()
    shutil.copytree(source / "teachers/a/kept", beside / "cache/teachers/a/kept")
    staged = (beside / "cache/teachers/a/kept/c/0").stat().st_ino
    copy(source, target)
    assert known.contents(target) == known.contents(source)
    assert (target / "teachers/a/kept/c/0").stat().st_ino == staged
    assert not beside.exists()


def test_a_copy_staged_on_another_file_system_is_named_before_anything_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, beside = tmp_path / "target", tmp_path / "target.incoming"
    (beside / "cache").mkdir(parents=True)
    (beside / "cache/tokens").write_bytes(b"x")
    mount_point(target, monkeypatch)
    with pytest.raises(InputError, match=r"target\.incoming: left by an earlier copy.*cross-device"):
        copy(source, target)
    assert known.contents(target) == {}
    assert known.contents(beside) == {"cache/tokens": b"x"}


def test_a_parent_that_is_not_writable_is_named_before_anything_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Any, *others: Any, **named: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(InputError, match=r"target\.incoming: Permission denied; a copy is staged there"):
        copy(source, tmp_path / "target")


def test_a_copy_that_was_killed_is_none_of_the_cache_s_leftovers(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "target")
    (tmp_path / "target/.incoming/cache").mkdir(parents=True)
    (tmp_path / "target/.incoming/cache/x").write_bytes(b"x")
    found = verify(str(tmp_path / "target"), repair=True)
    assert (found.leftovers, found.repaired) == ([], [])
    assert (tmp_path / "target/.incoming/cache/x").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_target_that_appears_meanwhile_is_not_touched(source: Path, tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "target"
    if exists:
        target.mkdir()
    with prepared(source, target) as transfer:
        target.mkdir(exist_ok=True)
        (target / "theirs").write_text("x")
        with pytest.raises(InputError, match="appeared"):
            transfer.deliver()
    shutil.rmtree(target / ".incoming", ignore_errors=True)
    assert known.contents(target) == {"theirs": b"x"}


def test_an_empty_folder_and_a_link_to_one_can_be_targets(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    before = (tmp_path / "disk").stat()
    (tmp_path / "target").symlink_to(tmp_path / "disk")
    copy(source, tmp_path / "target")
    assert known.contents(tmp_path / "disk") == known.contents(source)
    after = (tmp_path / "disk").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_a_full_disk_leaves_no_target_and_the_next_run_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = os.replace, [20]

    def full(a: Any, b: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(b))
        replace(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        copy(source, tmp_path / "target", workers=1)
    monkeypatch.undo()
    assert not (tmp_path / "target").exists()
    assert not list((tmp_path / "target.incoming").rglob("*.partial"))
    copied: list[str] = []
    whole = StagingFolder.copy

    def note(self: StagingFolder, store: Any, key: str, *others: Any, **named: Any) -> None:
        copied.append(key)
        whole(self, store, key, *others, **named)

    monkeypatch.setattr(StagingFolder, "copy", note)
    copy(source, tmp_path / "target")
    objects = [key for key in known.contents(source) if "/c/" in key]
    assert 0 < len(copied) < len(objects), "the objects of the first run were reused"
    assert known.contents(tmp_path / "target") == known.contents(source)


# --- stopped at any step ---------------------------------------------------------------------------------------------


def honest(url: str, record: CacheRecord) -> str:
    """The state that a reader finds: nothing, or a cache whose every part is right or reported as missing."""
    try:
        cache = LogitCache.open(url)
    except CacheNotFound:
        return "nothing"
    for part in known.corpus_parts():
        assert part.outcome(cache) is None, part.name
    for name in cache.teachers:
        entry = known.entries(record)[name]
        for shard in range(-(-known.N // entry.layout.shard)):
            error = known.shard_part(name, entry, shard).outcome(cache)
            assert error is None or isinstance(error, IncompleteCache), error
    return "a cache"


@pytest.mark.parametrize("every", [79, pytest.param(5, marks=pytest.mark.soak)])
@pytest.mark.parametrize("before", [an_empty_folder, *BEFORE])
def test_killed_at_any_step_on_a_disk_that_may_lose_power(
    tmp_path: Path, before: Callable[[str], None], every: int
) -> None:
    source = tmp_path / "source"
    record = known.write_stream(source)
    write_entry(source, "a", known.entries(record)["a"], known.targets())
    base = tmp_path / "base"
    before(str(base))

    def copied(name: str, dies_at: int | None) -> tuple[Path, Disk]:
        root = tmp_path / name
        root.mkdir()
        if base.exists():
            shutil.copytree(base, root / "target")
        disk = Disk(root, tmp_path / f"graves-{name}")
        with disk.process(dies_at), contextlib.suppress(Crash):
            copy(source, root / "target", workers=1)
        return root / "target", disk

    _, undisturbed = copied("undisturbed", None)
    # The critical moments are the few steps that change the target itself.
    near = [number for number, step in enumerate(undisturbed.steps) if ".incoming" not in step]
    for number in sorted({*range(0, len(undisturbed.steps), every), *near[:: min(every, 1 + len(near) // 8)]}):
        target, disk = copied(str(number), number)
        if number % 2:
            disk.cut_power(lambda: False)
        assert honest(str(target), record) == "a cache" or before in NO_CACHE
        with disk.process():
            copy(source, target)
        after = {key: data for key, data in known.contents(target).items() if not key.endswith(".partial")}
        assert data_of(after) == data_of(known.contents(source)), undisturbed.steps[number]
        found = verify(str(target), deep=True)
        assert (found.problems, found.missing) == ([], {})
        assert all(leftover.endswith(".partial") for leftover in found.leftovers), "as any killed writer leaves"
        shutil.rmtree(target.parent)
    assert len(near) >= 3


def data_of(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files that are equal whichever run wrote them: receipts have times."""
    return {key: data for key, data in files.items() if "receipts/" not in key}


@pytest.mark.parametrize("before", BEFORE)
def test_killed_at_any_request_to_a_store(
    known_whole: Path, tmp_path: Path, before: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = known.write_stream(tmp_path / "stream")
    put, left = RemoteStore._put, [0]

    def mortal(self: RemoteStore, *arguments: Any, **mode: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Crash
        put(self, *arguments, **mode)

    stop, stopped = 0, True
    while stopped:
        target = f"memory://{tmp_path.name}/{before.__name__}-{stop}"
        left[0] = 1 << 30
        before(target)
        monkeypatch.setattr(RemoteStore, "_put", mortal)
        left[0], stopped = stop, False
        try:
            copy(known_whole, target, teachers=["a"], workers=2)
        except Crash:
            stopped = True
        monkeypatch.setattr(RemoteStore, "_put", put)
        found = honest(target, record)
        assert (found == "nothing") == (before is nothing_yet and stopped), stop
        if found == "a cache":
            # The one state in which verify sees an entry without a record is that of its arrays' metadata alone.
            problems = verify(target).problems
            assert problems == [] or (len(problems) == 1 and "teachers/a/zarr.json: missing" in problems[0])
        copy(known_whole, target, teachers=["a"])
        sound(target)
        stop += 9
    assert stop > 20


@pytest.mark.parametrize("before", [an_empty_folder, *BEFORE])
def test_a_reader_at_any_step_sees_nothing_false(
    known_whole: Path, tmp_path: Path, before: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = known.write_stream(tmp_path / "stream")
    target = str(tmp_path / "target")
    before(target)
    seen: list[str] = []
    steps: list[Any] = []
    rename = os.rename

    def looking(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            # Every fourth step, to save time, and every rename, which publishes.
            steps.append(function)
            if len(steps) % 4 == 0 or function is rename:
                seen.append(honest(target, record))
            return result

        return call

    monkeypatch.setattr(os, "replace", looking(os.replace))
    monkeypatch.setattr(os, "rename", looking(os.rename))
    monkeypatch.setattr(os, "link", looking(os.link))
    copy(known_whole, target, teachers=["a"], workers=1)
    assert len(seen) > 8
    assert set(seen) <= ({"nothing", "a cache"} if before in NO_CACHE else {"a cache"})
    assert "b" not in LogitCache.open(target).teachers
    sound(target)


def test_everything_is_synced_before_it_has_its_name(
    known_whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, synced, names = tmp_path / "target", set(), set()
    fsync, rename, lock = os.fsync, os.rename, threading.Lock()

    def note(descriptor: int) -> None:
        fsync(descriptor)
        with lock:
            synced.add(os.fstat(descriptor).st_ino)

    def check(a: Any, b: Any) -> None:
        if Path(b) == target:
            names.update(os.walk(a) and [path.stat().st_ino for path in [Path(a), *Path(a).rglob("*")]])
            assert names <= synced
        rename(a, b)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", check)
    copy(known_whole, target)
    assert len(names) > 60
    assert tmp_path.stat().st_ino in synced
