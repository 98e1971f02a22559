"""The names of a stream's sources, and the numbers by which its documents refer to them."""

from __future__ import annotations

from storage.errors import InputError
from storage.format.manifest.cache import MAX_SOURCES

_MOST_CHARACTERS = 256


class SourceNames:
    """Sources numbered as the record lists them: files one by one, named ones by their names, in order of occurrence.

    A record lists at most `MAX_SOURCES`. Of files alone, the last one listed stands for all others; names are never
    merged: one too many is refused.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._named: dict[str, int] = {}

    @property
    def noun(self) -> str:
        return "source" if self._named else "file"

    def of_file(self, name: str) -> int:
        self.names.append(name)
        self._check_number()
        return len(self.names) - 1

    def of_name(self, name: str) -> int:
        """The number of a named source: another for each name. Raises InputError for one too many."""
        if name not in self._named:
            self._named[name] = len(self.names)
            self.names.append(name)
            self._check_number()
        return self._named[name]

    def _check_number(self) -> None:
        if self._named and len(self.names) > MAX_SOURCES:
            raise InputError(
                f"more than {MAX_SOURCES:,} sources, the last one {self.names[-1]!r}: take a column with fewer values, "
                f"or give files a common name: --text NAME=FOLDER"
            )


def check_source_name(name: str, where: str) -> None:
    """Raise InputError for a text that cannot be the name of a source."""
    if not name.strip() or not name.isprintable() or len(name) > _MOST_CHARACTERS:
        raise InputError(
            f"{where}: expected the name of a source, of 1 to {_MOST_CHARACTERS} characters that can be printed, "
            f"found {name[:40]!r}"
        )
