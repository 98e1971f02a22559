"""Triton kernels for the passes of `student.loss.chunk.logit_chunk`: logits are read once for sums, once for gradients.

Legend: `R` rows, `C` columns of a part of the buffer, `tau` the temperature.

In torch operations a row goes to memory and back for its maximum, its exponentials, their sums, and once or more for
the gradient. Here one program processes one row. It finds the largest logit and the sums together: where a block of
columns has a larger logit than all before, the sums so far are rescaled to it (online softmax: Milakov and Gimelshein
2018, "Online normalizer calculation for softmax"). Nothing is written then; the gradient computes the exponentials
again from z and overwrites it.

Precision: float32 throughout. Exponentials are powers of two, so that base and temperature are one factor: an exponent
has three roundings, of the difference of logits, of the factor, and of their product. Sums within a block are
pairwise, and those of blocks sequential, 32 of them for V = 128k.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from student.loss.chunk.logit_chunk import LogitChunk, Part

# The most columns that a program holds at once; with 8 warps, 16 for each thread.
_BLOCK = 4096


class TritonChunk(LogitChunk):
    """A `LogitChunk` of a float32 buffer, on a device that triton compiles for."""

    @staticmethod
    def _part(z: Tensor, temperature: float) -> Part:
        return _Logits.of(z, temperature)


class _Logits(Part):
    """A part whose buffer holds z until the gradient replaces it."""

    @classmethod
    def of(cls, z: Tensor, temperature: float) -> _Logits:
        assert z.dtype == torch.float32, "the kernels add up in float32"
        assert z.stride(1) == 1, "the kernels take a row as one piece of memory"
        largest, total, total_one = (z.new_empty(len(z)) for _ in range(3))
        _run(_sums_kernel, z, temperature, largest, total, total_one, TEMPERED=temperature != 1.0)
        return cls(z, temperature, largest, total, total if temperature == 1.0 else total_one)

    def to_gradient(self, a: Tensor, b: Tensor | None, softcap: float | None) -> None:
        if b is not None and self.temperature == 1.0:
            a, b = a + b, None
        _run(
            _gradient_kernel,
            self.buffer,
            self.temperature,
            self.largest,
            a.contiguous(),
            a if b is None else b.contiguous(),
            1.0 if softcap is None else softcap,
            TWO_TERMS=b is not None,
            CAPPED=softcap is not None,
        )


def check(device: torch.device, temperature: float, softcap: float | None) -> None:
    """Compile the kernels for such chunks, and compare their results with those of torch's passes.

    Raises RuntimeError where they differ, and triton's own errors where it cannot compile or run here: without a C
    compiler, for example, or for a device older than it supports.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    # Two blocks and a partial one, and padded columns.
    rows, columns, vocabulary_size = 3, 2 * _BLOCK + 50, 2 * _BLOCK + 10
    z, labels = normal(rows, columns), torch.arange(rows, device=device)
    trained, support = labels >= 0, torch.arange(5, device=device).repeat(rows, 1)
    z = 4.0 * z if softcap is None else softcap * torch.tanh(4.0 * z / softcap)
    by_label, by_bucket = normal(rows), [(normal(rows, 5), normal(rows))]
    found = []
    for kind in (LogitChunk, TritonChunk):
        buffer = z.clone()
        chunk = kind(buffer, labels, trained, [support], [vocabulary_size], temperature, softcap)
        chunk.to_gradient(by_label, by_bucket)
        found.append((chunk.cross_entropy, *chunk.buckets[0], buffer))
    for ours, theirs in zip(found[1], found[0], strict=True):
        scale = float(theirs.abs().max())
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale):
            raise RuntimeError(f"its results differ by {float((ours - theirs).abs().max()):.3g} of {scale:.3g}")


def _run(kernel: Any, z: Tensor, temperature: float, *arguments: Tensor | float, **choices: bool) -> None:
    """Launch a kernel with one program for each row of z [R, C]."""
    rows, columns = z.shape
    block = min(_BLOCK, triton.next_power_of_2(columns))
    scales = (math.log2(math.e) / temperature, math.log2(math.e))
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        kernel[(rows,)](
            z, z.stride(0), columns, *scales, *arguments, BLOCK=block, num_warps=max(1, min(8, block // 256)), **choices
        )


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore[no-untyped-def]
    z,  # [R, C], rows `stride` apart
    stride,
    columns,
    scale,  # log2(e) / tau, and for temperature 1
    scale_one,
    largest,  # [R], and the next two: written
    total,
    total_one,  # left alone unless TEMPERED
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``largest = max(z)``, ``total = sum(exp((z - largest) / tau))``, ``total_one = sum(exp(z - largest))``."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    top = -float("inf")
    sum_tau = 0.0
    sum_one = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + at, mask=at < columns, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(x, 0))
        # While all columns are -inf, any finite number here makes their exponentials 0, as they are.
        level = tl.where(new_top == -float("inf"), 0.0, new_top)
        sum_tau = sum_tau * tl.exp2((top - level) * scale) + tl.sum(tl.exp2((x - level) * scale), 0)
        if TEMPERED:
            sum_one = sum_one * tl.exp2((top - level) * scale_one) + tl.sum(tl.exp2((x - level) * scale_one), 0)
        top = new_top
    tl.store(largest + row, top)
    tl.store(total + row, sum_tau)
    if TEMPERED:
        tl.store(total_one + row, sum_one)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    z,  # [R, C], rows `stride` apart: read, and written over
    stride,
    columns,
    scale,  # log2(e) / tau, and for temperature 1
    scale_one,
    largest,  # [R], and the next two
    a,
    b,  # not read unless TWO_TERMS
    softcap,
    TWO_TERMS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``z = (a exp((z - largest) / tau) + b exp(z - largest)) * (1 - (z / softcap)**2)``; 0 where z is -inf."""
    row = tl.program_id(0).to(tl.int64)
    z += row * stride
    top = tl.load(largest + row)
    level = tl.where(top == -float("inf"), 0.0, top)
    by_tau = tl.load(a + row)
    if TWO_TERMS:
        by_one = tl.load(b + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(z + at, mask=at < columns, other=-float("inf"))
        gradient = by_tau * tl.exp2((x - level) * scale)
        if TWO_TERMS:
            gradient += by_one * tl.exp2((x - level) * scale_one)
        if CAPPED:
            share = x / softcap
            gradient = tl.where(x == -float("inf"), 0.0, gradient * (1.0 - share * share))
        tl.store(z + at, gradient, mask=at < columns)
