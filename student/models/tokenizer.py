"""The tokenizer beside a model or in a cache."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage import LogitCache
from storage.errors import InputError
from storage.format.identity import TOKENIZER_FILES, has_tokenizer
from storage.progress import Log
from student.models.configuration import has_weights

# What belongs to a tokenizer or to a processor beside the files that can be read alone.
_BESIDE = (
    *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
# Tokens of a cache whose text two tokenizers are compared on.
_PROBED = 4096


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
    if not has_weights(model) or path.exists() or "/" not in model:
        return path if has_weights(model) and path.is_dir() else None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=[*TOKENIZER_FILES, *_BESIDE]))
    except Exception:  # whoever loads the model says what is wrong with its id or the network
        return None


def special_ids(files: Mapping[str, bytes], where: str) -> dict[str, int | None]:
    """Ids of BOS, EOS and padding in the tokenizer of these files, None where it has none; `where` is for errors."""
    tokenizer = _tokenizer_of(files, where)
    return {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def begin_id(cache: str) -> int:
    """The id that begins a text in a cache's tokenizer; raises InputError where it has none."""
    found = special_ids(LogitCache.open(cache).tokenizer_files(), cache)["bos"]
    if found is None:
        raise InputError(f"--bos-each-window: the tokenizer of {cache} has no token that begins a text; leave it out")
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


def saved_tokenizer(cache: LogitCache, model: str, log: Log) -> dict[str, bytes]:
    """The files, by path, of the tokenizer that a student is saved with: its own, or else the cache's.

    A student's own tokenizer has the cache's vocabulary (`student.models.vocabulary` has the check). Where it splits
    the cache's text in another way, the student learns the cache's way, and is saved with that tokenizer; where the
    text is conversations, it learns their chat template, and is saved with that. Both are said.
    """
    folder = model_folder(model)
    own = None if folder is None else read_tokenizer(folder, model)
    stored = cache.tokenizer_files()
    if folder is None or own is None:
        return stored
    cached = _tokenizer_of(stored, cache.url)
    text = cached.decode(cache.tokens.read(0, min(_PROBED, cache.record.corpus.positions)).tolist())
    if own.encode(text, add_special_tokens=False) != cached.encode(text, add_special_tokens=False):
        log(f"{model}: its tokenizer splits the text of {cache.url} in another way: saved with the cache's")
        return stored
    found = {path for pattern in (*TOKENIZER_FILES, *_BESIDE) for path in folder.glob(pattern)}
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)}
    template = cached.chat_template
    if not _is_rendered(cache) or template is None or template == own.chat_template:
        return files
    log(f"{model}: its chat template is not that of the conversations of {cache.url}: saved with theirs")
    return _with_template(files, template)


def _is_rendered(cache: LogitCache) -> bool:
    """Whether a chat template wrote the text; where the record does not say, whether some of it is not trained on."""
    corpus = cache.record.corpus
    if corpus.begins_with_bos is None:  # a record of version 1
        return corpus.has_loss_mask
    return corpus.template_sha256 is not None


def _with_template(files: Mapping[str, bytes], template: str | Mapping[str, str]) -> dict[str, bytes]:
    """A tokenizer's files with another chat template, or several by name, in place of its own."""
    kept = {name: data for name, data in files.items() if "chat_template" not in name}
    config = json.loads(kept.get("tokenizer_config.json", b"{}"))
    config.pop("chat_template", None)
    kept["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    by_name = {"default": template} if isinstance(template, str) else template
    for name, text in by_name.items():
        path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        kept[path] = text.encode()
    return kept


def _tokenizer_of(files: Mapping[str, bytes], where: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        write_files(files, Path(folder))
        return read_tokenizer(Path(folder), where)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files by their paths below a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
