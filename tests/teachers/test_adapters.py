"""Adapters as teachers: the logits of the merged model, the digests of base and adapter, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.caches.small import word_tokenizer
from support.models.adapters import rename_base, save_adapter
from support.models.families import families
from support.models.saved import load, saver
from transformers import AutoModelForCausalLM

from storage.errors import InputError
from student.models.tokenizer import write_files
from teachers.huggingface.device_map import DeviceMap
from teachers.live import LiveTeacher

# peft itself, by which the tests merge, asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return saver(tmp_path_factory.mktemp("models"), families(512))


@pytest.fixture
def adapter(save: Callable[..., Path], tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", save("llama"))


def scored(directory: Path, **options: Any) -> torch.Tensor:
    windows = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(3))
    return torch.cat(list(load(directory, **options).score(windows, torch.arange(40))))


def member(directory: Path) -> Any:
    return load(directory).identity.members[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_its_logits_are_those_of_the_merged_model_in_a_directory(
    save: Callable[..., Path], tmp_path: Path, family: str, dtype: str
) -> None:
    """To the last bit: the sum is rounded once, from float32 to the dtype."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(save(family), dtype=getattr(torch, dtype)).save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", base)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    whole.merge_and_unload().to(getattr(torch, dtype)).save_pretrained(tmp_path / "whole")
    found = scored(adapter, dtype=dtype)
    assert torch.equal(found, scored(tmp_path / "whole", dtype=dtype))
    assert not torch.allclose(found, scored(base, dtype=dtype), atol=0.1)


def test_base_and_adapter_are_both_in_its_identity(save: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base, found = member(save("llama")), member(adapter)
    assert (base.adapter, base.adapter_sha256, base.adapter_config_sha256) == (None, None, None)
    assert not [name for name in base.model_dump(mode="json") if name.startswith("adapter")]
    assert found.model_copy(update=dict.fromkeys(("adapter", "adapter_sha256", "adapter_config_sha256"))) == base
    assert (found.adapter, found.name) == ("adapter", "llama with adapter")
    other = member(save_adapter(tmp_path / "other" / "adapter", save("llama"), seed=1))
    assert (other.weights_sha256, other.adapter_config_sha256) == (found.weights_sha256, found.adapter_config_sha256)
    assert other.adapter_sha256 != found.adapter_sha256
    assert "0/adapter_sha256" in LiveTeacher(load(adapter)).provenance


@pytest.mark.parametrize(
    ("change", "same"),
    [({"lora_alpha": 6}, False), ({"use_rslora": True}, False), ({"lora_dropout": 0.5}, True),
     ({"peft_version": "0.22", "new_option": None}, True), ({"target_modules": None}, True)],
)  # fmt: skip
def test_what_decides_the_computation_is_in_the_digest(adapter: Path, change: dict[str, Any], same: bool) -> None:
    path = adapter / "adapter_config.json"
    config, before = json.loads(path.read_text()), member(adapter).adapter_config_sha256
    if "target_modules" in change:  # a set, which peft writes in any order
        change = {"target_modules": config["target_modules"][::-1]}
    path.write_text(json.dumps(config | change))
    assert (member(adapter).adapter_config_sha256 == before) == same


def test_its_tokenizer_is_its_own_or_that_of_its_base(save: Callable[..., Path], adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(save("llama"), tmp_path / "base")
    write_files(word_tokenizer(20), base)
    rename_base(adapter, str(base))
    assert len(load(adapter).vocabulary()) == 20
    write_files(word_tokenizer(30), adapter)
    assert len(load(adapter).vocabulary()) == 30


REFUSED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "pickle": (lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), {}, "a pickle"),
    "cut off": (
        lambda d: (d / "adapter_model.safetensors").write_bytes((d / "adapter_model.safetensors").read_bytes()[:-9]),
        {},
        "not a whole safetensors file",
    ),
    "no adapter's configuration": (lambda d: (d / "adapter_config.json").write_text("{}"), {}, "of type None"),
    "a module to import": (
        lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LORA", "megatron_config": {"a": 1}}'),
        {},
        "megatron_config is not supported",
    ),
    "a revision": (lambda d: None, {"revision": "main"}, "leave it out"),
    "several devices": (lambda d: None, {"device_map": DeviceMap("auto", {}, None)}, "merge it first"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_teacher_is_one_line(adapter: Path, case: str) -> None:
    spoil, options, said = REFUSED[case]
    spoil(adapter)
    with pytest.raises(InputError, match=said) as caught:
        load(adapter, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_of_a_tied_head_is_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", save("llama", tie_word_embeddings=True), lora="r=2,targets=lm_head")
    with pytest.raises(InputError, match="lm_head, whose weight another layer shares"):
        load(adapter)
