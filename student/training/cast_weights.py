"""The dtype of a saved model. Training keeps float32 weights; a model that came in 16 bits is given back in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from storage.files import atomic_file, replace_file


def cast_weights(folder: Path, dtype: str) -> None:
    """Rewrite the float32 tensors of a saved model in another dtype, one file after the other.

    dtype: float32 (nothing to do), bfloat16 or float16. Its name goes into config.json, and the size into the index.
    """
    if dtype == "float32":
        return
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {
            name: tensor.to(getattr(torch, dtype)) if tensor.dtype == torch.float32 else tensor
            for name, tensor in load_file(path).items()
        }
        total += sum(tensor.nbytes for tensor in tensors.values())
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_bytes())
        content["metadata"]["total_size"] = total
        _write(index, content)
    config = json.loads((folder / "config.json").read_bytes())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("dtype") == "float32":
            part["dtype"] = dtype
    _write(folder / "config.json", config)


def _write(path: Path, content: Any) -> None:
    replace_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
