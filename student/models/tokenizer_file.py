"""tokenizer.json as what a tokenizer is.

transformers' classes may put rules of their own in place of a tokenizer.json's: its pre-tokenizer, normaliser, decoder,
tokens, or the flags of its added tokens. Here the file holds; what only the settings beside it list is added to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.progress import Log, silent
from student.models.text_ids import text_ids, text_prefix, text_suffix
from student.models.tokenizer_settings import SETTINGS_FILE, class_name, read_settings

FILE = "tokenizer.json"
# Where rules of tokenizers differ: white space, digits, case, contractions, accents, scripts, symbols, code.
PROBES = (
    "",
    " ",
    "  The quick\tbrown fox's 1,234.5 jumps\r\n\n\nüber ﬁne e\u0301 é 日本語 😀 — no  end ",
    "in 1234567890 years, 3.14159 or 0x1F: 12 345, ½ ² ٣",
    "a  b   c    d\t\te\n\nf\r\n\r\ng \n h\n  \n",
    "CamelCase UPPER lower ÀÉÎ İstanbul straße ǅ",
    "we'll I'M don't they'RE it's l'été rock’n’roll",
    "naïve nai\u0308ve ﬀ Å A\u030a 가 각 Ω",
    "日本語のテキスト、ここに。中文，没有空格。한국어 텍스트 ไทย हिन्दी العربية",
    "👩\u200d👩\u200d👧 😀😀 ✈️ \ufeff\u00a0x\u2003y\u200b",
    "def f(x):\n    return {'a': x**2, \"b\": [1, -2]}  # ok?\n\tif(a!=b)&&c->d;",
    "http://a.b/c?d=e&f=%20 <b>x</b> $5.00 #tag @me __init__ ... !!! ---",
    "\n",
    "\n\nx",
    "x ",
)
_CHANCE = {"dropout": "BPE dropout", "alpha": "sampling", "nbest_size": "sampling"}  # of a tokenizer.json's model
_ADDED = 64  # added tokens of a tokenizer that are probed
# The classes of transformers 4 that acted on add_bos_token and add_eos_token beside a tokenizer.json: models were
# trained with what they did, though transformers 5 ignores both then. The value: whether they add BOS by default.
ADDING = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}


def read_file(folder: Path, asked: str, log: Log | None) -> Any:
    """The tokenizer of a folder's tokenizer.json, with the settings beside it; what differs from transformers is said.

    Raises InputError where the settings give a token an id that it cannot have, and what tokenizers and transformers
    raise for damaged files.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    say = log or silent
    make: Any = PreTrainedTokenizerFast
    tokenizer = make.from_pretrained(str(folder), local_files_only=True)
    # The name of code that is not run, and that its files would ask for when they are loaded again.
    tokenizer.init_kwargs.pop("auto_map", None)
    backend = _with_listed_tokens(Tokenizer.from_file(str(folder / FILE)), tokenizer, folder, asked, say)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    tokenizer._tokenizer = backend
    if backend.post_processor is None:
        tokenizer.update_post_processor()
    same_every_time(tokenizer, asked, log)
    name = class_name(folder)
    # For some types of models transformers takes another class than the settings name.
    if name not in (None, "TokenizersBackend") or (folder / "config.json").is_file():
        _compare_class(tokenizer, folder, asked, say)
    if name in ADDING:
        _add_around(tokenizer, read_settings(folder), asked, say)
    return tokenizer


def as_transformers_does(folder: Path, trust_remote_code: bool = False, asked: str = "", log: Log | None = None) -> Any:
    """The tokenizer of the class that a folder names, with the rules of that class, without sampling; that is said.

    Raises what transformers raises.
    """
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    sampling = (read_settings(folder).get("sp_model_kwargs") or {}).get("enable_sampling")
    if sampling and log is not None:
        log(f"{asked}: the sampling of segmentations in its {SETTINGS_FILE} (sp_model_kwargs) is switched off")
    return auto.from_pretrained(
        str(folder),
        # Code of a tokenizer may lie in another repository.
        local_files_only=not trust_remote_code,
        trust_remote_code=trust_remote_code,
        **({"sp_model_kwargs": {}} if sampling else {}),
    )


def same_every_time(tokenizer: Any, asked: str, log: Log | None) -> Any:
    """The tokenizer without truncation, padding and dropout; chance that is switched off is said."""
    if not tokenizer.is_fast:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    for name, what in _CHANCE.items():
        chance = getattr(backend.model, name, None)
        if chance:
            setattr(backend.model, name, None)
            (log or silent)(f"{asked}: the {what} of its {FILE} ({name} {chance:g}) is switched off")
    return tokenizer


def same_every_time_files(files: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """A tokenizer's files as `same_every_time` leaves the tokenizer, and what was taken out of them."""
    changed, taken_out = dict(files), []
    if FILE in files:
        content = json.loads(files[FILE])
        model = content["model"]
        off = [(content, name, name) for name in ("truncation", "padding")]
        off += [(model, name, f"{what} ({name} {model[name]:g})") for name, what in _CHANCE.items() if model.get(name)]
        for where, name, what in off:
            if where.get(name):
                where[name] = None
                taken_out.append(what)
        if taken_out:
            changed[FILE] = json.dumps(content, indent=2, ensure_ascii=False).encode()
    settings = json.loads(files.get(SETTINGS_FILE, b"{}"))
    if (settings.get("sp_model_kwargs") or {}).pop("enable_sampling", None):
        changed[SETTINGS_FILE] = json.dumps(settings, indent=2, ensure_ascii=False).encode()
        taken_out.append("sampling (sp_model_kwargs)")
    return changed, taken_out


def differing_text(a: Any, b: Any, texts: Iterable[str] = (), shared: bool = False) -> tuple[str, int, int] | None:
    """The first probe, or one of `texts`, that two tokenizers give different ids, and how many each; None where all are
    equal. shared: no probes with added tokens that only one of them knows."""
    added = [list(map(str, each.added_tokens_decoder.values()))[:_ADDED] for each in (a, b)]
    known = a.get_vocab().keys() & b.get_vocab().keys() if shared else {*added[0], *added[1]}
    marked = (f"a {token} b{token}{token}c\n{token}\n" for token in dict.fromkeys(chain(*added)) if token in known)
    for text in chain(PROBES, marked, texts):
        ids = [text_ids(each, text) for each in (a, b)]
        if ids[0] != ids[1]:
            return text, len(ids[0]), len(ids[1])
    return None


def _with_listed_tokens(backend: Any, tokenizer: Any, folder: Path, asked: str, say: Log) -> Any:
    """The file's tokenizer with the tokens that only the settings list, each with the id that they give it.

    backend: the file alone; tokenizer: what transformers made of the file and its settings.
    """
    ids = backend.get_vocab()
    here = {str(token) for token in backend.get_added_tokens_decoder().values()}
    more = [token for _, token in sorted(tokenizer.added_tokens_decoder.items()) if str(token) not in here]
    listed = listed_ids(folder)
    taken = {index: string for string, index in ids.items()}
    for string, index in listed.items():
        if string in ids and ids[string] != index:
            say(f"{asked}: {string!r} is id {ids[string]}, as {FILE} says; {SETTINGS_FILE} says {index}")
        elif string not in ids and index in taken:
            raise InputError(
                f"{asked}: {SETTINGS_FILE} gives {string!r} the id {index}, which is {taken[index]!r} in {FILE}: "
                f"correct the id, or take the token out of {SETTINGS_FILE}"
            )
    backend.add_tokens(more)
    found = backend.get_vocab()
    new = {str(token): listed.get(str(token), found[str(token)]) for token in more if str(token) not in ids}
    for string, index in new.items():
        # The next id is the number of tokens, which another may have where ids have holes.
        if index in taken:
            new[string] = max(*taken, *new.values()) + 1
    if all(found[string] == index for string, index in new.items()):
        return backend
    # A token that is added gets the next id, and one that the model has keeps its own.
    content = json.loads((folder / FILE).read_bytes())
    if not isinstance(content["model"].get("vocab"), dict):
        string, index = next((string, index) for string, index in new.items() if found[string] != index)
        raise InputError(
            f"{asked}: {SETTINGS_FILE} gives {string!r} the id {index}, and the next one of {FILE} is {found[string]}: "
            f"add the ids between them to {FILE}, or correct the id"
        )
    content["model"]["vocab"] |= new
    again = type(backend).from_str(json.dumps(content))
    again.add_tokens(more)
    return again


def listed_ids(folder: Path) -> dict[str, int]:
    """Ids of added tokens that the settings beside a tokenizer state, by string."""
    path = folder / "added_tokens.json"
    listed: dict[str, int] = json.loads(path.read_bytes()) if path.is_file() else {}
    for index, token in (read_settings(folder).get("added_tokens_decoder") or {}).items():
        listed[token["content"] if isinstance(token, dict) else str(token)] = int(index)
    return listed


def _add_around(tokenizer: Any, settings: Mapping[str, Any], asked: str, say: Log) -> None:
    """Put BOS and EOS around a text where the settings of a class that acted on them say so, and the file does not."""
    there = {"bos": text_prefix(tokenizer), "eos": text_suffix(tokenizer)}
    wanted = {}
    for name, ids in there.items():
        token, flag = getattr(tokenizer, f"{name}_token_id"), settings.get(f"add_{name}_token")
        wanted[name] = flag if isinstance(flag, bool) and token is not None else token in ids
    differing = [name for name, ids in there.items() if wanted[name] != (getattr(tokenizer, f"{name}_token_id") in ids)]
    if not differing:
        return
    for name, flag in wanted.items():
        setattr(tokenizer, f"add_{name}_token", flag)
    for name in differing:
        say(
            f"{asked}: a text has {'' if wanted[name] else 'no '}{getattr(tokenizer, f'{name}_token')} "
            f"{'before' if name == 'bos' else 'after'} it, as add_{name}_token in {SETTINGS_FILE} says; {FILE} says "
            f"otherwise"
        )


def _compare_class(tokenizer: Any, folder: Path, asked: str, say: Log) -> None:
    """Take the defaults of the class that transformers would use, and say where its rules give other ids."""
    try:
        other = as_transformers_does(folder)
    except Exception:  # whatever the class has against the file, the file can be read
        return
    if type(other) is type(tokenizer):
        return
    vocabulary = tokenizer.get_vocab()
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        token = getattr(other, name, None)
        if getattr(tokenizer, name) is None and token in vocabulary:
            setattr(tokenizer, name, token)
            tokenizer.backend_tokenizer.add_special_tokens([str(token)])
    for name in ("padding_side", "model_input_names"):
        tokenizer.init_kwargs[name] = getattr(other, name)
        setattr(tokenizer, name, getattr(other, name))
    same_every_time(other, asked, None)
    differing = differing_text(tokenizer, other)
    if differing is not None:
        text, ours, theirs = differing
        say(
            f"{asked}: its {FILE} is used; {type(other).__name__} of transformers applies rules of its own, which "
            f"give other ids for {text[:40]!r} ({theirs} in place of {ours})"
        )
