"""Probes this machine for a training run: free memory and the speed of a matrix product.

    python -m logit_cache.recipes.machine

Prints one line of JSON. It runs in a process of its own, so that its caller holds no device memory afterwards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pydantic import Field

from storage.config import Frozen

_SECONDS = 0.3
_SIZE = {"cpu": 1024, "cuda": 4096}


class Machine(Frozen):
    """The probed device: `memory_bytes` are free now, on the GPU where there is one, else in main memory.

    products_per_second: multiply-adds of float32 matrices on a CPU, of float16 matrices on a GPU. cores: the usable
    ones, 1 where an accelerator trains.
    """

    device: str
    name: str
    memory_bytes: int
    products_per_second: float
    cores: int = Field(1, ge=1)

    @property
    def at_once(self) -> int:
        """Models to train side by side: two where each has a core of its own, which is faster than one on two cores."""
        return min(2, self.cores)


def probe() -> Machine:
    """Probe this machine in a subprocess. Takes a few seconds, for the import of torch."""
    line = [sys.executable, "-m", "logit_cache.recipes.machine"]
    return Machine.model_validate_json(subprocess.check_output(line, timeout=300))


def _measure() -> Machine:
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    size = _SIZE[kind]
    dtype = torch.float16 if kind == "cuda" else torch.float32
    one, other = (torch.ones(size, size, dtype=dtype, device=kind) for _ in range(2))

    def seconds(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(one, other)
        if kind == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)
    times, took = 1, 0.0
    while took < _SECONDS:
        times *= 2
        took = seconds(times)
    if kind == "cuda":
        memory, name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    else:
        memory, name = free_memory(), f"{torch.get_num_threads()} threads"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = 1 if torch.accelerator.is_available() else cores
    speed = times * size**3 / took
    return Machine(device=kind, name=name, memory_bytes=memory, products_per_second=speed, cores=cores)


def free_memory() -> int:
    """Bytes that a new process may take: those that the system has, and no more than the container's cgroup allows."""
    import psutil

    found = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
        found = min(found, max(0, int(limit.read_text()) - int(used.read_text())))
    return found


if __name__ == "__main__":
    print(json.dumps(_measure().model_dump()))
