"""The directory of an adapter in peft's form: adapter_config.json, which names the base model, and its weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.files import local_path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_MAX_JSON_BYTES = 64 << 20
# The first names a module to import; with the others, which weights hold depends on the text.
_UNSUPPORTED = ("megatron_config", "alora_invocation_tokens", "arrow_config")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on this machine.

    asked: the directory as the user named it, for messages. base: the model that it was trained on, an absolute path or
    a hub id; revision: that of a hub id, where the adapter names one. config: the content of adapter_config.json.
    """

    asked: str
    directory: Path
    base: str
    revision: str | None
    config: dict[str, Any]

    @property
    def weights(self) -> Path:
        return self.directory / ADAPTER_WEIGHTS


def find_adapter(spec: str | os.PathLike[str]) -> AdapterFiles | None:
    """The adapter in a directory; None for anything else, a whole model too.

    A relative path of the base is relative to the current directory, as in peft; one that is no directory is a hub id.
    Raises InputError where the adapter has no safetensors weights (a pickle can run code), is no LoRA, names no base,
    or one that is not there.
    """
    asked = os.fspath(spec)
    directory = local_path(asked).resolve()
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        return None
    config = _read(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{asked}: an adapter of type {config.get('peft_type')}, and only LORA is supported")
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    if unsupported:
        raise InputError(f"{path}: an adapter with {unsupported[0]} is not supported")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        others = f"only {_PICKLE}, a pickle, which can run code" if (directory / _PICKLE).is_file() else "no weights"
        raise InputError(
            f"{asked}: expected {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}, found {others}: save the adapter as "
            "safetensors (save_pretrained in peft writes them)"
        )
    base, revision = _base(path, config.get("base_model_name_or_path")), config.get("revision")
    return AdapterFiles(asked, directory, base, None if Path(base).is_dir() else revision, config)


def base_of(spec: str | os.PathLike[str]) -> str:
    """The model whose weights an adapter's directory is trained on; `spec` itself where it is no adapter.

    Raises the errors of `find_adapter`.
    """
    adapter = find_adapter(spec)
    return os.fspath(spec) if adapter is None else adapter.base


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES} bytes")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no configuration of an adapter ({error}): save the adapter again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}: save the adapter again")
    return config


def _base(path: Path, named: Any) -> str:
    remedy = "set base_model_name_or_path there to the model that the adapter was trained on"
    if not isinstance(named, str) or not named.strip():
        raise InputError(f"{path}: names no base model: {remedy}, a directory or a hub id")
    folder = local_path(named).resolve()
    if not folder.is_dir():
        if named.startswith((".", "/", "~")) or named.count("/") > 1:
            raise InputError(
                f"{path}: names the base model {named}, and there is no such directory"
                + ("" if named.startswith(("/", "~")) else f" in {Path.cwd()}")
                + f": {remedy}"
            )
        return named
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{path}: its base {named} is an adapter, too: merge that one first, and {remedy}")
    return str(folder)
