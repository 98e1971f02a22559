"""The directory of an adapter as a model: what is no whole adapter, and what contradicts it, is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from support.models.adapters import rename_base, save_adapter, save_base
from support.runs import V
from transformers import AutoModelForCausalLM

from storage.errors import InputError
from student.models.adapters.lora import Lora
from student.models.loading import _from_weights, load_student

# peft itself, by which a test saves another kind of adapter, asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, lora="r=4,alpha=8,targets=q_proj+v_proj")


def refusal(spec: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_student(str(spec), vocabulary_size=V, special_ids={}, window_tokens=16, seed=0, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without_a_weight(folder: Path, base: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path)


def as_prefix_tuning(folder: Path, base: Path) -> None:
    shutil.rmtree(folder)
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)


def with_field(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


BROKEN: dict[str, tuple[Any, str]] = {
    "pickle": (lambda d, base: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"), "a pickle, which"),
    "no weights": (lambda d, base: (d / "adapter_model.safetensors").unlink(), "found no weights"),
    "no JSON": (lambda d, base: (d / "adapter_config.json").write_text("{"), "no configuration of an adapter"),
    "a list": (lambda d, base: (d / "adapter_config.json").write_text("[]"), "expected a JSON object, found list"),
    "no base": (lambda d, base: rename_base(d, None), "names no base model: set base_model_name_or_path there"),
    "base not there": (lambda d, base: rename_base(d, "./nowhere/x"), "there is no such directory in /"),
    "base is an adapter": (lambda d, base: rename_base(d, str(d)), "is an adapter, too"),
    "base is a preset": (
        lambda d, base: rename_base(d, "llama-tiny"),
        "llama-tiny, which is no directory",
    ),
    "a revision": (lambda d, base: with_field(d, base_model_name_or_path="o/n", revision="v1"), "revision v1 of o/n"),
    "another type": (as_prefix_tuning, "of type PREFIX_TUNING, and only LORA"),
    "a router": (lambda d, base: with_field(d, arrow_config={"top_k": 1}), "arrow_config is not supported"),
    "of a later peft": (lambda d, base: with_field(d, use_more=True), "use_more, which the installed peft does not"),
    "another base": (lambda d, base: rename_base(d, str(save_base(d / "b", hidden_size=32))), "does not fit its base"),
    "a weight short": (without_a_weight, "lacks base_model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_whole_adapter_is_refused(base: Path, adapter: Path, case: str) -> None:
    spoil, said = BROKEN[case]
    spoil(adapter, base)
    assert said in refusal(adapter)


@pytest.mark.parametrize(
    ("asked", "said"),
    [("r=8", "r 4, not 8"), ("r=4,alpha=9", "alpha 8, not 9"), ("r=4,dropout=0.5", "dropout 0.0, not 0.5"),
     ("r=4,targets=q_proj", "['q_proj', 'v_proj'], not ['q_proj']")],
)  # fmt: skip
def test_another_lora_than_that_of_the_adapter_is_refused(adapter: Path, asked: str, said: str) -> None:
    assert said in refusal(adapter, lora=Lora.model_validate(asked))


def test_an_adapter_beside_a_whole_model_is_not_loaded_unasked(base: Path, adapter: Path) -> None:
    """As transformers does, of the hub's repositories too, where peft is installed."""
    for path in base.iterdir():
        shutil.copy(path, adapter)
    with pytest.raises(InputError, match="holds an adapter: download it"):
        _from_weights(str(adapter), V, 16, None)
