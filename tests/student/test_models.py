"""Models by name, by configuration and from weights: their construction, and refusals in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from storage.errors import InputError
from student.models.configuration import config_of
from student.models.loading import load_student
from student.models.model_files import stored_dtype
from student.models.presets import PRESET_VOCABULARY, PRESETS, describe_presets, preset_settings

V = 101
SPECIAL = {"bos": 1, "eos": 2, "pad": 0}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
}


def load(spec: str | Path, vocabulary_size: int = V, window_tokens: int = 32, seed: int = 0, **more: Any) -> Any:
    more = {"special_ids": SPECIAL, **more}
    return load_student(str(spec), vocabulary_size=vocabulary_size, window_tokens=window_tokens, seed=seed, **more)


def refused(spec: str | Path, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(spec, **more)
    return str(caught.value)


def config_file(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in {**LLAMA, **changes}.items() if value is not None}))
    return path


def change(path: Path, **members: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | members))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A saved model with a head of V + 6 columns, its weights in bfloat16."""
    config = AutoConfig.for_model("llama", **{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=V + 6)
    path = tmp_path / "saved"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_stated_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(preset_settings(name), name, PRESET_VOCABULARY, SPECIAL))
    assert model.num_parameters() == PRESETS[name].parameters
    assert model.config.tie_word_embeddings == PRESETS[name].tied
    assert model.config.max_position_embeddings == PRESETS[name].positions


def test_the_published_recipes_are_as_published() -> None:
    millions = {"llama-360m": 360.0, "gpt2-705m": 704.9, "llama-58m": 58.3, "llama-345m": 345.4}
    for name, expected in millions.items():
        assert round(PRESETS[name].parameters / 1e6, 1) == expected
        assert PRESETS[name].positions == 256
        assert PRESETS[name].tied == name.startswith("gpt2")
    gpt2 = config_of(preset_settings("gpt2-705m"), "gpt2-705m", PRESET_VOCABULARY, SPECIAL)
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop, gpt2.n_inner) == (0.1, 0.1, 0.1, 6144)
    llama = config_of(preset_settings("llama-345m"), "llama-345m", PRESET_VOCABULARY, SPECIAL)
    assert (llama.num_key_value_heads, llama.head_dim, llama.attention_dropout) == (5, 64, 0.0)


def test_presets_are_described_without_torch() -> None:
    code = (
        "import sys; from student.models.presets import describe_presets; print(describe_presets()); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == describe_presets()
    assert all(name in done.stdout for name in PRESETS)
    assert "58.3M" in done.stdout


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny", "llama-mini", "gpt2-mini"])
def test_a_small_preset_trains_on_the_caches_vocabulary(name: str) -> None:
    model = load(name, window_tokens=512)
    assert model.training
    assert model.dtype == torch.float32
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)
    logits = model(input_ids=torch.arange(V)[None]).logits
    assert logits.shape == (1, V, V)
    logits.sum().backward()


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = load(name, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    second, other = load(name, seed=3).state_dict(), load(name, seed=4).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_ids_that_the_tokenizer_has_not_are_not_set() -> None:
    config = load("gpt2-tiny", special_ids={"eos": 9}).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 9, None)


def test_a_pad_id_that_is_also_the_end_does_not_freeze_its_embedding() -> None:
    model = load("llama-tiny", special_ids={"bos": 1, "eos": 2, "pad": 2})
    model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    assert model.get_input_embeddings().weight[2].abs().sum() > 0
    assert model.get_input_embeddings().padding_idx is None


def test_a_config_is_read_from_json(tmp_path: Path) -> None:
    model = load(config_file(tmp_path), window_tokens=48)
    assert (model.config.model_type, model.config.vocab_size, model.config.hidden_size) == ("llama", V, 24)
    assert model.config.bos_token_id == 1
    again = load(tmp_path / "config.json", window_tokens=48).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    wider = load(config_file(tmp_path, vocab_size=V + 27, bos_token_id=77))
    assert wider.get_output_embeddings().weight.shape[0] == V + 27
    assert wider.config.bos_token_id == 1


def test_a_saved_config_makes_a_new_model_of_its_kind(directory: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(directory)
    model = load(directory / "config.json")
    assert model.config.vocab_size == V + 6
    assert model.dtype == torch.float32
    assert not torch.equal(model.lm_head.weight, saved.lm_head.weight.float())


@pytest.mark.parametrize("model_type", ["opt", "gpt_neox", "qwen2", "mamba"])
def test_other_causal_families_are_taken(tmp_path: Path, model_type: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2}
    if model_type != "mamba":
        sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    if model_type == "opt":
        sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 16}
    if model_type == "qwen2":
        sizes |= {"num_key_value_heads": 1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **sizes}))
    assert load(path).config.model_type == model_type


def test_weights_are_loaded_as_float32(directory: Path) -> None:
    saved = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = load(directory)
    assert model.training
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight.float())
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, model.config.pad_token_id) == (2, 2, 0)


@pytest.mark.parametrize(
    ("own", "saved"),
    [
        # Several ids that end a reply; a tokenizer that has one of them, or none.
        ({"eos_token_id": [7, 9], "bos_token_id": 5}, {"eos_token_id": [7, 9], "bos_token_id": 5, "pad_token_id": 0}),
        ({"eos_token_id": 0, "bos_token_id": 5}, {"eos_token_id": 0, "bos_token_id": 5, "pad_token_id": None}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}),
        ({"eos_token_id": 7, "pad_token_id": 8}, {"eos_token_id": 7, "bos_token_id": 1, "pad_token_id": 8}),
    ],
)
def test_a_model_with_weights_keeps_its_special_ids(
    directory: Path, own: dict[str, Any], saved: dict[str, Any], tmp_path: Path
) -> None:
    """What it lacks is added, and said; whether its ids are in config.json or in generation_config.json."""
    for file in ("config.json", "generation_config.json"):
        change(directory / file, **own)
    said: list[str] = []
    load(directory, log=said.append).save_pretrained(tmp_path / "again")
    for file in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "again" / file).read_text())
        assert {name: found.get(name) for name in saved} == saved
    added = [f"{name} {value}" for name, value in saved.items() if value is not None and own.get(name) is None]
    added = [one for one in added if one != "bos_token_id 1" or "bos_token_id" in own]
    assert (added == []) == (said == [])
    assert all(one in said[0] for one in added)

    said.clear()
    load(directory, special_ids={}, log=said.append).save_pretrained(tmp_path / "none")
    found = json.loads((tmp_path / "none" / "generation_config.json").read_text())
    assert {name: found.get(name) for name in own} == own
    assert said == []


@pytest.mark.parametrize("kind", ["a preset", "a configuration", "weights"])
def test_a_special_id_that_the_model_does_not_have_is_left_out(kind: str, directory: Path, tmp_path: Path) -> None:
    """With such a padding id the saved model would not load again."""
    spec = {"a preset": "llama-tiny", "a configuration": config_file(tmp_path, vocab_size=V), "weights": directory}[
        kind
    ]
    load(spec, special_ids={"bos": 1, "eos": 2, "pad": V + 6}).save_pretrained(tmp_path / "again")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "again").config
    assert config.pad_token_id is None
    assert config.eos_token_id == 2


def test_a_wrapped_text_model_has_its_own_ids(tmp_path: Path) -> None:
    """In its part of the configuration: the wrapper's generation config may have none."""
    text = {name: value for name, value in LLAMA.items() if name != "model_type"} | {
        "vocab_size": V,
        "num_key_value_heads": 1,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**text, "eos_token_id": [7, 9], "bos_token_id": 5, "pad_token_id": 0},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wrapped")
    (tmp_path / "wrapped" / "generation_config.json").write_text('{"max_length": 40}')
    said: list[str] = []
    model = load(tmp_path / "wrapped", log=said.append)
    assert said == []
    assert model.config.text_config.eos_token_id == [7, 9]
    assert model.generation_config.eos_token_id is None


def test_a_generation_config_that_cannot_be_saved_is_put_right_and_said(directory: Path, tmp_path: Path) -> None:
    shipped = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_length": 99}
    change(directory / "generation_config.json", **shipped)
    said: list[str] = []
    load(directory, log=said.append).save_pretrained(tmp_path / "again")
    (line,) = [one for one in said if "generation_config.json" in one]
    assert "temperature 0.6, top_p 0.9" in line
    found = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert found["max_length"] == 99
    assert not found.keys() & {"temperature", "top_p"}


UNUSABLE: dict[str, Any] = {
    "no length": {"max_new_tokens": -1},
    "several, all the same": {"num_return_sequences": 3, "do_sample": False},
    "no cache": {"cache_implementation": "nonsense"},
    "no object": [1],
    "a watermark of nothing": {"watermarking_config": {"x": 1}},
    "an id as text": {"eos_token_id": "2"},
    "an id as text in a list": {"eos_token_id": [2, "7"]},
    "a truth value as an id": {"pad_token_id": True},
    "a word for yes": {"do_sample": "yes"},
    "a number as text": {"do_sample": True, "temperature": "0.6"},
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_generation_config_that_cannot_be_used_is_named(directory: Path, case: str) -> None:
    (directory / "generation_config.json").write_text(json.dumps(UNUSABLE[case]))
    message = refused(directory)
    assert "its generation_config.json" in message
    assert "correct it, or remove it" in message


def test_ids_of_a_generation_config_that_the_model_lacks_are_said(directory: Path) -> None:
    for ids, words in (
        ({"eos_token_id": [2, 99999]}, "eos_token_id 99999, which the model has no column for"),
        ({"pad_token_id": -1}, "pad_token_id -1, which transformers does not save"),
    ):
        (directory / "generation_config.json").write_text(json.dumps(ids))
        said: list[str] = []
        load(directory, log=said.append)
        assert [words in line for line in said if "generation_config" in line] == [True]


def test_attention_is_chosen(directory: Path, tmp_path: Path) -> None:
    for spec in (directory, config_file(tmp_path), "llama-tiny"):
        assert load(spec, attention="eager").config._attn_implementation == "eager"
        assert load(spec).config._attn_implementation == "sdpa"
        assert "eage" in refused(spec, attention="eage")


def test_the_dtype_of_stored_weights(directory: Path, tmp_path: Path) -> None:
    """By the weights, whatever the configuration says; several are said."""
    said: list[str] = []
    assert stored_dtype("llama-tiny", said.append) == "float32"
    assert stored_dtype(str(config_file(tmp_path, dtype="bfloat16")), said.append) == "float32"
    for named in ("bfloat16", "float32", None):
        change(directory / "config.json", dtype=named)
        assert stored_dtype(str(directory), said.append) == "bfloat16"
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    assert stored_dtype(str(directory), said.append) == "bfloat16"
    assert said == []
    norms = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(norms, directory / "model.safetensors")
    assert stored_dtype(str(directory), said.append) == "bfloat16"
    assert said == [f"{directory}: its weights are in bfloat16 and float32: saved in bfloat16 (--save-dtype)"]


def test_an_unknown_name_lists_the_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused("lama-58m")
    assert "did you mean 'llama-58m'" in message
    assert "gpt2-mini" in message
    assert "owner/name" in message
    assert "did you mean" not in refused("zzz")
    for missing in ("./llama-58m", "models/old/llama-58m", "llama-58m.json", str(tmp_path / "llama-58m")):
        message = refused(missing)
        assert "no such file or directory" in message
        assert "'llama-58m' alone" in message
    assert "no model was named" in refused(" ")


def test_a_hub_id_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused("models/llama-58n")
    assert "not a directory here" in message
    assert "did you mean 'llama-58m'" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON configuration"),
        ("[1]", 'with a "model_type"'),
        ('{"hidden_size": 8}', 'with a "model_type"'),
        ('{"model_type": "lama"}', "'lama' is no causal language model .* did you mean 'llama'"),
        ('{"model_type": "t5"}', "'t5' is no causal language model"),
        ('{"model_type": "llama", "hiden_size": 8}', "no 'hiden_size' .* did you mean 'hidden_size'"),
        ('{"model_type": "gpt2", "n_layers": 8}', "no 'n_layers' .* did you mean 'n_layer'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "refuses this configuration .*hidden_size"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "not a multiple"),
        (json.dumps({**LLAMA, "vocab_size": 100}), "100 ids, fewer than the 101"),
        (json.dumps({**LLAMA, "max_position_embeddings": 31}), "31 positions, fewer than the 32"),
    ],
)
def test_broken_configs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_presets_are_too_short_for_a_long_window() -> None:
    assert "256 positions, fewer than the 257 tokens of a window" in refused("llama-58m", window_tokens=257)


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", **sizes}))
    assert "change with a later token" in refused(path)
    path.write_text(json.dumps({"model_type": "bert", "is_decoder": True, **sizes}))
    assert load(path).config.is_decoder


def test_directories_that_do_not_fit_are_refused(directory: Path) -> None:
    assert f"{V + 6} ids, fewer than the {V + 7}" in refused(directory, vocabulary_size=V + 7)
    assert "48 positions, fewer than the 49" in refused(directory, window_tokens=49)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no model directory"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "no model directory"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "weights cannot be loaded"),
    "truncated weights": (lambda folder: os.truncate(folder / "model.safetensors", 100), "weights cannot be loaded"),
    "other shapes": (lambda folder: change(folder / "config.json", intermediate_size=44), "weights cannot be loaded"),
    "a layer missing": (
        lambda folder: change(folder / "config.json", num_hidden_layers=3),
        "the files lack 9 weights of a LlamaForCausalLM",
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_broken_directories_are_refused(directory: Path, how: str) -> None:
    damage, message = DAMAGED[how]
    damage(directory)
    found = refused(directory)
    assert message in found
    assert str(directory) in found
    assert "\n" not in found


def test_a_directory_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 16, "num_layers": 1}))
    assert str(tmp_path) in refused(tmp_path)
