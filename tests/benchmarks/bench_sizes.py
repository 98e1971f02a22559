"""Bytes per position of what a small real teacher says, by array and in all, and what other forms of it would take.

The teacher is trained for a minute on the text in ../shared/data/text where that is there, else on Python's own
standard library, by the public commands. What is stored differs by targets, codes and codec; the exact log-probs of the
same positions say what each of them loses. Sizes are those of the files on the disk.

Legend: `T` positions, `K` stored ids per position, `V` vocabulary size.
"""

from __future__ import annotations

import atexit
import functools
import math
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import NOT_MEASURED, ROOT, Table, command, in_turn, ratios, spread
from numpy.typing import NDArray

V, K = 16_000, 64
CUTS = (0.98, 0.5)
CORPUS = ROOT.parent / "shared/data/text/train"
TOKENIZER_BYTES, TRAINING_BYTES = 6_000_000, 520_000
TEACHER_MODEL, TEACHER_STEPS = "llama-tiny", 700
FIDELITY_POSITIONS = 512
ROUNDS = 5
Codec = tuple[str, int, str, int]
# Blosc's codec, level, shuffle and bytes of a block (0: Blosc's choice). The first two are those of format v1.
ZSTD: Codec = ("zstd", 3, "bitshuffle", 0)
LZ4: Codec = ("lz4", 5, "bitshuffle", 0)
CHUNK_BYTES = 1 << 20
# What is tried: on the ids, and on the codes where they get another.
CODECS: tuple[tuple[Codec, Codec], ...] = (
    *(
        (codec, codec)
        for codec in (
            ZSTD,
            LZ4,
            ("zstd", 1, "bitshuffle", 0),
            ("zstd", 5, "bitshuffle", 0),
            ("zstd", 7, "bitshuffle", 0),
            ("zstd", 3, "bitshuffle", CHUNK_BYTES),
            ("zstd", 5, "bitshuffle", CHUNK_BYTES),
            ("zstd", 3, "shuffle", 0),
            ("zstd", 3, "noshuffle", 0),
            ("lz4", 5, "shuffle", 0),
            ("lz4", 5, "bitshuffle", CHUNK_BYTES),
            ("lz4hc", 5, "bitshuffle", 0),
        )
    ),
    (("zstd", 3, "noshuffle", CHUNK_BYTES), ("zstd", 3, "bitshuffle", CHUNK_BYTES)),
    (("zstd", 5, "noshuffle", CHUNK_BYTES), ("zstd", 5, "bitshuffle", CHUNK_BYTES)),
)
_PER_POSITION = ("kept", "certain", "log_tail", "log_tail_half", "label_logprob", "entropy")
# The arrays of either version of the format that hold ids and log-probs.
_IDS = ("token_ids", "ids")
_LOGPROBS = ("logprob_codes", "logprobs", "certain_codes", "certain_logprobs", "sampled_codes", "sampled_logprobs")


def tables() -> Iterator[Table]:
    """Sizes, then what is lost and how long it takes, then the codecs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = {way.name: way for way in _cached_ways()}
        exact = {kind: stored[f"{word}, all fields, float32"] for kind, word in _WORDS.items()}
        others = [
            *(_parquet(folder, f"Parquet, {word}", exact[kind].targets) for kind, word in _WORDS.items()),
            _parquet(folder, "Parquet, top-k, with the fields per position", exact["topk"].targets, _PER_POSITION),
            _packed("bit-packed, top-k", exact["topk"].targets),
        ]
        yield _sizes([*stored.values(), *others])
        yield _losses([*stored.values(), *others], {kind: way.targets for kind, way in exact.items()})
        yield _codecs()


_WORDS = {"topk": "top-k", "varopt": "VarOpt"}
_CUT = "top-k cut at a mass of"


@functools.cache
def workshop() -> Path:
    """A folder for what several tables and parts use; it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="benchmarks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def teacher() -> tuple[Path, Path]:
    """A token stream of at least 50,000 positions, and a teacher trained on it and as much again."""
    run = workshop()
    _excerpt(run / "text-tokenizer", TOKENIZER_BYTES)
    blocks = _excerpt(run / "text-training", TRAINING_BYTES)
    _write(run / "text-cached", {name: some[::2] for name, some in blocks.items()})
    tokenize = ("logit-cache", "tokenize", "--text")
    command([*tokenize, run / "text-tokenizer", "--train-tokenizer", str(V), "--out", run / "tokenizer"])
    for name in ("training", "cached"):
        command([*tokenize, run / f"text-{name}", "--tokenizer", run / "tokenizer/tokenizer", "--out", run / name])
    settings = {
        "max_steps": TEACHER_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 4e-3,
        "warmup_steps": 20,
        "save_strategy": "no",
    }
    given = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command(
        ["train-teacher", "--cache", run / "training", "--model", TEACHER_MODEL, "--output-dir", run / "model", *given]
    )
    return run / "cached", run / "model"


@functools.cache
def exact_entry(kind: str) -> tuple[Path, str]:
    """The teacher's float32 entry of `kind` (topk, varopt) with all fields: its cache and its name."""
    return cached(kind, kind, "--fields", "all", "--encoding", "float32")


@functools.cache
def cached(name: str, kind: str, *options: str) -> tuple[Path, str]:
    """An entry of the teacher: its cache and its name."""
    cache, model = teacher()
    options = ("--targets", kind, "-k", str(K), "--fidelity-positions", str(FIDELITY_POSITIONS), *options)
    command(["cache-logits", "--cache", cache, "--teacher", model, "--name", name, *options])
    return cache, name


def _excerpt(out: Path, most_bytes: int) -> dict[str, list[str]]:
    """Evenly spread blocks of 50 lines of every file, about `most_bytes` in all; returns them by file."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(CORPUS.glob("*.txt")) if CORPUS.is_dir() else sorted(library.glob("*.py"))
    share = min(1.0, most_bytes / sum(path.stat().st_size for path in files))
    chosen = {}
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        blocks = ["".join(lines[start : start + 50]) for start in range(0, len(lines), 50)]
        wanted = round(share * len(blocks))
        chosen[path.stem + ".txt"] = [blocks[index * len(blocks) // wanted] for index in range(wanted)]
    _write(out, chosen)
    return chosen


def _write(out: Path, blocks: Mapping[str, Sequence[str]]) -> None:
    out.mkdir()
    for name, some in blocks.items():
        (out / name).write_text("".join(some), encoding="utf-8")


@dataclass(frozen=True)
class Way:
    """A way of storing the same positions. Bytes are of all of them; `rest` is whatever belongs to no array.

    targets   as its reader hands them out; None where it has no reader
    """

    name: str
    kind: str
    positions: int
    kept: int
    ids: int
    logprobs: int
    per_position: int
    rest: int
    targets: Any
    encode: Callable[[], object] | None
    decode: Callable[[], object] | None

    @property
    def total(self) -> int:
        return self.ids + self.logprobs + self.per_position + self.rest


def _cached_ways() -> Iterator[Way]:
    """The two float32 entries of the teacher, its entries of version 1, and the same targets in forms of version 2."""
    from support.caches.small import entry_2

    from storage import LogitCache
    from storage.cache.writer import EntryWriter
    from storage.format.encoding import logprob_floor
    from storage.format.manifest.entry import TARGET_FIELDS, TeacherEntry
    from storage.format.pruning import prune

    cache = LogitCache.open(str(teacher()[0]))
    exact = {kind: cache.teacher(exact_entry(kind)[1]) for kind in _WORDS}

    def version_2(
        kind: str, *fields: str, compression: str = "zstd", step: float = 1 / 32, **changes: Any
    ) -> TeacherEntry:
        source = exact[kind].entry
        entry = entry_2(source, *fields, **{**_OF_KIND[kind], **changes})
        encoding = entry.encoding.model_copy(update={"step_nats": step})
        layout = source.layout.model_copy(update={"compression": compression})
        return entry.model_copy(update={"encoding": encoding, "layout": layout})

    all_fields = {"topk": [name for name in TARGET_FIELDS if name != "sampled-logprobs"], "varopt": TARGET_FIELDS}
    wanted: dict[str, tuple[str, TeacherEntry | None]] = {}
    for kind, word in _WORDS.items():
        default = ("entropy", "half-tail") if kind == "topk" else ("entropy",)
        wanted |= {
            f"{word}, v1": (kind, None),
            f"{word}, all fields": (kind, version_2(kind, *all_fields[kind])),
            f"{word}, default": (kind, version_2(kind, *default)),
            f"{word}, lean": (kind, version_2(kind)),
            f"{word}, lean, lz4": (kind, version_2(kind, compression="lz4")),
            f"{word}, lean, codes of 1/16": (kind, version_2(kind, step=1 / 16)),
            f"{word}, lean, codes of 1/64": (kind, version_2(kind, step=1 / 64)),
            f"{word}, all fields, float32": (kind, exact[kind].entry),
        }
    wanted |= {f"{_CUT} {cut}, lean": ("topk", version_2("topk", top_p=cut)) for cut in CUTS}
    for number, (name, (kind, entry)) in enumerate(wanted.items()):
        targets = exact[kind].read(0, exact[kind].entry.positions)
        called = kind
        if entry is None:
            called = cached(f"{kind}-v1", kind, "--format-version", "1")[1]
        elif entry is not exact[kind].entry:
            if entry.targets.top_p is not None:
                targets = prune(targets, K, entry.targets.top_p, logprob_floor(1 / 32))
            called = f"way-{number}"
            writer = EntryWriter.open(cache.url, called, entry)
            for shard in writer.pending():
                start = shard * entry.layout.shard
                writer.commit(shard, targets.rows(start, min(start + entry.layout.shard, entry.positions)))
            writer.finish()
        yield _entry_way(name, kind, Path(cache.url), called, targets)


_OF_KIND: dict[str, dict[str, Any]] = {"topk": {"method": "top-k"}, "varopt": {"method": "varopt", "head_ids": 0}}


def _entry_way(name: str, kind: str, url: Path, entry_name: str, exact: Any) -> Way:
    from storage import LogitCache

    folder = url / "teachers" / entry_name
    opened = LogitCache.open(str(url)).teacher(entry_name)
    found = opened.read(0, len(opened))

    def size(array: str) -> int:
        return sum(path.stat().st_size for path in (folder / array / "c").rglob("*") if path.is_file())

    by_array = {array: size(array) for array in opened.specs}
    ids, logprobs = (sum(by_array.get(array, 0) for array in some) for some in (_IDS, _LOGPROBS))
    return Way(
        name=name,
        kind=kind,
        positions=len(opened),
        kept=int(found.kept.sum(dtype=np.int64)),
        ids=ids,
        logprobs=logprobs,
        per_position=sum(by_array.values()) - ids - logprobs,
        rest=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) - sum(by_array.values()),
        targets=found,
        encode=functools.partial(_encode, opened.entry, exact),
        decode=lambda: LogitCache.open(str(url)).teacher(entry_name).read(0, len(found)),
    )


def _encode(entry: Any, exact: Any) -> None:
    """What the writer does before it publishes."""
    from storage.format.layout import teacher_arrays
    from storage.format.shard import encode_shard
    from storage.format.stored import StoredTargets

    for shard in range(-(-entry.positions // entry.layout.shard)):
        start = shard * entry.layout.shard
        stored = StoredTargets.of(entry, exact.rows(start, min(start + entry.layout.shard, entry.positions)))
        for name, spec in teacher_arrays(entry).items():
            encode_shard(spec, shard, stored.arrays[name])


def _parquet(folder: Path, name: str, exact: Any, fields: Sequence[str] = ()) -> Way:
    """int32 ids and float16 log-probs as lists of K in every row, by pyarrow with zstd and else its defaults."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{name}.parquet"

    def encode() -> None:
        table = pa.table(
            {
                "token_ids": _lists(exact.token_ids.astype(np.int32)),
                "logprobs": _lists(exact.logprobs.astype(np.float16)),
                **{field: getattr(exact, field) for field in fields},
            }
        )
        pq.write_table(table, path, compression="zstd")

    def decode() -> tuple[NDArray[Any], NDArray[Any]]:
        table = pq.read_table(path, columns=["token_ids", "logprobs"], use_threads=False)
        ids, logprobs = (table.column(i).combine_chunks().flatten().to_numpy().reshape(-1, K) for i in range(2))
        return ids, logprobs

    encode()
    groups = pq.ParquetFile(path).metadata
    sizes: dict[str, int] = {}
    for group in range(groups.num_row_groups):
        for number in range(groups.num_columns):
            column = groups.row_group(group).column(number)
            array = column.path_in_schema.partition(".")[0]
            sizes[array] = sizes.get(array, 0) + column.total_compressed_size
    read = replace(exact, logprobs=decode()[1].astype(np.float32))
    return Way(
        name=name,
        kind="varopt" if "VarOpt" in name else "topk",
        positions=len(exact),
        kept=int(exact.kept.sum(dtype=np.int64)),
        ids=sizes["token_ids"],
        logprobs=sizes["logprobs"],
        per_position=sum(sizes[field] for field in fields),
        rest=path.stat().st_size - sum(sizes.values()),
        targets=read,
        encode=encode,
        decode=decode,
    )


def _lists(values: NDArray[Any]) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _packed(name: str, exact: Any) -> Way:
    """Ids at ceil(log2 V) bits, log-probs at 8: of each row, 255 equal steps from its first to its last (float16)."""
    bits = math.ceil(math.log2(V))
    ids = np.packbits(
        ((exact.token_ids[:, :, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint16)) & 1).astype(np.uint8)
    )
    ends = exact.logprobs[:, [0, -1]].astype(np.float16)
    first, last = (column[:, None] for column in ends.astype(np.float32).T)
    steps = np.where(first > last, (first - exact.logprobs) / np.where(first > last, first - last, 1) * 255, 0)
    levels = np.rint(steps).clip(0, 255).astype(np.uint8)
    return Way(
        name=name,
        kind="topk",
        positions=len(exact),
        kept=levels.size,
        ids=ids.nbytes,
        logprobs=levels.nbytes + ends.nbytes,
        per_position=0,
        rest=0,
        targets=replace(exact, logprobs=first - levels * ((first - last) / np.float32(255))),
        encode=None,
        decode=None,
    )


def _sizes(ways: Sequence[Way]) -> Table:
    parquet = {way.kind: way for way in ways if way.name.startswith("Parquet") and not way.per_position}
    rows = []
    for way in ways:
        base, n = parquet[way.kind], way.positions
        cells = (
            f"{way.total / base.total:.2f}",
            f"{(way.ids + way.logprobs) / (base.ids + base.logprobs):.2f}",
            f"{way.total / n:.1f}",
            f"{way.total / way.kept:.2f}",
            *(f"{part / n:.1f}" for part in (way.ids, way.logprobs, way.per_position, way.rest)),
        )
        rows.append((way.name, *cells))
    from storage import LogitCache

    cache = LogitCache.open(str(teacher()[0]))
    top = ways[0].targets
    mass = float(np.exp(top.logprobs.astype(np.float64)).sum(axis=1).mean())
    left = ", ".join(f"{way.kept / way.positions:.1f}" for way in ways if way.name.startswith(_CUT))
    stream = sum(path.stat().st_size for path in (teacher()[0] / "tokens/c").rglob("*") if path.is_file())
    return Table(
        f"Bytes per position, V = {V:,}, K = {K}",
        (
            "way",
            "all, of Parquet's",
            "ids and log-probs, of Parquet's",
            "bytes per position in all",
            "bytes per kept id in all",
            "ids",
            "log-probs",
            "other fields",
            "the rest",
        ),
        rows,
        f"""Targets of {ways[0].positions:,} positions of {_text()} by a {TEACHER_MODEL}, trained on it for
{TEACHER_STEPS} steps of 512 tokens: entropy {float(top.entropy.mean()):.2f} nats, {mass:.2f} of the mass in the {K}
most probable ids; cut at a mass of {" and ".join(map(str, CUTS))}, {left} ids are left. Parquet: int32 ids and
float16 log-probs, zstd, else as pyarrow writes it; ratios are to the one of the same targets. Bit-packed: ids at
{math.ceil(math.log2(V))} bits, log-probs at 8. Neither holds the other fields (counts, tails, label, entropy) unless
it says so. The rest is metadata, receipts and the fidelity report: some ten kilobytes for each entry and three for
each shard, less per position in a larger cache. The token stream, which all entries of a cache share, takes
{stream / cache.record.corpus.positions:.2f} bytes per position more.""",
    )


def _text() -> str:
    return "English (books, dialogues, encyclopaedia)" if CORPUS.is_dir() else "Python's standard library"


def _losses(ways: Sequence[Way], exact: Mapping[str, Any]) -> Table:
    def seconds(run: Callable[[], object]) -> Callable[[], float]:
        def timed() -> float:
            began = time.process_time()
            run()
            return time.process_time() - began

        return timed

    encoding = in_turn({way.name: seconds(way.encode) for way in ways if way.encode is not None}, ROUNDS)
    decoding = in_turn({way.name: seconds(way.decode) for way in ways if way.decode is not None}, ROUNDS)
    base = ways[0].name
    rows = []
    for way in ways:
        nats = quantisation_nats(exact[way.kind], way.targets)
        cells = [f"{nats:.1e}"]
        for taken in (encoding, decoding):
            found = taken.get(way.name)
            cells.append(spread(ratios(found, taken[base])) if found else NOT_MEASURED)
        found = decoding.get(way.name)
        cells.append(spread([way.positions / t / 1e6 for t in found]) if found else NOT_MEASURED)
        rows.append((way.name, *cells))
    reports = {word: _fidelity(kind) for kind, word in _WORDS.items()}
    lost = "; ".join(f"{word}: {_said(report)}" for word, report in reports.items())
    return Table(
        "What codes lose, and the time that they take",
        ("way", "quantisation, KL in nats", "encode, ratio", "decode, ratio", "decode, M positions/s"),
        rows,
        f"""Quantisation: KL from the exact log-probs of the same positions to what the reader hands out, over the ids
that are stored for certain and one bucket for the rest. Processor time of one thread, {ROUNDS} rounds, files in the
page cache, ratios to the first row. Encode: from arrays to the objects of a shard, or to a Parquet file. Decode: a
cache is opened afresh and read whole with every field, receipts and checksums; of Parquet, ids and log-probs alone.
The packed bits have no reader to be timed. What is lost before any quantisation, at {FIDELITY_POSITIONS} positions
that were scored again: {lost}.""",
    )


def _said(report: Any) -> str:
    kl = report.divergences["bucket"].forward
    angles = {name: report.gradients[name]["tempered"].mean for name in report.gradients}
    best = f"as a sample {angles['sampled']:.1f}°, " if "sampled" in angles else ""
    return (
        f"KL to the teacher {kl:.2f} nats with all other ids as one bucket, the mean gradient "
        f"{best}as a bucket {angles['bucket']:.1f}° off"
    )


def _fidelity(kind: str) -> Any:
    from storage import LogitCache

    url, name = exact_entry(kind)
    report = LogitCache.open(str(url)).teacher(name).fidelity()
    assert report is not None
    return report


def quantisation_nats(exact: Any, stored: Any) -> float:
    """Mean over positions of KL(exact || stored) over the stored row's certain ids and one bucket for all else.

    Both are normalised: a row of codes sums to 1 only as far as they do. Ids that were cut from the exact row lie in
    its bucket. In float64, since the figure is near 1e-5.
    """
    columns = np.arange(exact.k)
    certain = columns < stored.certain[:, None]
    cut = (columns >= stored.certain[:, None]) & (columns < exact.certain[:, None])
    cut_mass = np.where(cut, np.exp(np.where(cut, exact.logprobs, 0).astype(np.float64)), 0).sum(axis=1)
    p = _distribution(exact.logprobs, certain, np.exp(exact.log_tail.astype(np.float64)) + cut_mass)
    q = _distribution(stored.logprobs, certain, np.exp(stored.log_tail.astype(np.float64)))
    used = p > 0
    terms = p * (np.log(np.where(used, p, 1)) - np.log(np.where(used, q, 1)))
    return float(terms.sum(axis=1).mean())


def _distribution(logprobs: NDArray[Any], certain: NDArray[np.bool_], tail: NDArray[Any]) -> NDArray[np.float64]:
    heads = np.where(certain, np.exp(np.where(certain, logprobs, 0).astype(np.float64)), 0)
    whole = np.concatenate([heads, tail[:, None]], axis=1)
    return whole / whole.sum(axis=1, keepdims=True)


def _codecs() -> Table:
    """Blosc alone on the ids and the codes of the top-k entry of version 1, chunk by chunk as the format cuts them."""
    import numcodecs
    import numcodecs.blosc

    from storage import LogitCache

    entry = LogitCache.open(str(teacher()[0])).teacher("topk-v1")
    targets = entry.stored(0, len(entry)).arrays
    numcodecs.blosc.use_threads = False
    chunk = 8_192
    count = len(entry) // chunk * chunk
    chunks = {
        name: [np.ascontiguousarray(values[start : start + chunk]) for start in range(0, count, chunk)]
        for name, values in (("ids", targets["token_ids"]), ("codes", targets["logprob_codes"]))
    }
    shuffles = {"noshuffle": numcodecs.Blosc.NOSHUFFLE, "shuffle": numcodecs.Blosc.SHUFFLE}
    shuffles["bitshuffle"] = numcodecs.Blosc.BITSHUFFLE
    encoded: dict[tuple[str, Codec], list[bytes]] = {}
    room = np.empty((chunk, K), dtype=np.uint16)

    def encode(array: str, codec: Codec) -> float:
        blosc = numcodecs.Blosc(codec[0], codec[1], shuffles[codec[2]], codec[3])
        began = time.process_time()
        encoded[array, codec] = [blosc.encode(part) for part in chunks[array]]
        return time.process_time() - began

    def decode(array: str, codec: Codec) -> float:
        blosc = numcodecs.Blosc()
        began = time.process_time()
        for part in encoded[array, codec]:
            blosc.decode(part, out=room)
        return time.process_time() - began

    each = dict.fromkeys(one for ids, codes in CODECS for one in (("ids", ids), ("codes", codes)))
    encoding = in_turn({repr(one): functools.partial(encode, *one) for one in each}, 3)
    decoding = in_turn({repr(one): functools.partial(decode, *one) for one in each}, ROUNDS)

    def both(taken: dict[str, list[float]], ids: Codec, codes: Codec) -> list[float]:
        pairs = zip(taken[repr(("ids", ids))], taken[repr(("codes", codes))], strict=True)
        return [sum(pair) for pair in pairs]

    def size(array: str, codec: Codec) -> float:
        return sum(map(len, encoded[array, codec])) / count

    v1 = size("ids", ZSTD) + size("codes", ZSTD)
    rows = []
    for pair in CODECS:
        ids, codes = size("ids", pair[0]), size("codes", pair[1])
        rows.append(
            (
                _codec_words(*pair),
                f"{(ids + codes) / v1:.3f}",
                f"{ids:.1f}",
                f"{codes:.1f}",
                spread(ratios(both(encoding, *pair), both(encoding, ZSTD, ZSTD))),
                spread(ratios(both(decoding, *pair), both(decoding, ZSTD, ZSTD))),
            )
        )
    return Table(
        "Codecs on ids and codes (top-k, version 1, 1/32)",
        ("Blosc", "bytes, ratio", "ids, bytes", "codes, bytes", "encode, ratio", "decode, ratio"),
        rows,
        f"""Chunks of {chunk:,} positions, {chunk * K * 2 >> 20} MiB each of ids and of codes, {count:,} positions,
one thread; bytes per position. Blosc's levels 3, 5 and 7 are 5, 9 and 13 of zstd itself. Version 1 of an entry can be
written in the two ways that are marked; version 2 packs ids and certain codes by zstd 5 after a shuffle of bytes. One
block is a whole chunk; Blosc itself cuts smaller ones.""",
    )


def _codec_words(ids: Codec, codes: Codec) -> str:
    def one(codec: Codec) -> str:
        cname, level, shuffle, block = codec
        return f"{cname} {level} {shuffle}{', one block' if block else ''}"

    marked = {ZSTD: " (v1: zstd)", LZ4: " (v1: lz4)"}
    return one(ids) + marked.get(ids, "") if ids == codes else f"ids {one(ids)}; codes {one(codes)}"
