"""The tokenizer of a cache: taken as it is, or trained on the text; and its stored files.

Text is tokenised with the tokenizer as it is read back from those files, so that the stored tokenizer is the one that
made the tokens. No code is stored, and nothing that names a folder of this machine.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.cache.reader import LogitCache
from storage.errors import InputError, LogitCacheError

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
BYTES = 256
MIN_FREQUENCY = 2

_STORED = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab"}
_FILE_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# How and from where it was loaded: not part of its behaviour, and private.
_LOADING = {
    "name_or_path",
    "is_local",
    "local_files_only",
    "_commit_hash",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
}
_PROBE = "  The quick\tbrown fox's 1,234.5 jumps\r\n\n\nüber ﬁne e\u0301 日本語 😀 — no  end "


def open_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder, in a cache (its URL), or on the hub. Raises InputError when there is none."""
    path = Path(name).expanduser()
    if "://" in name or (path / "zarr.json").is_file():
        with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
            LogitCache.open(name).save_tokenizer(Path(folder))
            return _load(Path(folder), name, trust_remote_code)
    if path.is_dir():
        return _load(path, name, trust_remote_code)
    if path.exists():
        raise InputError(f"{name}: expected a folder with tokenizer.json or the like, found a file; give its folder")
    if not _HUB_ID.match(name):
        raise InputError(f"{name}: no such folder; give a tokenizer's folder, a cache, or a hub id such as org/name")
    return _load(name, name, trust_remote_code, revision)


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

    Raises InputError when saving loses something: another vocabulary, or other ids for a text of many scripts.
    """
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        tokenizer.save_pretrained(folder)
        files = {
            path.name: _scrubbed(path)
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.suffix in _STORED and _FILE_NAME.match(path.name)
        }
    if trust_remote_code and "tokenizer.json" not in files:
        # Its code is not stored, so its files alone cannot give it back.
        return tokenizer, files
    with tempfile.TemporaryDirectory(prefix="logit-cache-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        again = _load(Path(folder), "the tokenizer as saved", trust_remote_code)
    probes = [
        (each.get_vocab(), each(_PROBE, add_special_tokens=False, verbose=False)["input_ids"], each.chat_template)
        for each in (tokenizer, again)
    ]
    if probes[0] != probes[1]:
        raise InputError(
            f"the tokenizer ({type(tokenizer).__name__}) does not survive saving: read back ({type(again).__name__}) "
            f"it has another vocabulary or gives other ids; save it with this transformers and give that folder"
        )
    return again, files


def template_environment(source: str) -> Any:
    """The Jinja environment in which transformers renders a chat template: its sandbox, filters and functions."""
    # It has no public name.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source).environment


def _load(location: str | Path, name: str, trust_remote_code: bool, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    local = isinstance(location, Path)
    pinned = {} if revision is None else {"revision": revision}
    try:
        return AutoTokenizer.from_pretrained(
            str(location), local_files_only=local, trust_remote_code=trust_remote_code, **pinned
        )
    except LogitCacheError:
        raise
    except Exception as error:
        # Damaged files raise an exception of whichever library reads them first.
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        remedy = "give a folder in which a tokenizer was saved" if local else "check the id and the network"
        raise InputError(f"{name}: cannot be read as a tokenizer ({reason}); {remedy}") from None


def _scrubbed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name != "tokenizer_config.json":
        return data
    config = {key: value for key, value in json.loads(data).items() if key not in _LOADING}
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
