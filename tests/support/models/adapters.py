"""Models with weights, and adapters on them as peft saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.caches.small import word_tokenizer
from support.runs import LLAMA, V
from transformers import AutoConfig, AutoModelForCausalLM

from student.models.adapters.attach import with_lora
from student.models.adapters.lora import Lora
from student.models.tokenizer import write_files

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def save_base(folder: Path, **config: Any) -> Path:
    """A Llama of random weights, and a tokenizer of V words with a chat template."""
    settings = {**{name: value for name, value in LLAMA.items() if name != "model_type"}, "vocab_size": V, **config}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(folder)
    files = word_tokenizer(V)
    settings = json.loads(files["tokenizer_config.json"]) | {"chat_template": TEMPLATE}
    write_files({**files, "tokenizer_config.json": json.dumps(settings).encode()}, folder)
    return folder


def save_adapter(folder: Path, base: Path, lora: str = "r=3,alpha=5,targets=all-linear", seed: int = 0) -> Path:
    """A LoRA on the model in `base`, both of whose factors are random, so that it changes the logits."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted: Any = with_lora(model, Lora.model_validate(lora), str(base), seed)
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def rename_base(adapter: Path, base: str | None) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
