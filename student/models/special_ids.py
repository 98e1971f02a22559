"""The special ids and the generation config of a student: a model with weights keeps its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from storage.errors import InputError
from storage.files import local_path
from storage.progress import Log
from student.foreign_errors import explained

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_FLAGS = ("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits", "token_healing")
_NUMBERS = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "no_repeat_ngram_size", "guidance_scale"),
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences"),
)


def token_ids(special_ids: Mapping[str, int | None], columns: int) -> dict[str, int | None]:
    """The three ids by their names in configurations; None for those that a model of so many ids does not have."""
    found = (special_ids.get(name) for name in ("bos", "eos", "pad"))
    # A model whose configuration names such a padding id does not even load.
    bos, eos, pad = (None if id is None or id >= columns else id for id in found)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None if pad in (bos, eos) else pad}


def add_missing_ids(model: PreTrainedModel, spec: str, special_ids: Mapping[str, int | None], log: Log | None) -> None:
    """Give a model the tokenizer's special ids where neither its configurations nor its generation config have any."""
    text = model.config.get_text_config(decoder=True)
    records = [one for one in (model.config, text, model.generation_config) if one is not None]

    def own(name: str) -> set[int]:
        found = [getattr(record, name, None) for record in records]
        return {id for ids in found if ids is not None for id in (ids if isinstance(ids, list) else [ids])}

    added = []
    embeddings: Any = model.get_input_embeddings()
    for name, value in token_ids(special_ids, len(embeddings.weight)).items():
        frozen = name == "pad_token_id" and value in own("bos_token_id") | own("eos_token_id")
        if value is None or frozen or own(name):
            continue
        for record in records:
            setattr(record, name, value)
        added.append(f"{name} {value}")
    if added and log is not None:
        log(f"{spec}: its configuration does not have {' and '.join(added)}, which the tokenizer has: added")


def check_generation_file(spec: str) -> None:
    """Raise InputError, naming the file, where transformers cannot use a model's generation_config.json."""
    from transformers import GenerationConfig

    path, make = local_path(spec), cast(Any, GenerationConfig)
    local = path.is_dir()
    if local and not (path / "generation_config.json").exists():
        return
    with explained(f"{spec}: its generation_config.json cannot be used", ": correct it, or remove it"):
        try:
            make.from_pretrained(str(path) if local else spec, local_files_only=local)
        except OSError:  # of a hub id also where there is none
            if local:
                raise


def make_generation_valid(model: PreTrainedModel, spec: str, log: Log | None) -> None:
    """Put options that transformers would refuse to save back to their defaults, and say so.

    Base models ship them, such as a temperature beside `do_sample: false`, and are loaded without an error. Raises
    InputError for values of another type than their option has, which transformers takes and compares in vain.
    """
    from transformers import GenerationConfig

    generation = model.generation_config
    if generation is None:
        return
    _check_values(model, generation, spec, log)
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
    with explained(f"{spec}: its generation_config.json is not valid: correct it, or remove it"):
        generation.validate(strict=True)
    if log is not None:
        log(f"{spec}: its generation_config.json has {ignored}, which transformers does not save: saved without")


def _check_values(model: PreTrainedModel, generation: GenerationConfig, spec: str, log: Log | None) -> None:
    embeddings: Any = model.get_input_embeddings()
    beyond = []
    for name, value in generation.to_dict().items():
        values = value if isinstance(value, list) else [value]
        expected = None
        if name.endswith("_token_id"):
            expected = "an id, or a list of ids" if any(type(id) is not int for id in values) else None
            beyond += [f"{name} {id}" for id in values if type(id) is int and id >= len(embeddings.weight)]
        elif name in _FLAGS:
            expected = None if isinstance(value, bool) else "true or false"
        elif name in _NUMBERS:
            expected = None if type(value) in (int, float) else "a number"
        if value is not None and expected is not None:
            raise InputError(
                f"{spec}: {name} in its generation_config.json: expected {expected}, found {value!r}: correct it, or "
                f"remove it"
            )
    if beyond and log is not None:
        log(f"{spec}: its generation_config.json has {', '.join(beyond)}, which the model has no column for: kept")
