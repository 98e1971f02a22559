"""The errors that a user can meet, and the one line each of them prints.

Every error says where, what was expected, what was found, and what to do. All derive from
`LogitCacheError`; where Python has a natural class for the case, they derive from that too, so that
code which does not know this package still catches them.
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

    Errors can be sent from one process to another, whatever their constructors take.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), str(self), self.__dict__)


def _remade(kind: type[LogitCacheError], message: str, fields: dict[str, Any]) -> LogitCacheError:
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(fields)
    return error


class InputError(LogitCacheError, ValueError):
    """What was asked for cannot be done: a missing file, a wrong option, a model that does not fit."""


class CacheNotFound(LogitCacheError, FileNotFoundError):
    """There is no cache, or no teacher entry, where one was expected."""


class FormatError(LogitCacheError, ValueError):
    """Metadata that format v1 does not allow. Nothing was allocated or read on its word."""


class CorruptCache(LogitCacheError, OSError):
    """A stored object differs from the receipt that commits it."""


class MissingObject(CorruptCache):
    """An object is not there, though something that was read before says that it is."""


class IncompleteCache(LogitCacheError, LookupError):
    """A range was asked for that no receipt covers."""


class IdentityMismatch(LogitCacheError, ValueError):
    """Two records that must agree do not; the message lists the fields that differ."""

    def __init__(self, where: str, fields: list[str], remedy: str) -> None:
        self.fields = fields
        super().__init__(f"{where}: {'; '.join(fields)}. {remedy}")


class StorageFull(LogitCacheError, OSError):
    """The disk or the quota is full. Whatever was being written has been removed."""


class StoreUnavailable(LogitCacheError, OSError):
    """A remote store did not answer in time, or refused; nothing it said was taken for data."""


def is_out_of_space(error: OSError) -> bool:
    """Whether the operating system refused a write for want of room (disk, quota or file-size limit)."""
    return error.errno in _NO_SPACE


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `LogitCacheError`, or what the operating system says of a file, into one line on stderr and exit
    status 2; a command's outermost frame."""
    try:
        yield
    except LogitCacheError as error:
        message = " ".join(str(error).split())
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
    raise SystemExit(2)
