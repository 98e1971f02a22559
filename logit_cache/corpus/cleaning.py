"""`logit-cache clean`: text files → a folder of cleaned files of the same names, and a record of them.

Each file is cleaned into NAME.partial; when it is complete it is entered in `cleaning.json` and renamed. A killed run
resumes where it stopped, and a finished file is left alone as long as its input, its family and the rules are those of
the record. The record is written before the rename: a file that the record does not list is somebody else's, and an
entry without its file is cleaned again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from logit_cache.corpus.cleaning_rules import FAMILIES, PLAIN, RULES_VERSION, Cleaner, family_of
from logit_cache.corpus.sources.find import find_sources
from logit_cache.corpus.sources.text_files import COMPRESSIONS, decoded
from storage.config import Frozen, Settings
from storage.errors import IdentityMismatch, InputError
from storage.files import PARTIAL, atomic_file, check_writable, local_path, replace_file
from storage.progress import Advance, Track

RECORD = "cleaning.json"
PIECE_BYTES = 1 << 18


class CleaningJob(Settings):
    """The fields of `logit-cache clean`.

    text         files, folders and patterns of plain text
    out          the folder of the cleaned files
    family       `NAME=GLOB`: the files whose base name or path matches belong to that family
    limit_bytes  only this many bytes from the start of each file, cut at a line end; at least its first line
    """

    text: Annotated[tuple[str, ...], Field(min_length=1)]
    out: Annotated[str, Field(min_length=1)]
    family: tuple[str, ...] = ()
    limit_bytes: Annotated[int, Field(ge=1)] | None = None


class CleanedFile(Frozen):
    """One entry of the record. `bytes_in`, `sha256_in` are of the cleaned part of the input: all, unless `cut`."""

    family: str
    rules: int
    bytes_in: int
    sha256_in: str
    cut: bool
    lines_in: int
    bytes_out: int
    sha256_out: str
    lines_out: int


class Cleaning(Frozen):
    """The record, `cleaning.json`: an entry for each file of the folder, by its name."""

    kind: Literal["cleaning"] = "cleaning"
    format: Literal[1] = 1
    files: dict[str, CleanedFile] = Field(default_factory=dict)


ChosenBy = Literal["--family", "name", "no family in the name"]


class Outcome(Frozen):
    name: str
    input: str
    chosen_by: ChosenBy
    already_there: bool
    entry: CleanedFile


@dataclass(frozen=True)
class _Input:
    """A file to clean, of which the first `size` bytes are taken."""

    name: str
    location: str
    size: int
    family: str
    chosen_by: ChosenBy

    def blocks(self, advance: Advance) -> Iterator[bytes]:
        left = self.size
        with open(self.location, "rb") as file:
            while block := file.read(min(PIECE_BYTES, left)):
                yield block
                left -= len(block)
                advance(len(block))


def clean(job: CleaningJob, track: Track) -> list[Outcome]:
    """Clean the files that are not clean yet. `track(name, total, unit)` opens a progress bar and yields `advance`.

    Raises InputError for input that is no UTF-8 text, and IdentityMismatch if the folder holds a file of the same name
    that came from another input, family or version of the rules; that is checked before anything is written.
    """
    inputs = _inputs(job)
    out = _folder(job.out)
    record = _read_record(out)
    with track("clean", sum(one.size for one in inputs), "bytes") as advance:
        there = {one.name for one in inputs if _is_there(out, record, one, advance)}
        if len(there) < len(inputs):
            check_writable(out, f"--out {job.out}")
        for one in inputs:
            if one.name not in there:
                out.mkdir(parents=True, exist_ok=True)
                record = _clean_file(out, record, one, advance)
    return [
        Outcome(
            name=one.name,
            input=one.location,
            chosen_by=one.chosen_by,
            already_there=one.name in there,
            entry=record.files[one.name],
        )
        for one in inputs
    ]


def _inputs(job: CleaningJob) -> list[_Input]:
    found: dict[str, str] = {}
    for source in find_sources(job.text):
        name = Path(source.location).name
        if source.named:
            raise InputError(f"{source.name}={source.location}: files are cleaned under their own names: give the path")
        if source.kind != "text" or Path(name).suffix.lower() in COMPRESSIONS:
            raise InputError(
                f"{source.location}: expected a plain text file, as BabyLM's are; write the text into one first"
            )
        if name.endswith(PARTIAL):
            raise InputError(f"{source.location}: a name in {PARTIAL} is for files that are being written; rename it")
        if name in found:
            raise InputError(
                f"{found[name]} and {source.location} would both become {name} in {job.out}: "
                f"clean them into different folders"
            )
        found[name] = source.location
    chosen = _chosen_families(job, found)
    inputs = []
    for name, location in found.items():
        family = chosen.get(name, family_of(name))
        by: ChosenBy = "--family" if name in chosen else "no family in the name" if family == PLAIN else "name"
        inputs.append(_Input(name, location, _bytes_taken(location, job.limit_bytes), family, by))
    return inputs


def _chosen_families(job: CleaningJob, locations: dict[str, str]) -> dict[str, str]:
    """The families that --family names, by the base name of the file."""
    chosen: dict[str, str] = {}
    for option in job.family:
        family, _, pattern = option.partition("=")
        if family not in FAMILIES or not pattern:
            raise InputError(f"--family {option}: expected NAME=GLOB, where NAME is one of {', '.join(FAMILIES)}")
        matching = [n for n, location in locations.items() if fnmatch(n, pattern) or fnmatch(location, pattern)]
        if not matching:
            raise InputError(f"--family {option}: the pattern matches none of the files of --text; check its spelling")
        for name in matching:
            if chosen.setdefault(name, family) != family:
                raise InputError(f"--family: {name} cannot be both {chosen[name]} and {family}: narrow the patterns")
    return chosen


def _folder(out: str) -> Path:
    if "://" in out:
        raise InputError(f"--out {out}: cleaned text is written to a folder of this machine")
    path = local_path(out)
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {out}: a file, where a folder was expected: give another name")
    return path


def _read_record(out: Path) -> Cleaning:
    path = out / RECORD
    if not path.exists():
        return Cleaning()
    try:
        return Cleaning.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: not the record of a cleaning ({' '.join(str(error.errors()[0]['msg']).split())}); "
            f"give another --out"
        ) from None


def _bytes_taken(location: str, limit: int | None) -> int:
    """How many bytes of the file are cleaned: the lines that end within the limit, or at least the first."""
    size = os.stat(location).st_size
    if limit is None or size <= limit:
        return size
    with open(location, "rb") as file:
        for stop in range(limit, 0, -PIECE_BYTES):
            start = max(0, stop - PIECE_BYTES)
            file.seek(start)
            if end := file.read(stop - start).rfind(b"\n") + 1:
                return start + end
        file.seek(limit)
        while (piece := file.readline(PIECE_BYTES)) and not piece.endswith(b"\n"):
            pass
        return file.tell()


def _is_there(out: Path, record: Cleaning, one: _Input, advance: Advance) -> bool:
    """Whether the cleaned file exists. Raises InputError or IdentityMismatch for another file of its name."""
    path = out / one.name
    entry = record.files.get(one.name)
    if not path.exists():
        return False
    if entry is None:
        raise InputError(f"{path}: there is a file of this name that {RECORD} does not list: give another --out")
    sha256_in = hashlib.sha256()
    for block in one.blocks(advance):
        sha256_in.update(block)
    with open(path, "rb") as file:
        sha256_out = hashlib.file_digest(file, "sha256")
    wanted = {
        "family": (entry.family, one.family),
        "rules": (entry.rules, RULES_VERSION),
        "bytes_in": (entry.bytes_in, one.size),
        "sha256_in": (entry.sha256_in, sha256_in.hexdigest()),
        "sha256_out": (entry.sha256_out, sha256_out.hexdigest()),
    }
    fields = [f"{field} was {before}, is {now}" for field, (before, now) in wanted.items() if before != now]
    if fields:
        raise IdentityMismatch(f"{path} is the work of another run", fields, "Remove that file, or give another --out")
    return True


def _clean_file(out: Path, record: Cleaning, one: _Input, advance: Advance) -> Cleaning:
    sha256_in, sha256_out = hashlib.sha256(), hashlib.sha256()
    bytes_out = 0
    cleaner = Cleaner(one.family, one.location)

    def read() -> Iterator[bytes]:
        for block in one.blocks(advance):
            sha256_in.update(block)
            yield block

    def cleaned() -> Iterator[str]:
        for text in decoded(read(), one.location):
            yield cleaner.feed(text)
        yield cleaner.close()

    with atomic_file(out / one.name, durable=True) as partial:
        with partial.open("wb") as file:
            for text in cleaned():
                data = text.encode()
                sha256_out.update(data)
                bytes_out += file.write(data)
        entry = CleanedFile(
            family=one.family,
            rules=RULES_VERSION,
            bytes_in=one.size,
            sha256_in=sha256_in.hexdigest(),
            cut=one.size < os.stat(one.location).st_size,
            lines_in=cleaner.lines_in,
            bytes_out=bytes_out,
            sha256_out=sha256_out.hexdigest(),
            lines_out=cleaner.lines_out,
        )
        record = record.model_copy(update={"files": dict(sorted({**record.files, one.name: entry}.items()))})
        replace_file(out / RECORD, (record.model_dump_json(indent=1) + "\n").encode())
    return record
