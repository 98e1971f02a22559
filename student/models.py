"""Models by name, by configuration or from weights, checked against a cache's vocabulary and windows.

Owns the presets and every check that a model must pass before training starts: enough columns for the vocabulary,
enough positions for the window, and causality (no sight of the token to predict).

The presets are plain data, so that `--help` can list them; torch and transformers are imported when a model is made.
Llama presets have no dropout. GPT-2 presets have 0.1 everywhere, GPT2Config's own default, which the published
GPT-2 teacher was trained with; caching and evaluation switch it off.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from storage.errors import InputError
from storage.progress import Log

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

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


def preset_config(name: str, vocabulary_size: int, special_ids: Mapping[str, int | None]) -> PretrainedConfig:
    """The transformers configuration of a preset for a vocabulary; see `load_student` for `special_ids`."""
    from transformers import AutoConfig

    settings = preset_settings(name)
    return AutoConfig.for_model(
        settings.pop("model_type"), vocab_size=vocabulary_size, **settings, **_token_ids(special_ids)
    )


def load_student(
    spec: str,
    *,
    vocabulary_size: int,
    special_ids: Mapping[str, int | None],
    window_tokens: int,
    seed: int,
    attention: str | None = None,
    log: Log | None = None,
) -> PreTrainedModel:
    """A causal language model in float32 on the CPU, in training mode.

    `spec` is, in this order: a preset's name (write ./name for a folder of that name); a file, read as a
    transformers config.json with `model_type`, whose `vocab_size` is V unless it sets another; a model directory;
    or a hub id written owner/name. The first two start from random weights that depend on `seed` alone; torch's own
    random state is left as it was. The last two load weights, and `seed` plays no part. No code of a model's
    repository is ever run.

    vocabulary_size: V; the model may have more columns, which no target falls on, but not fewer.
    special_ids: the tokenizer's, by "bos", "eos" and "pad", None where it has none; written into the configuration of
    a new model. One that has weights keeps its own, which may be several, and gets those that it lacks. A pad id that
    is also a bos or eos id is left out: transformers would freeze that token's embedding at zero.
    window_tokens: positions that a training window reads.
    attention: one of transformers' implementations, None for its own choice.
    log: receives a line for each thing about a model with weights that differs from what its files say.

    Raises InputError for an unknown name, a broken file or directory, a model type that transformers does not know
    as a causal language model, missing weights, too few columns or positions, and a model whose output at a position
    depends on later tokens (an encoder would learn to copy the answer).
    """
    if not spec.strip():
        raise InputError(f"no model was named: give a preset ({', '.join(PRESETS)}), a config JSON or a directory")
    if spec in PRESETS:
        config = preset_config(spec, vocabulary_size, special_ids)
        _check_config(config, spec, vocabulary_size, window_tokens)
        return _from_scratch(config, spec, seed, attention)
    path = Path(spec).expanduser()
    if path.is_file():
        config = config_of(read_settings(path), str(path), vocabulary_size, special_ids)
        _check_config(config, spec, vocabulary_size, window_tokens)
        model = _from_scratch(config, spec, seed, attention)
    else:
        if not path.is_dir():
            _refuse_missing(spec)
        model = _from_weights(spec, path, vocabulary_size, window_tokens, attention)
        _add_missing_ids(model, spec, special_ids, log)
        _make_generation_valid(model, spec, log)
    _probe(model, spec, vocabulary_size, window_tokens)
    model.train()
    return model


def stored_dtype(spec: str) -> str:
    """The dtype of a model's weights on disk, by its configuration; float32 for a new model, or where none is named."""
    from transformers import AutoConfig

    path = Path(spec).expanduser()
    if spec in PRESETS or path.is_file():
        return "float32"
    with _explained(f"{spec}: its configuration cannot be read"):
        config = AutoConfig.from_pretrained(str(path) if path.is_dir() else spec, trust_remote_code=False)
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    name = str(found).removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "float32"


def check_settings(
    settings: Mapping[str, Any],
    where: str,
    *,
    vocabulary_size: int,
    special_ids: Mapping[str, int | None],
    window_tokens: int,
) -> None:
    """Raise InputError where a configuration cannot be a student; its modules are made without weights, one layer deep.

    The other checks of `load_student` need weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(settings, where, vocabulary_size, special_ids)
    _check_config(config, where, vocabulary_size, window_tokens)
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise InputError(f"{where}: {heads} attention heads are not a multiple of {shared} key-value heads")
    if isinstance(getattr(config, "num_hidden_layers", None), int) and not getattr(config, "layer_types", None):
        if config.num_hidden_layers < 1:
            raise InputError(f"{where}: a model has at least one layer, found {config.num_hidden_layers}")
        config.num_hidden_layers = 1
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"), _explained(f"{where}: transformers cannot build this model"):
        auto.from_config(config)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a JSON configuration. Raises InputError for any other file."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: this is not a JSON configuration of a model: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise InputError(f'{path}: a model configuration is a JSON object with a "model_type", like "llama" or "gpt2"')
    model_type = data["model_type"]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{path}: model_type {model_type!r} is no causal language model of the installed transformers"
            + _closest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        )
    return data


def config_of(
    settings: Mapping[str, Any], where: str, vocabulary_size: int, special_ids: Mapping[str, int | None]
) -> PretrainedConfig:
    """The configuration that a mapping describes, with a cache's vocabulary and special ids; `where` is for errors."""
    from transformers import AutoConfig

    data = dict(settings)
    model_type = data.pop("model_type")
    _refuse_misspelt(where, data, AutoConfig.for_model(model_type))
    if "text_config" not in data:
        data.setdefault("vocab_size", vocabulary_size)
    # Fields about the stored weights and their writer: they do not apply to a new model.
    for name in ("architectures", "dtype", "torch_dtype", "transformers_version", "auto_map"):
        data.pop(name, None)
    with _explained(f"{where}: transformers refuses this configuration of a {model_type} model"):
        config: PretrainedConfig = AutoConfig.for_model(model_type, **{**data, **_token_ids(special_ids)})
    return config


def _refuse_misspelt(where: str, data: Mapping[str, Any], default: PretrainedConfig) -> None:
    """transformers takes any key and ignores those it does not know: `hiden_size` would give the default width.

    Only a key that nearly is another one is refused; saved configurations carry others that mean nothing today.
    """
    known = {*default.to_dict(), *default.attribute_map}
    for key in data:
        match = difflib.get_close_matches(key, known - set(data), n=1, cutoff=0.8)
        if not hasattr(default, key) and match:
            raise InputError(
                f"{where}: a {default.model_type} configuration has no {key!r} and would ignore it; "
                f"did you mean {match[0]!r}?"
            )


def _from_scratch(config: PretrainedConfig, spec: str, seed: int, attention: str | None) -> PreTrainedModel:
    """Random weights, a function of the configuration and the seed."""
    import torch
    from transformers import AutoModelForCausalLM

    # Only the CPU's generator is used, so only it is seeded and put back; torch.manual_seed would also seed the GPUs'.
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        _explained(f"{spec}: transformers cannot build this model"),
    ):
        torch.default_generator.manual_seed(seed)
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model.train()
    return model


def _from_weights(
    spec: str, path: Path, vocabulary_size: int, window_tokens: int, attention: str | None
) -> PreTrainedModel:
    """A model directory's or hub repository's weights, as float32: mixed precision is the trainer's choice."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    local = path.is_dir()
    where = str(path) if local else spec
    what = "no model directory" if local else "not a directory here, and no model of the hub could be loaded by that id"
    with _explained(f"{spec}: {what}", _closest(path.name, PRESETS)):
        config = AutoConfig.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    _check_config(config, spec, vocabulary_size, window_tokens)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel
    with _explained(f"{spec}: the weights cannot be loaded"):
        model, report = auto.from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            local_files_only=local,
            trust_remote_code=False,
            attn_implementation=attention,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{spec}: {len(missing)} weights of a {type(model).__name__} are missing ({', '.join(missing[:3])}, …) and "
            "would start at random: take a complete causal language model"
        )
    return model


def _add_missing_ids(model: PreTrainedModel, spec: str, special_ids: Mapping[str, int | None], log: Log | None) -> None:
    """Give a model the tokenizer's special ids where neither its configuration nor its generation config has any."""
    records = [one for one in (model.config, model.generation_config) if one is not None]

    def own(name: str) -> set[int]:
        found = [getattr(record, name, None) for record in records]
        return {id for ids in found if ids is not None for id in (ids if isinstance(ids, list) else [ids])}

    added = []
    for name, value in _token_ids(special_ids).items():
        frozen = name == "pad_token_id" and value in own("bos_token_id") | own("eos_token_id")
        if value is None or frozen or own(name):
            continue
        for record in records:
            setattr(record, name, value)
        added.append(f"{name} {value}")
    if added and log is not None:
        log(f"{spec}: its configuration does not have {' and '.join(added)}, which the tokenizer has: added")


def _make_generation_valid(model: PreTrainedModel, spec: str, log: Log | None) -> None:
    """Put options that transformers would refuse to save back to their defaults; generation ignored them.

    Base models ship them, such as a temperature beside `do_sample: false`, and are loaded without an error.
    """
    from transformers import GenerationConfig

    generation = model.generation_config
    if generation is None:
        return
    try:
        generation.validate(strict=True)
        return
    except ValueError as error:
        names = re.findall(r"^- `(\w+)`:", str(error), flags=re.MULTILINE)
    ignored = ", ".join(f"{name} {getattr(generation, name)}" for name in names)
    make: Any = GenerationConfig
    default = make()
    for name in names:
        setattr(generation, name, getattr(default, name))
    with _explained(f"{spec}: its generation_config.json is not valid: correct it, or remove it"):
        generation.validate(strict=True)
    if log is not None:
        log(f"{spec}: its generation_config.json has {ignored}, which its other options make void: saved without")


def _check_config(config: PretrainedConfig, spec: str, vocabulary_size: int, window_tokens: int) -> None:
    """Refuse a model that cannot fit before its weights are made or fetched."""
    text = config.get_text_config(decoder=True)
    columns = getattr(text, "vocab_size", None)
    if isinstance(columns, int) and columns < vocabulary_size:
        raise InputError(
            f"{spec}: the model has {columns} ids, fewer than the {vocabulary_size} of the cache's tokenizer: "
            "set vocab_size to that, or take a model of this tokenizer"
        )
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < window_tokens:
        raise InputError(
            f"{spec}: the model has {positions} positions, fewer than the {window_tokens} tokens of a window: "
            "take shorter windows or a model with more positions"
        )


def _probe(model: PreTrainedModel, spec: str, vocabulary_size: int, window_tokens: int) -> None:
    """Run a few tokens twice, the last one changed: the logits must cover V and be causal."""
    import torch

    tokens = min(8, max(2, window_tokens))
    ids = (torch.arange(tokens) * vocabulary_size // tokens).expand(2, tokens).clone()
    ids[1, -1] = 0
    with torch.no_grad(), _explained(f"{spec}: the model does not run on plain token ids"):
        logits = model.train(False)(input_ids=ids).logits
    if logits.shape[-1] < vocabulary_size:
        raise InputError(
            f"{spec}: the model's head has {logits.shape[-1]} columns, fewer than the {vocabulary_size} ids of the "
            "cache's tokenizer"
        )
    before = logits[:, :-1]
    # Equal rows give equal numbers but for the order of sums; the effect of a later token is orders above that.
    if not (before[0] - before[1]).abs().max() <= 1e-4 * before.abs().max():
        raise InputError(
            f"{spec}: the logits at a position change with a later token (or are not finite), so this is no causal "
            "language model: take a decoder (an encoder's configuration may need is_decoder)"
        )


def _refuse_missing(spec: str) -> None:
    """Raise InputError unless `spec`, no preset, file or directory here, can be a hub id."""
    as_path = spec.startswith((".", "/", "~")) or spec.endswith(".json")
    if as_path or spec.count("/") > 1:
        stem = Path(spec).stem
        hint = f"; the preset is written {stem!r} alone" if stem in PRESETS else ""
        raise InputError(f"{spec}: there is no such file or directory{hint}")
    if "/" not in spec:
        raise InputError(
            f"{spec!r} is no preset, file or directory here{_closest(spec, PRESETS)}; presets: {', '.join(PRESETS)}; "
            "a model of the hub is written owner/name"
        )


def _token_ids(special_ids: Mapping[str, int | None]) -> dict[str, int | None]:
    """The three ids by their names in configurations."""
    bos, eos, pad = (special_ids.get(name) for name in ("bos", "eos", "pad"))
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None if pad in (bos, eos) else pad}


def _closest(name: str, known: Mapping[str, Any]) -> str:
    """'; did you mean ...?', or an empty string without a close match."""
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


@contextlib.contextmanager
def _explained(what: str, hint: str = "") -> Iterator[None]:
    """Turns any exception of transformers inside into an InputError: they have no common base class."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} ({reason[:400] or type(error).__name__}){hint}") from error
