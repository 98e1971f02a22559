"""Which windows score which positions, and what a teacher reads of them: integer arithmetic, and nothing else.

Legend: `C` context tokens, `R` scored rows of a batch of windows. A *segment* is a document when documents are
isolated, else the whole stream; no window leaves its segment. The rule is in `storage.format` ("Windows"): position r
of a segment is scored by the window that starts at ``max(0, (r // stride + 1) * stride - context)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from storage.format.manifest.entry import Windowing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Pads windows to their shape; a causal model never attends to it from a scored position.
_FILL_TOKEN = 0


@dataclass(frozen=True)
class Window:
    """The tokens `start .. stop` are read, the positions `first .. last` scored; `end` is the segment's end."""

    start: int
    stop: int
    first: int
    last: int
    end: int

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where in the window its scored positions are."""
        return np.arange(self.first, self.last) - self.start


def segments(
    start: int, stop: int, positions: int, document_starts: NDArray[np.uint64] | None
) -> Iterator[tuple[int, int]]:
    """The segments that overlap `start .. stop`; `document_starts` only when documents are isolated."""
    if document_starts is None:
        yield 0, positions
        return
    index = int(np.searchsorted(document_starts, start, side="right")) - 1
    while index < len(document_starts) and int(document_starts[index]) < stop:
        after = int(document_starts[index + 1]) if index + 1 < len(document_starts) else positions
        yield int(document_starts[index]), after
        index += 1


def windows(
    start: int, stop: int, positions: int, windowing: Windowing, document_starts: NDArray[np.uint64] | None
) -> Iterator[Window]:
    """The windows that together score each position of `start .. stop` once, in order.

    A window that also scores positions outside the range appears with its share of them only, so the context that a
    position is scored in does not depend on how the stream is cut into shards.
    """
    context, stride = windowing.context_tokens, windowing.stride_tokens
    for begin, end in segments(start, stop, positions, document_starts if windowing.isolate_documents else None):
        first = max(start, begin)
        last = min(stop, end)
        while first < last:
            block = (first - begin) // stride
            offset = max(0, (block + 1) * stride - context)
            # The first window scores every block that fits into it; each later one scores its last block.
            blocks_end = (context // stride) * stride if offset == 0 else (block + 1) * stride
            scored = min(last, begin + max(blocks_end, (block + 1) * stride))
            window = begin + offset
            yield Window(window, min(window + context, end), first, scored, end)
            first = scored


Read = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Of a window: its tokens int64 [<= C], and the ascending offsets in it of the positions that are scored."""


@dataclass(frozen=True)
class Inputs:
    """What a teacher reads of some windows.

    ids        int64 [B, L], padded
    scored     int64 [R], ascending indices into the flattened ids
    positions  int64 [B, L], which restart at each of several windows in a row; None where rows hold one
    """

    ids: NDArray[np.int64]
    scored: NDArray[np.int64]
    positions: NDArray[np.int64] | None = None

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arguments of a teacher's `score`, on its device."""
        import torch

        ids, scored = (torch.from_numpy(array).to(device) for array in (self.ids, self.scored))
        return ids, scored, None if self.positions is None else torch.from_numpy(self.positions).to(device)


def batch_inputs(batch: Sequence[Read], windowing: Windowing, batch_windows: int) -> Inputs:
    """The inputs of rows of one window each, [batch_windows, C], or [batch_windows, C + 1] where windows begin with an
    id of their own."""
    return row_inputs([[read] for read in batch], windowing.begin_id, windowing.input_tokens, batch_windows)


def row_inputs(
    rows: Sequence[Sequence[Read]], begin: int | None, length: int, count: int, packed: bool = False
) -> Inputs:
    """The inputs of `count` rows of `length` tokens, some with several windows each, one behind the other.

    begin: the id that is put before windows that do not begin with it. packed: whether positions are needed; those of
    the padding are 0, as the model may have embeddings for no more than the longest window.
    """
    ids = np.full((count, length), _FILL_TOKEN, dtype=np.int64)
    positions = np.zeros_like(ids)
    scored = []
    for number, reads in enumerate(rows):
        at = 0
        for tokens, offsets in reads:
            lead = int(begin is not None and tokens[0] != begin)
            stop = at + lead + len(tokens)
            if lead and begin is not None:
                ids[number, at] = begin
            ids[number, at + lead : stop] = tokens
            positions[number, at:stop] = np.arange(stop - at)
            scored.append(number * length + at + lead + offsets)
            at = stop
    return Inputs(ids, np.concatenate(scored), positions if packed else None)
