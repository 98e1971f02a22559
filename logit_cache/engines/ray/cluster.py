"""Joining a running Ray cluster, or starting one on this machine (extra `ray`)."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator

from storage.errors import InputError

_CONNECT_SECONDS = 10.0
# Ray's attempts to connect to a cluster, a second apart, each with a warning; 20 by default.
_ATTEMPTS = "5"


@contextlib.contextmanager
def connect(address: str | None) -> Iterator[bool]:
    """Join the cluster at an address, or at RAY_ADDRESS; else start one on this machine for as long as the body runs.

    Yields whether it was started here, so that this machine is the whole cluster.

    Raises InputError where that fails.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address == "local":
        address = None
    if address is not None:
        # Ray reads the variable when it is imported.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", _ATTEMPTS)
        _check_reachable(address)
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'logit-cache[ray]'") from None
    if ray.is_initialized():
        raise InputError("this process is connected to Ray already")
    try:
        # A running cluster has its own dashboard.
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.CRITICAL,
            log_to_driver=False,
        )
    except Exception as error:  # the address, the token, the versions of both sides
        raise InputError(_refusal(address, error)) from None
    try:
        yield address is None
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise InputError where no server accepts connections, for which Ray itself takes minutes."""
    if address.startswith("ray://"):
        raise InputError(
            f"{address}: Ray Client is not supported: give host:port of the head node, on a node of the cluster, or "
            f"submit the command as a job of the cluster"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"the Ray cluster at {address} cannot be reached: {error.strerror or error}; "
            f"--ray-address takes host:port of its head node, or auto on one of its nodes"
        ) from None


def _refusal(address: str | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
    if address is None:
        return f"Ray cannot be started on this machine: {reason}"
    hint = ""
    if reason.startswith("Failed to connect"):  # does not mention the token, of which Ray has warned
        mode = os.environ.get("RAY_AUTH_MODE", "")
        has = "another token" if mode == "token" else "a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH"
        hint = f"; if it runs, it may want {has}"
    return f"the Ray cluster at {address} cannot be used: {reason}{hint}"
