"""Architectures by name.

Plain data, so that `--help` can list them; torch and transformers are imported when a model is made. Llama presets have
no dropout. GPT-2 presets have 0.1 everywhere, GPT2Config's own default, which the published GPT-2 teacher was trained
with; caching and evaluation switch it off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

PRESET_VOCABULARY = 16_000
"""The vocabulary at which `Preset.parameters` is counted: that of the published recipes."""


@dataclass(frozen=True)
class Preset:
    """An architecture by name. `parameters` counts all weights at `PRESET_VOCABULARY` ids, a tied head once."""

    family: Literal["llama", "gpt2"]
    layers: int
    hidden: int
    heads: int
    feed_forward: int
    parameters: int
    about: str
    kv_heads: int | None = None
    tied: bool = False
    positions: int = 256


PRESETS: dict[str, Preset] = {
    "llama-58m": Preset("llama", 16, 512, 8, 1024, 58_343_936, "Baby Llama's student"),
    "llama-345m": Preset("llama", 32, 960, 15, 2560, 345_355_200, "BabyLlama-2's student and teachers", kv_heads=5),
    "llama-360m": Preset("llama", 24, 1024, 8, 3072, 359_973_888, "Baby Llama's Llama teacher"),
    "gpt2-705m": Preset("gpt2", 24, 1536, 16, 6144, 704_928_768, "Baby Llama's GPT-2 teacher", tied=True),
    "llama-tiny": Preset("llama", 2, 128, 4, 384, 2_474_624, "seconds on a CPU", tied=True, positions=512),
    "gpt2-tiny": Preset("gpt2", 2, 128, 4, 512, 2_510_336, "seconds on a CPU", tied=True, positions=512),
    "llama-mini": Preset("llama", 4, 256, 4, 768, 7_506_176, "minutes on a CPU", tied=True, positions=512),
    "gpt2-mini": Preset("gpt2", 4, 256, 4, 1024, 7_386_624, "minutes on a CPU", tied=True, positions=512),
}


def describe_presets() -> str:
    """The presets as lines of text for a command's help; needs no torch."""
    return "\n".join(
        f"{name:<11} {preset.parameters / 1e6:6.1f}M  {preset.layers} layers x {preset.hidden}, "
        f"{preset.positions} positions: {preset.about}"
        for name, preset in PRESETS.items()
    )


def preset_settings(name: str) -> dict[str, Any]:
    """A preset as the mapping that a JSON configuration would hold: no vocabulary, no special ids."""
    preset = PRESETS[name]
    settings: dict[str, Any] = {"model_type": preset.family, "tie_word_embeddings": preset.tied}
    if preset.family == "llama":
        return settings | {
            "hidden_size": preset.hidden,
            "intermediate_size": preset.feed_forward,
            "num_hidden_layers": preset.layers,
            "num_attention_heads": preset.heads,
            "num_key_value_heads": preset.kv_heads or preset.heads,
            "max_position_embeddings": preset.positions,
            "attention_dropout": 0.0,
        }
    return settings | {
        "n_embd": preset.hidden,
        "n_inner": preset.feed_forward,
        "n_layer": preset.layers,
        "n_head": preset.heads,
        "n_positions": preset.positions,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
    }
