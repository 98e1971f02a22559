"""The logits of a tensor-parallel model: each rank computes its own columns, so that logits are never gathered.

Legend: `B` windows, `C` tokens per window, `H` hidden size, `n` columns of this rank.

transformers shards the output layer's weights by rows, one run of columns for each rank, and gathers the logits after
its product. Here each rank multiplies the hidden states, which are replicated, with its own rows alone. An output layer
that is replicated is sliced in the same way, and each rank multiplies only its slice.

fast     the backbone, then the product; where the model does nothing else
general  the model's own forward with an output layer that returns this rank's columns: a factor or a soft cap after it
         works on some columns as on all of them

The choice is tested as in `teachers.huggingface.scoring`, against the model's own gathered logits of a few short
windows; the ranks decide together. A model that needs whole rows after its head is refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from storage.errors import InputError
from student.models.logit_agreement import agree, replaced_forward
from teachers.huggingface.output_layer import Float32Head
from teachers.huggingface.scoring import TOLERANCE, FastPath, GeneralPath, ScoringPath, disagreement, forward
from teachers.ranks import ColumnShard, Ranks, all_true, equal_runs

_GATHERED_ROWS = 64  # of the transposed weights at a time


def tensor_parallel_options(ranks: Ranks) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that shard layers by the model's own tensor-parallel plan."""
    try:
        distributed: Any = importlib.import_module("transformers.distributed")
        return {"distributed_config": distributed.DistributedConfig(tp_size=ranks.size)}
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"transformers {transformers.__version__} cannot spread a model over ranks as --tensor-parallel needs it "
            f"({error}): install a newer one"
        ) from None


class ShardedHead(Float32Head):
    """This rank's columns of a `Head`: weights [n, H] and a bias [n]. All ranks make its calls together."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shard: ColumnShard) -> None:
        super().__init__(weight, bias)
        self._shard = shard

    def embeddings(self) -> Tensor:
        """The weights of the columns of all ranks, float32 [C, H], on the CPU; the same on every rank."""
        return torch.cat([part.float().cpu() for part in self._whole_columns()]).t().contiguous()

    def in_order(self, order: Tensor) -> ShardedHead:
        """This rank's columns of the head in another order, int64 [C], which may be other ranks' now."""
        own = order.to(self.device)[self._shard.own]
        weight = torch.cat([part[:, own] for part in self._whole_columns()]).t().contiguous()
        bias = None if self._bias is None else self._shard.whole(self._bias[None])[0, own]
        return ShardedHead(weight, bias, self._shard)

    def _whole_columns(self) -> Iterator[Tensor]:
        """The transposed weights [H, C] of all ranks, some of their rows at a time."""
        for part in torch.split(self._weight.t(), _GATHERED_ROWS):
            yield self._shard.whole(part)


class ShardedPath(GeneralPath):
    """The model's own forward with an output layer that returns this rank's columns."""

    def __init__(self, model: Any, linear: nn.Linear, head: ShardedHead) -> None:
        super().__init__(model, float32=True)
        self._linear = linear
        self.head = head

    def in_order(self, order: Tensor) -> ShardedPath:
        """See `FastPath.in_order`; what comes after the head works on columns one by one."""
        return ShardedPath(self._model, self._linear, self.head.in_order(order))

    def own_logits(self, windows: Tensor, last: int | None, positions: Tensor | None = None) -> Tensor:
        with replaced_forward(self._linear, self.head):
            return forward(self._model, windows, last, positions)


def choose_sharded_path(
    model: Any, windows: Tensor, logits: Tensor, dtype: str, ranks: Ranks, source: str
) -> tuple[ScoringPath, ColumnShard, str | None]:
    """The path to this rank's columns, the columns, and why the path is not the fast one (None where it is).

    logits: the model's own for the windows, float32 [B, C, columns]. All ranks call this, and get the same kind of
    path. Raises InputError for a model whose columns cannot be computed separately.
    """
    linear, backbone = model.get_output_embeddings(), getattr(model, "base_model", model)
    if type(linear) is not nn.Linear:
        raise InputError(
            f"{source}: its output layer is a {type(linear).__name__}, not a plain Linear, whose columns could be "
            f"computed on several ranks: leave --tensor-parallel out"
        )
    shard = _shard(linear, ranks, source)
    if shard.head_columns != logits.shape[-1]:
        raise InputError(
            f"{source}: its output layer has {shard.head_columns} columns and its logits {logits.shape[-1]}: they "
            f"cannot be computed on several ranks: leave --tensor-parallel out"
        )

    def same(own: Tensor, whole: Tensor) -> bool:
        expected = whole[..., shard.own]
        fits = own.shape == expected.shape and (not own.numel() or agree(own, expected, TOLERANCE[dtype]))
        return all_true(ranks, fits)

    bias = None if linear.bias is None else _own_rows(linear.bias, shard)
    head = ShardedHead(_own_rows(linear.weight, shard), bias, shard)
    problem = "it has no backbone that can be called by itself"
    if backbone is not model:
        fast = FastPath(backbone, head)
        found = disagreement(
            model, linear, fast, windows, logits, lambda *both: None if same(*both) else "give other logits"
        )
        if found is None:
            return fast, shard, None
        problem = found
    path = ShardedPath(model, linear, head)
    with torch.inference_mode():
        now = path.own_logits(windows, None)
    if not (same(now, logits) and now.dtype == torch.float32):
        raise InputError(
            f"{source}: after its output layer {type(model).__name__} needs all columns at once, or their dtype, so "
            f"that it cannot be computed on several ranks: use --device-map instead of --tensor-parallel"
        )
    return path, shard, problem


def _shard(linear: nn.Linear, ranks: Ranks, source: str) -> ColumnShard:
    weight: Any = linear.weight
    if not _is_sharded(weight, source):
        return ColumnShard(ranks, equal_runs(int(weight.shape[0]), ranks.size))
    counts = ranks.objects(len(weight.to_local()))
    stops = [sum(counts[: rank + 1]) for rank in range(ranks.size)]
    return ColumnShard(ranks, tuple(zip([0, *stops[:-1]], stops, strict=True)))


def _own_rows(tensor: Tensor, shard: ColumnShard) -> Tensor:
    """The part of the output layer's weights [C, H] or bias [C] for this rank's columns."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local if _is_sharded(tensor, "") else local[shard.own]


def _is_sharded(tensor: Tensor, source: str) -> bool:
    """Whether a rank has only its rows of a parameter."""
    if not isinstance(tensor, DTensor) or tensor.placements == (Replicate(),):
        return False
    if tensor.placements != (Shard(0),):
        raise InputError(
            f"{source}: its output layer is spread over the ranks as {tensor.placements}, not by columns: leave "
            f"--tensor-parallel out"
        )
    return True
