"""The text of single tokens by a cache's tokenizer, of which nothing is lost: bytes that are no text are marked."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from logit_cache.passage.token_bytes import TokenBytes
from storage.cache.reader import LogitCache

# Of a token that somebody else gave no more is shown: a page has it a thousand times.
_MOST_BYTES = 256
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
    def _bytes(self) -> TokenBytes | None:
        data = self._cache.tokenizer_files().get("tokenizer.json")
        return None if data is None else TokenBytes(data, self._cache.url)

    def joined(self, ids: Sequence[int]) -> str:
        """The text of neighbouring ids, by the tokenizer's own rules."""
        if self._bytes is None:
            return "".join(map(self.text, ids))
        text: str = self._bytes.backend.decode(list(ids), skip_special_tokens=False)
        return text

    def text(self, token: int) -> str:
        """The text of an id with its marks: ` the`, `⟨F0 9F⟩`, `<s>`."""
        return "".join(part.text for part in self.parts(token))

    def _parts(self, token: int) -> tuple[Part, ...]:
        data = None if self._bytes is None else self._bytes(token)
        if self._bytes is None or data is None:
            return (Part("mark", f"⟨id {token}⟩"),)
        parts = list(_parts_of(data[:_MOST_BYTES]))
        if self._bytes.is_special(token):
            parts = [Part("mark", "".join(part.text for part in parts))]
        if len(data) > _MOST_BYTES:
            parts.append(Part("mark", f"⟨{len(data) - _MOST_BYTES:,} bytes more⟩"))
        return tuple(parts) or (Part("mark", "⟨empty⟩"),)


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
