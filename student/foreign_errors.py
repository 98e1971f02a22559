"""Other libraries' exceptions as one line that names the model."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

from storage.errors import InputError, LogitCacheError


@contextlib.contextmanager
def explained(what: str, hint: str = "") -> Iterator[None]:
    """Turns any exception of other libraries inside into an InputError: they have no common base class."""
    try:
        yield
    except (LogitCacheError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} ({reason[:400] or type(error).__name__}){hint}") from error


def closest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?', or an empty string without a close match."""
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
