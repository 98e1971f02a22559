"""Binds the distillation loss into a model's own `forward`, the call that DDP and FSDP hook; and unbinds it.

Legend: `B` windows of a batch, `T` positions of a window, `P` = B·T positions, `W` columns of the student's head,
`M` members of the mixture, `C` of them with tail controlled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from storage.errors import InputError
from student.loss.dense import DenseLoss
from student.loss.distillation import DistillationLoss, LossSums
from student.loss.documents import DocumentReader
from student.loss.output_layer import PlainHead, choose_head
from student.models.adapters.attach import inner_model
from student.target_batch import StoredBatch, TargetBatch

FusedHead = Literal["auto", "on", "off"]


@dataclass
class DistillationOutput(ModelOutput):
    """The output of a bound model that was given labels.

    loss      scalar: the sum over trained positions, divided once
    logits    [B, T, W], only outside training: nothing needs them there, and they are the largest tensor
    parts     float32 [1 + M, 2], without gradient: count of trained positions and sum of the cross-entropy, and of
              each member, in the loss's order, count of those with targets and sum of the divergence (nats)
    control   float32 [C, 3], without gradient: what `DistillationLoss.end_step` takes
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    parts: Tensor | None = None
    control: Tensor | None = None


def bind_loss(model: nn.Module, loss: DistillationLoss, fused_head: FusedHead = "auto") -> str | None:
    """Replace `model.forward`, on this instance only, by one that also takes labels and targets.

    ``model(input_ids, labels=labels, targets=targets).loss`` is ``loss_sum / num_items_in_batch`` of
    `DistillationLoss`; without `num_items_in_batch` the batch's own count divides. Labels are aligned with the logits
    already (`student.data.batches.collate`), unlike those that transformers' models shift themselves. `targets[name]`
    is a teacher's `StoredBatch` or `TargetBatch`, `position_weights` [B, T] those of the loss, if a data set gives any.
    Without labels the original forward runs, so `generate` works unchanged. A batch with positions is of documents that
    share rows: the model is tried out with the first one, and where it mixes them, it reads each in a row of its own.

    In training mode the output layer is fused with the loss (`student.loss.fused`: the logits [P, W] are never held)
    if the model's output layer allows it, which is tried on a few tokens (`student.loss.output_layer`). fused_head:
    auto, on (raises InputError where it does not) or off. Returns the reason why they are not fused, None where they
    are. A `DenseLoss` takes no targets: its teachers read the batch's own windows, and it is never fused.

    In a model that peft wraps, the forward of the model inside is replaced, which the wrapper's calls.

    Nothing is added to the weights or the configuration: `save_pretrained` writes the files of an unbound model.
    """
    model = inner_model(model)
    is_live = isinstance(loss, DenseLoss)
    if is_live and fused_head == "on":
        raise InputError("the fused head was asked for, but live teachers give whole logits; take auto or off")
    head = "the teachers run beside it" if is_live else choose_head(model, fused_head)
    model.forward = _BoundForward(model, loss, head)
    # Makes the Trainer count the trained tokens of a whole optimizer step and pass their number in.
    model.accepts_loss_kwargs = True  # type: ignore[assignment]
    return head if isinstance(head, str) else None


class _BoundForward:
    """A model's forward with its loss; `head` is the reason where the output layer is not fused with it."""

    def __init__(self, model: nn.Module, loss: DistillationLoss, head: PlainHead | str) -> None:
        self.model, self.original, self.loss, self.head = model, model.forward, loss, head
        self.documents = DocumentReader(model, self.original)
        # Loops over chunks and teachers on small tensors, which torch.compile handles badly and could not speed up.
        self._loss_sums = torch.compiler.disable(self.loss_sums)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        targets: dict[str, StoredBatch | TargetBatch] | None = None,
        position_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Any:
        aligned = shift_labels if shift_labels is not None else labels
        if aligned is None:
            if input_ids is not None and position_ids is not None and use_cache is False and not others:
                # A batch of `collate` without its labels.
                return DistillationOutput(logits=self.documents(partial(self._read, None, {}), input_ids, position_ids))
            given = {"position_ids": position_ids, "use_cache": use_cache}
            others |= {name: value for name, value in given.items() if value is not None}
            return self.original(input_ids=input_ids, **others)
        head = self.head if self.model.training and isinstance(self.head, PlainHead) else None
        read = partial(self._read, head, others)
        computed = read(None) if input_ids is None else self.documents(read, input_ids, position_ids)
        sums: LossSums = self._loss_sums(head, computed, aligned, targets, position_weights, input_ids, position_ids)
        count = sums.count if num_items_in_batch is None else num_items_in_batch
        # A step without a single trained token has the sum 0, and must not become 0/0.
        divisor = torch.as_tensor(count, device=sums.loss_sum.device).clamp(min=1)
        pairs = [(sums.count, sums.cross_entropy)]
        pairs += [(sums.taught[name], divergence) for name, divergence in sums.divergence.items()]
        return DistillationOutput(
            loss=sums.loss_sum / divisor,
            logits=None if self.model.training else computed,
            parts=torch.stack([torch.stack(pair) for pair in pairs]).to(torch.float32),
            control=sums.control.to(torch.float32),
        )

    def _read(
        self, head: PlainHead | None, others: dict[str, Any], ids: Tensor | None, positions: Tensor | None = None
    ) -> Tensor:
        """What `head` takes, hidden states [B, T, H], or logits [B, T, W]."""
        given = others if positions is None else {"position_ids": positions, **others}
        if head is not None:
            return head.hidden(ids, **given)
        logits: Tensor = self.original(input_ids=ids, use_cache=False, **given).logits
        return logits

    def loss_sums(
        self,
        head: PlainHead | None,
        computed: Tensor,
        labels: Tensor,
        targets: dict[str, StoredBatch | TargetBatch] | None,
        position_weights: Tensor | None,
        windows: Tensor | None,
        positions: Tensor | None,
    ) -> LossSums:
        """The sums of a batch; `computed` are what `head` takes, hidden states [B, T, H], or logits [B, T, W].

        Hidden states of rows that the loss does not depend on, such as prompts, get no logits.
        """
        flat, by_row = labels.flatten(), computed.flatten(0, 1)
        by_position = None if position_weights is None else position_weights.flatten()
        if head is None:
            return self.loss(by_row, flat, targets, by_position, windows, positions)
        rows = self.loss.needed_rows(flat)
        by_row = by_row if rows is None else by_row.index_select(0, rows)
        return head.loss_sums(by_row, self.loss.prepare(flat, targets, by_position, rows))


def unbind_loss(model: nn.Module) -> None:
    """Restore the forward of the model's class; does nothing to a model without a bound loss."""
    for name in ("forward", "accepts_loss_kwargs"):
        inner_model(model).__dict__.pop(name, None)
