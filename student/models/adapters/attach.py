"""A LoRA on a transformers model, by peft: new, from its files, and merged into the weights.

Legend: `W` a layer's weight [outputs, inputs], `A` [r, inputs], `B` [outputs, r].
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from storage.errors import InputError
from storage.files import local_path
from student.foreign_errors import explained
from student.models.adapters.files import ADAPTER_CONFIG, AdapterFiles
from student.models.adapters.lora import ALL_LINEAR, Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "default"


def with_lora(model: PreTrainedModel, lora: Lora, base: str, seed: int) -> PreTrainedModel:
    """peft's wrapper of the model with a new adapter, which alone is trained; A depends on `seed` alone, and B is 0.

    base: the model as the user named it, which the adapter's configuration names as an absolute path or a hub id.
    Raises InputError for a target that no layer is called by, or that peft cannot adapt.
    """
    import torch
    from peft import LoraConfig, PeftModelForCausalLM, TaskType

    targets: Any = lora.targets
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=_location(base),
        r=lora.r,
        lora_alpha=cast(int, int(lora.alpha) if lora.alpha.is_integer() else lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else targets and list(targets),
    )
    with torch.random.fork_rng(devices=[]), _by_peft(f"{base}: no LoRA can be put on it"):
        torch.default_generator.manual_seed(seed)
        adapted = PeftModelForCausalLM(model, config)
    names = _adapted_layers(adapted)
    for target in () if targets in (None, (ALL_LINEAR,)) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"{base}: no layer of a {type(model).__name__} is called {target}: correct --lora targets")
    return cast("PreTrainedModel", adapted)


def with_adapter(model: PreTrainedModel, adapter: AdapterFiles, trained: bool) -> PreTrainedModel:
    """peft's wrapper of the base model with an adapter's weights; `trained`: they, and nothing else, can be trained.

    Raises InputError where the files lack a weight of the adapter, hold others, do not fit the model, or ask for
    something that the installed peft does not have.
    """
    from peft import LoraConfig, PeftModelForCausalLM

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unknown = [name for name, value in adapter.config.items() if value and name not in known]
    if unknown:  # which peft leaves out, with a warning
        raise InputError(
            f"{adapter.asked}: its configuration has {unknown[0]}, which the installed peft does not know: install a "
            "newer one"
        )
    with _by_peft(f"{adapter.asked}: peft cannot read its configuration"):
        config: LoraConfig = LoraConfig.from_pretrained(str(adapter.directory))
    config.base_model_name_or_path = adapter.base
    config.inference_mode = not trained
    with _by_peft(f"{adapter.asked}: the adapter does not fit its base {adapter.base}"):
        adapted = PeftModelForCausalLM(model, config)
        report = adapted.load_adapter(str(adapter.directory), _NAME, is_trainable=trained, torch_device="cpu")
    wrong = {"lacks": sorted(report.missing_keys), "holds": sorted(report.unexpected_keys)}
    for verb, names in wrong.items():
        if names:
            raise InputError(
                f"{adapter.weights} {verb} {names[0]} ({len(names)} in all), against its configuration and the base "
                f"{adapter.base}: not the whole adapter, or of another base"
            )
    return cast("PreTrainedModel", adapted)


def check_same(lora: Lora, adapter: AdapterFiles) -> None:
    """Raise InputError where a job asks for another LoRA than the adapter that it continues with."""
    own = adapter.config
    found = {"r": own.get("r"), "alpha": own.get("lora_alpha")}
    asked: dict[str, Any] = {"r": lora.r, "alpha": lora.alpha}
    if "dropout" in lora.model_fields_set:
        found["dropout"], asked["dropout"] = own.get("lora_dropout", 0.0), lora.dropout
    if lora.targets is not None and lora.targets != (ALL_LINEAR,):
        found["targets"] = _named(own.get("target_modules"))
        asked["targets"] = sorted(lora.targets)
    differing = [f"{name} {found[name]}, not {asked[name]}" for name in asked if found[name] != asked[name]]
    if differing:
        raise InputError(
            f"{adapter.asked}: training continues with this adapter, which has {'; '.join(differing)}: leave --lora "
            "out, or merge the adapter first"
        )


def inner_model(model: Any) -> Any:
    """The transformers model in peft's wrapper, or the model itself: the one that has LM head and backbone."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_checkpoint_adapter(folder: Path, model: Any) -> None:
    """Raise InputError where a checkpoint's adapter is on other layers, as where peft has other defaults by now."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return
    then = _named(json.loads(path.read_bytes())["target_modules"])
    now = _named(model.peft_config[_NAME].target_modules)
    if then != now:
        raise InputError(
            f"{folder}: its adapter is on {'+'.join(then)}, and this peft puts one on {'+'.join(now)}: "
            "install the peft that the run was started with, or give another --output-dir"
        )


def _adapted_layers(model: Any) -> list[str]:
    return list(model.base_model.targeted_module_names)


def _named(targets: Any) -> list[str]:
    """The targets of a configuration in alphabetical order; a pattern for them is one."""
    return [targets] if isinstance(targets, str) else sorted(targets or ())


def check_mergeable(model: Any, where: str) -> None:
    """Raise InputError where a weight that the adapter changes is also that of another layer.

    A head that is tied to the embedding would change with it: a merged weight is one number for both.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = inner_model(model)
    weights: dict[int, int] = {}
    for _, parameter in base.named_parameters(remove_duplicate=False):
        weights[id(parameter)] = weights.get(id(parameter), 0) + 1
    changed = _adapted_layers(model)
    changed += [name for name, module in base.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for name in changed:
        module: Any = base.get_submodule(name)
        own = getattr(module, "base_layer", None) or getattr(module, "original_module", None) or module
        if any(weights.get(id(parameter), 0) > 1 for parameter in own.parameters()):
            raise InputError(
                f"{where}: the adapter changes {name}, whose weight another layer shares, so it cannot be merged into "
                "one model: leave that layer out of its targets"
            )


def merged(model: Any, where: str) -> PreTrainedModel:
    """The model with ``W + (alpha / r)·B·A`` for each adapted W, without peft's layers.

    The sum is computed in float32 and rounded once to the dtype of W. Raises InputError as `check_mergeable` does.
    """
    check_mergeable(model, where)
    with _by_peft(f"{where}: peft cannot merge the adapter"):
        return cast("PreTrainedModel", model.merge_and_unload())


@contextlib.contextmanager
def _by_peft(what: str) -> Iterator[None]:
    """peft's errors as one line, without its warnings: of defaults that it changes itself, and of what is to be."""
    with warnings.catch_warnings(), explained(what):
        warnings.simplefilter("ignore")
        yield


def check_installed(asked: str) -> None:
    """Raise InputError where peft is not installed; the functions here need it. `asked` is the model, for the error."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"{asked}: adapters need peft: pip install 'logit-cache[peft]'")


def _location(base: str) -> str:
    path = local_path(base)
    return str(path.resolve()) if path.is_dir() else os.fspath(base)
