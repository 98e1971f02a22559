"""Token stream on disk while it is made: bounded memory, whatever the corpus.

Legend: `N` tokens, `D` documents, `n` tokens of a piece.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.corpus.documents import Ids
from logit_cache.corpus.pieces import Piece
from storage.errors import StorageFull, is_out_of_space
from storage.format.manifest.cache import MAX_SOURCES


class Spool:
    """The token stream under construction: raw files that grow, and the counts.

    The loss mask of a document is that of its tokens moved one to the left: position p is trained on if token p + 1
    is, and the last position never is. So for each document it is written from its second token on, and closed
    with a zero.

    prefix: the ids with which the tokenizer begins a text, put before documents of text that do not begin with them.
    append: the ids put after every document.
    """

    def __init__(self, folder: Path, token_dtype: str, prefix: Sequence[int] = (), append: Sequence[int] = ()) -> None:
        self.positions = 0
        self.documents = 0
        self.trained = 0  # positions whose next token is trained on
        self.source_documents: Counter[int] = Counter()
        self.source_bytes: Counter[int] = Counter()
        self._folder = folder
        self._dtypes = {
            "tokens": token_dtype, "document_starts": "uint64", "document_sources": "uint16", "loss_mask": "bool"
        }  # fmt: skip
        self._prefix, self._append = (np.array(ids, dtype=np.uint32) for ids in (prefix, append))
        self.has_mask = False
        self._document_tokens = 0
        self._document_bytes = 0
        self._files: dict[str, IO[bytes]] = {}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Spool:
        self._files = {name: self._open.enter_context((self._folder / name).open("wb")) for name in self._dtypes}
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._open.close()
        except OSError as error:
            raise self._explained(error) from error

    def add(self, piece: Piece, ids: Ids, trained: NDArray[np.bool_] | None) -> None:
        """Append a piece: ids uint32 [n]; trained bool [n], None for all. A document without tokens is left out."""
        self._document_bytes += len(piece.own.encode())
        self.has_mask |= trained is not None
        prefix = self._prefix
        if piece.begins and len(ids) and not self._document_tokens and ids[: len(prefix)].tolist() != prefix.tolist():
            self._append_tokens(prefix, np.full(len(prefix), trained is None))
        self._append_tokens(ids, np.ones(len(ids), dtype=bool) if trained is None else trained)
        if not piece.closes:
            return
        if self._document_tokens:
            self._append_tokens(self._append, np.full(len(self._append), piece.appended_trained))
            self._write("loss_mask", np.zeros(1, dtype=bool))
            self._write("document_sources", np.array([min(piece.source, MAX_SOURCES - 1)]))
            self.documents += 1
            self.source_documents[piece.source] += 1
            self.source_bytes[piece.source] += self._document_bytes
        self._document_tokens = self._document_bytes = 0

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Memory maps: tokens [N]; document_starts uint64 [D]; document_sources uint16 [D], the number of a document's
        source; loss_mask bool [N], where not all is trained on."""
        return {
            name: np.memmap(self._folder / name, dtype=dtype, mode="r")
            for name, dtype in self._dtypes.items()
            if name != "loss_mask" or self.has_mask
        }

    def _append_tokens(self, ids: Ids, trained: NDArray[np.bool_]) -> None:
        if not len(ids):
            return
        if not self._document_tokens:
            self._write("document_starts", np.array([self.positions]))
        self._write("tokens", ids)
        shifted = trained if self._document_tokens else trained[1:]
        self._write("loss_mask", shifted)
        self.trained += int(np.count_nonzero(shifted))
        self._document_tokens += len(ids)
        self.positions += len(ids)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        try:
            self._files[name].write(values.astype(self._dtypes[name]).tobytes())
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        if not is_out_of_space(error):
            return error
        return StorageFull(
            f"no space left for the token stream in the temporary folder {self._folder.parent}: free some room, or "
            f"set TMPDIR to a folder with 5 bytes per token"
        )
