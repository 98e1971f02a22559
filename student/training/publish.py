"""Publication of a trained model: its whole weights in the dtype that was asked for, its configuration, its tokenizer.

Training keeps float32 weights; a model that came in 16 bits is given back in them. transformers 4.57 makes the same
model of the files as transformers 5, which has the rotary embedding in `rope_parameters` alone: 4.57 does not know
these, and would take the family's default base and no scaling, and give other logits without a word. The fields of 4.57
are written beside them; 5 reads them too, and makes the same configuration of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from storage.files import atomic_file, replace_file
from student.models.adapters.attach import merged
from student.models.tokenizer import write_files
from student.report import TrainingReport
from student.training.run_folder import OutputDirectory
from student.training.trainer import DistillationTrainer

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


def publish(
    trainer: DistillationTrainer,
    output: OutputDirectory,
    report: TrainingReport,
    use_cache: bool,
    dtype: str,
    tokenizer: Mapping[str, bytes],
    merge: bool = False,
) -> None:
    """Save the model in the output directory, with its tokenizer's files and the report; all processes call it.

    Of a model with an adapter, the adapter alone in peft's form; or, to `merge`, the whole model that the two make.
    """
    # The base class switches the key-value cache off for training; a saved model would generate slowly.
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = use_cache
    if trainer.is_fsdp_enabled:
        # Checkpoints may be sharded; the published model is whole, gathered by all processes.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if merge:
        trainer.model = merged(model, str(output.path))
    trainer.save_model(str(output.stage))
    if trainer.args.process_index == 0:
        # A pickle, and nothing in it that the report lacks.
        (output.stage / "training_args.bin").unlink(missing_ok=True)
        cast_weights(output.stage, dtype)
        if (output.stage / "config.json").exists():
            add_earlier_fields(output.stage)
        else:
            (output.stage / "README.md").unlink(missing_ok=True)  # peft's template of a card, with its blanks
        write_files(tokenizer, output.stage)
        output.publish(report)
    trainer.accelerator.wait_for_everyone()


def cast_weights(folder: Path, dtype: str) -> None:
    """Rewrite the float32 tensors of a saved model or adapter in another dtype, one file after the other.

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
    if not (folder / "config.json").exists():  # an adapter
        return
    config = json.loads((folder / "config.json").read_bytes())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("dtype") == "float32":
            part["dtype"] = dtype
    _write(folder / "config.json", config)


def add_earlier_fields(folder: Path) -> None:
    """Write the fields that transformers 4.57 reads into the config.json of a saved model."""
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in (_rotary_fields(part) | _aliases(part)).items():
            part.setdefault(name, value)
    _write(path, config)


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


def _write(path: Path, content: Any) -> None:
    replace_file(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
