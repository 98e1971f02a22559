"""A Ray cluster of several nodes on this machine, for the tests, which start, identify and kill them."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

# Ray's own processes are heavy, and the machine is small: nothing that a job does not need.
_LEAN = (
    "--block", "--disable-usage-stats", "--include-log-monitor=False", "--object-store-memory=80000000",
    "--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0",
    "--num-cpus=1",
)  # fmt: skip
# A lost node is noticed within a few seconds instead of half a minute.
_FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


class RayNodes:
    """A cluster whose nodes have one CPU each, and say that they have `gpus`; it lets in only who has its token.
    `address` is the head's."""

    def __init__(self, environment: Mapping[str, str], gpus: int = 0) -> None:
        self._lean = (*_LEAN, f"--num-gpus={gpus}")
        # Names of sockets must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self.token = self.folder / "token"
        self.token.write_text(secrets.token_hex(32), encoding="utf-8")
        self.access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        self._environment = {**environment, **_FAST_HEALTH_CHECKS, **self.access}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._roots: list[subprocess.Popen[bytes]] = []
        self._start("--head", f"--port={port}", "--include-dashboard=False", f"--temp-dir={self.folder}/r")
        until(self._is_reachable, "the head accepts connections")

    def add(self) -> None:
        """Have one more node join; its workers have two threads, and the head's one."""
        self._start(f"--address={self.address}", threads=2)

    def kill(self, number: int) -> None:
        """Kill all processes of a node at once, as a power cut does; 0 is the head."""
        root = self._roots[number]
        for process in (root.pid, *descendants(root.pid)):
            kill(process)
        root.wait()

    def node_of(self, process: int) -> int:
        """The number of the node that a process belongs to."""
        return next(n for n, root in enumerate(self._roots) if process in descendants(root.pid))

    def actors(self) -> list[int]:
        """Process IDs of the actors on all nodes."""
        found = [process for root in self._roots for process in descendants(root.pid)]
        return [process for process in found if _title(process).startswith("ray::_Actor")]

    def stop(self) -> None:
        """Kill every node and remove the cluster's folder."""
        for number in reversed(range(len(self._roots))):
            self.kill(number)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, *options: str, threads: int = 1) -> None:
        command = [
            f"{sysconfig.get_path('scripts')}/ray",
            "start",
            "--node-ip-address=127.0.0.1",
            *self._lean,
            *options,
        ]
        variables = {**self._environment, "OMP_NUM_THREADS": str(threads)}
        with (self.folder / f"node-{len(self._roots)}.log").open("wb") as log:
            root = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
        self._roots.append(root)

    def _is_reachable(self) -> bool:
        host, port = self.address.split(":")
        with socket.socket() as one:
            return one.connect_ex((host, int(port))) == 0


def kill(process: int) -> None:
    """kill -9; no error for a process that is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _title(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    return ""


def descendants(process: int) -> list[int]:
    """Children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def until(condition: Callable[[], object], description: str, seconds: float = 120.0) -> None:
    """Wait for a condition; fails after so many seconds, with its description."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} seconds: {description}"
        time.sleep(0.1)
