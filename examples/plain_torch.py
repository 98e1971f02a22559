"""Distil from a cache in a loop of your own: plain torch, no Trainer.

    python examples/plain_torch.py run/train --teacher llama --model llama-tiny --steps 200 --out run/plain

What a loop must get right is here in full: windows and targets come from one range of positions
(`DistillationWindows`); a step cut into micro-batches divides once, by the trained positions of all of them; labels are
aligned with the logits already and are not shifted again. The model's own forward computes the loss (`bind_loss`) and
takes a batch as it is. Isolated documents, as conversations, share windows: the bound forward keeps them apart by the
batch's positions, and a model that cannot reads each document in a row of its own, and says so.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from storage import LogitCache
from student import (
    NOT_TRAINED,
    DistillationLoss,
    DistillationWindows,
    LossFigures,
    Member,
    bind_loss,
    collate,
    load_student,
    reading_order,
)


def train(
    cache: str,
    teachers: list[str],
    model_name: str,
    out: str | None,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    window_tokens: int = 128,
    batch_windows: int = 32,
    micro_batches: int = 2,
    steps: int = 200,
    learning_rate: float = 1e-3,
    seed: int = 0,
    **options: object,
) -> list[float]:
    """Train a student and return the loss of every step; `options` are other fields of the loss, e.g. loss="jsd"."""
    windows = DistillationWindows(cache, teachers, window_tokens, "random", seed)
    members = [Member.of(name, entry) for name, entry in windows.entries.items()]
    loss = DistillationLoss(
        windows.vocabulary_size, alpha, temperature, members, window_tokens=window_tokens, **options
    )
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    bind_loss(model, loss)
    figures = LossFigures(loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    order = reading_order(windows, batch_windows)
    loader = DataLoader(windows, batch_windows // micro_batches, sampler=order, collate_fn=collate, drop_last=True)

    if len(loader) < micro_batches:
        raise SystemExit(f"{len(windows)} windows are fewer than the {batch_windows} of a step")

    losses: list[float] = []
    epoch = 0
    while len(losses) < steps:
        order.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(len(loader) // micro_batches):
            step = [next(batches) for _ in range(micro_batches)]
            # One divisor for all of the step's micro-batches, known before the first backward pass.
            count = sum(int((batch["labels"] != NOT_TRAINED).sum()) for batch in step)
            loss.set_progress(len(losses) / max(steps - 1, 1))
            total, control = 0.0, []
            for batch in step:
                output = model(**send_to_device(batch, device), num_items_in_batch=count)
                output.loss.backward()
                total += float(output.loss.detach())
                control.append(output.control)
                figures.add(output)
            loss.end_step(torch.stack(control).sum(0))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            if len(losses) % 20 == 0 or len(losses) == steps:
                shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.take().items())
                print(f"step {len(losses)}: loss {total:.4f}; since the last line: {shown}", flush=True)
            if len(losses) == steps:
                break
        epoch += 1
    if out is not None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="A student from cached targets, in a plain loop.")
    parser.add_argument("cache")
    parser.add_argument("--teacher", action="append", required=True)
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--window-tokens", type=int, default=128)
    parser.add_argument("--batch-windows", type=int, default=32)
    parser.add_argument("--out")
    given = parser.parse_args()
    train(
        given.cache, given.teacher, given.model, given.out,
        alpha=given.alpha, temperature=given.temperature, steps=given.steps, window_tokens=given.window_tokens,
        batch_windows=given.batch_windows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
