"""A student by name, by configuration or from weights, checked against a cache's vocabulary and windows.

Every check that a model must pass before training starts is here or in `configuration`: enough columns for the
vocabulary, enough positions for the window, and causality (no sight of the token to predict).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import InputError
from storage.files import local_path
from storage.progress import Log
from storage.text import counted
from student.foreign_errors import explained
from student.models.adapters.attach import check_installed, check_same, with_adapter, with_lora
from student.models.adapters.files import AdapterFiles, find_adapter
from student.models.adapters.lora import Lora
from student.models.configuration import check_config, config_of, has_weights, read_config, read_settings
from student.models.presets import PRESETS, preset_settings
from student.models.special_ids import add_missing_ids, check_generation_file, make_generation_valid

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def load_student(
    spec: str | os.PathLike[str],
    *,
    vocabulary_size: int,
    special_ids: Mapping[str, int | None],
    window_tokens: int,
    seed: int,
    attention: str | None = None,
    log: Log | None = None,
    lora: Lora | None = None,
) -> PreTrainedModel:
    """A causal language model in float32 on the CPU, in training mode.

    `spec` is, in this order: a preset's name (write ./name for a folder of that name); a file, read as a
    transformers config.json with `model_type`, whose `vocab_size` is V unless it sets another; a model directory;
    or a hub id written owner/name. The first two start from random weights that depend on `seed` alone; torch's own
    random state is left as it was. The last two load weights, and `seed` plays no part. No code of a model's
    repository is ever run.

    vocabulary_size: V, the ids that text and targets can name (`DistillationWindows.within` finds those of a model with
    fewer columns than the tokenizer has ids); the model may have more columns, which no target falls on, but not fewer.
    special_ids: the tokenizer's, by "bos", "eos" and "pad", None where it has none; written into the configuration of
    a new model. One that has weights keeps its own, which may be several, and gets those that it lacks. Ids that the
    model does not have are left out, and a pad id that is also a bos or eos id: transformers would freeze that token's
    embedding at zero.
    window_tokens: positions that a training window reads.
    attention: one of transformers' implementations, None for its own choice.
    lora: an adapter to put on a model with weights. `spec` may also be the directory of an adapter, loaded on its base.
    Both give peft's wrapper of the model, in which the adapter alone can be trained; given both, they must agree.
    log: receives a line for each thing about a model with weights that differs from what its files say.

    Raises InputError for an unknown name, a broken file or directory, a model type that transformers does not know
    as a causal language model, missing weights, too few columns or positions, and a model whose output at a position
    depends on later tokens (an encoder would learn to copy the answer).
    """
    spec = os.fspath(spec)
    adapter = adapter_of(spec, lora)
    if has_weights(spec):
        base = spec if adapter is None else adapter.base
        model = _from_weights(base, vocabulary_size, window_tokens, attention)
        add_missing_ids(model, base, special_ids, log)
        make_generation_valid(model, base, log)
        if adapter is not None:
            model = with_adapter(model, adapter, trained=True)
        elif lora is not None:
            model = with_lora(model, lora, base, seed)
    else:
        settings = preset_settings(spec) if spec in PRESETS else read_settings(local_path(spec))
        config = config_of(settings, str(local_path(spec)), vocabulary_size, special_ids)
        check_config(config, spec, vocabulary_size, window_tokens)
        model = _from_scratch(config, spec, seed, attention)
    if spec not in PRESETS:
        _probe(model, spec, vocabulary_size, window_tokens)
    model.train()
    return model


def adapter_of(spec: str, lora: Lora | None) -> AdapterFiles | None:
    """The adapter in a model's directory, None where there is none.

    Raises InputError where `lora`, what is asked of an adapter, is not that one, or the model has no weights for one.
    """
    if not has_weights(spec):
        if lora is not None:
            raise InputError(
                f"{spec}: --lora trains an adapter on a model's weights, and a new model has random ones: give a "
                "model directory or hub id, or leave --lora out"
            )
        return None
    adapter = find_adapter(spec)
    if adapter is not None or lora is not None:
        check_installed(spec)
    if adapter is not None and lora is not None:
        check_same(lora, adapter)
    if adapter is not None and not Path(adapter.base).is_dir() and "/" not in adapter.base:
        raise InputError(
            f"{spec}: its adapter names the base model {adapter.base}, which is no directory here: set "
            "base_model_name_or_path in adapter_config.json to one, or to a hub id owner/name"
        )
    if adapter is not None and adapter.revision is not None:
        raise InputError(
            f"{spec}: its adapter was trained on revision {adapter.revision} of {adapter.base}: download that, and "
            "name its directory as base_model_name_or_path in adapter_config.json"
        )
    return adapter


def _from_scratch(config: PretrainedConfig, spec: str, seed: int, attention: str | None) -> PreTrainedModel:
    """Random weights, a function of the configuration and the seed."""
    import torch
    from transformers import AutoModelForCausalLM

    # Only the CPU's generator is used, so only it is seeded and put back; torch.manual_seed would also seed the GPUs'.
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        explained(f"{spec}: transformers cannot build this model"),
    ):
        torch.default_generator.manual_seed(seed)
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model


def _from_weights(spec: str, vocabulary_size: int, window_tokens: int, attention: str | None) -> PreTrainedModel:
    """A model directory's or hub repository's weights, as float32: mixed precision is the trainer's choice."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(spec)
    check_config(config, spec, vocabulary_size, window_tokens)
    check_generation_file(spec)
    auto: Any = AutoModelForCausalLM
    path = local_path(spec)
    model: PreTrainedModel
    with explained(f"{spec}: the weights cannot be loaded"):
        model, report = auto.from_pretrained(
            str(path) if path.is_dir() else spec,
            config=config,
            dtype=torch.float32,
            local_files_only=path.is_dir(),
            trust_remote_code=False,
            attn_implementation=attention,
            output_loading_info=True,
        )
    if getattr(model, "_hf_peft_config_loaded", False):  # which transformers loads beside a config.json, unasked
        raise InputError(f"{spec}: holds an adapter: download it (hf download), and give its directory")
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{spec}: the files lack {counted(len(missing), 'weight')} of a {type(model).__name__} "
            f"({', '.join(missing[:3])}, …), which "
            "would start at random: take a complete causal language model"
        )
    return model


def _probe(model: PreTrainedModel, spec: str, vocabulary_size: int, window_tokens: int) -> None:
    """Run a few tokens twice, the last one changed: the logits must cover V and be causal."""
    import torch

    tokens = min(8, max(2, window_tokens))
    ids = (torch.arange(tokens) * vocabulary_size // tokens).expand(2, tokens).clone()
    ids[1, -1] = 0
    with torch.no_grad(), explained(f"{spec}: the model does not run on plain token ids"):
        logits = model.train(False)(input_ids=ids).logits
    if logits.shape[-1] < vocabulary_size:
        raise InputError(
            f"{spec}: the model's head has {logits.shape[-1]} columns, fewer than the {vocabulary_size} ids that text "
            "and targets can name: take another model"
        )
    before = logits[:, :-1]
    # Equal rows give equal numbers but for the order of sums; the effect of a later token is orders above that.
    if not (before[0] - before[1]).abs().max() <= 1e-4 * before.abs().max():
        raise InputError(
            f"{spec}: the logits at a position change with a later token (or are not finite), so this is no causal "
            "language model: take a decoder (an encoder's configuration may need is_decoder)"
        )
