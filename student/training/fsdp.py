"""FSDP2 through accelerate: checks that it is on where it was asked for, and keeps the loss out of mixed precision.

accelerate silently ignores FSDP where it does not apply, as on CPUs, and trains with DDP or in one process. A run that
was to be sharded must not turn out, hours later, to have been something else.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from storage.errors import InputError
from storage.text import counted

# accelerate's full or sharded state dict in a checkpoint, which only a sharded model can load.
_SHARDED_CHECKPOINT = "pytorch_model_fsdp*"


def fsdp_is_asked_for(args: TrainingArguments) -> bool:
    """Whether the training fields or `accelerate launch` ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_fsdp(args: TrainingArguments) -> None:
    """Raise InputError where FSDP was asked for and cannot be applied, as far as known before there is a model."""
    if not fsdp_is_asked_for(args):
        return
    config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    asked = config.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", "1")
    if str(asked) != "2":
        raise InputError(
            f"fsdp of version {asked} was asked for, and only FSDP2 is supported: set fsdp_version 2 in fsdp_config, "
            "or in accelerate's configuration"
        )
    if args.device.type == "cpu":
        raise InputError(
            "fsdp was asked for on a CPU, where accelerate would train without it: leave it out, or run on GPUs"
        )
    if args.world_size == 1:
        raise InputError(
            "fsdp was asked for in a single process, which has no other to shard the model with: start several with "
            "torchrun or accelerate launch, or leave it out"
        )


def keep_precision(accelerator: Accelerator) -> None:
    """Restrict FSDP2's mixed precision to the weights: it casts neither the inputs of forward nor its outputs.

    accelerate's policy casts every floating-point input, position weights and token counts too, and every output, the
    loss among them, to the dtype of the weights: bfloat16 has 8 bits of precision.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if policy is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = replace(policy, cast_forward_inputs=False, output_dtype=None)


def check_checkpoint(folder: Path, is_sharded: bool) -> None:
    """Raise InputError where the checkpoint of a sharded run is to be resumed without FSDP, or the reverse."""
    was_sharded = any(folder.glob(_SHARDED_CHECKPOINT))
    if was_sharded != is_sharded:
        raise InputError(
            f"{folder} was written {'with' if was_sharded else 'without'} fsdp, and this run is "
            f"{'not sharded' if was_sharded else 'sharded'}: launch it as it was, or give another --output-dir"
        )


class FSDPIsOn(TrainerCallback):
    """Raises InputError, before the first step, where FSDP was asked for and a trained parameter is not sharded."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **others: Any) -> None:
        model: nn.Module = others["model"]
        if not fsdp_is_asked_for(args):
            return
        whole = [name for name, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if whole:
            raise InputError(
                f"fsdp was asked for, but {counted(len(whole), 'parameter')} not sharded ({whole[0]}, …): accelerate "
                "did not apply FSDP2 here; look at its configuration, or leave fsdp out"
            )
