"""A cache is plain Zarr v3: other people's readers get the same numbers, and shards have the bytes that zarr writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
import zarr.buffer
from support.caches import known
from support.caches.known import contents
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.caches.two_entries import K, N, Stream, V
from support.programs import format_page

from storage import CorruptCache, FormatError, IncompleteCache, InputError, LogitCache
from storage.cache.verify import verify
from storage.errors import CacheNotFound
from storage.format.layout import ArraySpec, metadata_bytes
from storage.format.manifest.shared import ArrayLayout
from storage.format.sealing import canonical_json, sealed
from storage.format.shard import encode_shard


def decoded_by_the_format_page(arrays: Any, record: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs by the program that docs/format.md prints, from any reader's arrays."""
    (program,) = re.findall(r"```python\n(.*?)^entry = ", format_page.page(""), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    decoded: tuple[np.ndarray, np.ndarray] = names[f"version_{record['format_version']}"](
        arrays, record["encoding"]["step_nats"]
    )
    return decoded


def read_with_zarr(path: Path, name: str) -> tuple[Any, Any]:
    group = zarr.open(str(path), mode="r")[f"teachers/{name}"]
    return group, group.attrs["logit_cache"]


def read_with_xarray(path: Path, name: str) -> tuple[Any, Any]:
    import xarray

    data = xarray.open_zarr(str(path), group=f"teachers/{name}", consolidated=False, mask_and_scale=False)
    assert data["token_ids" if "token_ids" in data else "ids"].dims == ("position", "rank")
    assert "sampling_order" not in data or data["sampling_order"].dims == ("place",)
    return {str(array): values.values for array, values in data.items()}, data.attrs["logit_cache"]


def read_with_tensorstore(path: Path, name: str) -> tuple[Any, Any]:
    import tensorstore

    def one(folder: Path) -> np.ndarray:
        location = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}}
        return np.asarray(tensorstore.open(location).result().read().result())

    folder = path / "teachers" / name
    record = json.loads((folder / "zarr.json").read_text())["attributes"]["logit_cache"]
    return {array.parent.name: one(array.parent) for array in folder.glob("*/zarr.json")}, record


@pytest.mark.filterwarnings("ignore:Object at receipts")  # zarr's remark on a folder that is no array
@pytest.mark.parametrize("name", ["a", "v2"])
@pytest.mark.parametrize("read", [read_with_zarr, read_with_xarray, read_with_tensorstore])
def test_independent_readers_get_the_same_numbers(read: Any, name: str, known_whole: Path) -> None:
    arrays, record = read(known_whole, name)
    teacher = LogitCache.open(str(known_whole)).teacher(name)
    assert record["format_version"] == teacher.entry.format_version
    for array, values in teacher.stored(0, known.N).arrays.items():
        assert np.array_equal(arrays[array][:], values, equal_nan=values.dtype.kind == "f")
    ids, logprobs = decoded_by_the_format_page(arrays, record)
    ours = teacher.read(0, known.N)
    assert np.array_equal(ids[ours.is_kept], ours.token_ids[ours.is_kept])
    np.testing.assert_allclose(logprobs[ours.is_certain], ours.logprobs[ours.is_certain], rtol=1e-6)
    if teacher.order is not None:
        assert np.array_equal(arrays["sampling_order"][:], known.order())
    assert ours.log_tail is not None
    there = ours.kept > 0
    mass = (np.exp(logprobs) * ours.is_certain).sum(axis=1) + np.exp(ours.log_tail.astype(np.float64))
    assert np.abs(mass[there] - 1).max() <= (np.expm1(1 / 64) if name == "a" else 1e-6)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "uint32", "uint64", "float32", "bool"])
@pytest.mark.parametrize("rest", [(), (1,), (7,)], ids=str)
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_shard_s_bytes_are_those_that_zarr_writes(dtype: Any, rest: tuple[int, ...], compression: Any) -> None:
    for entries, shard_entries, chunk in [(100, 32, 8), (96, 96, 32), (33, 64, 16), (5000, 4096, 1024)]:
        spec = ArraySpec(
            "x", dtype, (entries, *rest), ArrayLayout(shard=shard_entries, chunk=chunk, compression=compression)
        )
        values = np.random.default_rng(0).normal(size=spec.shape).astype("float32")
        values = values if dtype == "float32" else (abs(values) * 40).astype(dtype)
        values[::8] = 1  # so that zarr finds no chunk empty
        held = {"zarr.json": zarr.buffer.cpu.Buffer.from_bytes(metadata_bytes(spec.metadata()))}
        zarr.open_array(zarr.storage.MemoryStore(held), mode="r+")[:] = values
        for shard in range(spec.shards):
            start, stop = spec.shard_range(shard)
            key = spec.shard_key(shard).removeprefix("x/")
            assert encode_shard(spec, shard, values[start:stop]) == held[key].to_bytes()


def test_chunks_that_hold_nothing_but_the_fill_value_are_stored(tmp_path: Path) -> None:
    """A loss mask that is off for whole chunks, and labels of one-token documents: zarr would leave them out."""
    url = str(tmp_path / "c")
    count = 150_000
    mask = np.zeros(count, dtype=bool)
    mask[5] = mask[140_000] = True
    tokens = np.random.default_rng(0).integers(0, V, count).astype(np.uint16)
    make_corpus(url, tokens, V, loss_mask=mask)
    stream = LogitCache.open(url).loss_mask
    assert stream is not None
    assert np.array_equal(stream.read(0, count), mask)
    assert np.array_equal(zarr.open(url, mode="r")["loss_mask"][:], mask)

    one = str(tmp_path / "one")
    record = make_corpus(one, tokens[:1], V)
    targets = dense_targets(np.random.default_rng(1).normal(size=(1, V)), K, np.array([-1]))
    write_entry(one, "a", make_entry(record, K), targets)
    found = LogitCache.open(one).teacher("a").read(0, 1)
    assert np.isnan(found.label_logprob).all()
    assert np.array_equal(found.token_ids, targets.token_ids)
    assert verify(one, deep=True).sound


@pytest.fixture
def short(cache: Path, stream: Stream) -> Path:
    """The first 840 positions, in shards of 256 and chunks of 64: of the last shard, two chunks lie behind the end."""
    path = cache / "short"
    record = make_corpus(str(path), stream[0][:840], V)
    label = np.append(stream[1].label_logprob[:839], np.nan).astype(np.float32)
    targets = dataclasses.replace(stream[1].rows(0, 840), label_logprob=label)
    write_entry(path, "a", make_entry(record, K, shard_tokens=256, chunk_tokens=64), targets)
    return path


def test_the_seal_of_a_last_shard_covers_its_chunks(short: Path) -> None:
    path = short / "teachers/a/token_ids/c/3/0"
    spec = LogitCache.open(short).teacher("a").specs["token_ids"]
    index = np.frombuffer(path.read_bytes()[-spec.index_bytes : -4], dtype="<u8").reshape(-1, 2)
    assert (index[1:] == 2**64 - 1).sum() == 4, "two chunks lie behind the end"
    data = bytearray(path.read_bytes())
    data[int(index[1].sum()) - 1] ^= 1  # the second chunk's checksum, which the index does not show
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptCache, match="token_ids/c/3/0"):
        LogitCache.open(short).teacher("a").read(768, 770)


def test_a_last_shard_that_was_sealed_by_its_index_alone_is_read(short: Path, stream: Stream) -> None:
    path = short / "teachers/a/receipts/00000003.json"
    receipt = json.loads(path.read_text())
    for name, spec in LogitCache.open(short).teacher("a").specs.items():
        data = (short / "teachers/a" / spec.shard_key(3)).read_bytes()
        receipt["objects"][name]["seal_sha256"] = hashlib.sha256(data[-spec.index_bytes :]).hexdigest()
    body = {key: value for key, value in receipt.items() if key != "sha256"}
    receipt["sha256"] = hashlib.sha256(canonical_json(body)).hexdigest()
    path.write_text(json.dumps(receipt))
    (path.parent / "index.json").unlink()
    read = LogitCache.open(short).teacher("a").read(768, 840)
    assert np.array_equal(read.token_ids, stream[1].token_ids[768:840])


@pytest.fixture(params=["file", "memory"])
def opened(request: pytest.FixtureRequest, cache: Path) -> tuple[LogitCache, Callable[[str, bytes | None], None]]:
    """A cache, and what changes its objects: new bytes for a key, or None to remove it."""
    url = f"{request.param}://{cache}"
    filesystem, root = fsspec.url_to_fs(url)
    if request.param == "memory":
        for key, data in contents(cache).items():
            filesystem.pipe_file(f"{root}/{key}", data)

    def change(key: str, data: bytes | None) -> None:
        filesystem.rm_file(f"{root}/{key}")
        if data is not None:
            filesystem.pipe_file(f"{root}/{key}", data)

    return LogitCache.open(url), change


def test_zarr_and_xarray_give_the_reader_s_values(opened: Any) -> None:
    cache, _ = opened
    group = cache.zarr()
    assert sorted(name for name, _ in group.members(max_depth=None)) == sorted(
        ["tokens", "document_starts", "teachers", "teachers/codes", "teachers/exact"]
        + [f"teachers/{name}/{array}" for name in cache.teachers for array in cache.teacher(name).specs]
    )
    for name in cache.teachers:
        ours, theirs, data = cache.teacher(name).stored(0, N).arrays, group["teachers"][name], cache.xarray(name)
        assert dict(theirs.attrs) == data.attrs == {"logit_cache": sealed(cache.teacher(name).entry)}
        assert np.array_equal(data["tokens"].values, cache.tokens.read(0, N))
        assert (data["tokens"].dims, data["token_ids"].dims) == (("position",), ("position", "rank"))
        for array in ("token_ids", "kept", "certain", "top_logprob", "log_tail", "log_tail_half", "label_logprob"):
            stored = ours[array]
            assert data[array].dtype == theirs[array].dtype == stored.dtype
            assert np.array_equal(theirs[array][:], stored, equal_nan=stored.dtype.kind == "f")
            assert np.array_equal(data[array][17:300].values, stored[17:300], equal_nan=stored.dtype.kind == "f")
    assert np.array_equal(group["document_starts"][:], cache.document_starts)


def test_they_are_for_reading_only(opened: Any) -> None:
    group = opened[0].zarr()
    with pytest.raises(ValueError, match="read-only"):
        group["tokens"][0] = 1
    with pytest.raises(ValueError, match="read-only"):
        group.create_array("more", shape=(1,), dtype="uint8")


def test_what_the_reader_refuses_zarr_does_not_get(opened: Any) -> None:
    cache, change = opened
    good = cache.zarr()["teachers/codes/kept"][:256]
    assert (good[0], len(good)) == (cache.teacher("codes").read(0, 1).kept[0], 256)
    flipped = bytearray(cache._store.read("teachers/codes/label_logprob/c/1"))
    flipped[20] ^= 1
    change("teachers/codes/kept/c/1", cache._store.read("teachers/codes/certain/c/1")[:-1])
    change("teachers/codes/entropy/c/1", None)
    change("teachers/codes/label_logprob/c/1", bytes(flipped))
    change("teachers/codes/log_tail/zarr.json", cache._store.read("tokens/zarr.json"))
    change("teachers/exact/receipts/00000001.json", None)
    change("teachers/exact/receipts/index.json", None)
    cache = LogitCache.open(cache.url)
    group = cache.zarr()
    for values in (group["teachers/codes"], cache.xarray("codes")):
        with pytest.raises(CorruptCache, match="codes/kept/c/1: expected"):
            np.asarray(values["kept"][256:300])
        with pytest.raises(CorruptCache, match="codes/entropy/c/1: missing"):
            np.asarray(values["entropy"][256:300])
        with pytest.raises((CorruptCache, ValueError), match=r"checksum|sha256"):
            np.asarray(values["label_logprob"][256:300])
        with pytest.raises(FormatError, match=r"codes/log_tail/zarr\.json"):
            np.asarray(values["log_tail"][:10])
    for values in (group["teachers/exact"], cache.xarray("exact")):
        with pytest.raises(IncompleteCache, match=r"positions 256\.\.512"):
            np.asarray(values["kept"][:])
        assert np.array_equal(np.asarray(values["kept"][:256]), good)


def test_a_cache_that_is_no_cache_any_more_is_refused_when_it_is_asked_for(cache: Path) -> None:
    opened = LogitCache.open(str(cache))
    (cache / "teachers/exact/zarr.json").write_text("{}")
    with pytest.raises(FormatError):
        opened.zarr()
    shutil.rmtree(cache / "teachers/exact")
    with pytest.raises(CacheNotFound, match="there is: codes"):
        opened.xarray("another")


def test_one_line_without_xarray(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(InputError, match=r"pip install 'logit-cache\[xarray\]'"):
        LogitCache.open(str(original)).xarray("codes")
    assert isinstance(LogitCache.open(str(original)).zarr(), zarr.Group)
