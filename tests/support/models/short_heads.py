"""Models whose heads lack columns for the last ids of their tokenizer, as where a token was added to it alone."""

from __future__ import annotations

import json
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


def swap_ids(model: Path) -> str:
    """Swap two strings of the tokenizer beside a model, ids 300 and 301; the string that had id 300."""
    path = model / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(data))
    return str(first)
