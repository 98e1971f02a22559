"""Head and loss on a CUDA device: the Triton kernels beside torch's passes, plain cross-entropy, and others' kernels.

    python tests/benchmarks/studies/gpu_fused.py [--columns 16384 131072] [--hidden 512 4096] [--positions 8192 32768]
        [--dtype bfloat16] [--temperature 2] [--buffer-mib 256 1024] [--rounds 5]

Legend: `R` rows of a buffer, `P` positions, `H` hidden size, `W` columns of the head (all of them ids), `K` stored ids.

Two kinds of table: the passes over a buffer [R, W] alone; and output layer and loss, forward and backward, of P
positions. Ways take turns, CUDA events give the time, torch's allocator the peak above what is held before a step. The
limits stand in the same table: operations at the rate of a large product, bytes at the rate of a copy, both measured
in the same run. A way that is not installed, is out of memory or fails says so in its row. Where there is no CUDA
device nothing is measured, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import Table, copy_bandwidth, flat_tail_targets, in_turn, ratios, spread, timed_on_gpu

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from student.loss.chunk.logit_chunk import LogitChunk
    from student.target_batch import TargetBatch

DEVICE = "cuda"
STORED_IDS = 64
PLAIN, HELD = "plain cross-entropy", "distilled, logits held"
NOT_INSTALLED = "not installed"
NONE = "–"

# The mean loss of hidden states [P, H] and weights [W, H], differentiable.
Way = Callable[["Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class Limits:
    """What the device does at most: floating-point operations, and bytes read and written, a second."""

    operations: float
    bandwidth: float


@dataclass(frozen=True)
class Size:
    columns: int
    hidden: int
    positions: int


@dataclass(frozen=True)
class Tried:
    """A way's first steps: bytes at the peak above the start, and the gradient by the hidden states [P, H]."""

    peak_bytes: int
    gradient: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[1 << 14, 1 << 17])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--positions", type=int, nargs="+", default=[1 << 13, 1 << 15])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="hidden states, weights")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the distilled ways")
    parser.add_argument("--buffer-mib", type=int, nargs="+", default=[256, 1024], help="of logits, for the fused ways")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"gpu_fused was not run: torch {torch.__version__} finds no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}\n", flush=True)
    for table in tables(arguments):
        print(table.markdown(), flush=True)


def tables(arguments: argparse.Namespace) -> Iterator[Table]:
    import torch

    torch.manual_seed(0)
    limits = measured_limits(getattr(torch, arguments.dtype))
    for columns in arguments.columns:
        for temperature in sorted({1.0, arguments.temperature}):
            yield passes(columns, temperature, limits, arguments)
    for columns in arguments.columns:
        for hidden in arguments.hidden:
            for positions in arguments.positions:
                yield head_and_loss(Size(columns, hidden, positions), limits, arguments)


def measured_limits(dtype: torch.dtype, size: int = 8192) -> Limits:
    """The best of some repetitions: a limit is no average."""
    import torch

    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    taken = in_turn({"product": timed_on_gpu(lambda: a @ b, 4)}, 10)
    return Limits(2 * size**3 / min(taken["product"]), copy_bandwidth())


def passes(columns: int, temperature: float, limits: Limits, arguments: argparse.Namespace) -> Table:
    """From logits to the gradient by them, without a product: the passes alone, and with the work on [R, K]."""
    import torch

    rows = max(1, (arguments.buffer_mib[0] << 18) // columns)
    # The gradient of one step is the logits of the next: no pass depends on what the numbers are.
    z = torch.randn(rows, columns, device=DEVICE)
    labels, targets = batch(columns, rows)
    trained = torch.ones_like(labels, dtype=torch.bool)
    a, b, h = (torch.rand(rows, 1, device=DEVICE) for _ in range(3))
    g = torch.rand(rows, STORED_IDS, device=DEVICE)

    def alone(kind: type[LogitChunk]) -> None:
        kind._part(z, temperature).to_gradient(a, b, None)

    def whole(kind: type[LogitChunk]) -> None:
        chunk = kind(z, labels, trained, [targets.token_ids], [columns], temperature)
        chunk.to_gradient(b[:, 0], [(g, h[:, 0])])

    steps: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, devices in (("torch operations", set()), ("Triton kernels", {DEVICE})):
        kind = chunk_kind(devices, z.device, temperature)
        for what, call in ((f"{name}, the passes", alone), (f"{name}, the whole chunk", whole)):
            if isinstance(kind, str):
                failed[what] = kind
                continue
            steps[what] = timed_on_gpu(functools.partial(call, kind), 4)
            steps[what]()
    least = 12 * z.numel() / limits.bandwidth
    table = Table(
        f"Passes over a buffer of {rows:,} × {columns:,} float32 logits, tau = {temperature:g}, K = {STORED_IDS}",
        ("way", "time, ms", "times the limit"),
        [("limit: logits read twice, gradient written", f"{1e3 * least:.3f}", "1.00")],
        f"A copy moves {limits.bandwidth / 1e9:,.0f} GB/s.",
    )
    for name, seconds in in_turn(steps, arguments.rounds).items():
        table.rows.append((name, spread([1e3 * each for each in seconds], 3), spread([s / least for s in seconds])))
    table.rows.extend((name, reason, NONE) for name, reason in failed.items())
    return table


def head_and_loss(size: Size, limits: Limits, arguments: argparse.Namespace) -> Table:
    """Forward and backward of every way, beside the limits."""
    import torch

    dtype = getattr(torch, arguments.dtype)
    hidden = torch.randn(size.positions, size.hidden, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(size.columns, size.hidden, device=DEVICE) * 2 / math.sqrt(size.hidden)).to(dtype)
    weight.requires_grad_()
    title = f"Output layer and loss: {size.columns:,} columns, H = {size.hidden:,}, {size.positions:,} positions"
    tried: dict[str, Tried] = {}
    steps: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, way in ways(size, arguments).items():
        if isinstance(way, str):
            failed[name] = way
            continue

        def step(way: Way = way) -> None:
            hidden.grad = weight.grad = None
            way(hidden, weight).backward()

        found = _tried(step, hidden, weight)
        if isinstance(found, str):
            failed[name] = found
        else:
            tried[name], steps[name] = found, timed_on_gpu(step)
    taken = in_turn(steps, arguments.rounds)
    least = 6 * size.positions * size.columns * size.hidden / limits.operations
    table = Table(
        f"{title}, {arguments.dtype}, K = {STORED_IDS}, tau = {arguments.temperature:g}",
        ("way", "time, ms", "to plain", "peak, MiB", "to plain", "times the products", "gradient differs by"),
        [("limit: three products", f"{1e3 * least:.2f}", NONE, NONE, NONE, "1.00", NONE)],
        f"A large product runs at {limits.operations / 1e12:,.0f} TFLOP/s, a copy at {limits.bandwidth / 1e9:,.0f} "
        "GB/s. The bytes are those of the fused way's logits and weights, by its Triton kernels. The last column is "
        f"the norm of the difference in the gradient by the hidden states, relative: cross-entropy to {PLAIN!r}, "
        f"distilled to {HELD!r}.",
    )
    for mib in arguments.buffer_mib:
        seconds = fused_bytes(size, mib, arguments.dtype) / limits.bandwidth
        row = (f"limit: bytes, buffer of {mib:,} MiB", f"{1e3 * seconds:.2f}", NONE, NONE, NONE)
        table.rows.append((*row, f"{seconds / least:.2f}", NONE))
    for name, seconds_of in taken.items():
        true = tried.get(HELD if name.startswith("distilled") else PLAIN)
        differs = NONE
        if true is not None and true is not tried[name]:
            differs = f"{float((tried[name].gradient - true.gradient).norm() / true.gradient.norm()):.1e}"
        peak = tried[name].peak_bytes
        row = (
            name,
            spread([1e3 * each for each in seconds_of]),
            spread(ratios(seconds_of, taken[PLAIN])) if PLAIN in taken else NONE,
            f"{peak / 2**20:,.0f}",
            f"{peak / tried[PLAIN].peak_bytes:.2f}" if PLAIN in tried else NONE,
        )
        table.rows.append((*row, spread([each / least for each in seconds_of]), differs))
    table.rows.extend((name, reason, *(NONE,) * 5) for name, reason in failed.items())
    return table


def _tried(step: Callable[[], None], hidden: Tensor, weight: Tensor) -> Tried | str:
    """A step after the first, which compiles; or why there is none."""
    import torch

    try:
        step()
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        assert hidden.grad is not None
        return Tried(peak, hidden.grad.float())
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # a row says so, and the table goes on
        return _failure(error)
    finally:
        hidden.grad = weight.grad = None
        torch.cuda.empty_cache()


def ways(size: Size, arguments: argparse.Namespace) -> dict[str, Way | str]:
    """Every way, or in its place why there is none."""
    import torch
    import torch.nn.functional as F

    labels, targets = batch(size.columns, size.positions)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.t()).float(), labels)

    found: dict[str, Way | str] = {
        PLAIN: plain,
        "plain cross-entropy, torch.compile": torch.compile(plain, dynamic=False),
        "cross-entropy, liger_kernel": _liger(labels),
        "cross-entropy, cut_cross_entropy": _cut(labels),
    }
    for what, alpha, temperature in (("cross-entropy", 1.0, 1.0), ("distilled", 0.5, arguments.temperature)):
        if alpha < 1:
            found[HELD] = _held(alpha, temperature, size, labels, targets)
        for name, devices in (("torch operations", set()), ("Triton", {DEVICE})):
            for mib in arguments.buffer_mib:
                kind = chunk_kind(devices, labels.device, temperature)
                found[f"{what}, fused, {name}, {mib:,} MiB"] = (
                    kind if isinstance(kind, str) else _fused(alpha, temperature, devices, mib, size, labels, targets)
                )
    return found


def _held(alpha: float, temperature: float, size: Size, labels: Tensor, targets: TargetBatch) -> Way:
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member

    loss = DistillationLoss(size.columns, alpha, temperature, [Member("t", 1.0, None, size.columns)])
    return lambda hidden, weight: loss(hidden @ weight.t(), labels, {"t": targets}).loss_sum / size.positions


def _fused(
    alpha: float,
    temperature: float,
    devices: set[str],
    mib: int,
    size: Size,
    labels: Tensor,
    targets: TargetBatch,
) -> Way:
    from student.loss import fused
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member

    loss = DistillationLoss(size.columns, alpha, temperature, [Member("t", 1.0, None, size.columns)])

    def way(hidden: Tensor, weight: Tensor) -> Tensor:
        buffers = mock.patch.dict(fused._BUFFER_LOGITS, elsewhere=mib << 18)
        with mock.patch.object(fused, "_TRITON_DEVICES", devices), buffers:
            prepared = loss.prepare(labels, {"t": targets})
            return fused.fused_loss(hidden, weight, None, prepared).loss_sum / size.positions

    return way


def _liger(labels: Tensor) -> Way | str:
    module = _module("liger_kernel.transformers.fused_linear_cross_entropy")
    if isinstance(module, str):
        return module
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight: loss(weight, hidden, labels)


def _cut(labels: Tensor) -> Way | str:
    module = _module("cut_cross_entropy")
    if isinstance(module, str):
        return module
    return lambda hidden, weight: module.linear_cross_entropy(hidden, weight, labels)


def _module(name: str) -> Any:
    """A package that may be missing, or the reason in a few words."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return NOT_INSTALLED
    try:
        return importlib.import_module(name)
    except Exception as error:  # made for other versions of torch or triton
        return _failure(error)


def _failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}".replace("|", "/")


def chunk_kind(devices: set[str], device: torch.device, temperature: float) -> type[LogitChunk] | str:
    """What the fused loss takes when these types of device are Triton's; why not, where that is not what was asked."""
    import torch

    from student.loss import fused
    from student.loss.chunk.logit_chunk import LogitChunk

    with mock.patch.object(fused, "_TRITON_DEVICES", devices):
        kind = fused._chunk_kind(device, torch.float32, temperature, None)
    if devices and kind is LogitChunk:
        return NOT_INSTALLED if importlib.util.find_spec("triton") is None else "does not run here"
    return kind


def fused_bytes(size: Size, buffer_mib: int, dtype: str) -> float:
    """Bytes that the fused way's tensors [R, W] and [W, H] move, at least, in all its chunks.

    A logit: written by the product, read for the sums, read and written for the gradient, and read by the two products
    that take it, for which half precision makes a copy. A weight in each chunk: read by two products; its gradient
    read and written, to which half precision adds a product's float32 output, written and read.
    """
    half = dtype != "float32"
    by_logit = 4 + 4 + 8 + ((4 + 2) + 2 + 2 if half else 4 + 4)
    by_weight = 2 + 2 + 8 + 8 if half else 4 + 4 + 8
    chunks = math.ceil(size.positions / max(1, (buffer_mib << 18) // size.columns))
    return size.columns * (size.positions * by_logit + chunks * size.hidden * by_weight)


def batch(columns: int, positions: int) -> tuple[Tensor, TargetBatch]:
    """Labels, and top-k targets of teachers whose other columns are flat; on the device."""
    import torch

    # One id from each of K equal ranges of them: distinct, and spread out.
    width = columns // STORED_IDS
    starts = width * torch.arange(STORED_IDS, device=DEVICE)
    ids = (starts + torch.randint(width, (positions, STORED_IDS), device=DEVICE)).to(torch.int32)
    heads = torch.randn(positions, STORED_IDS, device=DEVICE).log_softmax(1).sort(1, descending=True).values - 0.3
    return torch.randint(0, columns, (positions,), device=DEVICE), flat_tail_targets(ids, heads, columns)


if __name__ == "__main__":
    main()
