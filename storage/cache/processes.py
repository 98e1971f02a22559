"""A name for a process that tells others on its machine whether it still runs.

    <machine>/<pid>/<start>

machine  digest of the host's name, the kernel's boot and the PID namespace: equal for processes that see each other's
         pids, and for no others
start    when the process started, in the kernel's ticks since boot, since a pid is used again

There are such names where the kernel has `/proc` (Linux). From elsewhere, and of processes elsewhere, nothing is known.
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

_PROC = Path("/proc")


def this_process() -> str | None:
    """The name of the process that calls; None where the kernel does not tell."""
    try:
        return f"{_machine()}/{os.getpid()}/{_start(os.getpid())}"
    except (OSError, ValueError, IndexError):
        return None


def has_ended(name: str) -> bool:
    """Whether a process of this machine has ended; False for one that runs, and wherever it cannot be known."""
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
    """Ticks at which a process started; None when there is none, or only what its parent has to collect.

    A machine may hide the processes of other users; of these nothing is known (an OSError).
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
        raise  # it is there, and hidden
    # The second field is the command in parentheses, and may hold anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])
