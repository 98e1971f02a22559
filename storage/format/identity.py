"""Identity of vocabularies, tokenizers and token streams, as sha256 digests.

A tokenizer has two digests, because they answer two questions. `vocabulary_sha256` covers which id is which string: a
teacher and a cache must share it for the columns of their distributions to mean the same. `tokenizer_fingerprint`
covers behaviour too (merges, normaliser, pre-tokenizer): two token streams must share it to be comparable. `V` is the
largest id + 1, added tokens included; a vocabulary may have unused ids below it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.format.manifest.cache import CacheRecord
from storage.format.manifest.entry import TeacherEntry
from storage.format.sealing import canonical_json
from storage.text import counted

# A tokenizer.json stores the options of its last call. They do not change which ids a text gets here.
_VOLATILE = ("padding", "truncation")
# AutoTokenizer can read a folder that has any of these.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
_BLOCK = 1 << 20  # entries of a token stream that are hashed at a time


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def vocabulary_sha256(vocabulary: Mapping[str, int]) -> str:
    """sha256 of the canonical JSON of [[id, string], ...], sorted by id and then by string."""
    return hashlib.sha256(canonical_json(sorted([index, string] for string, index in vocabulary.items()))).hexdigest()


def vocabulary_size(vocabulary: Mapping[str, int]) -> int:
    """V: the largest id + 1. Raises InputError for a vocabulary without entries."""
    if not vocabulary:
        raise InputError("the tokenizer has no tokens: expected a vocabulary with at least one entry")
    return max(vocabulary.values()) + 1


def differing_ids(a: Mapping[str, int], b: Mapping[str, int]) -> dict[int, str]:
    """The ids with different strings in two vocabularies, ascending, and how; `a` is the one here, `b` the model's.

    >>> differing_ids({"a": 0, "cat": 1}, {"a": 0, "dog": 1, "e": 2})
    {1: "id 1: 'cat' here, 'dog' in the model's", 2: "id 2: nothing here, 'e' in the model's"}
    """
    here, theirs = id_strings(a), id_strings(b)
    differing = sorted(index for index in here.keys() | theirs.keys() if here.get(index) != theirs.get(index))
    return {
        index: f"id {index}: {here.get(index, 'nothing')} here, {theirs.get(index, 'nothing')} in the model's"
        for index in differing
    }


def contradicting_ids(a: Mapping[str, int], b: Mapping[str, int], below: int) -> dict[int, str]:
    """Those of `differing_ids` below a number for which both vocabularies have a string."""
    both = set(a.values()) & set(b.values())
    return {index: line for index, line in differing_ids(a, b).items() if index in both and index < below}


def few(lines: Collection[str], most: int = 5) -> list[str]:
    """The first lines, and then the number of further ones, each of which is about an id."""
    more = len(lines) - most
    return [*list(lines)[:most], f"and {counted(more, 'more id')}"] if more > 0 else list(lines)


def tokenizer_fingerprint(files: Mapping[str, bytes], vocabulary: Mapping[str, int]) -> str:
    """sha256 of a tokenizer's behaviour: its tokenizer.json (or else all its files) and its vocabulary.

    Of tokenizer.json, the canonical JSON without `padding` and `truncation`. Raises InputError when that file is
    not a JSON object.
    """
    behaviour: object
    if "tokenizer.json" in files:
        try:
            behaviour = json.loads(files["tokenizer.json"])
        except ValueError as error:
            raise InputError(f"tokenizer.json is not valid JSON ({error}): save the tokenizer again") from None
        if not isinstance(behaviour, dict):
            raise InputError(f"tokenizer.json: expected a JSON object, found {type(behaviour).__name__}")
        behaviour = {key: value for key, value in behaviour.items() if key not in _VOLATILE}
    else:
        behaviour = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    whole = {"behaviour": behaviour, "vocabulary_sha256": vocabulary_sha256(vocabulary)}
    return hashlib.sha256(canonical_json(whole)).hexdigest()


def id_strings(vocabulary: Mapping[str, int]) -> dict[int, str]:
    """The quoted string of each id; two strings with the same id are both named."""
    strings: dict[int, str] = {}
    for string, index in sorted(vocabulary.items()):
        strings[index] = f"{strings[index]} and {string!r}" if index in strings else repr(string)
    return strings


def stream_sha256(tokens: NDArray[Any], document_starts: NDArray[Any], loss_mask: NDArray[Any] | None) -> str:
    """sha256 of `"tokens"` + ids as uint32 + `"documents"` + starts as uint64 [+ `"loss_mask"` + uint8 each].

    tokens [N] of any unsigned width, document_starts [D], loss_mask [N] bool or None. All numbers little-endian, so
    that the digest depends on neither the machine nor the width in which ids are stored. Arrays may be memory maps:
    they are read block by block.
    """
    parts = [(b"tokens", tokens, "<u4"), (b"documents", document_starts, "<u8")]
    if loss_mask is not None:
        parts.append((b"loss_mask", loss_mask, "?"))
    digest = hashlib.sha256()
    for name, values, dtype in parts:
        digest.update(name)
        for start in range(0, len(values), _BLOCK):
            digest.update(np.asarray(values[start : start + _BLOCK]).astype(dtype).tobytes())
    return digest.hexdigest()


def same_sources(entry: TeacherEntry, one: CacheRecord, other: CacheRecord) -> bool:
    """Whether two caches of a stream agree on where its documents are from, or the entry has targets of all of them."""
    named = [(record.corpus.document_sources, record.corpus.sources) for record in (one, other)]
    return entry.targets.sources is None or named[0] == named[1]


def other_tokens(entry: TeacherEntry, record: CacheRecord) -> dict[str, tuple[str, str]]:
    """The digests in which an entry and a cache differ, as each of them has it; none where the entry belongs there."""
    pairs = {
        "stream_sha256": (entry.stream_sha256, record.corpus.stream_sha256),
        "tokenizer_fingerprint": (entry.tokenizer_fingerprint, record.tokenizer.fingerprint),
    }
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}
