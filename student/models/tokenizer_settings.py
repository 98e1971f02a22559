"""tokenizer_config.json: read, and written so that transformers 4.57 and 5 load the same tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import InputError

SETTINGS_FILE = "tokenizer_config.json"
# How and from where it was loaded: not part of its behaviour, and private.
_LOADING = {
    "name_or_path",
    "is_local",
    "local_files_only",
    "_commit_hash",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
}
# The class in both that applies no rules of its own to a tokenizer.json.
CLASS = "PreTrainedTokenizerFast"
# The name of transformers 5 for it.
_UNKNOWN = ("TokenizersBackend", CLASS)


def read_settings(folder: Path) -> dict[str, Any]:
    """The fields of a folder's tokenizer_config.json; {} without one. Raises ValueError for one that is not JSON."""
    path = folder / SETTINGS_FILE
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    return settings


def class_name(folder: Path) -> str | None:
    """The tokenizer's class that a folder names, by its settings or its model's type, without `Fast`; None if none."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    classes: Mapping[str, str | None] = TOKENIZER_MAPPING_NAMES
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    name = (
        read_settings(folder).get("tokenizer_class")
        or config.get("tokenizer_class")
        or classes.get(str(config.get("model_type")))
    )
    return None if name is None or name == CLASS else str(name).removesuffix("Fast")


def portable_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A tokenizer's files by name, its settings written for transformers 4.57 and 5; the other files as they are.

    A class that 4.57 knows stays: its rules there are those that the tokenizer came with.
    """
    return _with_settings(files, portable=True, own_class=True)


def stored_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """A tokenizer's files by name as a cache stores them: nothing in them names a folder, and both versions of
    transformers take ids, special tokens and templates from these files.

    Without a tokenizer.json, the settings are part of the tokenizer's fingerprint, and stay as they are.
    """
    return _with_settings(files, portable="tokenizer.json" in files, own_class=False)


def _with_settings(files: Mapping[str, bytes], portable: bool, own_class: bool) -> dict[str, bytes]:
    if SETTINGS_FILE not in files:
        return dict(files)
    found = json.loads(files[SETTINGS_FILE])
    settings = {name: value for name, value in found.items() if name not in _LOADING}
    if portable and "auto_map" not in settings:
        settings = _portable(settings)
        if "tokenizer.json" in files and not (own_class and settings.get("tokenizer_class") not in _UNKNOWN):
            settings |= _of_file(json.loads(files["tokenizer.json"]))
    if own_class and settings == found:
        return dict(files)
    data = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    return {**files, SETTINGS_FILE: data}


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """4.57 takes a list of tokens under one name only, and named ones under the other; 5 reads both."""
    settings = {name: value for name, value in settings.items() if name != "backend"}
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    named = settings.pop("model_specific_special_tokens", None)
    if named:
        settings["extra_special_tokens"] = {**(settings.get("extra_special_tokens") or {}), **named}
        settings = {name: value for name, value in settings.items() if name not in named}
    return settings


def _of_file(backend: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under which both versions apply no rules but the file's."""
    prefix_space = (backend.get("pre_tokenizer") or {}).get("add_prefix_space")
    # 4.57 changes the pre-tokenizer where this differs from it; absent means False.
    return {"tokenizer_class": CLASS} | ({} if prefix_space is None else {"add_prefix_space": prefix_space})
