"""A saved student is one model for transformers 5 and for 4.57, whatever its rotary embedding."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import make_corpus
from support.commands import ROOT, environment
from support.programs.saved_models import TEXT, outcome
from support.runs import V
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from student.job import StudentJob
from student.training.publish import add_earlier_fields
from student.training.run import train

TRANSFORMERS_4 = Path(os.environ.get("TRANSFORMERS_4_DIR", ROOT / "build" / "transformers-4"))
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IDS = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": [5, 7], "pad_token_id": 0}
BASE = {"rope_type": "default", "rope_theta": 123.0}
LINEAR = {"rope_type": "linear", "rope_theta": 321.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 777.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 77.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 3.5], "original_max_position_embeddings": 16,
}  # fmt: skip
BY_LAYER = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}

# By family: its configuration, and fields of 4.57 that must be in the file.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama, llama3": (
        {"rope_parameters": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {name: value for name, value in LLAMA3.items() if name != "rope_theta"}},
    ),
    "llama, yarn": ({"rope_parameters": YARN}, {"rope_theta": 777.0}),
    "llama, dynamic": ({"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, {"rope_theta": 321.0}),
    "llama, longrope": ({"rope_parameters": {**LONG, "factor": 4.0}}, {"original_max_position_embeddings": 16}),
    "mistral": ({"rope_parameters": BASE}, {"rope_theta": 123.0, "rope_scaling": None}),
    "mixtral": ({"rope_parameters": BASE, "num_local_experts": 4}, {"rope_theta": 123.0}),
    "qwen2": ({"rope_parameters": BASE}, {"rope_theta": 123.0}),
    "qwen3": ({"rope_parameters": YARN, "head_dim": 16}, {"rope_theta": 777.0}),
    "qwen3_moe": ({"rope_parameters": BASE, **MOE}, {"num_experts": 4}),
    "gemma2": ({"rope_parameters": BASE, "head_dim": 16, "sliding_window": 4}, {"rope_theta": 123.0}),
    "gemma3_text": (
        {"rope_parameters": BY_LAYER, "head_dim": 16, "sliding_window": 4, "num_hidden_layers": 6},
        {"rope_theta": 321.0, "rope_local_base_freq": 77.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "phi3": (
        {"rope_parameters": LONG, "original_max_position_embeddings": 16},
        {"rope_scaling": {"type": "longrope", **{name: LONG[name] for name in ("short_factor", "long_factor")}}},
    ),
    "phi": ({"rope_parameters": {**BASE, "partial_rotary_factor": 0.25}}, {"partial_rotary_factor": 0.25}),
    "gpt_neox": (
        {"rope_parameters": {**BASE, "partial_rotary_factor": 0.5}}, {"rotary_emb_base": 123.0, "rotary_pct": 0.5}
    ),
    "olmo2": ({"rope_parameters": LINEAR}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "olmo3": (
        {
            "rope_parameters": {"full_attention": YARN, "sliding_attention": {**BASE, "rope_theta": 777.0}},
            "num_hidden_layers": 4, "sliding_window": 4,
        },
        {"rope_theta": 777.0, "rope_scaling": {name: value for name, value in YARN.items() if name != "rope_theta"}},
    ),
    "falcon": ({"rope_parameters": BASE}, {"rope_theta": 123.0}),
    "gemma3, images and text": (
        {
            "text_config": {**SIZES, **IDS, "rope_parameters": BY_LAYER, "sliding_window": 4, "num_hidden_layers": 6},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            },
            "mm_tokens_per_image": 1,
        },
        {"rope_theta": 321.0, "rope_local_base_freq": 77.0},
    ),
    "gpt2": (GPT, {}),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, {}),
}  # fmt: skip


def random_model(name: str, folder: Path) -> Path:
    settings = copy.deepcopy(FAMILIES[name][0])
    base = {**IDS, **({} if "n_embd" in settings else SIZES)} if "text_config" not in settings else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split(",")[0], **{**base, **settings}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def text_part(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return dict(config.get("text_config", config))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fields_of_transformers_4_stand_beside_those_of_5(tmp_path: Path, name: str) -> None:
    """Which make the same model of both."""
    folder = random_model(name, tmp_path / "model")
    before = AutoConfig.from_pretrained(folder).to_dict()
    plain = text_part(folder)
    add_earlier_fields(folder)
    found = text_part(folder)
    assert {field: found.get(field) for field in FAMILIES[name][1]} == FAMILIES[name][1]
    assert plain.items() <= found.items()
    after = AutoConfig.from_pretrained(folder).to_dict()
    changed = {field for field, value in before.items() if after[field] != value}
    assert changed <= {"rope_parameters"}
    if changed:
        # `type` is a name of `rope_type` that transformers 5 keeps and does not use.
        assert {**before["rope_parameters"], "type": before["rope_parameters"]["rope_type"]} == after["rope_parameters"]


@pytest.mark.transformers4
def test_saved_students_are_the_same_in_transformers_4(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    make_corpus(cache, np.random.default_rng(0).integers(0, V, 200).astype(np.uint16), V)
    expected = {}
    for number, name in enumerate(FAMILIES):
        job = StudentJob(
            cache=cache,
            model=str(random_model(name, tmp_path / f"from-{number}")),
            output_dir=str(tmp_path / f"{number}"),
            window_tokens=16,
            windows_per_step=1,
            training={"max_steps": 2, "learning_rate": 0.01},
        )
        train(job)
        own = Tokenizer.from_file(f"{job.output_dir}/tokenizer.json").encode(TEXT).ids
        expected[name] = outcome(Path(job.output_dir)) | {"ids": own}
    program = ROOT / "tests" / "support" / "programs" / "saved_models.py"
    folders = [str(tmp_path / f"{number}") for number in range(len(FAMILIES))]
    variables = {**environment(), "PYTHONPATH": str(TRANSFORMERS_4), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, program, *folders], capture_output=True, text=True, env=variables, check=False
    )
    assert done.returncode == 0, done.stderr
    found = dict(zip(FAMILIES, json.loads(done.stdout).values(), strict=True))
    for name, values in found.items():
        torch.testing.assert_close(
            torch.tensor(values.pop("logits")), torch.tensor(expected[name].pop("logits")), rtol=1e-5, atol=1e-5
        )
        assert values == expected[name], name
        assert {id: len(text) for id, text in values["texts"].items()} == {"1": 14, "5": 6, "7": 6, "8": 14, "9": 14}
