"""`logit-cache export`: an entry as a folder of files of another format. The folder is there once all of it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from logit_cache.exporting.documents import Exported, check_entry, exported
from logit_cache.exporting.formats import WRITERS, Export
from storage import LogitCache
from storage.errors import InputError
from storage.files import local_path
from storage.progress import Track, untracked

_FILE_TOKENS = 1 << 18


@dataclass(frozen=True)
class Delivered:
    """The folder that was written: windows and tokens in it, files, and targets that the format cannot hold."""

    folder: str
    name: str
    format: str
    windows: int
    tokens: int
    files: int
    left_out: int


def export_entry(url: str, name: str, format: str, out: str, track: Track = untracked) -> Delivered:
    """Write an entry's windows to a new folder.

    Raises InputError for what the format cannot say, and for a folder that is there.
    """
    import pyarrow.parquet

    if format not in WRITERS:
        raise InputError(f"--format {format}: there is {', '.join(WRITERS)}")
    writer, folder = WRITERS[format], local_path(out)
    if folder.exists():
        raise InputError(f"{out} is there already, and nothing of it is replaced: give a new folder")
    cache = LogitCache.open(url)
    entry = cache.teacher(name)
    check_entry(url, entry, writer.tail_needed)
    record = entry.entry
    export = Export(record.targets.k, record.vocabulary_size, record.targets.positions == "all")
    windows = tokens = files = 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        staging = Path(temporary) / folder.name  # a folder with the usual permissions
        staging.mkdir()
        with track(f"export {name}", record.positions, "positions") as advance:
            for some in _in_files(exported(url, cache, entry)):
                pyarrow.parquet.write_table(writer.table(some, export), staging / f"data_{files}.parquet")
                count = sum(len(window.ids) for window in some)
                windows, tokens, files = windows + len(some), tokens + count, files + 1
                advance(count)
        for beside, content in writer.beside(export).items():
            _write_yaml(staging / beside, content)
        staging.rename(folder)
    return Delivered(str(out), name, format, windows, tokens, files, export.left_out)


def _in_files(windows: Iterator[Exported]) -> Iterator[list[Exported]]:
    """Windows in groups of about as many tokens as a file has."""
    some: list[Exported] = []
    count = 0
    for window in windows:
        some.append(window)
        count += len(window.ids)
        if count >= _FILE_TOKENS:
            yield some
            some, count = [], 0
    if some:
        yield some


def _write_yaml(path: Path, content: dict[str, object]) -> None:
    import yaml

    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
