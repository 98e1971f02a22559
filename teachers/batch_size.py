"""The number of windows in one forward pass: chosen once for an entry, and recorded in it.

Half-precision results change with a batch's shape, so the number belongs to an entry's identity: a resumed job uses
the recorded one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from teachers.base import Teacher

# On a CPU larger batches only cost memory.
_CPU_TOKENS = 4_096
_RANKS_TOKENS = 8_192
_MOST_TOKENS = 65_536
# Twice the windows must bring this much more throughput, or the smaller batch stays.
_LEAST_GAIN = 1.05
# Share of the memory that is free before the first pass; the rest is for the reducer and all else on the device.
_MEMORY_SHARE = 0.7

Measure = Callable[[int], tuple[float, int]]


def choose_batch_windows(teacher: Teacher, context_tokens: int, packed: bool = False) -> int:
    """Windows of `context_tokens` in one pass: a constant on a CPU and for several ranks, measured on a GPU.

    packed: whether documents share them, which takes a mask of the square of a window.
    Several ranks measure nothing, since one that ran out of memory would leave the others waiting for it.
    """
    if teacher.device.type != "cuda":
        return max(1, _CPU_TOKENS // context_tokens)
    if teacher.shard is not None:
        return max(1, _RANKS_TOKENS // context_tokens)
    free = min(torch.cuda.mem_get_info(device)[0] for device in _devices(teacher))
    return largest_worthwhile(
        lambda count: _measured(teacher, count, context_tokens, packed),
        max(1, _MOST_TOKENS // context_tokens),
        int(_MEMORY_SHARE * free),
    )


def largest_worthwhile(measure: Measure, most: int, memory_bytes: int) -> int:
    """The largest power of two up to `most` that still raises throughput and fits in memory.

    `measure(count)` returns the seconds that a batch of `count` takes and the bytes that it needs, or raises
    `torch.OutOfMemoryError`. A count is tried only if twice the memory of the previous one fits.
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


def _measured(teacher: Teacher, count: int, context_tokens: int, packed: bool) -> tuple[float, int]:
    """Seconds of the second of two passes over `count` windows, and the bytes that they needed beside the weights, on
    the device that needed most."""
    device, devices = teacher.device, _devices(teacher)
    windows = torch.zeros(count, context_tokens, dtype=torch.int64, device=device)
    rows = torch.arange(windows.numel(), device=device)
    halves = torch.arange(context_tokens, device=device) % -(-context_tokens // 2)
    positions = halves.expand(count, -1).contiguous() if packed else None
    for each in devices:
        torch.cuda.reset_peak_memory_stats(each)
    before = [torch.cuda.memory_allocated(each) for each in devices]
    seconds = 0.0
    for _ in range(2):  # the first pass selects kernels
        _wait(devices)
        began = time.perf_counter()
        for _ in teacher.score(windows, rows, positions):
            pass
        _wait(devices)
        seconds = time.perf_counter() - began
    return seconds, max(torch.cuda.max_memory_allocated(each) - was for each, was in zip(devices, before, strict=True))


def _devices(teacher: Teacher) -> list[int]:
    """The GPUs that hold anything of this process: the teacher's, which may be spread over several."""
    return [
        number
        for number in range(torch.cuda.device_count())
        if torch.cuda.memory_allocated(number) or number == teacher.device.index
    ]


def _wait(devices: list[int]) -> None:
    for each in devices:
        torch.cuda.synchronize(each)
