"""Students of a few thousand parameters, of every family whose output layer is known, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from support.references.dense_targets import dense, member, stored
from support.runs import LLAMA
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from student.loss.distillation import DistillationLoss
from student.target_batch import TargetBatch

V = 61
BATCH = (2, 8)
SMALL = {
    **{k: v for k, v in LLAMA.items() if k != "model_type"},
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": V + 3,
    "pad_token_id": None,
}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": V + 3}
IDS = {"bos_token_id": 1, "eos_token_id": 1}
# By family: its configuration, and (logit_scale, softcap) of its head.
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "llama": ({}, 1.0, None),
    "llama, tied": ({"tie_word_embeddings": True}, 1.0, None),
    "gpt2": (GPT, 1.0, None),
    "gptj, with a bias": ({**GPT, "rotary_dim": 4}, 1.0, None),
    "opt, projected": ({"word_embed_proj_dim": 8, "ffn_dim": 32, "dropout": 0.1}, 1.0, None),
    "qwen3": ({}, 1.0, None),
    "mistral": ({}, 1.0, None),
    "gpt_neox": ({}, 1.0, None),
    "gemma2": ({"final_logit_softcapping": 2.0}, 1.0, 2.0),
    "granite": ({"logits_scaling": 8.0}, 0.125, None),
    "cohere": ({"logit_scale": 0.25}, 0.25, None),
    "falcon_h1": ({"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}, 0.3, None),
}


def small_model(family: str, **others: Any) -> PreTrainedModel:
    settings = FAMILIES[family][0] if family in FAMILIES else {}
    base = {} if "n_embd" in settings else SMALL
    name = family.split(",")[0]
    config = AutoConfig.for_model(name, **{**base, **settings, **IDS, **others})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def loss_of() -> DistillationLoss:
    return DistillationLoss(V, 0.3, 2.0, [member(size=V)])


def batch_of(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, BATCH, generator=generator)
    labels[0, :3] = -100
    targets = stored(dense(seed, BATCH[0] * BATCH[1], vocabulary_size=V), 9)
    shaped = {name: values.unflatten(0, BATCH) for name, values in vars(targets).items() if values is not None}
    return {
        "input_ids": torch.randint(0, V, BATCH, generator=generator),
        "labels": labels,
        "targets": {"t": TargetBatch(**shaped)},
    }
