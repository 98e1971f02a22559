"""The text of single tokens by a cache's tokenizer, of which nothing is lost: bytes that are no text are shown as such.

`Tokenizer.decode` of one id is no such text: a piece of an emoji becomes U+FFFD, and the space before a word is dropped
where a text must not begin with one.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from storage.cache.reader import LogitCache
from storage.errors import FormatError

# Of a token that somebody else gave no more is shown: a page has it a thousand times.
_MOST_BYTES = 256
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WHITE: dict[str, Kind] = {" ": "space", "\n": "newline", "\t": "tab"}

Kind = Literal["text", "space", "newline", "tab", "mark"]


class Part(NamedTuple):
    """Characters of a token; a `mark` stands for what is no visible text: bytes, a code point, a special token."""

    kind: Kind
    text: str


class TokenTexts:
    """The texts of a cache's ids. Without a tokenizer.json they are the ids themselves: `⟨id 17⟩`.

    The first text raises FormatError for a tokenizer.json that is none.
    """

    def __init__(self, cache: LogitCache) -> None:
        self._cache = cache
        self.parts = functools.cache(self._parts)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        data = self._cache.tokenizer_files().get("tokenizer.json")
        if data is None:
            return None
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(data.decode())
        except Exception as error:
            # The library has no exception class for a file that is no tokenizer, which a foreign cache may hold.
            raise FormatError(f"{self._cache.url}: its tokenizer.json cannot be opened ({error})") from None
        self._added = tokenizer.get_added_tokens_decoder()
        file = json.loads(data)
        self._decoders = list(_flat(file.get("decoder")))
        self._byte_fallback = file["model"].get("byte_fallback", False)
        return tokenizer

    def joined(self, ids: Sequence[int]) -> str:
        """The text of neighbouring ids, by the tokenizer's own rules."""
        if self._tokenizer is None:
            return "".join(map(self.text, ids))
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def text(self, token: int) -> str:
        """The text of an id with its marks: ` the`, `⟨F0 9F⟩`, `<s>`."""
        return "".join(part.text for part in self.parts(token))

    def _parts(self, token: int) -> tuple[Part, ...]:
        name = None if self._tokenizer is None else self._tokenizer.id_to_token(token)
        if name is None:
            return (Part("mark", f"⟨id {token}⟩"),)
        added, byte = self._added.get(token), _BYTE.fullmatch(name) if self._byte_fallback else None
        if byte is not None:
            return tuple(_parts_of(bytes.fromhex(byte[1])))
        data = self._bytes(name) if added is None else name.encode()
        parts = list(_parts_of(data[:_MOST_BYTES]))
        if added is not None and added.special:
            parts = [Part("mark", "".join(part.text for part in parts))]
        if len(data) > _MOST_BYTES:
            parts.append(Part("mark", f"⟨{len(data) - _MOST_BYTES:,} bytes more⟩"))
        return tuple(parts) or (Part("mark", "⟨empty⟩"),)

    def _bytes(self, name: str) -> bytes:
        """The bytes that a token of the vocabulary stands for, where a rule of its decoder says so."""
        for decoder in self._decoders:
            kind = decoder["type"]
            if kind == "ByteLevel" and _byte_letters().keys() >= set(name):
                return bytes(map(_byte_letters().__getitem__, name))
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
def _byte_letters() -> dict[str, int]:
    """The byte of each letter of byte-level tokenizers: printable ones stand for themselves (GPT-2's encoder.py)."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - own)
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _parts_of(data: bytes) -> Iterator[Part]:
    """UTF-8 as visible text and white space; each run of bytes that is none as one mark."""
    while data:
        try:
            text, stop = data.decode(), len(data)
        except UnicodeDecodeError as error:
            text, stop = data[: error.start].decode(), error.end
            while data[stop : stop + 1] and data[stop] & 0xC0 == 0x80:  # behind what is no text, no letter begins so
                stop += 1
        yield from _letters(text)
        bad = data[len(text.encode()) : stop]
        if bad:
            yield Part("mark", f"⟨{bad.hex(' ').upper()}⟩")
        data = data[stop:]


def _letters(text: str) -> Iterator[Part]:
    for visible, run in itertools.groupby(text, lambda letter: letter.isprintable() and letter != " "):
        if visible:
            yield Part("text", "".join(run))
        else:
            yield from (Part(_WHITE[c], c) if c in _WHITE else Part("mark", f"⟨U+{ord(c):04X}⟩") for c in run)
