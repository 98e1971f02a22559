"""The tokenizer beside a model or in a cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from storage import LogitCache
from storage.errors import InputError
from storage.format.identity import TOKENIZER_FILES, has_tokenizer


def read_tokenizer(folder: Path, asked: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder, or None where there is none; `asked` is the model as the user named it.

    Raises InputError for one that cannot be read.
    """
    # AutoTokenizer makes an empty tokenizer of a folder that holds none, for some families.
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    try:
        return auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers' exceptions have no common class
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        raise InputError(
            f"{asked}: the tokenizer beside the model cannot be read ({reason}): save it again, or remove its files"
        ) from error


def model_folder(model: str) -> Path | None:
    """The folder with the tokenizer files of a model directory or of a hub id; None for anything else."""
    path = Path(model).expanduser()
    if path.exists() or "/" not in model:
        return path if path.is_dir() else None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(TOKENIZER_FILES)))
    except Exception:  # whoever loads the model says what is wrong with its id or the network
        return None


def special_ids(cache: str) -> dict[str, int | None]:
    """Ids of BOS, EOS and padding in a cache's tokenizer, None where it has none."""
    with tempfile.TemporaryDirectory() as folder:
        LogitCache.open(cache).save_tokenizer(Path(folder))
        tokenizer = read_tokenizer(Path(folder), cache)
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def begin_id(cache: str) -> int:
    """The id that begins a text in a cache's tokenizer; raises InputError where it has none."""
    found = special_ids(cache)["bos"]
    if found is None:
        raise InputError(
            f"{cache}: --bos-each-window: its tokenizer has no token that begins a text; leave the flag out"
        )
    return found


def text_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that a tokenizer puts before a text by itself."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return tuple(whole[:at])


def text_suffix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that a tokenizer puts after a text by itself."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return tuple(whole[len(text_prefix(tokenizer)) + len(plain) :])
