"""A name for a process, by which others on its machine can check whether it still runs.

    <machine>/<pid>/<start>

machine  digest of the host name, the kernel's boot id and the PID namespace: equal for processes that see each other's
         pids, and for no others
start    start time of the process, in the kernel's clock ticks since boot, because pids are reused

Such names exist where the kernel has `/proc` (Linux). Without it, and of processes on other machines, nothing is known.
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

_PROC = Path("/proc")


def this_process() -> str | None:
    """The name of the calling process; None where `/proc` does not give it."""
    try:
        return f"{_machine()}/{os.getpid()}/{_start(os.getpid())}"
    except (OSError, ValueError, IndexError):
        return None


def has_ended(name: str) -> bool:
    """Whether a process of this machine has ended; False for one that runs, and wherever that cannot be known."""
    machine, _, rest = name.partition("/")
    pid, _, start = rest.partition("/")
    if not pid.isdecimal() or not start.isdecimal():
        return False
    try:
        return machine == _machine() and _start(int(pid)) != int(start)
    except (OSError, ValueError, IndexError, OverflowError):
        return False


def _machine() -> str:
    boot = (_PROC / "sys/kernel/random/boot_id").read_text()
    namespace = os.readlink(_PROC / "self/ns/pid")
    return hashlib.sha256("\0".join((socket.gethostname(), boot, namespace)).encode()).hexdigest()[:16]


def _start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when there is none, or only a zombie.

    Raises OSError for a process of another user that the machine hides: of these nothing is known.
    """
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except ProcessLookupError:  # it ended while it was read
        return None
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        raise  # it exists, and is hidden
    # The second field is the command in parentheses, and may hold anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])
