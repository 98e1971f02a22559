"""Distil from a cache under Lightning: the loss in a LightningModule, the windows in a DataLoader.

    pip install lightning
    python examples/lightning_module.py run/train --teacher llama --model llama-tiny --steps 200

On several devices Lightning averages gradients over the processes, so a step's loss is multiplied by their number and
divided by the trained positions of all of them. Accumulated batches are averaged too, each as if it had as many
trained positions as the others; where that is not so, take `student.DistillationTrainer`.

Isolated documents, as conversations, share windows: the model's bound forward (`bind_loss`) keeps them apart by the
batch's positions, and a model that cannot reads each document in a row of its own, and says so.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from storage import LogitCache
from student import (
    NOT_TRAINED,
    DistillationLoss,
    DistillationWindows,
    Member,
    bind_loss,
    collate,
    load_student,
    reading_order,
)


class Distillation(lightning.LightningModule):
    """A causal language model of transformers and a DistillationLoss."""

    def __init__(self, model: torch.nn.Module, loss: DistillationLoss, steps: int, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.model = model
        bind_loss(model, loss)
        self.loss = loss
        self.steps = steps
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        self.loss.set_progress(self.global_step / max(self.steps - 1, 1))
        count = self.all_gather((batch["labels"] != NOT_TRAINED).sum()).sum()
        loss = self.model(**batch, num_items_in_batch=count).loss * self.trainer.world_size
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)


def train(
    cache: str,
    teachers: list[str],
    model_name: str,
    steps: int,
    window_tokens: int = 128,
    batch_windows: int = 32,
    seed: int = 0,
    **trainer: Any,
) -> Distillation:
    """Train a student for some steps; `trainer` are arguments of lightning.Trainer."""
    windows = DistillationWindows(cache, teachers, window_tokens, "random", seed)
    members = [Member.of(name, entry) for name, entry in windows.entries.items()]
    loss = DistillationLoss(windows.vocabulary_size, alpha=0.5, temperature=1.0, members=members)
    with tempfile.TemporaryDirectory() as folder:
        LogitCache.open(cache).save_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_student(
        model_name,
        vocabulary_size=windows.vocabulary_size,
        special_ids={name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        window_tokens=window_tokens,
        seed=seed,
    )
    # Lightning sets the epoch of a sampler that has `set_epoch`, and an index carries its epoch to the data set.
    order = reading_order(windows, batch_windows)
    loader = DataLoader(windows, batch_windows, sampler=order, collate_fn=collate, drop_last=True)
    module = Distillation(model, loss, steps)
    lightning.Trainer(max_steps=steps, enable_checkpointing=False, logger=False, **trainer).fit(module, loader)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description="A student from cached targets, under Lightning.")
    parser.add_argument("cache")
    parser.add_argument("--teacher", action="append", required=True)
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out")
    given = parser.parse_args()
    module = train(given.cache, given.teacher, given.model, given.steps)
    if given.out:
        module.model.save_pretrained(given.out)


if __name__ == "__main__":
    main()
