"""All formats, and which one files are of."""

from __future__ import annotations

from pathlib import Path

from logit_cache.importing.document import Format
from logit_cache.importing.files import source_files
from logit_cache.importing.formats import axolotl, distillkit, llama_cpp, maxtext, nemo, parquet, sglang, vllm
from storage.errors import InputError

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        parquet.FORMAT,
        vllm.FORMAT,
        sglang.FORMAT,
        distillkit.FORMAT,
        distillkit.LEGACY,
        axolotl.FORMAT,
        nemo.FORMAT,
        llama_cpp.FORMAT,
        maxtext.FORMAT,
    )
}


def format_of(source: str, name: str) -> tuple[Format, list[Path]]:
    """A format by its name, and its files. Raises InputError for another name, no files, and others."""
    if name not in FORMATS:
        raise InputError(f"--format {name}: there is {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    files = source_files(source, chosen.suffixes)
    if not chosen.recognises(files[0]):
        raise InputError(
            f"{files[0]}: expected {chosen.about}; by its content it is {_named(_formats_of(files[0]))}: give that "
            f"--format, or other files"
        )
    return chosen, files


def guessed(source: str) -> Format:
    """The format of files by the content of the first one. Raises InputError where it is none, or several."""
    suffixes = tuple({suffix for each in FORMATS.values() for suffix in each.suffixes})
    first = source_files(source, suffixes)[0]
    found = _formats_of(first)
    if len(found) != 1:
        raise InputError(f"{first}: by its content it is {_named(found)}: give --format, one of {', '.join(FORMATS)}")
    return found[0]


def _formats_of(path: Path) -> list[Format]:
    return [each for each in FORMATS.values() if each.recognises(path)]


def _named(formats: list[Format]) -> str:
    return " or ".join(each.name for each in formats) or "none of those that are known"
