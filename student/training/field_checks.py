"""Checks of training fields for what transformers, accelerate and torch find out late or never.

`TYPES` narrows the types that transformers declares: most of its numbers have no range. What no table can say is tried
out: `rehearse` makes of the fields what a run makes of them (loader, compiler, optimizer, schedule), for one small
parameter, so that the checks of the libraries speak before anything is loaded or written.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import torch
from accelerate.utils import TorchDynamoPlugin
from pydantic import AfterValidator, Field
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from storage.errors import InputError, LogitCacheError


def _whole(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("Input above 1 is a number of steps, and should be whole; below 1 it is a share of the run")
    return value


_Windows = Annotated[int, Field(ge=1, le=1 << 24)]
_Steps = Annotated[int, Field(ge=1, le=1 << 53)]
_NotNegative = Annotated[float, Field(ge=0)]
_Interval = Annotated[float, Field(gt=0, le=1 << 53), AfterValidator(_whole)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]

TYPES: dict[str, Any] = {
    "per_device_train_batch_size": _Windows,
    "per_device_eval_batch_size": _Windows,
    "gradient_accumulation_steps": _Windows,
    "max_steps": _Steps | Literal[-1],
    "num_train_epochs": Annotated[float, Field(gt=0, le=1e9)],
    "learning_rate": _NotNegative,
    "warmup_steps": Annotated[float, Field(ge=0, le=1 << 53), AfterValidator(_whole)],
    "warmup_ratio": Annotated[float, Field(ge=0, le=1)] | None,  # earlier transformers have it
    "weight_decay": _NotNegative,
    "adam_beta1": _Decay,
    "adam_beta2": _Decay,
    "adam_epsilon": Annotated[float, Field(gt=0)],
    "max_grad_norm": _NotNegative,
    "neftune_noise_alpha": _NotNegative | None,
    "logging_steps": _Interval,
    "eval_steps": _Interval | None,
    "eval_delay": _NotNegative,
    "save_steps": _Interval,
    "save_total_limit": _Steps | None,
    "torch_empty_cache_steps": _Steps | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0, le=1 << 12)],
    "dataloader_prefetch_factor": Annotated[int, Field(ge=1, le=1 << 16)] | None,
    "ddp_bucket_cap_mb": Annotated[int, Field(ge=1, le=1 << 20)] | None,
    "ddp_timeout": Annotated[int, Field(ge=1, le=1 << 31)],
    "log_level": _LogLevel,
    "log_level_replica": _LogLevel,
    # transformers takes a bool too; an empty mapping would silently be none.
    "fsdp": bool | str,
    "deepspeed": Annotated[dict[str, Any] | str, Field(min_length=1)] | None,
}
"""By field, the type of its values: another than transformers declares. Floats are finite besides."""

NOTES = {
    "max_steps": "-1 leaves it to num_train_epochs",
    "max_grad_norm": "0 switches clipping off",
    "save_steps": "save_strategy=no writes no checkpoints",
    "eval_steps": "eval_strategy=no switches evaluations off",
    "logging_steps": "logging_strategy=no switches the log off",
    "save_total_limit": "null keeps all checkpoints",
}
"""What a value outside of a field's range may have been meant to be, and how that is written."""

REFUSALS = (ArithmeticError, AssertionError, ImportError, LookupError, NotImplementedError, TypeError, ValueError)
"""The errors by which libraries refuse values."""

# Steps at which a schedule is looked at, beside its first, its last and the end of its warm-up.
_LOOKS = 32


@contextlib.contextmanager
def one_line_refusals(
    what: str = "transformers refuses these training fields", has_begun: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Turn the errors by which libraries refuse values into an InputError that begins with `what`.

    Once the work `has_begun`, errors are left as they are: the values are not to blame for them.
    """
    try:
        yield
    except LogitCacheError:
        raise
    except REFUSALS as error:
        if has_begun():
            raise
        kind = f"{type(error).__name__}: " if isinstance(error, (AssertionError, LookupError)) else ""
        raise InputError(f"{what}: {kind}{error}") from error


def rehearse(args: TrainingArguments, steps: int) -> None:
    """Make of the fields what a run of so many steps would, for one small parameter, and take a step.

    Raises InputError naming the fields where a library refuses them, or would leave one of them aside.
    """
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise InputError(
            "fp16 was asked for on a CPU, where accelerate would train without it: leave it out, take bf16, or run on "
            "a GPU"
        )
    with one_line_refusals("dataloader fields"):
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )
    if args.torch_compile:
        backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
        with one_line_refusals(f"torch_compile with backend {backend}, mode {mode}"):
            TorchDynamoPlugin(backend=backend, mode=mode)
            try:
                torch.compile(nn.Linear(1, 1), backend=backend, mode=mode)
            except RuntimeError as error:
                raise ValueError(error) from None
    optim, schedule = OptimizerNames(args.optim).value, SchedulerType(args.lr_scheduler_type).value
    with one_line_refusals(f"optim {optim}"):
        _check_optimizer_arguments(args)
        optimizer = _optimizer(args)
    if optimizer is None:
        return
    if args.optim_target_modules:
        raise InputError(f"optim {optim} has no target modules: leave optim_target_modules out, or take another optim")
    with one_line_refusals(f"lr_scheduler_type {schedule}"):
        _check_schedule(args, optimizer, steps)
    with one_line_refusals(f"optim {optim} with learning_rate {args.learning_rate:g}"):
        _check_first_step(optimizer, args.learning_rate)


def _optimizer(args: TrainingArguments) -> torch.optim.Optimizer | None:
    """The optimizer of one small parameter; None for a kind that is made from the layers of a whole model."""
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, None)
    except ValueError as error:
        # Its package is there: transformers asks for that first.
        if "pass a" in str(error) and "model" in str(error):
            return None
        raise
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        return None
    weight = nn.Parameter(torch.zeros(4, 4, device=args.device))
    return kind([{"params": [weight], "weight_decay": args.weight_decay}], **options)


def _check_optimizer_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for a key of `optim_args` that the optimizer does not read: with any value it is the same."""
    if not args.optim_args:
        return
    pairs = [pair.split("=") for pair in args.optim_args.replace(" ", "").split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"optim_args are key=value,key=value, found {args.optim_args!r}")
    given = _made_of(args, pairs)
    for key, _ in pairs:
        others = ([[k, other if k == key else v] for k, v in pairs] for other in ("?", "true"))
        if given is not None and all(_made_of(args, other) == given for other in others):
            raise ValueError(f"it does not read {key!r} of optim_args: leave it out, or take another optim")


def _made_of(args: TrainingArguments, pairs: list[list[str]]) -> Any:
    """What transformers makes of such `optim_args`; None where it refuses them."""
    asked = copy.copy(args)
    asked.optim_args = ",".join("=".join(pair) for pair in pairs)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(asked, None)
    except REFUSALS:
        return None


def _check_schedule(args: TrainingArguments, optimizer: torch.optim.Optimizer, steps: int) -> None:
    kind, warmup = args.lr_scheduler_type, args.get_warmup_steps(steps)
    options: Any = args.lr_scheduler_kwargs
    schedule = get_scheduler(kind, optimizer, warmup, steps, options)
    if options:
        with contextlib.suppress(TypeError):
            get_scheduler(kind, optimizer, warmup, steps, {**options, "no_schedule_has_this": 0})
            raise ValueError("it takes no lr_scheduler_kwargs: leave them out, or take another schedule")
    if isinstance(schedule, LambdaLR):
        looks = {0, 1, min(warmup, steps), *(steps * i // _LOOKS for i in range(_LOOKS + 1))}
        for step in sorted(looks):
            factor = schedule.lr_lambdas[0](step)
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(
                    f"expected a learning rate of 0 or more at each of {steps:,} steps, found {factor:g} times "
                    f"learning_rate at step {step:,}: take other lr_scheduler_kwargs"
                )


def _check_first_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    (weight,) = optimizer.param_groups[0]["params"]
    # Rows of an embedding that a step does not read have gradients of exactly 0.
    weight.grad = torch.eye(4, device=weight.device)
    optimizer.param_groups[0]["lr"] = learning_rate
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    if not weight.isfinite().all():
        raise ValueError(
            "a step on gradients of 0 and 1 makes weights that are not finite: take a smaller learning_rate, or a "
            "larger adam_epsilon"
        )
