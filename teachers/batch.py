"""How many windows one forward pass takes: chosen once for an entry, and recorded in it.

Half-precision results change with a batch's shape, so the number belongs to an entry's identity; whoever goes on with
an entry takes what is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from teachers.base import Teacher

# On a CPU larger batches only cost memory.
_CPU_TOKENS = 4_096
_MOST_TOKENS = 65_536
# Twice the windows must bring this much more throughput, or the smaller batch stays.
_LEAST_GAIN = 1.05
# Of the memory that is free before the first pass: the rest is for the reducer, and for what else runs there.
_MEMORY_SHARE = 0.7

Measure = Callable[[int], tuple[float, int]]


def choose_batch_windows(teacher: Teacher, context_tokens: int) -> int:
    """Windows of `context_tokens` in one pass: a constant on a CPU, tried out on a GPU."""
    if teacher.device.type != "cuda":
        return max(1, _CPU_TOKENS // context_tokens)
    free, _ = torch.cuda.mem_get_info(teacher.device)
    return largest_worthwhile(
        lambda count: _measured(teacher, count, context_tokens),
        max(1, _MOST_TOKENS // context_tokens),
        int(_MEMORY_SHARE * free),
    )


def largest_worthwhile(measure: Measure, most: int, memory_bytes: int) -> int:
    """The largest power of two up to `most` that still brings throughput, and fits.

    `measure(count)` gives the seconds that a batch of `count` takes and the bytes that it needs, or raises
    `torch.OutOfMemoryError`. A count is tried only if twice the memory of the one before it fits.
    """
    count, rate = 1, 0.0
    while True:
        try:
            seconds, needed = measure(count)
        except torch.OutOfMemoryError:
            return max(1, count // 2)
        if count / seconds < _LEAST_GAIN * rate:
            return count // 2
        if 2 * count > most or 2 * needed > memory_bytes:
            return count
        count, rate = 2 * count, count / seconds


def _measured(teacher: Teacher, count: int, context_tokens: int) -> tuple[float, int]:
    """Seconds of the second of two passes over `count` windows, and the bytes that they needed beside the weights."""
    device = teacher.device
    windows = torch.zeros(count, context_tokens, dtype=torch.int64, device=device)
    rows = torch.arange(windows.numel(), device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds = 0.0
    for _ in range(2):  # the first one chooses kernels
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in teacher.score(windows, rows):
            pass
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds, torch.cuda.max_memory_allocated(device) - before
