"""The output layer (LM head) of a teacher with float32 logits, in memory or offloaded.

Legend: `H` hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.errors import InputError


class Float32Head:
    """A `Head` of weights [columns, H] and a bias [columns] that are loaded.

    device: where its logits appear; hidden states may be on another one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        weight = weight.detach()
        # cuBLAS multiplies half-precision operands into float32; elsewhere one float32 copy of the weights,
        # which is no copy at all when the model is float32.
        self._mixed = weight.is_cuda and weight.dtype != torch.float32
        self._weight = weight if self._mixed else weight.float()
        self._bias = None if bias is None else bias.detach().float()
        self.device = weight.device

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits, float32 [..., columns], of hidden states [..., H]."""
        hidden = hidden.to(self.device)
        if not self._mixed:
            return F.linear(hidden.float(), self._weight, self._bias)
        flat = hidden.reshape(-1, hidden.shape[-1]).to(self._weight.dtype)
        logits = torch.mm(flat, self._weight.t(), out_dtype=torch.float32)
        if self._bias is not None:
            logits.add_(self._bias)
        return logits.view(*hidden.shape[:-1], -1)

    def embeddings(self) -> Tensor:
        """The weights of all columns, float32 [columns, H], on the CPU."""
        return self._weight.float().cpu()

    def in_order(self, order: Tensor) -> Float32Head:
        """The head with its columns in another order, int64 [columns]; the rows of its weights are copied."""
        order = order.to(self.device)
        return Float32Head(self._weight[order], None if self._bias is None else self._bias[order])


class OffloadedHead:
    """A `Head` of an offloaded output layer, whose weights are loaded for each chunk of rows.

    order: of its columns, int64 [columns], where it is not that of the weights.
    """

    def __init__(self, linear: nn.Linear, order: Tensor | None = None) -> None:
        hook: Any = getattr(linear, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is None:
            raise InputError("its output layer has no weights")
        with self._loaded(linear):
            self.device = linear.weight.device
        self._linear = linear
        self._order = None if order is None else order.to(self.device)

    def __call__(self, hidden: Tensor) -> Tensor:
        with self._loaded(self._linear):
            logits = Float32Head(self._linear.weight, self._linear.bias)(hidden)
        return logits if self._order is None else logits.index_select(-1, self._order)

    def embeddings(self) -> Tensor:
        with self._loaded(self._linear):
            return Float32Head(self._linear.weight, None).embeddings()

    def in_order(self, order: Tensor) -> OffloadedHead:
        """See `Float32Head.in_order`; the weights stay where they are, and each chunk of logits is copied."""
        return OffloadedHead(self._linear, order)

    @staticmethod
    def _loaded(linear: nn.Linear) -> Any:
        from accelerate.utils import align_module_device

        return align_module_device(linear)


Head = Float32Head | OffloadedHead


def linear_of(model: Any, columns: int, source: str) -> nn.Linear:
    """The output layer of a model with `columns` logits; InputError where it is not a plain Linear of as many."""
    linear = model.get_output_embeddings()
    if type(linear) is not nn.Linear or linear.out_features != columns:
        found = type(linear).__name__ + (f" of {linear.out_features} columns" if type(linear) is nn.Linear else "")
        raise InputError(
            f"{source}: its output layer is a {found}, not a plain Linear of {columns}, so it has no output embeddings "
            f"to order the vocabulary by: sample without an order"
        )
    return linear


def head_of(linear: nn.Linear) -> Head:
    """The `Head` of an output layer in memory, or one that loads the weights for each use if they are offloaded."""
    if linear.weight.device.type == "meta":
        return OffloadedHead(linear)
    return Float32Head(linear.weight, linear.bias)
