"""The errors that a user can meet, each printed as one line.

Every message states where, what was expected, what was found, and the remedy. All derive from `LogitCacheError`; where
Python has a natural class for the case, they derive from that too, so that code that does not know this package still
catches them.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LogitCacheError(Exception):
    """Base class. The message is a complete explanation for a user; it needs no traceback.

    Errors can be sent from one process to another, whatever their constructors take. `exit_status` is that of a
    command which ends with the error: 2 where its input is wrong, 1 where the work itself failed.
    """

    exit_status = 2

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), str(self), self.__dict__)


def _remade(kind: type[LogitCacheError], message: str, fields: dict[str, Any]) -> LogitCacheError:
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(fields)
    return error


class InputError(LogitCacheError, ValueError):
    """A request that cannot be carried out: a missing file, a wrong option, a model that does not fit."""


class CacheNotFound(LogitCacheError, FileNotFoundError):
    """There is no cache, or no teacher entry, where one was expected."""


class FormatError(LogitCacheError, ValueError):
    """Metadata that format v1 does not allow. Nothing was allocated or read because of it."""


class CorruptCache(LogitCacheError, OSError):
    """A stored object differs from the receipt that commits it."""


class MissingObject(CorruptCache):
    """An object is missing, though a receipt, an index or a listing that was read before names it."""


class IncompleteCache(LogitCacheError, LookupError):
    """A requested range that no receipt covers."""


# So many fields of two records are shown with their values, and as many again by name.
_MOST_FIELDS = 6


class IdentityMismatch(LogitCacheError, ValueError):
    """Two records that must agree do not; `fields` are those that differ, of which the message shows the first."""

    def __init__(self, where: str, fields: list[str], remedy: str) -> None:
        self.fields = fields
        shown, more = fields[:_MOST_FIELDS], [field.partition(":")[0] for field in fields[_MOST_FIELDS:]]
        if more:
            others = ", ".join(more[:_MOST_FIELDS]) + (", …" if len(more) > _MOST_FIELDS else "")
            shown.append(f"{len(more)} more differ: {others}")
        super().__init__(f"{where}: {'; '.join(shown)}. {remedy}")


class Diverged(LogitCacheError, ArithmeticError):
    """A loss, gradient, weight or held-out figure that is not finite: a model is of no use from there on."""

    exit_status = 1


class StorageFull(LogitCacheError, OSError):
    """The disk or the quota is full. Partly written data has been removed."""


class StoreUnavailable(LogitCacheError, OSError):
    """A remote store did not respond in time, or refused; no part of its response was taken for data."""


class StoreNotFound(StoreUnavailable):
    """The bucket or data set of a URL does not exist, or is hidden from this user."""


def is_out_of_space(error: OSError) -> bool:
    """Whether the operating system refused a write for lack of space (disk, quota or file-size limit)."""
    return error.errno in _NO_SPACE


def error_text(error: BaseException, most: int | None = 200) -> str:
    """The message of an error on one line, at most so many characters; its type's name where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `LogitCacheError`, or an OSError about a file, into one line on stderr and its exit status (2).

    For the outermost frame of a command.
    """
    status = LogitCacheError.exit_status
    try:
        yield
    except LogitCacheError as error:
        message, status = error_text(error, None), error.exit_status
    except OSError as error:
        if is_out_of_space(error):
            message = (
                f"no space left while writing {error.filename or 'a file'}: free some room and run the command again"
            )
        elif error.filename is not None and error.strerror is not None:
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
