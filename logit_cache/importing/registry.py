"""All formats, and which one files are of."""

from __future__ import annotations

from pathlib import Path

from logit_cache.importing.document import Format
from logit_cache.importing.files import source_files
from logit_cache.importing.formats import parquet, sglang, vllm
from storage.errors import InputError

FORMATS: dict[str, Format] = {each.name: each for each in (parquet.FORMAT, vllm.FORMAT, sglang.FORMAT)}


def format_of(source: str, name: str) -> tuple[Format, list[Path]]:
    """A format by its name, and its files. Raises InputError for another name, and no files."""
    if name not in FORMATS:
        raise InputError(f"--format {name}: there is {', '.join(FORMATS)}")
    return FORMATS[name], source_files(source, FORMATS[name].suffixes)


def guessed(source: str) -> Format:
    """The format of files by the content of the first one. Raises InputError where it is none, or several."""
    suffixes = tuple({suffix for each in FORMATS.values() for suffix in each.suffixes})
    first = source_files(source, suffixes)[0]
    found = [each for each in FORMATS.values() if each.recognises(first)]
    if len(found) != 1:
        which = " and ".join(each.name for each in found) or "none of those that are known"
        raise InputError(f"{first}: by its content it is {which}: give --format, one of {', '.join(FORMATS)}")
    return found[0]
