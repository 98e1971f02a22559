"""Distil from a cache under TRL: our windows and our loss in SFTTrainer, with its arguments, callbacks and saving.

    pip install trl
    python examples/trl_sft.py run/chats --teacher chat --model models/small-chat --window-tokens 1024 --out run/sft

The same command continues from the last checkpoint in --out, with the windows that an uninterrupted run would read.

TRL takes data sets of `datasets` alone: `IterableWindows` is one, in the order in which our own trainer reads. Its
`collate` makes the batches, and the model's own forward computes the loss (`bind_loss`), so nothing holds logits.
Isolated documents, as conversations, share windows: the bound forward keeps them apart by the batch's positions, and a
model that cannot reads each document in a row of its own, and says so.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from storage import LogitCache
from student import (
    DistillationLoss,
    DistillationWindows,
    IterableWindows,
    LossFigures,
    Member,
    bind_loss,
    load_student,
    reading_order,
)


class DistillingSFTTrainer(SFTTrainer):
    """SFTTrainer for a model with a bound loss; its log has the divergence from each teacher.

    A scheduled alpha and tail "controlled" want a callback at each step besides: `student.DistillationTrainer` has it.
    """

    def __init__(self, *given: Any, loss: DistillationLoss, **named: Any) -> None:
        self.figures = LossFigures(loss)
        super().__init__(*given, **named)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # TRL's own makes a loss of the labels' log-probs; transformers' takes that of the model.
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if model.training:
            self.figures.add(outputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self.figures.take() if "loss" in logs else logs, start_time)


def train(
    cache: str,
    teachers: list[str],
    model_name: str,
    out: str,
    steps: int,
    window_tokens: int = 1024,
    batch_windows: int = 8,
    seed: int = 0,
    **options: Any,
) -> DistillingSFTTrainer:
    """Train a student for some steps and save it; `options` are other fields of trl.SFTConfig."""
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
    bind_loss(model, loss)
    settings = SFTConfig(
        out,
        max_steps=steps,
        per_device_train_batch_size=batch_windows,
        seed=seed,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        **{"bf16": torch.cuda.is_available(), **options},
    )
    windows_per_step = settings.train_batch_size * settings.world_size * settings.gradient_accumulation_steps
    data = IterableWindows(windows, reading_order(windows, windows_per_step, whole_steps=True))
    trainer = DistillingSFTTrainer(
        model, settings, data_collator=data.collate, train_dataset=data, processing_class=tokenizer, loss=loss
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if Path(out).is_dir() else None)
    trainer.save_model()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="A student from cached targets, under TRL.")
    parser.add_argument("cache")
    parser.add_argument("--teacher", action="append", required=True)
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--batch-windows", type=int, default=8)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    train(given.cache, given.teacher, given.model, given.out, given.steps, given.window_tokens, given.batch_windows)


if __name__ == "__main__":
    main()
