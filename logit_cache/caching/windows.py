"""Which windows score which positions, and what a teacher reads of them: integer arithmetic, and nothing else.

Legend: `C` context tokens, `R` scored rows of a batch of windows. A *segment* is a document when documents are
isolated, else the whole stream; no window leaves its segment. The rule is in `storage.format` ("Windows"): position r
of a segment is scored by the window that starts at ``max(0, (r // stride + 1) * stride - context)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.format.manifest import Windowing

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


def batch_inputs(
    batch: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], windowing: Windowing, batch_windows: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What a teacher reads of some windows, and the rows of it that are scored.

    batch: of each window its tokens int64 [<= C], and the ascending offsets in it of the positions that are scored.
    Returns ids int64 [batch_windows, C], or [batch_windows, C + 1] where windows begin with an id of their own, padded;
    and int64 [R], ascending indices into its flattened positions.
    """
    begin, width = windowing.begin_id, windowing.input_tokens
    inputs = np.full((batch_windows, width), _FILL_TOKEN, dtype=np.int64)
    rows = []
    for number, (tokens, offsets) in enumerate(batch):
        lead = int(begin is not None and tokens[0] != begin)
        if lead and begin is not None:
            inputs[number, 0] = begin
        inputs[number, lead : lead + len(tokens)] = tokens
        rows.append(number * width + lead + offsets)
    return inputs, np.concatenate(rows)
