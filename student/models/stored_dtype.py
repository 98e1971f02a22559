"""The dtype of a model's weights on disk, in which its student is saved."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from storage.files import local_path
from storage.progress import Log
from student.models.adapters.files import base_of
from student.models.configuration import has_weights, read_config

_SAVED = ("float32", "bfloat16", "float16")
_OF_SAFETENSORS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def stored_dtype(spec: str, log: Log) -> str:
    """The dtype of most of a model's weights on disk, whatever its configuration says; float32 for a new model.

    An adapter's base has the weights. Where there are several, that is logged. Where the files do not tell, the
    configuration does, or it is float32.
    """
    if not has_weights(spec):
        return "float32"
    spec = base_of(spec)
    config = read_config(spec)
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    sizes: Counter[str] = Counter()
    # Files that transformers has loaded, and that may be in other formats.
    with contextlib.suppress(Exception):
        for dtype, size in _tensors(_folder(spec)):
            sizes[dtype] += size
    most = sizes.most_common(1)[0][0] if sizes else str(named).removeprefix("torch.")
    found = most if most in _SAVED else "float32"
    if sizes.keys() - {found}:
        log(f"{spec}: its weights are in {' and '.join(sorted(sizes))}: saved in {found} (--save-dtype)")
    return found


def _folder(spec: str) -> Path:
    path = local_path(spec)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(spec, allow_patterns=["model*.safetensors"], local_files_only=True))


def _tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """dtype and number of elements of the floating-point tensors of a model; reads none of them."""
    files = sorted(folder.glob("model*.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                part = tensors.get_slice(name)
                if part.get_dtype() in _OF_SAFETENSORS:
                    yield _OF_SAFETENSORS[part.get_dtype()], prod(part.get_shape())
    for path in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        for tensor in torch.load(path, map_location="meta", weights_only=True).values():
            if tensor.is_floating_point():
                yield str(tensor.dtype).removeprefix("torch."), tensor.numel()
