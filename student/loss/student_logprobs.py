"""The student's log-probs of some ids and log-mass of the tail bucket outside them, of logits that are held whole.

Legend: `P` positions of a batch (flattened), `K` ids per position, `V` vocabulary of a teacher, `W` columns of the
student's LM head, `tau` the temperature. Everything is in nats.

A chunk of rows at a time is copied, as float32, into a `LogitChunk` (`student.loss.chunk`), which has the gradient
rule. Unlike with plain autograd the logits alone are kept for the backward pass, which makes the chunks again: no
float32 copy, no softmax and no masked copy of [P, W] lives until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from storage.errors import InputError
from student.labels import NOT_TRAINED
from student.loss.chunk.logit_chunk import LogitChunk, Pair, row_slices

# Logits per chunk of rows, which bounds the temporaries: 2 MiB of float32 on a CPU, which stay in the processor's
# cache, and 256 MiB elsewhere, where fewer kernel launches matter more.
_CHUNK_LOGITS = {"cpu": 1 << 19, "elsewhere": 1 << 26}


def student_buckets(
    logits: Tensor, labels: Tensor, supports: Sequence[Tensor], sizes: Sequence[int], temperature: float
) -> tuple[Tensor, list[Pair]]:
    """(cross-entropy, and for each teacher ``ell = log q[ids]`` and ``theta = log sum of q outside the ids``).

    With ``u = logits / tau`` and ``lse = logsumexp(u)`` over all W columns, for each support int [P, K] (-1 where
    a column holds no id): ``ell = u[ids] - lse`` [P, K], 0 where there is no id, and ``theta = logsumexp of u[j]
    over j < V outside the ids - lse`` [P], -inf when nothing is outside. `sizes` are the teachers' V, which may differ
    and exceed W (a student of fewer columns than a teacher has ids has them all). The cross-entropy [P] is at
    temperature 1, and 0 where the label is `NOT_TRAINED`; such rows get the gradient 0, also by ell and theta.

    logits [P, W] of any float type; results are float32 (float64 for float64 logits), in nats, differentiable once.
    """
    cross_entropy, *rest = _StudentBuckets.apply(  # type: ignore[no-untyped-call]
        logits, labels, sizes, temperature, *supports
    )
    return cross_entropy, list(zip(rest[::2], rest[1::2], strict=True))


class _StudentBuckets(torch.autograd.Function):
    """Forward and backward of `student_buckets`, in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, sizes: Sequence[int], temperature: float, *supports: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, labels, *supports)
        ctx.sizes, ctx.temperature = sizes, temperature
        ctx.set_materialize_grads(False)
        found = []
        for rows in row_slices(logits, _CHUNK_LOGITS):
            _, chunk = _chunk(logits, labels, supports, sizes, temperature, rows)
            found.append([chunk.cross_entropy, *(tensor for pair in chunk.buckets for tensor in pair)])
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, *supports = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in row_slices(logits, _CHUNK_LOGITS):
            z, chunk = _chunk(logits, labels, supports, ctx.sizes, ctx.temperature, rows)
            by_label, *rest = (None if each is None else each[rows] for each in by_outputs)
            chunk.to_gradient(by_label, list(zip(rest[::2], rest[1::2], strict=True)))
            # Rounded once, to the logits' type.
            gradient[rows] = z
        return (gradient, None, None, None, *(None for _ in supports))


def _chunk(
    logits: Tensor,
    labels: Tensor,
    supports: Sequence[Tensor],
    sizes: Sequence[int],
    temperature: float,
    rows: slice,
) -> tuple[Tensor, LogitChunk]:
    """(the buffer [R, W], a copy of some rows; what was made of it)."""
    # float32 from here on: exp and its sum over the vocabulary lose digits in half precision.
    z = logits[rows].to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    some = [support[rows] for support in supports]
    return z, LogitChunk(z, labels[rows], labels[rows] != NOT_TRAINED, some, sizes, temperature)


def check_batch(logits: Tensor, labels: Tensor, vocabulary_size: int) -> None:
    """Raise InputError unless logits are [P, W] with W >= V and labels are [P]."""
    if logits.ndim != 2:
        raise InputError(f"logits must be flattened to [positions, columns]; got {list(logits.shape)}")
    check_columns(logits.shape[1], vocabulary_size)
    if labels.shape != logits.shape[:1]:
        raise InputError(f"labels must be [{len(logits)}], one for each row of logits; got {list(labels.shape)}")


def check_columns(columns: int, vocabulary_size: int) -> None:
    """Raise InputError where a head has fewer columns than there are ids."""
    if columns < vocabulary_size:
        raise InputError(
            f"the model's head has {columns} columns, fewer than the {vocabulary_size} ids of the cache's tokenizer: "
            "resize its embeddings or take another model"
        )
