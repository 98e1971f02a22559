"""Adapters as peft saves them, with weights that change the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from student.models.adapters.attach import with_lora
from student.models.adapters.lora import Lora


def save_adapter(folder: Path, base: Path, lora: str = "r=3,alpha=5,targets=all-linear", seed: int = 0) -> Path:
    """A LoRA on the model in `base`, both of whose factors are random."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted: Any = with_lora(model, Lora.model_validate(lora), str(base), seed)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder
