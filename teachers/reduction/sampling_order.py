"""An order of the ids to draw in, with ids of similar output embeddings beside each other.

Legend: `V` vocabulary size, `H` hidden size, `N` nodes of one level and size, `n` ids of each.

Ids near each other in the order are rarely drawn together (`teachers.reduction.varopt`), so the error of a sample is
small along every direction that varies slowly over the order. A student's hidden states get ``W^T (q - w)``, W its
output embeddings, so ids of similar embeddings should be neighbours.

The order is that of a recursive bisection: sort a node's ids along the first principal direction of their centred
embeddings, cut them into halves of equal count, and do the same with each half, down to pairs. A direction has no
sign; it takes the one in which the ids as sorted one level above ascend, so that halves join as they did there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from storage.errors import InputError

_FEW_ROWS = 256  # up to here the matrix of their inner products costs less than repeated products with them
_POWERS = 32
_DIRECTIONS, _SUBSPACE_POWERS = 8, 4
_BATCH_VALUES = 1 << 22  # of embeddings at a time, 16 MiB, but of one node at least
_TINY = torch.finfo(torch.float32).tiny


def sampling_order(embeddings: Tensor) -> Tensor:
    """The ids in the order to draw in, int64 [V], on the CPU: a permutation.

    embeddings: float32 [V, H], of the V ids alone, on any device. Where all are equal, ids ascend. The result is the
    same for a repeated call on one machine; last bits differ elsewhere, and a near tie there turns a half, so an order
    is made once and stored. Takes as much memory again as the embeddings, and minutes at most: 9 s to 22 s for V =
    50,000 and H = 512 on one core of a busy machine, 144 s for 152,000 and 1,024.
    Raises InputError for embeddings that are not finite.
    """
    if not bool(torch.isfinite(embeddings).all()):
        row = int((~torch.isfinite(embeddings)).any(1).nonzero()[0])
        raise InputError(
            f"the teacher's output embeddings have no order: that of id {row} is not finite: check its weights"
        )
    order = torch.arange(len(embeddings), device=embeddings.device)
    sizes = torch.tensor([len(embeddings)])  # of the nodes of a level, in order; they differ by one at most
    while int(sizes.max()) > 2:
        starts = (sizes.cumsum(0) - sizes).to(order.device)
        for size in torch.unique(sizes[sizes > 2]).tolist():
            at_once = max(1, _BATCH_VALUES // (size * embeddings.shape[1]))
            for first in torch.split(starts[(sizes == size).to(order.device)], at_once):
                at = first[:, None] + torch.arange(size, device=order.device)  # [N, n]
                ids = order[at]
                order[at] = ids.gather(1, _along_first_direction(embeddings, ids).argsort(dim=1, stable=True))
        sizes = torch.stack([(sizes + 1) // 2, sizes // 2], dim=1).flatten()
    return order.cpu()


def _along_first_direction(embeddings: Tensor, ids: Tensor) -> Tensor:
    """Where the ids [N, n] lie along the first principal direction of each node, float32 [N, n], in any unit."""
    rows = embeddings[ids]  # [N, n, H]
    rows -= rows[:, :1].clone()  # where all are equal, they are exactly 0
    rows -= rows.mean(1, keepdim=True)
    rows /= torch.linalg.vector_norm(rows, torch.inf, (1, 2), keepdim=True).clamp_min(_TINY)
    count = rows.shape[1]
    along = (_of_few(rows) if count <= _FEW_ROWS else _of_many(rows)).squeeze(2)
    before = torch.arange(count, device=rows.device) - (count - 1) / 2
    return torch.where((along * before).sum(1, keepdim=True) < 0, -along, along)


def _of_few(rows: Tensor) -> Tensor:
    """[N, n, 1]: power iteration with the rows' inner products [N, n, n]."""
    gram = rows @ rows.mT
    along = _random(rows.shape[1], 1, rows.device)
    for _ in range(_POWERS):
        along = gram @ along
        along = along / along.norm(dim=1, keepdim=True).clamp_min(_TINY)
    return along


def _of_many(rows: Tensor) -> Tensor:
    """[N, n, 1]: subspace iteration with a few directions, of which the first is taken at the end; it needs fewer
    passes over the rows."""
    basis = _random(rows.shape[2], min(_DIRECTIONS, rows.shape[2]), rows.device)
    for _ in range(_SUBSPACE_POWERS):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis)).Q  # [N, H, directions]
    along = rows @ basis
    first: Tensor = torch.linalg.eigh(along.mT @ along).eigenvectors[:, :, -1:]
    return along @ first


def _random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
