"""A saved model's config.json, so that transformers 4.57 makes the same model of it as transformers 5.

transformers 5 has the rotary embedding in `rope_parameters` alone, which 4.57 does not know: it would take the family's
default base and no scaling, and give other logits without a word. The fields of 4.57 are written beside it; 5 reads
them too, and makes the same configuration of both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from storage.files import replace_file

_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_LOCAL = {"sliding_theta": "rope_local_base_freq"}
# Names of 4.57 that are a family's own. Without one, a base for sliding windows is that of full attention.
_OWN_NAMES: dict[str, dict[str, str]] = {
    "gpt_neox": _NEOX,
    "gpt_neox_japanese": _NEOX,
    "gemma3_text": _LOCAL,
    "gemma3n_text": _LOCAL,
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "sliding_theta": "local_rope_theta"},
}
# Families that refuse `rope_type` for the name that it had before.
_OLDER_TYPE = frozenset({"olmo", "olmo2", "phi3"})


def add_earlier_fields(folder: Path) -> None:
    """Write the fields that transformers 4.57 reads into the config.json of a saved model."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in (_rotary_fields(part) | _aliases(part)).items():
            part.setdefault(name, value)
    replace_file(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _rotary_fields(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a model or of one of its parts, as 4.57 has them."""
    rope, kind = config.get("rope_parameters") or {}, config.get("model_type", "")
    own = _OWN_NAMES.get(kind, {})
    fields: dict[str, Any] = {}
    if "full_attention" in rope:
        sliding = rope.get("sliding_attention") or {}
        if "sliding_theta" in own and "rope_theta" in sliding:
            fields[own["sliding_theta"]] = sliding["rope_theta"]
        rope = rope["full_attention"] or {}
    if not {"rope_theta", "rope_type"} <= rope.keys():
        return fields
    scaling = dict(rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            fields[own.get(name, name)] = scaling.pop(name)
    if scaling == {"rope_type": "default"}:
        return fields
    if "original_max_position_embeddings" in scaling and scaling["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    if kind in _OLDER_TYPE:
        scaling["type"] = scaling.pop("rope_type")
        scaling.pop("original_max_position_embeddings", None)
    return fields | {"rope_scaling": scaling}


def _aliases(config: dict[str, Any]) -> dict[str, Any]:
    """A family's fields under the other names that it takes: some were its own in 4.57, as `num_experts`."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type", "")
    known = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    return {alias: config[name] for alias, name in known.items() if name in config}
