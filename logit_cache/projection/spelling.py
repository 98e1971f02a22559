"""A tokenizer as bytes: what each of its ids spells, and which of its ids some bytes begin with.

Legend: `V` ids.

Special ids that begin and end documents spell nothing: they are known by their role, not by their string, which is
another one in another tokenizer. All other added tokens spell their own string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.passage.token_bytes import TokenBytes, byte_letters
from storage.errors import FormatError, InputError
from student.models.tokenizer import special_ids

FILE = "tokenizer.json"
_SPELLED = ("BPE", "Unigram")


class Spelling:
    """The ids of a cache's tokenizer.

    flat     uint8, the bytes of all ids, one after the other
    offsets  int64 [V], where those of an id begin; lengths int64 [V], how many there are; 0 for bos, eos, and no token
    bos, eos the ids of these roles, None where the tokenizer has none
    blanks   int64 [V], how many spaces each begins with
    beginning  the spaces before "a" and before " a", by which tokenizers begin a text alike or not

    Raises InputError for a tokenizer whose ids spell no bytes.
    """

    def __init__(self, files: Mapping[str, bytes], size: int, where: str) -> None:
        if FILE not in files:
            raise InputError(f"{where}: its tokenizer has no {FILE}, which says what its ids spell: take one that has")
        self._bytes = TokenBytes(files[FILE], where)
        kind = self._bytes.file["model"].get("type", "BPE")
        if kind not in _SPELLED:
            raise InputError(
                f"{where}: its tokenizer is {kind}, whose ids do not spell the bytes of a text (spaces are lost, or "
                f"words unknown): only byte-level BPE and SentencePiece with byte fallback can be aligned"
            )
        largest = max(self._bytes.backend.get_vocab().values(), default=0)
        if size > 2 * (largest + 1):
            raise FormatError(
                f"{where}: its record says {size:,} ids, and the largest that its tokenizer has is {largest:,}"
            )
        self.file = files[FILE]
        self.size = size
        found = special_ids(files, where)
        self.bos, self.eos = (id if id is not None and id < size else None for id in (found["bos"], found["eos"]))
        roles = (self.bos, self.eos)
        spelled = [b"" if token in roles else self._bytes(token) or b"" for token in range(size)]
        self.lengths = np.array([len(each) for each in spelled], dtype=np.int64)
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.blanks = np.array([_blanks(each) for each in spelled], dtype=np.int64)
        self.flat = np.frombuffer(b"".join(spelled), dtype=np.uint8)

    def __getitem__(self, token: int) -> bytes:
        start = int(self.offsets[token])
        return self.flat[start : start + int(self.lengths[token])].tobytes()

    def string(self, token: int) -> str:
        """An id with its bytes, for errors."""
        return f"id {token} ({self[token].decode(errors='backslashreplace')!r})"

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        found = (self._bytes.backend.encode(text, add_special_tokens=False).ids for text in ("a", " a"))
        return tuple(_blanks(b"".join(self[token] for token in ids)) for ids in found)

    @cached_property
    def added(self) -> dict[bytes, int]:
        """The added tokens but bos and eos, by their strings."""
        ids = (token for token in range(self.size) if self._bytes.is_added(token) and self.lengths[token])
        return {self[token]: token for token in ids}

    @cached_property
    def is_special(self) -> NDArray[np.bool_]:
        """bool [V]: the ids that stand for no text, as bos, eos, and the markers of turns."""
        roles = (self.bos, self.eos)
        return np.array([token in roles or self._bytes.is_special(token) for token in range(self.size)])

    def first(self, texts: Sequence[bytes]) -> NDArray[np.int64]:
        """The first id of each text that is read on from a boundary, with nothing put before it; -1 where it has none.

        Of bytes that are no whole text, that of the text before them; of such bytes alone, that of these bytes.
        """
        heads = [_valid(each).decode() for each in texts]
        found = [encoding.ids for encoding in self._reading_on.encode_batch(heads, add_special_tokens=False)]
        firsts = [
            ids[0] if ids else self._first_of_bytes(each) if each else -1
            for each, ids in zip(texts, found, strict=True)
        ]
        return np.array(firsts, dtype=np.int64)

    def _first_of_bytes(self, data: bytes) -> int:
        backend = self._bytes.backend
        byte = backend.token_to_id(f"<0x{data[0]:02X}>")
        if byte is not None:
            return int(byte)
        tokens = backend.model.tokenize("".join(_letters()[each] for each in data))
        return int(tokens[0].id) if tokens else -1

    @cached_property
    def _reading_on(self) -> Any:
        """The tokenizer without what it does at the beginning of a text."""
        import json

        from tokenizers import Tokenizer

        file = dict(self._bytes.file)
        file |= {"truncation": None, "padding": None, "post_processor": None}
        file["normalizer"] = _without_beginning(file.get("normalizer"))
        file["pre_tokenizer"] = _without_beginning(file.get("pre_tokenizer"))
        return Tokenizer.from_str(json.dumps(file))


def _letters() -> dict[int, str]:
    return {byte: letter for letter, byte in byte_letters().items()}


def _blanks(data: bytes) -> int:
    return len(data) - len(data.lstrip(b" "))


def _valid(data: bytes) -> bytes:
    """The longest beginning of some bytes that is UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start]
    return data


def is_text(data: bytes) -> bool:
    """Whether some bytes are whole UTF-8."""
    return len(_valid(data)) == len(data)


def _without_beginning(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer of a tokenizer.json that puts nothing before a text, and takes nothing away."""
    if rule is None or rule["type"] in ("Prepend", "Strip"):
        return None
    changed = dict(rule)
    for name in ("normalizers", "pretokenizers"):
        if name in rule:
            changed[name] = [each for each in map(_without_beginning, rule[name]) if each is not None]
    if "add_prefix_space" in rule:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in rule:
        changed["prepend_scheme"] = "never"
    return changed
