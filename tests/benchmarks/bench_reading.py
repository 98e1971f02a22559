"""Reading and decoding targets: the student's order, random windows, whole shards, S3; against Parquet and raw arrays.

The cache repeats the targets of `bench_sizes`'s teacher over a million positions, so that its bytes are real and no
reader can hold it in memory whole. What is compared holds the same ids and log-probs. All of it is in the page cache of
the operating system: processor time is compared, not disks.

The entries are VarOpt: one of version 2 with nothing but what a forward KL needs (`--fields lean`), and one of
version 1, whose arrays zarr, Parquet and raw files hold too.

Legend: `K` stored ids per position.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from bench_sizes import K, V, cached, exact_entry, teacher
from harness import NOT_MEASURED, Table, in_turn, ratios, spread

SHARD, SHARDS, CHUNK = 65_536, 16, 8_192
N = SHARD * SHARDS
WINDOW, BATCH = 128, 32
RANDOM_WINDOWS = 256
# Of readers that hold nothing, fewer will do.
FEW_WINDOWS = 32
ROUNDS, S3_ROUNDS = 5, 3
# Of a corpus that is large against the buffer of the reading order.
ORDERED_POSITIONS = 100_000_000
LEAN, V1 = "lean", "v1"
_TRAINING = "logit-cache, training order"

Run = Callable[[], int]  # what one round does; returns how many positions it read


def tables() -> Iterator[Table]:
    """The disk, the bucket, and how random the order is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        yield _local(folder)
        yield _bucket(folder)
    yield _randomness()


def make(folder: Path) -> None:
    """The cache, and the same ids and log-probs as Parquet and as raw arrays."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from support.caches.small import entry_2, make_corpus

    from storage import LogitCache
    from storage.cache.writer import EntryWriter
    from storage.format.layout import entry_layout

    cache = LogitCache.open(str(teacher()[0]))
    exact = cache.teacher(exact_entry("varopt")[1])
    rows = exact.read(0, SHARD // 2)
    tokens = np.resize(cache.tokens.read(0, len(rows)), N)
    record = make_corpus(str(folder / "cache"), tokens, V)
    entries = {
        LEAN: entry_2(exact.entry, method="varopt", head_ids=0),
        V1: cache.teacher(cached("varopt-v1", "varopt", "--format-version", "1")[1]).entry,
    }
    writers = {}
    for name, entry in entries.items():
        changed = entry.model_copy(
            update={
                "positions": N,
                "stream_sha256": record.corpus.stream_sha256,
                "tokenizer_fingerprint": record.tokenizer.fingerprint,
                "layout": entry_layout(N, K, WINDOW, shard_tokens=SHARD, chunk_tokens=CHUNK),
            }
        )
        assert (changed.layout.shard, changed.layout.chunk) == (SHARD, CHUNK)
        writers[name] = EntryWriter.open(str(folder / "cache"), name, changed)
    schema = pa.schema({"token_ids": pa.list_(pa.int32(), K), "logprobs": pa.list_(pa.float16(), K)})
    with (
        pq.ParquetWriter(folder / "a.parquet", schema, compression="zstd") as parquet,
        (folder / "ids").open("wb") as raw_ids,
        (folder / "logprobs").open("wb") as raw_logprobs,
    ):
        for shard in range(SHARDS):
            targets = _repeated(rows, shard)
            writers[LEAN].commit(shard, targets)
            # Version 1 has the ids of a row in descending order, and stores each of them: all rows are whole.
            order = np.argsort(-targets.logprobs, axis=1, kind="stable")
            descending = {
                name: np.take_along_axis(getattr(targets, name), order, 1) for name in ("token_ids", "logprobs")
            }
            writers[V1].commit(shard, replace(targets, **descending))
            ids, logprobs = targets.token_ids.astype(np.int32), targets.logprobs.astype(np.float16)
            lists = [pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), K) for part in (ids, logprobs)]
            parquet.write_table(pa.table(lists, schema=schema), row_group_size=CHUNK)
            ids.tofile(raw_ids)
            logprobs.tofile(raw_logprobs)
    for writer in writers.values():
        writer.finish()


def _repeated(rows: Any, shard: int) -> Any:
    """A shard's targets: the rows in their order, over and over, from another one on in every shard."""
    from storage import SparseTargets

    index = (np.arange(SHARD) + shard * 997) % len(rows)
    names = ("token_ids", "kept", "certain", "log_tail", "log_tail_half", "entropy", "logprobs")
    label = rows.label_logprob[index]
    if shard == SHARDS - 1:
        label[-1] = np.nan
    fields = {name: getattr(rows, name)[index] for name in names}
    return SparseTargets(start=shard * SHARD, label_logprob=label, **fields)


def _local(folder: Path) -> Table:
    import pyarrow as pa

    # One thread each: pyarrow would decode columns side by side, and what is compared is processor time.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    cache = folder / "cache"
    ways = _ours(cache) | _decoded_by_zarr(cache) | _zarr(cache) | _parquet(folder) | _raw(folder)
    positions: dict[str, int] = {}
    for run in ways.values():
        run()  # imports, and files that were not read yet, do not count
    taken = in_turn({name: _timed(name, run, positions) for name, run in ways.items()}, ROUNDS)
    per_position = {name: [t / positions[name] for t in found] for name, found in taken.items()}
    base = per_position[_TRAINING]
    size = {
        "logit-cache": _bytes(cache / "teachers" / LEAN),
        "zarr": _bytes(cache / "teachers" / LEAN),
        "Parquet": (folder / "a.parquet").stat().st_size,
        "datasets": _bytes(folder / "arrow"),
        "numpy": _bytes(folder / "ids") + _bytes(folder / "logprobs"),
    }
    rows = []
    for name in ways:
        found = per_position[name]
        cells = (spread(ratios(base, found)), spread([1e-6 / t for t in found]))
        stored = _bytes(cache / "teachers" / V1) if name.endswith("version 1") else size[name.partition(",")[0]]
        rows.append((name, *cells, f"{stored / N:.0f}"))
    if importlib.util.find_spec("zarrs") is None:
        rows.append(("zarr, whole shards, Rust pipeline", *[f"{NOT_MEASURED}: zarrs is not installed"] * 2, "–"))
    return Table(
        f"Reading targets from a local disk, VarOpt, K = {K}, V = {V:,}",
        ("way", "positions/s, of training order's", "M positions/s of a core", "bytes per position"),
        rows,
        f"""{N:,} positions in {SHARDS} shards, {ROUNDS} rounds, positions per second of processor time, one thread,
files in the page cache; the first column says how many times as many as in training order. Ours and zarr's are the
arrays of a lean entry, or of one of version 1, and end with ids and codes as they are stored, or, decoded, with what
the loss reads; Parquet and numpy end with int32 ids and float16 log-probs. Ours checks each object against its receipt,
each chunk against its checksum and each value against the rules of the format; where zarr decodes for ours, all of that
is as it was, and zarr opens the shard and decodes the chunk. zarr alone checks the checksums. Training order: {BATCH}
windows of {WINDOW} positions at a time, by `DistillationWindows` in the order of `reading_order`, opening the cache
included. Random windows: {RANDOM_WINDOWS} (of readers that hold nothing: {FEW_WINDOWS}) of {WINDOW} positions anywhere,
after as many that do not count; a reader that holds decoded chunks meets some of them again, the others cost
{CHUNK:,} positions each, which is why there is a reading order. `datasets` reads Parquet from front to back as it is;
for random access it first writes all of it as Arrow, uncompressed, which is not in these figures.""",
    )


def _timed(name: str, run: Run, positions: dict[str, int]) -> Callable[[], float]:
    def timed() -> float:
        began = time.process_time()
        positions[name] = run()
        return time.process_time() - began

    return timed


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def training_order(url: str, decoded: bool = False, most: int | None = None, name: str = LEAN) -> int:
    """Read an epoch, or about the first `most` positions of it, as a student does; returns how many it read.

    decoded: collate the windows and decode the batch, as a training device does with it.
    """
    from student.data.batches import collate
    from student.data.windows import DistillationWindows, reading_order

    windows = DistillationWindows(url, [name], WINDOW)
    order = iter(reading_order(windows, BATCH))
    read = 0
    while batch := [index for index, _ in zip(order, range(BATCH), strict=False)]:
        found = windows.__getitems__(batch)
        if decoded:
            collate(found)["targets"][name].decoded()
        read += len(found) * WINDOW
        if most is not None and read >= most:
            break
    return read


def _ours(cache: Path) -> dict[str, Run]:
    from storage import LogitCache

    def whole_shards() -> int:
        targets = LogitCache.open(str(cache)).teacher(LEAN)
        for start in range(0, N, SHARD):
            targets.stored(start, start + SHARD)
        return N

    def random_windows() -> Run:
        targets = LogitCache.open(str(cache)).teacher(LEAN)
        return _random(lambda start: targets.stored(start, start + WINDOW))

    return {
        _TRAINING: lambda: training_order(str(cache)),
        f"{_TRAINING}, decoded": lambda: training_order(str(cache), decoded=True),
        f"{_TRAINING}, version 1": lambda: training_order(str(cache), name=V1),
        f"{_TRAINING}, decoded, version 1": lambda: training_order(str(cache), decoded=True, name=V1),
        "logit-cache, whole shards": whole_shards,
        "logit-cache, random windows": random_windows(),
    }


def _decoded_by_zarr(cache: Path) -> dict[str, Run]:
    """The same arrays in the same order with the same checks, each chunk opened and decoded by zarr."""
    ways = {f"{_TRAINING}, zarr decodes": _PLAIN}
    if importlib.util.find_spec("zarrs") is not None:
        ways[f"{_TRAINING}, zarr decodes, Rust pipeline"] = _RUST

    def run(config: Mapping[str, Any]) -> int:
        with _zarr_decodes(config):
            return training_order(str(cache))

    return {name: lambda config=config: run(config) for name, config in ways.items()}


_PLAIN: Mapping[str, Any] = {"threading.max_workers": 1}
_RUST: Mapping[str, Any] = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1}


@contextlib.contextmanager
def _zarr_decodes(config: Mapping[str, Any]) -> Iterator[None]:
    """Let zarr open and decode every chunk that a reader asks for, between the reader's own checks."""
    from storage.cache.checked_array import CheckedArray

    arrays: dict[str, Any] = {}

    def read_chunk(self: CheckedArray, chunk: int) -> Any:
        start, shard = chunk * self.spec.layout.chunk, chunk * self.spec.layout.chunk // self.spec.layout.shard
        if self.where not in arrays:
            arrays[self.where] = _opened(Path(self.where))
        stop = min(start + self.spec.layout.chunk, self.spec.shape[0])
        return self._of_checked(shard, lambda _: arrays[self.where][start:stop], "zarr cannot decode it")

    ours = CheckedArray.read_chunk
    with _zarr_config(config):
        CheckedArray.read_chunk = read_chunk  # type: ignore[method-assign]
        try:
            yield
        finally:
            CheckedArray.read_chunk = ours  # type: ignore[method-assign]


@contextlib.contextmanager
def _zarr_config(config: Mapping[str, Any]) -> Iterator[None]:
    import zarr

    if config is _RUST:
        import zarrs  # noqa: F401  (registers its pipeline)
    with zarr.config.set(dict(config)):
        yield


def _opened(path: Path) -> Any:
    import zarr

    array = zarr.open_array(str(path), mode="r")
    wanted = str(zarr.config.get("codec_pipeline.path")).rpartition(".")[2]
    found = type(array._async_array.codec_pipeline).__name__
    assert found == wanted, f"{found} has silently taken the place of {wanted}"
    return array


def _random(read: Callable[[int], object], count: int = RANDOM_WINDOWS) -> Run:
    """Windows anywhere, other ones in every round."""
    rng = np.random.default_rng(0)

    def run() -> int:
        for start in rng.integers(0, N - WINDOW, count).tolist():
            read(start)
        return count * WINDOW

    return run


def _zarr(cache: Path) -> dict[str, Run]:
    from storage import LogitCache

    names = list(LogitCache.open(str(cache)).teacher(LEAN).specs)

    def opened() -> list[Any]:
        return [_opened(cache / "teachers" / LEAN / name) for name in names]

    def whole_shards(config: Mapping[str, Any]) -> int:
        with _zarr_config(config):
            for array in opened():
                for start in range(0, N, SHARD):
                    array[start : start + SHARD]
        return N

    arrays = opened()
    found: dict[str, Run] = {"zarr, whole shards": lambda: whole_shards(_PLAIN)}
    if importlib.util.find_spec("zarrs") is not None:
        found["zarr, whole shards, Rust pipeline"] = lambda: whole_shards(_RUST)
    found["zarr, random windows"] = _random(
        lambda start: [array[start : start + WINDOW] for array in arrays], FEW_WINDOWS
    )
    return found


def _parquet(folder: Path) -> dict[str, Run]:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    datasets.disable_progress_bars()
    path = str(folder / "a.parquet")
    mapped = datasets.Dataset.from_parquet(path, cache_dir=str(folder / "arrow"))
    as_arrow, as_numpy = mapped.with_format("arrow"), mapped.with_format("numpy")

    def arrays(table: pa.Table) -> list[Any]:
        return [table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, K) for name in table.column_names]

    def streamed() -> int:
        found = datasets.load_dataset(
            "parquet", data_files=path, split="train", streaming=True, cache_dir=str(folder / "arrow")
        )
        read = 0
        for table in found.with_format("arrow").iter(batch_size=CHUNK):
            read += len(arrays(table)[0])
        return read

    def by_pyarrow() -> int:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                arrays(file.read_row_group(group, use_threads=False))
        return N

    def window_by_pyarrow(start: int) -> None:
        with pq.ParquetFile(path) as file:
            groups = sorted({start // CHUNK, (start + WINDOW - 1) // CHUNK})
            arrays(file.read_row_groups(groups, use_threads=False).slice(start - groups[0] * CHUNK, WINDOW))

    return {
        "Parquet, front to back, `datasets`": streamed,
        "Parquet, front to back, pyarrow": by_pyarrow,
        "Parquet, random windows, pyarrow": _random(window_by_pyarrow, FEW_WINDOWS),
        "datasets, its Arrow file, random windows": _random(lambda start: arrays(as_arrow[start : start + WINDOW])),
        "datasets, its Arrow file, random windows, format numpy": _random(
            lambda start: as_numpy[start : start + WINDOW]
        ),
    }


def _raw(folder: Path) -> dict[str, Run]:
    maps = [
        np.memmap(folder / name, dtype=dtype, mode="r", shape=(N, K))
        for name, dtype in (("ids", np.int32), ("logprobs", np.float16))
    ]

    def sequential() -> int:
        for start in range(0, N, CHUNK):
            for array in maps:
                np.array(array[start : start + CHUNK])
        return N

    return {
        "numpy, mapped files, front to back": sequential,
        "numpy, mapped files, random windows": _random(
            lambda start: [np.array(array[start : start + WINDOW]) for array in maps]
        ),
    }


def _bucket(folder: Path) -> Table:
    names = local, cold, warm = "local disk", "S3, nothing fetched yet", "S3, all fetched before"
    seconds: dict[str, list[float]] = {name: [] for name in names}
    used: dict[str, list[float]] = {name: [] for name in names}

    def read(name: str, place: str) -> None:
        began, used_before = time.perf_counter(), time.process_time()
        training_order(place)
        seconds[name].append(time.perf_counter() - began)
        used[name].append(time.process_time() - used_before)

    copies = folder / "copies"
    with _moto(copies) as bucket:
        url = bucket.upload(folder / "cache", "cache")
        for number in range(S3_ROUNDS):
            if number % 2:
                read(local, str(folder / "cache"))
            shutil.rmtree(copies, ignore_errors=True)
            read(cold, url)
            read(warm, url)
            if not number % 2:
                read(local, str(folder / "cache"))
        fetched = _bytes(copies / "objects")
    rows = [
        (
            name,
            spread(ratios(used[name], used["local disk"])),
            spread([N / t / 1e6 for t in used[name]]),
            spread(ratios(seconds[name], seconds["local disk"])),
            spread([N / t / 1e6 for t in seconds[name]]),
        )
        for name in names
    ]
    return Table(
        "Reading from S3 in training order",
        (
            "place",
            "processor time, ratio",
            "M positions/s of a core",
            "time passed, ratio",
            "M positions/s of time passed",
        ),
        rows,
        f"""The same cache on a moto server on this machine, whose own processor time is not counted but competes for
the cores; a real store is another matter. {S3_ROUNDS} rounds. Shards are fetched whole ({fetched / N:.0f} bytes per
position), checked against their receipts and kept in a local folder; the second reading opens the cache in S3 and
finds them there.""",
    )


@contextlib.contextmanager
def _moto(copies: Path) -> Iterator[Any]:
    """A bucket on a moto server, with the environment that leads to it and to the folder for what is fetched."""
    from support.servers import s3

    port = s3.free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    before = dict(os.environ)
    try:
        server = s3.Server(f"http://127.0.0.1:{port}", "moto", "anything")
        s3.wait_for(server.url, process)
        os.environ.update(server.environment(), LOGIT_CACHE_LOCAL_DIR=str(copies))
        s3.forget_connections()
        yield s3.new_bucket(server)
    finally:
        process.kill()
        process.wait()
        os.environ.clear()
        os.environ.update(before)
        s3.forget_connections()


def _randomness() -> Table:
    from student.data.order import BUFFER_GROUPS, GROUP_TOKENS, ReadingOrder

    windows, group = ORDERED_POSITIONS // WINDOW, GROUP_TOKENS // WINDOW
    order = ReadingOrder(windows, group_windows=group, seed=0, windows_per_step=BATCH).permutation(0)
    bound = BUFFER_GROUPS * group + BATCH
    rows, remark = [], ""
    for name, permutation in (
        ("reading order", order),
        ("shuffled whole", np.random.default_rng(0).permutation(windows)),
        ("as stored", np.arange(windows)),
    ):
        place = np.empty(windows, dtype=np.int64)
        place[permutation] = np.arange(windows)
        whole = place[: windows // group * group].reshape(-1, group)
        apart = whole.max(axis=1) - whole.min(axis=1)
        if name == "reading order" and (over := apart >= bound).any():
            last = windows - int(whole[over].min())
            remark = f" It does not hold for {over.sum()} of {len(whole):,} chunks, of the last {last:,} windows."
        steps = permutation[: windows // BATCH * BATCH].reshape(-1, BATCH) // group
        distinct = (np.diff(np.sort(steps, axis=1), axis=1) > 0).sum(axis=1) + 1
        rows.append((name, f"{int(np.median(apart)):,}", f"{apart.max():,}", f"{distinct.mean():.1f}"))
    return Table(
        "How random the reading order is",
        (
            "order",
            "windows of one chunk lie apart, median",
            "at most",
            f"different chunks in a step of {BATCH} windows",
        ),
        rows,
        f"""{ORDERED_POSITIONS:,} positions, windows of {WINDOW}, groups of {GROUP_TOKENS:,} positions, which is a
chunk of a cache in its default layout; places in the order of an epoch. `student.data.order` promises less than
{bound:,}, whatever the corpus: {BUFFER_GROUPS} groups of {group} windows, and a step.{remark}""",
    )
