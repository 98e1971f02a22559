"""The reducer's passes over all V columns of rows, as Triton kernels or torch operators.

Legend: `T` rows of one tile, `V` columns, `K` kept ids.

On a GPU they are Triton kernels (`teachers.reduction.triton_passes`) that read the logits and write nothing of their
size; elsewhere, or without triton, torch operators over a tile of rows.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Protocol

import torch
from torch import Tensor

from storage.errors import InputError
from teachers.reduction.top_k import block_maxima
from teachers.reduction.varopt import Masses, TensorMasses, row_nansums, row_sums


class Tail(Protocol):
    """The columns of T rows outside their K first ones; z = logits - the row's maximum.

    mass, half, weighted  float32 [T]  the sums over them of e^z, e^(z/2) and z e^z
    """

    mass: Tensor
    half: Tensor
    weighted: Tensor

    def masses(self, beta: float) -> Masses:
        """Their masses e^(beta z)."""


class Passes(Protocol):
    """The work over all V columns of logits float32 [T, V], in rows of any stride, with T <= tile_rows."""

    tile_rows: int

    def block_maxima(self, logits: Tensor, width: int) -> Tensor:
        """The maxima of blocks of `width` columns, [T, V // width], NaN where one has a NaN; a shorter last block is
        left out."""

    def tail(self, logits: Tensor, row_max: Tensor, top: Tensor, ids: Tensor) -> Tail:
        """The columns outside the K first ones, whose logits are `top` [T, K] and ids `ids` int64 [T, K], in order."""

    def row_sums(self, values: Tensor) -> Tensor:
        """The sums [T] of [T, n], n of any size."""


def make_passes(rows: int, tile_rows: int, width: int, device: torch.device) -> Passes:
    """The passes of a device: kernels over all rows, or torch operators over `tile_rows` of `width` columns."""
    if has_kernels(device):
        from teachers.reduction.triton_passes import TritonPasses

        return TritonPasses(rows)
    return TorchPasses(max(1, tile_rows), width, device)


def has_kernels(device: torch.device) -> bool:
    """Whether the passes are Triton kernels; compiled once as a test. `LOGIT_CACHE_KERNELS=torch` disables them."""
    wanted = os.environ.get("LOGIT_CACHE_KERNELS") != "torch"
    return wanted and device.type == "cuda" and importlib.util.find_spec("triton") is not None and _compile(device)


@functools.cache
def _compile(device: torch.device) -> bool:
    """True; InputError where kernels do not compile: torch's passes would round differently, on one worker of many."""
    from teachers.reduction.triton_passes import TritonPasses

    try:
        TritonPasses(1).block_maxima(torch.zeros(1, 32, device=device), 32)
    except Exception as error:  # any failure of the compiler
        raise InputError(
            f"Triton kernels cannot be compiled for {device} ({type(error).__name__}: {str(error).strip()[:200]}): "
            f"install a C compiler, or set LOGIT_CACHE_KERNELS=torch for every worker of the entry"
        ) from error
    return True


class TorchPasses:
    """`Passes` of torch operators. `width`: the columns of its buffers, V or more; with more, the id V is of no
    column."""

    block_maxima = staticmethod(block_maxima)
    row_sums = staticmethod(row_sums)

    def __init__(self, tile_rows: int, width: int, device: torch.device) -> None:
        self.tile_rows = tile_rows
        # Two buffers for all tiles: fresh ones would cost a page fault per 4 KiB in every pass.
        self._buffers = torch.empty(2, tile_rows, width, dtype=torch.float32, device=device)

    def tail(self, logits: Tensor, row_max: Tensor, top: Tensor, ids: Tensor) -> Tail:
        return _TorchTail(logits, row_max, ids, self._buffers[:, : len(logits)])


class _TorchTail:
    def __init__(self, logits: Tensor, row_max: Tensor, ids: Tensor, buffers: Tensor) -> None:
        half_z, mass = buffers[:, :, : logits.shape[1]]  # [T, V] each
        # z/2 = (logit - max)/2 in one pass; halving first also keeps two huge logits from overflowing.
        torch.add(row_max[:, None] * -0.5, logits, alpha=0.5, out=half_z)
        torch.exp(half_z, out=mass)
        buffers[1].scatter_(1, ids, 0.0)
        self.half = row_sums(mass)
        mass.mul_(mass)  # one exp per element: e^z is the square of e^(z/2)
        self.mass = row_sums(mass)
        half_z.mul_(mass)
        self.weighted = 2 * row_nansums(half_z)  # NaN here is -inf * 0, a masked id; it adds nothing to the entropy
        self._logits, self._row_max, self._ids, self._buffers = logits, row_max, ids, buffers

    def masses(self, beta: float) -> Masses:
        scratch, mass = self._buffers[:, :, : self._logits.shape[1]]  # e^z is still in the second
        if beta != 1.0:
            torch.add(self._row_max[:, None] * -beta, self._logits, alpha=beta, out=mass)
            torch.exp(mass, out=mass)
            self._buffers[1].scatter_(1, self._ids, 0.0)
        return TensorMasses(mass, scratch)
