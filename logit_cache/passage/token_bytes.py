"""The bytes that each id of a tokenizer stands for, by the rules of the decoder in its tokenizer.json.

`Tokenizer.decode` of one id gives no such bytes: a piece of an emoji becomes U+FFFD, and the space before a word is
dropped where a text must not begin with one.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

from storage.errors import FormatError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The ids of a tokenizer.json as bytes. `where` is for errors.

    Raises FormatError for a tokenizer.json that is none.
    """

    def __init__(self, data: bytes, where: str) -> None:
        from tokenizers import Tokenizer

        try:
            self.backend: Any = Tokenizer.from_str(data.decode())
        except Exception as error:
            # The library has no exception class for a file that is no tokenizer, which a foreign cache may hold.
            raise FormatError(f"{where}: its tokenizer.json cannot be opened ({error})") from None
        self.file: dict[str, Any] = json.loads(data)
        self._decoders = list(_flat(self.file.get("decoder")))
        fallback = bool(self.file["model"].get("byte_fallback", False))
        added = self.backend.get_added_tokens_decoder()
        # Trainers add the tokens of single bytes as special ones.
        self._added = {id: token for id, token in added.items() if not (fallback and _BYTE.fullmatch(token.content))}
        self._byte_fallback = fallback

    def is_added(self, token: int) -> bool:
        """Whether an id is one of the tokens that are found in a text before all others."""
        return token in self._added

    def is_special(self, token: int) -> bool:
        return token in self._added and bool(self._added[token].special)

    def __call__(self, token: int) -> bytes | None:
        """The bytes of an id, of an added token those of its own string; None where the id is no token."""
        name = self.backend.id_to_token(token)
        if name is None or self.is_added(token):
            return None if name is None else name.encode()
        byte = _BYTE.fullmatch(name) if self._byte_fallback else None
        return self._decoded(name) if byte is None else bytes.fromhex(byte[1])

    def _decoded(self, name: str) -> bytes:
        """The bytes that a token of the vocabulary stands for, where a rule of its decoder says so."""
        for decoder in self._decoders:
            kind = decoder["type"]
            if kind == "ByteLevel" and byte_letters().keys() >= set(name):
                return bytes(map(byte_letters().__getitem__, name))
            if kind == "Metaspace":
                name = name.replace(decoder["replacement"], " ")
            if kind == "Replace" and "String" in decoder["pattern"]:
                name = name.replace(decoder["pattern"]["String"], decoder["content"])
        return name.encode()


def _flat(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A decoder, or those of a sequence, in their order."""
    if decoder is not None:
        yield decoder
        for inner in decoder.get("decoders", ()):
            yield from _flat(inner)


@functools.cache
def byte_letters() -> dict[str, int]:
    """The byte of each letter of byte-level tokenizers: printable ones stand for themselves (GPT-2's encoder.py)."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - own)
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}
