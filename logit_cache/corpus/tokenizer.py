"""The tokenizer of a new cache: trained on the text, or taken as it is; and its stored files.

Text is tokenised with the tokenizer as it is read back from those files, so that the stored tokenizer is the one that
made the tokens. No code is stored, and nothing that names a folder of this machine.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.errors import InputError
from storage.format.identity import differing_ids, few
from student.models.text_ids import text_prefix, text_suffix
from student.models.tokenizer import read_tokenizer
from student.models.tokenizer_file import differing_text
from student.models.tokenizer_settings import stored_files

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
BYTES = 256
MIN_FREQUENCY = 2

_STORED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab"}
_FILE_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$")


def train_tokenizer(lines: Iterable[str], vocabulary_size: int, special_tokens: Iterable[str] = ()) -> Any:
    """A byte-level BPE of `vocabulary_size` ids, or fewer where the text has no more pairs to merge.

    NFKC, a space put before a text, pairs merged that occur at least twice; `<pad> <s> </s>` are the ids 0, 1, 2
    and further special tokens follow. All 256 bytes are in the alphabet, so no text is unknown. `lines` with their
    line feeds, each a text of its own, are read once and not kept. The result depends on the lines alone: counts
    are summed, and equal ones ordered by id.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFKC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    further = [token for token in dict.fromkeys(special_tokens) if token not in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[*SPECIAL_TOKENS, *further],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    pad, begin, end = SPECIAL_TOKENS
    extra = {"additional_special_tokens": further} if further else {}
    return make(tokenizer_object=bpe, pad_token=pad, bos_token=begin, eos_token=end, **extra)


def stored_tokenizer(tokenizer: Any, trust_remote_code: bool = False) -> tuple[Any, dict[str, bytes]]:
    """The tokenizer as its stored files give it back, and those files by name.

    Raises InputError that says what differs when saving loses something: of its vocabulary, its chat templates or its
    special tokens, or the ids of a text of many scripts.
    """
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        # Several templates would lie in a folder of their own, and stored files have none.
        tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        files = {
            path.name: path.read_bytes()
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.suffix in _STORED and _FILE_NAME.match(path.name)
        }
    files = stored_files(files)
    if trust_remote_code and "tokenizer.json" not in files:
        # Its code is not stored, so its files alone cannot give it back.
        return tokenizer, files
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        again = read_tokenizer(Path(folder), "the tokenizer as saved", trust_remote_code)
    lost = "nothing can be read back" if again is None else _lost(tokenizer, again)
    if lost is not None:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) does not survive saving: {lost}; save it with this "
            f"transformers and give that folder"
        )
    return again, files


def _lost(tokenizer: Any, again: Any) -> str | None:
    """What saving changed, or None."""
    if tokenizer.get_vocab() != again.get_vocab():
        return "; ".join(few(list(differing_ids(again.get_vocab(), tokenizer.get_vocab()).values())))
    if tokenizer.chat_template != again.chat_template:
        return "its chat template is another when read back"
    if tokenizer.special_tokens_map != again.special_tokens_map:
        return f"special tokens {again.special_tokens_map} in place of {tokenizer.special_tokens_map}"
    for name, ends in (("before", text_prefix), ("after", text_suffix)):
        if ends(tokenizer) != ends(again):
            return f"ids {name} a text: {ends(again)} in place of {ends(tokenizer)}"
    differing = differing_text(tokenizer, again)
    if differing is not None:
        text, ours, theirs = differing
        return f"{theirs} other ids in place of {ours} for {text[:40]!r}"
    return None


def template_environment(source: str) -> Any:
    """The Jinja environment in which transformers renders a chat template: its sandbox, filters and functions."""
    # It has no public name.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source).environment
