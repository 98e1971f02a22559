"""Configurations of models: from presets, JSON files and model directories, checked before any weights are made."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import InputError
from storage.files import local_path
from student.foreign_errors import closest, explained
from student.models.adapters.files import base_of
from student.models.presets import PRESETS
from student.models.special_ids import token_ids

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def has_weights(spec: str) -> bool:
    """Whether a model starts from weights: a directory or a hub id, and neither a preset nor a configuration."""
    return spec not in PRESETS and not local_path(spec).is_file()


def read_config(spec: str) -> PretrainedConfig:
    """The configuration of a model directory or hub id; of an adapter, that of its base. InputError where none is."""
    from transformers import AutoConfig

    if not spec.strip():
        raise InputError(f"no model was named: give a preset ({', '.join(PRESETS)}), a config JSON or a directory")
    spec = base_of(spec)
    path = local_path(spec)
    local = path.is_dir()
    if not local:
        _refuse_missing(spec)
    what = "no model directory" if local else "not a directory here, and no model of the hub could be loaded by that id"
    with explained(f"{spec}: {what}", closest(path.name, PRESETS)):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(path) if local else spec, local_files_only=local, trust_remote_code=False
        )
    return config


def positions_of(config: PretrainedConfig) -> int | None:
    """The most tokens that a model reads at once; None where its configuration names no limit."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def stated_columns(spec: str) -> int | None:
    """The ids that a model's own configuration states; None for a preset, and where `load_student` has to explain."""
    if spec in PRESETS:
        return None
    with contextlib.suppress(InputError):
        if not has_weights(spec):
            return _stated(read_settings(local_path(spec)))
        return _stated({"vocab_size": getattr(read_config(spec).get_text_config(decoder=True), "vocab_size", None)})
    return None


def _stated(settings: Mapping[str, Any]) -> int | None:
    """The vocabulary's size in a configuration, or in that of its text model; None where it has none."""
    text = settings.get("text_config")
    found = (text if isinstance(text, dict) else settings).get("vocab_size")
    return found if isinstance(found, int) else None


def check_settings(
    settings: Mapping[str, Any],
    where: str,
    *,
    vocabulary_size: int,
    special_ids: Mapping[str, int | None],
    window_tokens: int,
) -> None:
    """Raise InputError where a configuration cannot be a student; its modules are made without weights, one layer deep.

    The other checks of `load_student` need weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(settings, where, vocabulary_size, special_ids)
    check_config(config, where, vocabulary_size, window_tokens)
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise InputError(f"{where}: {heads} attention heads are not a multiple of {shared} key-value heads")
    if isinstance(getattr(config, "num_hidden_layers", None), int) and not getattr(config, "layer_types", None):
        if config.num_hidden_layers < 1:
            raise InputError(f"{where}: a model has at least one layer, found {config.num_hidden_layers}")
        config.num_hidden_layers = 1
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"), explained(f"{where}: transformers cannot build this model"):
        auto.from_config(config)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a JSON configuration. Raises InputError for any other file."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: this is not a JSON configuration of a model: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise InputError(f'{path}: a model configuration is a JSON object with a "model_type", like "llama" or "gpt2"')
    model_type = data["model_type"]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{path}: model_type {model_type!r} is no causal language model of the installed transformers"
            + closest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        )
    return data


def config_of(
    settings: Mapping[str, Any], where: str, vocabulary_size: int, special_ids: Mapping[str, int | None]
) -> PretrainedConfig:
    """The configuration that a mapping describes, with a cache's vocabulary and special ids; `where` is for errors."""
    from transformers import AutoConfig

    data = dict(settings)
    model_type = data.pop("model_type")
    _refuse_misspelt(where, data, AutoConfig.for_model(model_type))
    if "text_config" not in data:
        data.setdefault("vocab_size", vocabulary_size)
    columns = _stated(data) or vocabulary_size
    # Fields about the stored weights and their writer: they do not apply to a new model.
    for name in ("architectures", "dtype", "torch_dtype", "transformers_version", "auto_map"):
        data.pop(name, None)
    with explained(f"{where}: transformers refuses this configuration of a {model_type} model"):
        config: PretrainedConfig = AutoConfig.for_model(model_type, **{**data, **token_ids(special_ids, columns)})
    return config


def check_config(config: PretrainedConfig, spec: str, vocabulary_size: int, window_tokens: int) -> None:
    """Refuse a model that cannot fit before its weights are made or fetched."""
    text = config.get_text_config(decoder=True)
    columns = getattr(text, "vocab_size", None)
    if isinstance(columns, int) and columns < vocabulary_size:
        raise InputError(
            f"{spec}: the model has {columns} ids, fewer than the {vocabulary_size} that text and targets can name: "
            "set vocab_size to that, or take a model of this tokenizer"
        )
    positions = positions_of(config)
    if positions is not None and positions < window_tokens:
        raise InputError(
            f"{spec}: the model has {positions} positions, fewer than the {window_tokens} tokens of a window (with "
            "--bos-each-window one more than its own): take shorter windows or a model with more positions"
        )


def _refuse_missing(spec: str) -> None:
    """Raise InputError unless `spec`, no preset, file or directory here, can be a hub id."""
    as_path = spec.startswith((".", "/", "~")) or spec.endswith(".json")
    if as_path or spec.count("/") > 1:
        stem = Path(spec).stem
        hint = f"; the preset is written {stem!r} alone" if stem in PRESETS else ""
        raise InputError(f"{spec}: there is no such file or directory{hint}")
    if "/" not in spec:
        raise InputError(
            f"{spec!r} is no preset, file or directory here{closest(spec, PRESETS)}; presets: {', '.join(PRESETS)}; "
            "a model of the hub is written owner/name"
        )


def _refuse_misspelt(where: str, data: Mapping[str, Any], default: PretrainedConfig) -> None:
    """transformers takes any key and ignores those it does not know: `hiden_size` would give the default width.

    Only a key that nearly is another one is refused; saved configurations carry others that mean nothing today.
    """
    known = {*default.to_dict(), *default.attribute_map}
    for key in data:
        match = difflib.get_close_matches(key, known - set(data), n=1, cutoff=0.8)
        if not hasattr(default, key) and match:
            raise InputError(
                f"{where}: a {default.model_type} configuration has no {key!r} and would ignore it; "
                f"did you mean {match[0]!r}?"
            )
