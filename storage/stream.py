"""The identity of a token stream.

Legend: `N` tokens, `D` documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 20


def stream_sha256(tokens: NDArray[Any], document_starts: NDArray[Any], loss_mask: NDArray[Any] | None) -> str:
    """sha256 of `"tokens"` + ids as uint32 + `"documents"` + starts as uint64 [+ `"loss_mask"` + uint8 each].

    tokens [N] of any unsigned width, document_starts [D], loss_mask [N] bool or None. All numbers little-endian, so
    that the digest depends on neither the machine nor the width in which ids are stored. Arrays may be memory maps:
    they are read block by block.
    """
    digest = hashlib.sha256(b"tokens")
    for block in _blocks(tokens):
        digest.update(block.astype("<u4").tobytes())
    digest.update(b"documents")
    for block in _blocks(document_starts):
        digest.update(block.astype("<u8").tobytes())
    if loss_mask is not None:
        digest.update(b"loss_mask")
        for block in _blocks(loss_mask):
            digest.update(block.astype(bool).astype("u1").tobytes())
    return digest.hexdigest()


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(values), _BLOCK):
        yield np.asarray(values[start : start + _BLOCK])
