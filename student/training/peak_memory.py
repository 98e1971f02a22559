"""Peak memory of this process: resident, by the operating system, and on the device, by torch's allocator."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch


def peak_process_bytes() -> int:
    """Peak resident size of this process, in bytes.

    On Linux VmHWM, which starts anew with each program; elsewhere the count of getrusage, which is inherited from
    the parent process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int | None:
    """Peak bytes reserved by torch's allocator on a CUDA device; None on other devices."""
    return int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None
