"""Tiny configurations of transformers' families, for the models that tests save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "initializer_range": 0.5,  # spreads the logits, as training does
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.5}
_OPT = {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.5, "pad_token_id": 1}
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 10.0}


def families(columns: int) -> dict[str, Callable[..., Any]]:
    """What makes a configuration with so many columns and other fields as given, by family."""
    common = {**COMMON, "vocab_size": columns}
    mamba = {name: value for name, value in common.items() if name != "max_position_embeddings"}
    ids = {"vocab_size": columns, "bos_token_id": 0, "eos_token_id": 0}
    return {
        "gpt2": lambda **o: transformers.GPT2Config(**{**ids, **_GPT2, **o}),
        "llama": lambda **o: transformers.LlamaConfig(**{**common, "num_key_value_heads": 2, **o}),
        "opt": lambda **o: transformers.OPTConfig(**{**common, **_OPT, **o}),
        "qwen2": lambda **o: transformers.Qwen2Config(**{**common, "num_key_value_heads": 2, **o}),
        "gpt_neox": lambda **o: transformers.GPTNeoXConfig(**{**common, **o}),
        "phi": lambda **o: transformers.PhiConfig(**{**common, **o}),  # a head with a bias
        "mamba": lambda **o: transformers.MambaConfig(**{**mamba, "state_size": 8, **o}),
        "gemma2": lambda **o: transformers.Gemma2Config(**{**common, **_GEMMA, **o}),
        "granite": lambda **o: transformers.GraniteConfig(**{**common, "logits_scaling": 8.0, **o}),
        "cohere": lambda **o: transformers.CohereConfig(**{**common, "logit_scale": 0.0625, **o}),
    }
