"""What a failed request means: an answer that stays, a host that cannot be reached, or a failure that may pass.

Client libraries wrap the error of the system in their own; all that an error is made of is looked at.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator

from storage.errors import error_text

_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
# The end of a connection during a handshake passes; a certificate that is refused does not.
_TLS_PASSES = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")
# HTTP statuses of clients that are no mistake of the request: time-out, conflict, too early, too many.
_PASSING_STATUSES = (408, 409, 425, 429)
_MISSING = {
    "NoSuchBucket": "there is no such bucket: create it, or correct the URL",
    "RepositoryNotFoundError": "the hub has no such data set, or it is private: correct the URL, or run hf auth login",
    "RevisionNotFoundError": "the data set has no such revision: correct the URL",
}


def parts(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it wraps."""
    seen: list[BaseException] = []
    left: list[object] = [error]
    while left:
        each = left.pop()
        if isinstance(each, BaseException) and each not in seen:
            seen.append(each)
            yield each
            kept = getattr(each, "kwargs", None)  # botocore's
            left += [kept.get("error") if isinstance(kept, dict) else None, getattr(each, "os_error", None)]
            left += [each.__context__, each.__cause__]


def missing_store(error: BaseException) -> str | None:
    """Why there can be no object: its bucket or repository does not exist; None where only the object is missing."""
    names = {code(error), *(type(each).__name__ for each in parts(error))}
    return next((text for name, text in _MISSING.items() if name in names), None)


def refusal(error: BaseException) -> str | None:
    """The refusal of access that an error reports, None for any other error."""
    found = next((status(each) for each in parts(error) if status(each) in (401, 403, 407)), None)
    if found is None and not isinstance(error, PermissionError):
        return None
    if found == 407:
        return f"the proxy refuses ({error_text(error)}); give it a user and password in HTTPS_PROXY"
    return (
        f"access refused ({error_text(error)}); check the credentials that the standard chain finds (environment, "
        f"profile, instance role) and their permissions"
    )


def final(error: BaseException) -> str | None:
    """Why no retry changes an error, with the remedy; None for one that may pass."""
    for each in parts(error):
        name, found = type(each).__name__, status(each)
        if name == "OfflineModeIsEnabled":
            return (
                "offline, since HF_HUB_OFFLINE is set: unset it, or pull the cache where there is a network and give "
                "its folder"
            )
        if isinstance(each, ssl.SSLError) and not isinstance(each, _TLS_PASSES):
            return (
                f"no secure connection ({error_text(each)}): check the address and the proxy; SSL_CERT_FILE names "
                f"certificates of an authority of your own"
            )
        if name in _CREDENTIALS:
            return error_text(error)
        if name == "ClientResponseError" and 400 <= found < 500 and found not in _PASSING_STATUSES:
            return f"the server answers {found} ({error_text(error)}): check the URL"
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether a host has no address or no route, as for a mistyped name and on a machine without a network."""
    return any(
        isinstance(each, socket.gaierror)
        or type(each).__name__ == "ClientConnectorDNSError"
        or (isinstance(each, OSError) and each.errno in _NO_ROUTE)
        for each in parts(error)
    )


def status(error: BaseException) -> int:
    """The HTTP status that an error reports, 0 without one."""
    response = getattr(error, "response", None)
    found = getattr(error, "status", None) or getattr(response, "status_code", None)
    return found if isinstance(found, int) else 0


def code(error: BaseException) -> str | None:
    """The store's own error code, where the client library kept it as the cause."""
    cause = error.__cause__
    response = getattr(cause if cause is not None else error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return None if found is None else str(found)
