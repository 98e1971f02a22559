"""The tokenizer that a student is saved with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from storage import LogitCache
from storage.format.identity import TOKENIZER_FILES
from storage.progress import Log
from student.models.tokenizer import BESIDE, model_folder, read_tokenizer, tokenizer_of
from student.models.tokenizer_file import differing_text, same_every_time_files
from student.models.tokenizer_settings import portable_files, stored_files

# Stretches of a cache's tokens, spread over it, whose text two tokenizers are compared on, and tokens of each.
_STRETCHES, _STRETCH = 16, 512


def saved_tokenizer(cache: LogitCache, model: str, log: Log) -> dict[str, bytes]:
    """The files, by path, of the tokenizer that a student is saved with, for transformers 4.57 and 5: its own, or else
    the cache's; without chance and cut-offs, with which it would not be the one of the student's text.

    A student's own tokenizer has the cache's vocabulary (`student.models.vocabulary` has the check). Where it splits
    text in another way, the student learns the cache's way, and is saved with that tokenizer; where the
    text is conversations, it learns their chat template, and is saved with that. All of this is said.
    """
    files, taken_out = same_every_time_files(_own_or_cached(cache, model, log))
    if taken_out:
        log(f"{model}: its tokenizer is saved without {', '.join(taken_out)}, as the text was made without")
    return files


def _own_or_cached(cache: LogitCache, model: str, log: Log) -> dict[str, bytes]:
    folder = model_folder(model)
    own = None if folder is None else read_tokenizer(folder, model)
    stored = stored_files(cache.tokenizer_files())
    if folder is None or own is None:
        return stored
    cached = tokenizer_of(stored, cache.url)
    differing = differing_text(own, cached, _stretches(cache, cached), shared=True)
    if differing is not None:
        shown = differing[0][:40]
        log(
            f"{model}: its tokenizer splits text otherwise than that of {cache.url} ({shown!r}): saved with the cache's"
        )
        return stored
    found = {path for pattern in (*TOKENIZER_FILES, *BESIDE) for path in folder.glob(pattern)}
    files = portable_files({path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(found)})
    template = cached.chat_template
    if not _is_rendered(cache) or template is None or template == own.chat_template:
        return files
    log(f"{model}: its chat template is not that of the conversations of {cache.url}: saved with theirs")
    return _with_template(files, template)


def _stretches(cache: LogitCache, tokenizer: Any) -> Iterator[str]:
    """Texts of the cache, from its beginning to its end. Normalised as they are, they do not replace probes."""
    positions = cache.record.corpus.positions
    for start in sorted({max(0, positions - _STRETCH) * number // (_STRETCHES - 1) for number in range(_STRETCHES)}):
        yield tokenizer.decode(cache.tokens.read(start, min(start + _STRETCH, positions)).tolist())


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
