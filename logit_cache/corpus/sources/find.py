"""Which files a path, a folder, a pattern or a hub name stands for, and the format of each (docs/text.md).

A file that is named is read. Of several that a folder or a pattern stands for, those that only describe a data set, or
that a program keeps beside it, are left out, and the log names them. What cannot be meant is refused: files of several
formats, a file beside its own compressed copy, training and test splits together, a folder that lacks shards of a set.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, NoReturn

from logit_cache.corpus.sources.names import check_source_name
from logit_cache.corpus.sources.text_files import COMPRESSIONS
from storage.errors import InputError
from storage.files import local_path
from storage.progress import Log, silent

HUB = re.compile(r"^hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?$")

Kind = Literal["text", "jsonl", "csv", "tsv", "parquet", "arrow", "hub"]
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
_CALLED = {"text": "text", "jsonl": "JSON lines", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet", "arrow": "Arrow"}

# What lies beside a data set: prose about it, and the files of programs.
_PROSE = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|authors)([._-].*)?", re.IGNORECASE)
_PROGRAMS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "cache-*.arrow", "_SUCCESS",
             "_metadata", "_common_metadata", "_started_*", "_committed_*", "*.crc", "*.md5", "*.sha256")  # fmt: skip
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/", 1 << 10
_NAMED = 5  # files that are left out, by a line of the log
_SHARD = re.compile(r"^(?P<set>.*?[-.])(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\..*)?$")
_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train|training)|(?P<test>test|testing)|(?P<validation>val|valid|validation|dev|eval))(?![a-z])"
)


@dataclass(frozen=True, slots=True)
class Source:
    """One file or data set. `name` is its name in the cache record: a base name or hub id, never a folder; or, where it
    is `named`, the name that it was given, which it may share with others."""

    name: str
    kind: Kind
    location: str
    file_bytes: int | None
    named: bool = False


def find_sources(text: Iterable[str], log: Log = silent) -> list[Source]:
    """The sources that paths, patterns, folders and hub names stand for; raises InputError for any that names none.

    `log` receives what was found in each folder and by each pattern, what was left out, and what is read twice.
    """
    sources = [source for item in text for source in _named(item, log)]
    places = Counter(s.location if s.kind == "hub" else os.path.realpath(s.location) for s in sources)
    for place, times in places.items():
        if times > 1:
            log(f"{place} is read {times} times, as it is named")
    return sources


def _named(item: str, log: Log) -> list[Source]:
    """The sources of PATH or NAME=PATH; what is there under the whole text is a path."""
    name, equals, rest = item.partition("=")
    if not equals or "/" in name or name.startswith("hub:") or _is_there(item):
        return _find(item, log)
    check_source_name(name, item)
    if not rest:
        raise InputError(f"{item!r}: expected NAME=PATH, and there is no path; give a file, a folder, or a pattern")
    try:
        return [replace(source, name=name, named=True) for source in _find(rest, log)]
    except InputError as error:
        raise InputError(f"{error} ({item!r} was read as SOURCE=PATH)") from None


def _is_there(item: str) -> bool:
    path = local_path(item)
    return os.path.exists(path) or (glob.has_magic(item) and bool(glob.glob(str(path), recursive=True)))


def _find(item: str, log: Log) -> list[Source]:
    if item.startswith("hub:"):
        if not HUB.match(item):
            raise InputError(f"{item!r}: expected hub:NAME, hub:NAME:CONFIG or hub:NAME@REVISION")
        return [Source(item, "hub", item, None)]
    if "://" in item:
        raise InputError(f"{item}: text is read from files of this machine or from hub:NAME; copy it here first")
    path = local_path(item)
    if path.is_dir():
        left: list[str] = []
        files = sorted(_below(path, left))
        if not files:
            raise InputError(f"{item}: the folder holds no files; give files or a folder with some")
        files = _chosen(item, path, files, left, log)
        _refuse_missing_shards(item, files)
    elif path.exists():
        files = [path]
    elif glob.has_magic(item):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [p for p in found if not p.is_dir()]
        if not files:
            remedy = f"but the folder {found[0]}: give that" if found else f"here ({os.getcwd()}); check its spelling"
            raise InputError(f"{item}: the pattern matches no file {remedy}")
        root = Path(os.path.commonpath([p.parent for p in files]))
        # `**` matches what is in the folders, too.
        left = [] if "**" in item else [f"{p}/" for p in found if p.is_dir()]
        files = _chosen(item, root, files, left, log)
    else:
        raise InputError(f"{item}: no such file; give a file, a folder, a pattern, or hub:NAME for a hub data set")
    return [_file_source(p) for p in files]


def _file_source(path: Path) -> Source:
    if not path.is_file():
        state = "is neither a file nor a folder" if path.exists() else "is a link to a file that is not there"
        raise InputError(f"{path}: {state}, so its text cannot be read; write it to a file, or leave it out")
    size = path.stat().st_size
    if size < _POINTER_BYTES and os.access(path, os.R_OK) and path.read_bytes().startswith(_POINTER):
        raise InputError(f"{path}: a pointer of Git LFS is there, and not the file: fetch it, with git lfs pull")
    # A name that is not UTF-8 must still fit into JSON.
    name = os.fsencode(path.name).decode("utf-8", "replace")
    return Source(name, _kind(path), str(path), size)


def _kind(path: Path) -> Kind:
    return _KINDS.get(Path(_uncompressed(path)).suffix.lower(), "text")


def _uncompressed(path: Path) -> str:
    """The name of a file without the ending of a compression."""
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def _below(folder: Path, left: list[str]) -> Iterator[Path]:
    """Files below a folder, also in linked folders; `left` receives the others."""

    def unreadable(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None

    root = Path(os.path.realpath(folder))
    seen: set[Path] = set()
    for at, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        here, real = Path(at), Path(os.path.realpath(at))
        if real in seen or (here.is_symlink() and here != folder and _is_below(real, root)):
            left.append(f"{here.relative_to(folder)}/ (a link to a folder that is read already)")
            folders.clear()
            continue
        seen.add(real)
        left += [str((here / name).relative_to(folder)) for name in (*folders, *names) if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here / name for name in names if not name.startswith("."))


def _is_below(path: Path, root: Path) -> bool:
    """Whether a folder is found from the root without a link."""
    return path.is_relative_to(root) and not any(part.startswith(".") for part in path.relative_to(root).parts)


def _chosen(item: str, root: Path, files: list[Path], left: list[str], log: Log) -> list[Path]:
    """Those of several files that hold the text, for `log` to name. Raises InputError where that cannot be known."""
    kept = [p for p in files if not any(fnmatch(p.name, name) for name in _PROGRAMS)] or files
    if any(_kind(p) != "text" for p in kept):
        # Among files of text, a README is one of them.
        kept = [p for p in kept if _kind(p) != "text" or not _PROSE.fullmatch(p.name)]
    _refuse_mixtures(item, root, kept)
    if _kind(kept[0]) != "text":
        _refuse_splits(item, root, kept, [p.parent for p in files if p.name == "dataset_dict.json"])
    ends = f", from {kept[0]} to {kept[-1]}" if len(kept) > 1 else f", {kept[0]}"
    left = sorted([*left, *(str(p.relative_to(root)) for p in set(files) - set(kept))])
    more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    log(
        f"{item}: {len(kept):,} {_CALLED[_kind(kept[0])]} file{'s' * (len(kept) > 1)}{ends}"
        + (f"; left out: {', '.join(left[:_NAMED])}{more}" if left else "")
    )
    return kept


def _refuse_mixtures(item: str, root: Path, kept: list[Path]) -> None:
    """Refuse files of several formats, and the same file twice."""
    first: dict[str, Path] = {}
    for p in kept:
        first.setdefault(_kind(p), p)
    if len(first) > 1:
        ending = next(Path(_uncompressed(p)).suffix for kind, p in first.items() if kind != "text")
        found = " and ".join(f"{_CALLED[kind]} ({p.relative_to(root)})" for kind, p in first.items())
        raise InputError(
            f"{item}: files of several formats, {found}: give those that are meant, by name or by a pattern such as "
            f"'{root}/**/*{ending}*'"
        )
    plain = {p for p in kept if _uncompressed(p) == p.name}
    for p in kept:
        if p not in plain and p.with_name(_uncompressed(p)) in plain:
            raise InputError(f"{item}: {_uncompressed(p)} is there twice, also as {p.name}: remove one of them")


def _refuse_splits(item: str, root: Path, kept: list[Path], dictionaries: list[Path]) -> None:
    """Refuse files of several splits: those of a DatasetDict, or by the words in their names."""
    names = {found.lastgroup for p in kept if (found := _SPLIT.search(str(p.relative_to(root)).lower()))}
    for folder in dictionaries:
        names = {p.relative_to(folder).parts[0] for p in kept if folder in p.parents}
    if len(names) > 1:
        raise InputError(
            f"{item}: files of several splits, {' and '.join(sorted(map(str, names)))}: give each that is meant by "
            f"itself, as a folder or a pattern such as '{root}/**/*train*'"
        )


def _refuse_missing_shards(item: str, files: Iterable[Path]) -> None:
    shards: dict[tuple[str, ...], set[str]] = {}
    for p in files:
        if found := _SHARD.match(p.name):
            key = str(p.parent), found["set"], found["count"], found["ending"] or ""
            shards.setdefault(key, set()).add(found["number"])
    for (_, name, count, ending), numbers in shards.items():
        if len(numbers) < int(count):
            raise InputError(
                f"{item}: {len(numbers)} of the {int(count)} files {name}?????-of-{count}{ending} are there: fetch the "
                f"others, or give a pattern for these"
            )
