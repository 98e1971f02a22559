"""Progress of a training run: a bar on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerState, TrainingArguments

from storage.text import duration
from student.loss.objective import TEACHER_CROSS_ENTROPY


class TrainingProgress(TrainerCallback):
    """Steps, loss, tokens per second and time left. `tokens_per_step` counts all processes."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._bar: Any = None
        self._started = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        logs: dict[str, float] = others.get("logs") or {}
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & logs.keys():
            return
        figures = _figures(logs)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{figures}, {self._rate(state)}", refresh=False)
        else:
            left = self._seconds_per_step(state) * (state.max_steps - state.global_step)
            print(
                f"step {state.global_step}/{state.max_steps}: {figures}, {self._rate(state)}, {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _seconds_per_step(self, state: TrainerState) -> float:
        return (time.monotonic() - self._started) / max(state.global_step - self._first_step, 1)

    def _rate(self, state: TrainerState) -> str:
        return f"{self._tokens_per_step / max(self._seconds_per_step(state), 1e-9):,.0f} tokens/s"


def _figures(logs: dict[str, float]) -> str:
    shown = {
        key: value
        for key, value in logs.items()
        if key in ("loss", "cross_entropy", "eval_loss", "eval_ece")
        or key.removeprefix("eval_").startswith(("kl_", TEACHER_CROSS_ENTROPY))
    }
    return ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown.items())
