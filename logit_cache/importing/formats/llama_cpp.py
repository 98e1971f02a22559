"""The base file of llama.cpp's `perplexity --kl-divergence-base`: whole distributions of the second half of each chunk.

Legend: `n` tokens of a chunk, `V` vocabulary size, `R = n - 1 - n // 2` rows of a chunk. Little-endian::

    "_logits_", int32 n, int32 V, int32 chunks, int32 tokens [chunks, n]
    for each chunk, R rows of 2 * ((V + 1) // 2) + 4 uint16: float32 scale, float32 least, V codes
    log-prob = scale * code + least; code 0 is everything more than 16 nats below the row's best

Row r of a chunk stands at its token n // 2 + r. Chunks were read by themselves; where the vocabulary asks for BOS, it
took the place of a chunk's first token, which the file has as it was in the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from logit_cache.importing.document import NO_ID, Document, Format, Rows, Source
from logit_cache.importing.files import starts_with, wrong
from storage.errors import InputError

_MAGIC = b"_logits_"
_HEADER_BYTES = len(_MAGIC) + 12
_TILE_ROWS = 64


@dataclass(frozen=True)
class _File:
    path: Path
    chunk_tokens: int
    vocabulary_size: int
    chunks: int

    @classmethod
    def of(cls, path: Path) -> _File:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
            wrong(str(path), "a base file of llama.cpp, which begins with _logits_", header[:8])
        found = cls(path, *np.frombuffer(header[len(_MAGIC) :], dtype="<i4").tolist())
        if found.chunk_tokens < 3 or found.vocabulary_size < 1 or found.chunks < 1:
            wrong(str(path), "a header of positive sizes", found)
        size = path.stat().st_size
        if size != found.bytes:
            raise InputError(f"{path}: {size:,} bytes, and its header makes {found.bytes:,}: it was cut off")
        return found

    @property
    def rows(self) -> int:
        """Of a chunk."""
        return self.chunk_tokens - 1 - self.chunk_tokens // 2

    @property
    def width(self) -> int:
        """uint16 of a row."""
        return 2 * ((self.vocabulary_size + 1) // 2) + 4

    @property
    def first_row(self) -> int:
        return _HEADER_BYTES + 4 * self.chunks * self.chunk_tokens

    @property
    def bytes(self) -> int:
        return self.first_row + 2 * self.chunks * self.rows * self.width

    def parts(self, chunk: int) -> Iterator[Rows]:
        """The rows of a chunk, a tile in memory at a time."""
        shape, offset = (self.rows, self.width), self.first_row + 2 * chunk * self.rows * self.width
        stored = np.memmap(self.path, dtype="<u2", mode="r", offset=offset, shape=shape)
        for start in range(0, self.rows, _TILE_ROWS):
            tile = np.array(stored[start : start + _TILE_ROWS])
            scale, least = tile[:, :4].copy().view("<f4").T
            codes = tile[:, 4 : 4 + self.vocabulary_size].astype(np.float32)
            dense = codes * scale[:, None] + least[:, None]
            if not np.isfinite(dense).all():
                wrong(f"{self.path} chunk {chunk}", "finite scales and log-probs", "others: the file is damaged")
            none = np.full((len(dense), 0), NO_ID, dtype=np.int64)
            yield Rows(self.chunk_tokens // 2 + start, none, none.astype(np.float64), dense=dense)


def _documents(source: Source) -> Iterator[Document]:
    for number, path in enumerate(source.files):
        file = _File.of(path)
        shape = (file.chunks, file.chunk_tokens)
        tokens = np.memmap(path, dtype="<i4", mode="r", offset=_HEADER_BYTES, shape=shape)
        for chunk in range(file.chunks):
            where = f"{path} chunk {chunk}"
            ids = np.array(tokens[chunk])
            if ids.min() < 0:
                wrong(where, "token ids", int(ids.min()))
            source.note("chunks, whose first token llama.cpp replaced by BOS where the vocabulary asks for it")
            yield Document(number, where, ids.astype(np.uint32), partial(file.parts, chunk))


FORMAT = Format(
    name="llama-cpp",
    about="llama.cpp's base file of perplexity --kl-divergence-base",
    suffixes=(".bin", ".dat", ".kld"),
    recognises=lambda path: starts_with(path, _MAGIC),
    documents=_documents,
    values=("dense",),
    reading="after",
    error_nats=1.3e-4,
)
