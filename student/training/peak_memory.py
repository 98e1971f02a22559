"""The most memory that this process has held, by the operating system's count and by the device's."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_process_bytes() -> int:
    """The largest resident size of this process since it started.

    On Linux VmHWM, which begins anew with a program; the count of getrusage is inherited from the process that
    started it, and is taken elsewhere.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """The most bytes that torch's allocator has held on a CUDA device; None on other devices."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None
