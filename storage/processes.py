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

import psutil

_PROC = Path("/proc")


def this_process() -> str | None:
    """The name of the calling process; None where `/proc` does not give it."""
    try:
        return f"{_machine()}/{os.getpid()}/{_start(os.getpid())}"
    except (OSError, psutil.Error):
        return None


def has_ended(name: str) -> bool:
    """Whether a process of this machine has ended; False for one that runs, and wherever that cannot be known."""
    machine, _, rest = name.partition("/")
    pid, _, start = rest.partition("/")
    if not pid.isdecimal() or not start.isdecimal():
        return False
    try:
        return machine == _machine() and _start(int(pid)) != int(start)
    except (OSError, ValueError, OverflowError, psutil.Error):
        return False


def _machine() -> str:
    boot = (_PROC / "sys/kernel/random/boot_id").read_text()
    namespace = os.readlink(_PROC / "self/ns/pid")
    return hashlib.sha256("\0".join((socket.gethostname(), boot, namespace)).encode()).hexdigest()[:16]


def _start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when there is none, or only a zombie.

    Raises psutil.Error for a process of another user that the machine hides: of these nothing is known.
    """
    boot = psutil.boot_time()
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        ticks = round((process.create_time() - boot) * os.sysconf("SC_CLK_TCK"))
    except psutil.NoSuchProcess:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        raise  # it exists, and is hidden
    # psutil adds the time of boot, which moves when the clock is set: a process is the same one before and after.
    return ticks if psutil.boot_time() == boot else _start(pid)
