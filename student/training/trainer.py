"""Training from a cache with transformers' Trainer: loss inside the forward, reading order, held-out evaluation.

The loss is computed inside the student's own `forward` (`student.training.bound_forward`), because that is the call
which DDP and FSDP hook: a head applied outside it would leave gradients unsynchronised. Everything else (precision,
accumulation, checkpoints, resuming, logging) is the base class's; its `compute_loss` only has to rescale a loss that
was divided once, by the number of trained tokens of the whole optimizer step over all processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint

from storage.errors import Diverged, InputError
from student.data.batches import collate, read_by_model
from student.data.order import ReadingOrder
from student.data.windows import DistillationWindows, reading_order
from student.evaluation.held_out import HeldOutSums, bytes_per_token
from student.evaluation.passage import expected_passage
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss
from student.loss.figures import LossFigures
from student.loss.teacher_targets import Member
from student.report import HeldOutReport, Passage
from student.training.bound_forward import FusedHead, bind_loss
from student.training.divergence import FiniteSteps, are_finite
from student.training.fsdp import FSDPIsOn, keep_precision
from student.training.step import take_one_device, windows_per_step

CHECKPOINT_SECONDS = 60.0
"""Time between two checkpoints that `SaveByTime` asks for, at least."""

CHECKPOINT_SHARE = 0.05
"""Share of the time of a run that they take, at most."""

CONTROL_STATE = "control_variates"
"""Where the trainer's state in a checkpoint has those of the loss, by teacher."""


class DistillationTrainer(Trainer):
    """transformers' Trainer over `DistillationWindows` with a `DistillationLoss`.

    Takes Trainer's arguments (model, args, train_dataset, eval_dataset, callbacks, …) and `loss`, besides
    `eval_members`: the teachers of `eval_dataset` to which the held-out KL is measured, `eval_loss`: the loss that is
    averaged over `eval_dataset` as `distillation_loss`, and `fused_head`. The loss is bound to the model; `not_fused`
    is the reason why the output layer is not fused with it, None where it is (`bind_loss`). `has_begun` is False until
    all that the arguments ask for is made, and the first epoch begins.

    The reading order depends on the windows, their seed and the windows of a step, so a student and its control, or one
    process and several with the same step, see the same windows in the same order. `evaluate` counts every labelled
    position of `eval_dataset` once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: DistillationWindows | None = None,
        eval_dataset: DistillationWindows | None = None,
        *,
        loss: DistillationLoss,
        eval_members: Sequence[Member] = (),
        eval_loss: DistillationLoss | None = None,
        fused_head: FusedHead = "auto",
        **others: Any,
    ) -> None:
        self.not_fused = bind_loss(model, loss, fused_head)
        self.distillation_loss = loss
        self.eval_members = tuple(eval_members)
        self.eval_loss = eval_loss
        self._reading_order: ReadingOrder | None = None
        self._figures = LossFigures(loss)
        self._step_loss: Tensor | None = None
        self._step_control: Tensor | None = None
        self.has_begun = False
        # The base class would drop the fields of a batch that are no arguments of the model's own forward.
        args.remove_unused_columns = False
        take_one_device(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **others,
        )
        self._steps = FiniteSteps(skips_steps=self.accelerator.mixed_precision == "fp16")
        self.add_callback(_FollowRun(self))
        self.add_callback(FSDPIsOn())

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, with FSDP2's mixed precision kept away from targets and loss."""
        super().create_accelerator_and_postprocess()
        keep_precision(self.accelerator)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        windows = _ours(self.train_dataset if train_dataset is None else train_dataset)
        order = reading_order(windows, windows_per_step(self.args), whole_steps=self.args.dataloader_drop_last)
        self._reading_order = order
        return order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The base class's loss; its parts are summed on the device, without a synchronisation."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._figures.add(outputs)
            self._step_loss = _added(self._step_loss, loss.detach())
            self._step_control = _added(self._step_control, outputs["control"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `LossFigures` to the training loss."""
        if "loss" in logs:
            logs.update(self._figures.take())
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, *others: Any, **more: Any
    ) -> None:
        """After each step and each epoch. Raises Diverged before figures or weights of a diverged run are used."""
        if self._step_loss is not None:
            self._steps.add(self.state.global_step, self._step_loss, grad_norm)
            if self.distillation_loss.controls:
                self.distillation_loss.end_step(self.accelerator.reduce(self._step_control, reduction="sum"))
            self._step_loss = self._step_control = None
        control = self.control
        if control.should_training_stop and self.args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True  # so that the log ends with the last step
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            bad = self._steps.first_bad(self.accelerator)
            if bad is not None:
                figures = f"the loss is {bad.loss:g} and the norm of its gradient {bad.gradient_norm:g}"
                raise self._diverged(f"{figures} at step {bad.step:,}")
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *others, **more)

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        """With the control variates beside the trainer's own state, so that a resumed run continues with them."""
        states = {name: control.state() for name, control in self.distillation_loss.controls.items()}
        if states:
            self.state.stateful_callbacks[CONTROL_STATE] = states  # type: ignore[index, call-overload]
        super()._save_checkpoint(*arguments, **named)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, as a checkpoint does too. Raises Diverged for weights that are not finite."""
        model: nn.Module = self.model  # type: ignore[assignment]
        if not are_finite(model, self.accelerator):
            raise self._diverged(f"weights are not finite after step {self.state.global_step:,}")
        super().save_model(output_dir, _internal_call)

    def _diverged(self, found: str) -> Diverged:
        folder = str(self.args.output_dir)
        kept = get_last_checkpoint(folder) if os.path.isdir(folder) else None  # type: ignore[no-untyped-call]
        return Diverged(
            f"{folder}: {found} of {self.state.max_steps:,}, so training ends there: "
            + (f"the last checkpoint is {kept}" if kept else "there is no checkpoint before it")
            + "; take a smaller learning_rate, longer warmup_steps, max_grad_norm=1, or bf16 in place of fp16, in "
            "another --output-dir"
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out figures of `held_out` under their log names, e.g. eval_loss, eval_perplexity, eval_kl_<teacher>."""
        result = self.held_out(_ours(self.eval_dataset if eval_dataset is None else eval_dataset))
        metrics = result.logged(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def show_held_out(self, result: HeldOutReport) -> None:
        """Pass figures to the logging callbacks under the names of an evaluation, and not to the run's own log."""
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, result.logged())

    @torch.no_grad()
    def held_out(self, windows: DistillationWindows) -> HeldOutReport:
        """Cross-entropy, calibration, KL to `eval_members` and `eval_loss` over all windows, each exactly once.

        Rank r takes the windows r, r + world, …; sums are reduced over the ranks and divided once. Every rank runs
        the same number of batches, since FSDP would wait for a missing one: a shorter rank is padded with window 0,
        which is not counted.
        """
        model = self._evaluated_model()
        sums = HeldOutSums(windows.vocabulary_size, self.eval_members)
        objective = torch.zeros(2, dtype=torch.float64)  # sum of the loss, trained positions
        world, rank = self.args.world_size, self.args.process_index
        mine = list(range(rank, len(windows), world))
        padded = mine + [0] * (-(-len(windows) // world) - len(mine))
        rows = self.args.per_device_eval_batch_size
        loader = DataLoader(
            windows,
            batch_size=rows,
            sampler=padded,
            collate_fn=collate,
            num_workers=self.args.dataloader_num_workers,
        )
        self.callback_handler.eval_dataloader = loader
        was_training = model.training
        model.eval()
        for start, read in zip(range(0, len(padded), rows), loader, strict=True):
            read["labels"][max(0, len(mine) - start) :] = NOT_TRAINED
            batch: dict[str, Any] = self._prepare_inputs(read)
            logits = self._logits(model, batch)
            flat, labels = logits.flatten(0, 1), batch["labels"].flatten()
            sums.add(flat, labels, batch["targets"])
            if self.eval_loss is not None:
                read = batch["input_ids"], batch.get("position_ids")
                found = self.eval_loss(flat, labels, batch["targets"], None, *read)
                objective += torch.stack([found.loss_sum.double(), found.count.double()]).cpu()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        if world > 1:
            sums.load(self.accelerator.reduce(sums.tensor().to(self.args.device), reduction="sum"))
            objective = self.accelerator.reduce(objective.to(self.args.device), reduction="sum").cpu()
        try:
            result = sums.result(bytes_per_token(windows))
        except Diverged as error:
            raise self._diverged(f"{error}, after step {self.state.global_step:,}") from None
        if self.eval_loss is None:
            return result
        return result.model_copy(update={"distillation_loss": float(objective[0] / objective[1])})

    @torch.no_grad()
    def passage(self, windows: DistillationWindows) -> Passage:
        """What the model expects in the first document; every rank reads the same window."""
        model = self._evaluated_model()
        was_training = model.training
        model.eval()
        found = expected_passage(windows, lambda batch: self._logits(model, self._prepare_inputs(batch)))
        model.train(was_training)
        return found

    def _evaluated_model(self) -> nn.Module:
        model: nn.Module = self.model_wrapped if self.is_deepspeed_enabled else self.model  # type: ignore[assignment]
        return model

    def _logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            logits: Tensor = model(**read_by_model(batch)).logits
        return logits


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value


def _ours(dataset: Any) -> DistillationWindows:
    if not isinstance(dataset, DistillationWindows):
        raise InputError(
            f"DistillationTrainer reads student.data.windows.DistillationWindows, got {type(dataset).__name__}"
        )
    return dataset


class SaveByTime(TrainerCallback):
    """Asks for a checkpoint at the first logged step a minute after the last one, or 20 times as long as that one took.

    So a run that is killed loses little more than a minute, and spends at most a twentieth of its time on checkpoints.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step_done = self._saved = clock()
        self._pause = CHECKPOINT_SECONDS

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        self._saved = self._clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self._step_done = self._clock()

    on_evaluate = on_step_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if "loss" in (others.get("logs") or {}):
            is_due = torch.tensor(float(self._clock() - self._saved >= self._pause), device=args.device)
            # All processes save together, and their clocks differ.
            if reduce(is_due, "sum") > 0:
                control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self._saved = self._clock()
        self._pause = max(CHECKPOINT_SECONDS, (self._saved - self._step_done) / CHECKPOINT_SHARE)


class _FollowRun(TrainerCallback):
    """Sets the epoch of the reading order, `has_begun` with the first one, and the scheduled fields of the loss before
    each step; and the control variates, as they are in the checkpoint that a run resumes from.

    Epoch and schedules follow from the number of the step alone: they are the same for all its micro-batches and
    processes, and in a run resumed from a checkpoint. accelerate passes epochs down through a fixed number of wrappers,
    and resuming in the middle of an epoch with several processes has one more: the order would start again at epoch 0.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        saved: Any = state.stateful_callbacks
        for name, control in self._trainer.distillation_loss.controls.items():
            control.load(saved.get(CONTROL_STATE, {}).get(name))

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        self._trainer.has_begun = True
        loader, order = others.get("train_dataloader"), self._trainer._reading_order
        if loader is not None and order is not None:
            steps_per_epoch = max(1, -(-len(loader) // args.gradient_accumulation_steps))
            order.set_epoch(state.global_step // steps_per_epoch)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        self._trainer.distillation_loss.set_progress(state.global_step / max(1, state.max_steps - 1))
