"""Models whose heads lack columns for the last ids of their tokenizer, as where a token was added to it alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

EXTRA = "<extra>"


def add_tokens(tokenizer: Path, folder: Path, *tokens: str, pad: bool = False) -> Path:
    """Save a tokenizer with further special tokens in a folder, the last one for padding if asked."""
    changed = AutoTokenizer.from_pretrained(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(tokens)})
    if pad:
        changed.pad_token = tokens[-1]
    changed.save_pretrained(folder)
    return folder


def beside(model: Path, tokenizer: Path, folder: Path) -> Path:
    """A copy of a model with a tokenizer's files."""
    shutil.copytree(model, folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder
