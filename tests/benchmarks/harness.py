"""What the benchmarks share: repetitions in turn, ratios with their spread, memory by the system's count, tables.

Absolute times of a shared machine mean little, so what is compared is run in turn, round after round, in one process or
in processes of their own, and each round gives one ratio. A table shows their median, and in parentheses the lowest and
the highest. A cell that was not measured says so; nothing here makes one up.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from student.target_batch import TargetBatch

ROOT = Path(__file__).parents[2]
NOT_MEASURED = "not measured"
_RESULT = "result: "


@dataclass(frozen=True)
class Table:
    """A table of results; `note` says what the ways are and why a figure is what it is."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def markdown(self) -> str:
        """As it stands in docs/benchmarks.md."""
        for row in self.rows:
            assert len(row) == len(self.columns), f"{self.title}: {row}"
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")


def in_turn(ways: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round: what the way returns, or else what the call took."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # Every other round backwards: what the first way leaves behind (caches, heat) then meets each of them.
        for name, run in list(ways.items())[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            returned = run()
            taken[name].append(time.perf_counter() - began if returned is None else returned)
    return taken


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, values over base."""
    return [value / of for value, of in zip(values, base, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (lowest, highest)``, or the one value.

    >>> spread([1.0, 3.0, 2.0], 1)
    '2.0 (1.0, 3.0)'
    """
    if not values:
        return NOT_MEASURED
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}, {max(values):,.{digits}f})"


def flat_tail_targets(ids: Tensor, logprobs: Tensor, columns: int) -> TargetBatch:
    """Top-k targets [P, K] of teachers whose other columns, of so many in all, are flat."""
    import torch

    from student.target_batch import TargetBatch

    positions, stored = ids.shape
    log_tail = torch.log1p(-logprobs.exp().sum(1))
    counts = torch.full((positions,), stored, dtype=torch.int32, device=ids.device)
    return TargetBatch(
        token_ids=ids,
        logprobs=logprobs,
        kept=counts,
        certain=counts,
        log_tail=log_tail,
        log_tail_half=(log_tail + math.log(columns - stored)) / 2,
        entropy=torch.full((positions,), 4.0, device=ids.device),
    )


def timed_on_gpu(step: Callable[[], object], steps: int = 1) -> Callable[[], float]:
    """What gives the seconds of one step on a CUDA device, in the mean of some that are queued together."""
    import torch

    def run() -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        for _ in range(steps):
            step()
        ended.record()
        torch.cuda.synchronize()
        return float(began.elapsed_time(ended)) / 1e3 / steps

    return run


def copy_bandwidth(copied: int = 1 << 30) -> float:
    """Bytes that a CUDA device reads and writes a second, the best of some repetitions: a limit is no average."""
    import torch

    source = torch.randint(256, (copied,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * copied / min(in_turn({"copy": timed_on_gpu(lambda: target.copy_(source), 4)}, 10)["copy"])


@dataclass(frozen=True)
class Ran:
    """A process that ended well: seconds passed and of processor time, and its peak memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str


def command(line: Sequence[str | Path], threads: int | None = None, **variables: str) -> Ran:
    """Run a program to its end, alone in its group; SystemExit with what it said if it fails.

    `line[0]` without a slash is looked for beside this interpreter, where console scripts are.
    """
    first = str(line[0])
    program = first if "/" in first else str(Path(sys.executable).parent / first)
    environment = {**os.environ, **variables}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    answers, told = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(told), program, *map(str, line[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=ROOT,
        pass_fds=[told],
    )
    os.close(told)
    assert process.stdout is not None
    output = process.stdout.read().decode(errors="replace")
    process.wait()
    with os.fdopen(answers) as file:
        said = file.read()
    if not said:
        raise SystemExit(f"{' '.join(map(str, line))} could not be started:\n{output[-4000:]}")
    status, seconds, cpu_seconds, peak = json.loads(said)
    if status:
        raise SystemExit(f"{' '.join(map(str, line))} ended with {status}:\n{output[-4000:]}")
    # Linux counts the peak in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return Ran(seconds, cpu_seconds, peak * unit, output)


# A process is charged with the peak of whoever started it: Linux keeps that through fork and exec, and here it may be
# the gigabytes of an earlier part. So a small interpreter stands between, and says what its one child took.
_LAUNCHER = """
import json, os, sys, time
told = int(sys.argv[1])
os.set_inheritable(told, False)
began = time.perf_counter()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
took = time.perf_counter() - began
answer = os.waitstatus_to_exitcode(status), took, used.ru_utime + used.ru_stime, used.ru_maxrss
os.write(told, json.dumps(answer).encode())
"""


def in_child(module: str, function: str, threads: int | None = None, **arguments: Any) -> tuple[Any, Ran]:
    """``module.function(**arguments)`` of this folder in a fresh interpreter: its result (JSON), and what it took."""
    ran = command([sys.executable, __file__, module, function, json.dumps(arguments)], threads)
    # Not the last line: what a library says as the interpreter ends comes after it.
    result = next(line for line in reversed(ran.output.splitlines()) if line.startswith(_RESULT))
    return json.loads(result.removeprefix(_RESULT)), ran


def peak_above(run: Callable[[], object]) -> int:
    """Bytes by which this process's peak rises above what it holds, while `run` runs (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = held("VmRSS")
    run()
    return held("VmHWM") - before


def held(which: str) -> int:
    """Bytes of this process by the kernel's count: VmRSS now, VmHWM at most (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return 1024 * int(value.split()[0])
    raise SystemExit(f"this system does not say what a process holds ({which})")


def _child() -> None:
    module, function, arguments = sys.argv[1:]
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]
    found = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print(_RESULT + json.dumps(found))


if __name__ == "__main__":
    _child()
