"""The one loader of tokenizers: beside a model, in a cache, in a folder, on the hub.

What a tokenizer.json says is what is used (`student.models.tokenizer_file`); a SentencePiece model without one is
converted to it (`student.models.sentencepiece_model`); other files are left to transformers. Whatever the source, the
ids of a text are those of the whole text and the same every time: truncation, padding, dropout and sampling are off.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage import LogitCache
from storage.errors import InputError
from storage.files import local_path
from storage.format.identity import TOKENIZER_FILES, has_tokenizer
from storage.progress import Log
from student.foreign_errors import explained
from student.models.adapters.files import base_of
from student.models.configuration import has_weights
from student.models.sentencepiece_model import is_tiktoken, read_sentencepiece, sentencepiece_file
from student.models.tokenizer_file import FILE, as_transformers_does, read_file, same_every_time
from student.models.tokenizer_settings import SETTINGS_FILE, class_name, read_settings

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# What belongs to a tokenizer or to a processor beside the files that can be read alone.
BESIDE = (
    *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
# All that a tokenizer may consist of; config.json names its class where tokenizer_config.json does not.
_HUB_FILES = [
    *TOKENIZER_FILES,
    *BESIDE,
    *("config.json", "tokenizer.*.json", "*.jinja", "spm.model", "*.tiktoken", "tiktoken.model", "tekken.json"),
]
_TIKTOKEN = (".tiktoken", ".model")


def read_tokenizer(folder: Path, asked: str, trust_remote_code: bool = False, log: Log | None = None) -> Any:
    """The tokenizer in a model's folder, or None where there is none; `asked` is the model as the user named it.

    Raises InputError for one that cannot be read.
    """
    # AutoTokenizer makes an empty tokenizer of a folder that holds none, for some families.
    if not has_tokenizer(folder):
        return None
    with explained(f"{asked}: the tokenizer beside the model cannot be read", ": save it again, or remove its files"):
        return _read(folder, asked, trust_remote_code, log)


def open_tokenizer(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    log: Log | None = None,
    own_rules: bool = True,
) -> Any:
    """The tokenizer in a folder, in a cache (its URL), or on the hub. Raises InputError when there is none.

    own_rules: False for a tokenizer with the rules of its transformers class in place of those of its tokenizer.json,
    with which streams were made before.
    """

    def read(folder: Path, remedy: str = "give a folder in which a tokenizer was saved") -> Any:
        with explained(f"{name}: cannot be read as a tokenizer", f": {remedy}"):
            return _read(folder, name, trust_remote_code, log, own_rules)

    if "://" in name or (local_path(name) / "zarr.json").is_file():
        with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
            LogitCache.open(cache_of_tokenizer(name) or name).save_tokenizer(Path(folder))
            return read(Path(folder))
    path = local_path(name)
    if path.is_dir():
        return read(path)
    if path.exists():
        raise InputError(f"{name}: expected a folder with tokenizer.json or the like, found a file; give its folder")
    if not _HUB_ID.match(name):
        raise InputError(f"{name}: no such folder; give a tokenizer's folder, a cache, or a hub id such as org/name")
    return read(_hub_folder(name, revision, trust_remote_code), "check the id")


def cache_of_tokenizer(name: str) -> str | None:
    """The cache that a tokenizer is taken from, by its URL or that of its folder `tokenizer`; None for others."""
    if "://" in name:
        return name.rstrip("/").removesuffix("/tokenizer")
    path = local_path(name).resolve()
    folders = (path, path.parent) if path.name == "tokenizer" else (path,)
    return next((str(folder) for folder in folders if (folder / "zarr.json").is_file()), None)


def model_folder(model: str) -> Path | None:
    """The folder with the tokenizer files of a model directory or of a hub id; None for anything else.

    Of an adapter, its own directory where it has a tokenizer, and else that of its base.
    """
    path = local_path(model)
    if has_weights(model) and path.is_dir() and not has_tokenizer(path):
        model = base_of(model)
        path = local_path(model)
    if not has_weights(model) or path.exists() or "/" not in model:
        return path if has_weights(model) and path.is_dir() else None
    try:
        return _hub_folder(model)
    except InputError:  # whoever loads the model says what is wrong with its id or the network
        return None


def special_ids(files: Mapping[str, bytes], where: str) -> dict[str, int | None]:
    """Ids of BOS, EOS and padding in the tokenizer of these files, None where it has none; `where` is for errors."""
    tokenizer = tokenizer_of(files, where)
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def begin_id(cache: str) -> int:
    """The id that begins a text in a cache's tokenizer; raises InputError where it has none."""
    found = special_ids(LogitCache.open(cache).tokenizer_files(), cache)["bos"]
    if found is None:
        raise InputError(f"--bos-each-window: the tokenizer of {cache} has no token that begins a text; leave it out")
    return found


def tokenizer_of(files: Mapping[str, bytes], where: str) -> Any:
    """The tokenizer of these files; `where` is for errors."""
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        write_files(files, Path(folder))
        return read_tokenizer(Path(folder), where)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _hub_folder(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else _HUB_FILES
    with explained(f"{name}: cannot be read as a tokenizer", "; check the id and the network"):
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _read(folder: Path, asked: str, trust_remote_code: bool, log: Log | None, own_rules: bool = True) -> Any:
    if not own_rules:
        return as_transformers_does(folder, trust_remote_code)
    if trust_remote_code and "auto_map" in read_settings(folder):
        return same_every_time(as_transformers_does(folder, True, asked, log), asked, log)
    if (folder / FILE).is_file():
        if log is not None and "auto_map" in read_settings(folder):
            log(f"{asked}: the code that its {SETTINGS_FILE} names (auto_map) is not run: its {FILE} is used")
        return read_file(folder, asked, log)
    model = sentencepiece_file(folder)
    if model is not None:
        return read_sentencepiece(folder, model, asked, log)
    incomplete = _incomplete(folder)
    if incomplete is not None:
        raise InputError(f"{asked}: {incomplete}")
    return same_every_time(as_transformers_does(folder, trust_remote_code, asked, log), asked, log)


def _incomplete(folder: Path) -> str | None:
    """Why a folder's files do not say which ids a text has, though transformers may guess; None where they do."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    names = [path.name for path in files]
    kinds = {path.name: "a tiktoken vocabulary" for path in files if path.suffix in _TIKTOKEN and is_tiktoken(path)}
    if "tekken.json" in names:
        kinds["tekken.json"] = "a tekken vocabulary of mistral-common"
    for name, kind in kinds.items():
        return f"{name} is {kind}, which is not read: give a folder of the same model with a {FILE}"
    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if name in names and other not in names and _is_bpe(folder):
            return f"expected {other} beside {name}, found none: copy it there, or give a folder with a {FILE}"
    if not has_tokenizer(folder):
        return f"cannot be read as a tokenizer: expected {FILE} or the like, found {', '.join(names[:3]) or 'no files'}"
    wanted = _vocabulary_files(folder)
    if wanted and not set(wanted) & set(names):
        found = " and ".join(name for name in TOKENIZER_FILES if name in names)
        return f"expected the tokenizer's vocabulary ({' or '.join(wanted)}), found {found} alone: copy it there"
    if class_name(folder) is None and {"vocab.json", "vocab.txt"} & set(names):
        return (
            f"its vocabulary does not say how text is cut into words: copy the model's config.json or {SETTINGS_FILE} "
            f"there, which names the tokenizer's class"
        )
    return None


def _is_bpe(folder: Path) -> bool:
    """Whether the class that a folder names, if any, has merges."""
    kind = _class(folder)
    return kind is None or "merges_file" in kind.vocab_files_names


def _vocabulary_files(folder: Path) -> list[str]:
    """The files of which one at least holds a vocabulary, by the class that a folder names; [] where it needs none."""
    kind = _class(folder)
    if kind is None:
        return [FILE, "tokenizer.model", "vocab.json", "vocab.txt"]
    return list(dict.fromkeys([*kind.vocab_files_names.values(), FILE])) if kind.vocab_files_names else []


def _class(folder: Path) -> Any:
    """The class of transformers that a folder names, None where it names none."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    named: Any = tokenizer_class_from_name
    name = class_name(folder)
    return None if name is None else named(name)
