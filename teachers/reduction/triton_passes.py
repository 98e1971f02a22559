"""The reducer's passes over the logits as Triton kernels: each reads them once, none writes anything of their size.

Legend: `R` rows, `V` vocabulary size, `K` kept ids, `W` width of a block, `M` blocks, `G` segments of a row.

::

    maxima of blocks                           one read      [R, M], of which torch picks K blocks and the K best
    e^z, e^(z/2) and z e^z outside the head    one read      [3, R, G]: three sums for each segment
    lengths of blocks, for VarOpt targets      one read      [R, M]
    lengths inside a few blocks                K blocks      [R, K, W]

Top-k targets read the logits twice, VarOpt targets three times (once more at a temperature that is neither 1 nor 2).
A column is in the head if it comes no later than the K-th best in the order (logit descending, id ascending). So a
kernel needs that one's logit and id only, and a tail is the sum of its own terms.

A program reduces one segment of one row, and writes one number for each sum; another kernel adds those of a row. There
are no atomic additions, and nothing depends on the number of rows: equal rows give equal bits at any index. A program's
order of additions follows from the number of columns, the stride of rows and their alignment, so logits that are not
aligned to 16 bytes are copied first (whole tensors are aligned).

Precision: float32, with sums of sums. Triton's own exponential is one of the base two, of an argument that was rounded:
it is off by 6e-8 |x| of its size. `_exp` is off by less than 1e-7, whatever x is. It has only additions and products,
which are fused only where it writes fma: an id's length is the same number in each kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teachers.reduction.varopt import BlockMasses, Masses, with_top_lengths

# Columns of one program; with 8 warps, 16 for each thread, which are 4 loads of 16 bytes.
_SEGMENT = 4096
_COLUMNS_PER_WARP = 512
_SUMMANDS = 1024
_ALIGNMENT = 16


class TritonPasses:
    """`teachers.reduction.passes.Passes` on a device that triton compiles for; all rows at once, and no large
    buffers."""

    def __init__(self, rows: int) -> None:
        self.tile_rows = max(1, rows)

    def block_maxima(self, logits: Tensor, width: int) -> Tensor:
        logits = _aligned(logits)
        rows, columns = logits.shape
        maxima = logits.new_empty(rows, columns // width)
        blocks = maxima.shape[1]
        at_once = _blocks_at_once(columns, width)
        _run(
            _maxima_kernel, (rows, triton.cdiv(blocks, at_once)), width * at_once,
            logits, logits.stride(0), blocks, maxima, WIDTH=width, BLOCKS=at_once,
        )  # fmt: skip
        return maxima

    def tail(self, logits: Tensor, row_max: Tensor, top: Tensor, ids: Tensor) -> _Tail:
        return _Tail(_Rows(_aligned(logits), row_max.contiguous(), top[:, -1].contiguous(), ids[:, -1].int()))

    def row_sums(self, values: Tensor) -> Tensor:
        return _row_sums(values)


class _Rows(NamedTuple):
    """Rows of logits, and the last entry of each one's head."""

    logits: Tensor  # float32 [R, V]
    row_max: Tensor  # float32 [R]
    last: Tensor  # float32 [R], the logit of the K-th best
    last_id: Tensor  # int32 [R]


class _Tail:
    """`teachers.reduction.passes.Tail`."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self.mass, self.half, weighted = self._sums(0.5)
        self.weighted = 2 * weighted

    def masses(self, beta: float) -> Masses:
        totals = {1.0: self.mass, 0.5: self.half}
        return _Masses(self._rows, beta, totals[beta] if beta in totals else self._sums(beta)[1])

    def _sums(self, beta: float) -> Tensor:
        """[3, R]: the sums of m^2, m and beta z m^2, with m = e^(beta z)."""
        rows, columns = self._rows.logits.shape
        segment = min(_SEGMENT, triton.next_power_of_2(columns))
        sums = self._rows.logits.new_empty(3, rows, triton.cdiv(columns, segment))
        _run(
            _tail_kernel, (rows, sums.shape[2]), segment,
            *self._rows, self._rows.logits.stride(0), columns, beta, sums, *sums.stride()[:2], SEGMENT=segment,
        )  # fmt: skip
        return _row_sums(sums.flatten(0, 1)).view(3, rows)


class _Masses(BlockMasses):
    """Masses e^(beta z); every call computes lengths from the logits again."""

    def __init__(self, rows: _Rows, beta: float, total: Tensor) -> None:
        self._rows = rows
        self._beta = beta
        self.columns = rows.logits.shape[1]
        self.total = total

    def block_lengths(self, unit: Tensor, width: int) -> Tensor:
        self._unit, self._width = unit.contiguous(), width
        blocks = triton.cdiv(self.columns, width)
        sums = torch.empty(len(unit), blocks, dtype=torch.int64, device=unit.device)
        # A width that is no power of two is that of the only block.
        padded = triton.next_power_of_2(width)
        at_once = _blocks_at_once(self.columns, padded)
        _run(
            _block_lengths_kernel, (len(unit), triton.cdiv(blocks, at_once)), padded * at_once,
            *self._rows, self._rows.logits.stride(0), self.columns, self._beta, self._unit, blocks, sums,
            WIDTH=padded, BLOCKS=at_once,
        )  # fmt: skip
        return sums

    def lengths(self, blocks: Tensor, top_ids: Tensor, top_lengths: Tensor) -> Tensor:
        rows, count = blocks.shape
        padded = triton.next_power_of_2(self._width)
        ids = blocks[:, :, None] * self._width + torch.arange(padded, device=blocks.device)  # [R, n, W]
        lengths = torch.empty_like(ids)
        at_once = min(_blocks_at_once(self.columns, padded), triton.next_power_of_2(count))
        _run(
            _lengths_kernel, (rows, triton.cdiv(count, at_once)), padded * at_once,
            *self._rows, self._rows.logits.stride(0), self.columns, self._beta, self._unit, blocks.contiguous(), count,
            lengths, WIDTH=padded, BLOCKS=at_once,
        )  # fmt: skip
        replaced = with_top_lengths(lengths.flatten(1), ids.flatten(1), top_ids, top_lengths)
        return replaced.view(rows, count, padded)


def _aligned(logits: Tensor) -> Tensor:
    rows, columns = logits.shape
    if columns > 1 and logits.stride(1) != 1:
        return logits.contiguous()
    if logits.data_ptr() % _ALIGNMENT == 0:
        return logits
    aligned = logits.new_empty(rows, max(columns, logits.stride(0)))[:, :columns]
    return aligned.copy_(logits)


def _blocks_at_once(columns: int, width: int) -> int:
    return max(1, min(_SEGMENT, int(triton.next_power_of_2(columns))) // width)


def _row_sums(values: Tensor) -> Tensor:
    """The sums [N] of [N, n]. The order of torch's own sums changes with the number of rows."""
    values = values.contiguous()
    count, columns = values.shape
    sums = values.new_empty(count)
    block = min(_SUMMANDS, triton.next_power_of_2(max(1, columns)))
    at_once = _SUMMANDS // block
    grid = (triton.cdiv(count, at_once),)
    _run(_row_sums_kernel, grid, _SUMMANDS, values, count, columns, sums, ROWS=at_once, BLOCK=block)
    return sums


def _run(kernel: Any, grid: tuple[int, ...], columns: int, logits: Tensor, *arguments: Any, **sizes: int) -> None:
    """columns: the number that one program reads."""
    warps = max(1, min(8, columns // _COLUMNS_PER_WARP))
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        kernel[grid](logits, *arguments, num_warps=warps, enable_fp_fusion=False, **sizes)


@triton.jit
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x of finite x <= 0, 0 where that is under e^-87. Cody and Waite's reduction, Cephes' polynomial."""
    kept = x > -87.0
    x = tl.where(kept, x, 0.0)
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    x = tl.fma(n, -0.693359375, x)
    x = tl.fma(n, 2.12194440e-4, x)
    y = tl.fma(x, 1.9875691500e-4, 1.3981999507e-3)
    y = tl.fma(x, y, 8.3334519073e-3)
    y = tl.fma(x, y, 4.1665795894e-2)
    y = tl.fma(x, y, 1.6666665459e-1)
    y = tl.fma(x, y, 5.0000001201e-1)
    y = tl.fma(x * x, y, x) + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^n
    return tl.where(kept, y * power, 0.0)


@triton.jit
def _tail_mass(logit, ids, row_max, last, last_id, beta):  # type: ignore[no-untyped-def]
    """beta z and e^(beta z), which is 0 in the head, and where the logit is -inf, as beyond the last column."""
    # Clamped, because a masked logit would give -inf and then -inf * 0, as would two of opposite sign at the limits.
    z = beta * tl.maximum(logit - row_max, -3.4028234663852886e38)
    outside = (logit < last) | ((logit == last) & (ids > last_id))
    return z, tl.where(outside, _exp(z), 0.0)


@triton.jit
def _tail_lengths(  # type: ignore[no-untyped-def]
    row, ids, logits, row_max, last, last_id, stride, columns, beta, unit
):
    """The lengths of ids of a row, int64."""
    logit = tl.load(logits + row * stride + ids, mask=ids < columns, other=-float("inf"))
    _, mass = _tail_mass(logit, ids, tl.load(row_max + row), tl.load(last + row), tl.load(last_id + row), beta)
    return (mass * tl.load(unit + row)).to(tl.int32).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _maxima_kernel(  # type: ignore[no-untyped-def]
    logits,  # [R, V], rows `stride` apart
    stride,
    blocks,
    maxima,  # [R, M]: written
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``maxima = max(logits)`` of each block, NaN where it has one."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    ids = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(logits + row * stride + ids, mask=(block < blocks)[:, None], other=-float("inf"))
    # A GPU's maximum ignores NaN, unlike torch's.
    has_nan = tl.max((x != x).to(tl.int32), 1)
    largest = tl.max(tl.where(x != x, -float("inf"), x), 1)
    tl.store(maxima + row * blocks + block, tl.where(has_nan > 0, float("nan"), largest), mask=block < blocks)


@triton.jit  # type: ignore[untyped-decorator]
def _tail_kernel(  # type: ignore[no-untyped-def]
    logits,  # [R, V], rows `stride` apart
    row_max,  # [R], and the next two
    last,
    last_id,
    stride,
    columns,
    beta,
    sums,  # [3, R, G]: written
    plane_stride,
    sums_stride,
    SEGMENT: tl.constexpr,
):
    """Each segment's sums of m^2, m and beta z m^2, with m = e^(beta z) outside the head."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * SEGMENT + tl.arange(0, SEGMENT)
    logit = tl.load(logits + row * stride + ids, mask=ids < columns, other=-float("inf"))
    z, mass = _tail_mass(logit, ids, tl.load(row_max + row), tl.load(last + row), tl.load(last_id + row), beta)
    square = mass * mass
    sums += row * sums_stride + tl.program_id(1)
    tl.store(sums, tl.sum(square, 0))
    tl.store(sums + plane_stride, tl.sum(mass, 0))
    tl.store(sums + 2 * plane_stride, tl.sum(z * square, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _block_lengths_kernel(  # type: ignore[no-untyped-def]
    logits,  # [R, V], rows `stride` apart
    row_max,  # [R], and the next two
    last,
    last_id,
    stride,
    columns,
    beta,
    unit,  # [R]
    blocks,
    sums,  # int64 [R, M]: written
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``sums = sum(floor(unit e^(beta z)))`` of each block, outside the head."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    ids = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    lengths = _tail_lengths(row, ids, logits, row_max, last, last_id, stride, columns, beta, unit)
    tl.store(sums + row * blocks + block, tl.sum(lengths, 1), mask=block < blocks)


@triton.jit  # type: ignore[untyped-decorator]
def _lengths_kernel(  # type: ignore[no-untyped-def]
    logits,  # [R, V], rows `stride` apart
    row_max,  # [R], and the next two
    last,
    last_id,
    stride,
    columns,
    beta,
    unit,  # [R]
    wanted,  # int64 [R, n], blocks
    count,
    lengths,  # int64 [R, n, W]: written
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``lengths = floor(unit e^(beta z))`` in the wanted blocks, 0 in the head."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.load(wanted + row * count + number, mask=number < count, other=0).to(tl.int32)
    column = tl.arange(0, WIDTH)[None, :]
    ids = block[:, None] * WIDTH + column
    found = _tail_lengths(row, ids, logits, row_max, last, last_id, stride, columns, beta, unit)
    tl.store(lengths + (row * count + number)[:, None] * WIDTH + column, found, mask=(number < count)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _row_sums_kernel(  # type: ignore[no-untyped-def]
    values,  # [N, n]
    count,
    columns,
    sums,  # [N]: written
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sums = sum(values)``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = (row < count)[:, None]
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        total += tl.load(values + row[:, None] * columns + at, mask=here & (at < columns), other=0.0)
    tl.store(sums + row, tl.sum(total, 1), mask=row < count)
