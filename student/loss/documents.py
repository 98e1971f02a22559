"""Documents that share a row, one behind the other: what tells a model so, whether it minds, and what to do if not.

Legend: `B` rows, `T` tokens of a row. Positions int64 [B, T] begin at 0 with each document.

Without an attention mask and without a cache, transformers makes a mask of positions that restart, for families that
hand their positions to it. Others attend across documents, without a word: so a model is tested. Where it fails, each
document is read in a row of its own, padded on the right, where padding changes nothing for a causal model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from student.loss.output_layer import in_mode, tolerance_of
from student.models.logit_agreement import agree, difference

PACKED = "packed"
"""How documents that share rows are read by a model that keeps them apart."""

_log = logging.getLogger(__name__)

# Documents of about equal length that are read together are padded to a multiple of this.
_UNIT = 32


def model_inputs(ids: Tensor, positions: Tensor | None) -> dict[str, Any]:
    """A transformers model's arguments for ids [B, T]; positions: of rows with several documents."""
    at = {} if positions is None else {"position_ids": positions}
    return {"input_ids": ids, "use_cache": False, **at}


def mixes_documents(
    model: Any, ids: int, length: int, tolerance: float, device: torch.device, longest: int | None = None
) -> str | None:
    """Why documents can not share rows of `length` tokens in a model, in its present mode; None where they can.

    model: or its forward, for ids below `ids`. tolerance: relative to the largest logit. longest: the tokens that the
    model reads at most, None for no limit. In two rows of random ids, cut in different places, each document must have
    the logits that it has alone.
    """
    rows = torch.randint(ids, (2, length), generator=torch.Generator().manual_seed(1)).to(device)
    size = min(max(1, length // 3), longest or length)
    cuts = [range(0, length, size), (0, *range(min(7, size), length, size))]
    begins = torch.zeros(2, length, dtype=torch.long)
    for row, cut in enumerate(cuts):
        begins[row, list(cut)] = torch.tensor(list(cut))
    positions = (torch.arange(length) - begins.cummax(1).values).to(device)
    try:
        with torch.no_grad():
            together = model(**model_inputs(rows, positions)).logits.float()
            for row, cut in enumerate(cuts):
                for start, stop in itertools.pairwise((*cut, length)):
                    alone = model(**model_inputs(rows[row : row + 1, start:stop], None)).logits.float()
                    own = together[row : row + 1, start:stop]
                    if not agree(own, alone, tolerance):
                        return f"with others in its row, logits of a document differ by {difference(own, alone)}"
    except Exception as error:  # models that take no positions, each in a way of its own
        return f"it fails with positions that restart ({type(error).__name__}: {error!s:.200})"
    return None


class DocumentReader:
    """Reads documents that share rows as if each were alone: as they lie, or one by one where the model mixes them.

    Which of the two is tried out with the first batch, on its device and in its precision. `how`: PACKED, or why not;
    None before the first batch.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any] | None = None) -> None:
        self._model, self._forward = model, forward or model
        self.how: str | None = None

    def __call__(
        self, read: Callable[[Tensor, Tensor | None], Tensor], ids: Tensor, positions: Tensor | None
    ) -> Tensor:
        """What `read` makes of ids int64 [B, T] and their positions, or of ids alone: [B, T, ...]."""
        if positions is not None and self.how is None:
            self.how = self._tried_out(ids)
        if positions is None or self.how == PACKED:
            return read(ids, positions)
        found: Tensor = _one_by_one(lambda some: read(some, None), ids, positions)
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _tried_out(self, ids: Tensor) -> str:
        model, device = self._model, ids.device
        dtype = next(model.parameters()).dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        embedded = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        with in_mode(model, training=False):
            problem = mixes_documents(self._forward, embedded, ids.shape[1], 4 * tolerance_of(dtype), device)
        if problem is not None:
            name = type(model).__name__
            _log.warning("%s: documents are read in rows of their own, not packed: %s", name, problem)
        return problem or PACKED


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(read: Callable[[Tensor], Tensor], ids: Tensor, positions: Tensor) -> Tensor:
    """What `read` makes of each document by itself, [B, T, ...]; it takes ids [b, t] and returns [b, t, ...].

    Documents of about equal length are read together, in rows padded on the right: B * T tokens at a time, or one.
    """
    begins = (positions == 0).flatten().nonzero()[:, 0].tolist()
    spans = sorted(itertools.pairwise((*begins, ids.numel())), key=lambda span: (span[0] - span[1], span[0]))
    found: list[Tensor] = []
    order: list[Tensor] = []
    flat = ids.flatten()
    for some, length in _batches(spans, ids.numel(), ids.shape[1]):
        at = torch.arange(length)
        start, stop = (torch.tensor(ends)[:, None] for ends in zip(*some, strict=True))
        inside = (start + at < stop).to(ids.device)
        taken = (start + at).clamp(max=ids.numel() - 1).to(ids.device)
        found.append(read(flat[taken])[inside])
        order.append(taken[inside])
    joined, places = torch.cat(found), torch.cat(order)
    return joined.index_select(0, places.argsort()).reshape(*ids.shape, *joined.shape[1:])


def _batches(spans: list[tuple[int, int]], tokens: int, longest: int) -> Iterator[tuple[list[tuple[int, int]], int]]:
    """Spans, the longest first, in batches of rows of a length that together have at most so many tokens."""
    while spans:
        length = min(-(-(spans[0][1] - spans[0][0]) // _UNIT) * _UNIT, longest)
        count = max(1, tokens // length)
        yield spans[:count], length
        spans = spans[count:]
