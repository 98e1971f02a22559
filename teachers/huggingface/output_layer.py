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


class OffloadedHead:
    """A `Head` of an offloaded output layer, whose weights are loaded for each chunk of rows."""

    def __init__(self, linear: nn.Linear) -> None:
        hook: Any = getattr(linear, "_hf_hook", None)
        if getattr(hook, "execution_device", None) is None:
            raise InputError("its output layer has no weights")
        with self._loaded(linear):
            self.device = linear.weight.device
        self._linear = linear

    def __call__(self, hidden: Tensor) -> Tensor:
        with self._loaded(self._linear):
            return Float32Head(self._linear.weight, self._linear.bias)(hidden)

    @staticmethod
    def _loaded(linear: nn.Linear) -> Any:
        from accelerate.utils import align_module_device

        return align_module_device(linear)


Head = Float32Head | OffloadedHead


def head_of(linear: nn.Linear) -> Head:
    """The `Head` of an output layer in memory, or one that loads the weights for each use if they are offloaded."""
    if linear.weight.device.type == "meta":
        return OffloadedHead(linear)
    return Float32Head(linear.weight, linear.bias)
