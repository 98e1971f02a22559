"""Random models of transformers' families, saved once for the tests of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers


def saver(folder: Path, configs: Mapping[str, Callable[[], Any]]) -> Callable[[str], Path]:
    """What saves a model of a named configuration, with biases that are not 0, and gives its directory."""

    def save(name: str) -> Path:
        path = folder / name
        if not path.exists():
            torch.manual_seed(len(name))
            model = transformers.AutoModelForCausalLM.from_config(configs[name]())
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(path)
        return path

    return save
