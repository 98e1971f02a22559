"""Documents that share a row, one behind the other: what tells a model so, whether it minds, and what to do if not.

Legend: `B` rows, `T` tokens of a row. Positions int64 [B, T] begin at 0 with each document.

Without an attention mask and without a cache, transformers makes a mask of positions that restart, for families that
hand their positions to it. Others attend across documents, without a word: so a model is tested. Where it fails, each
document is read in a row of its own, padded on the right, where padding changes nothing for a causal model. And where
rows are long and documents short, they are read in shorter rows: attention with a mask costs the square of a row.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from storage.errors import InputError
from student.data.packing import SHORTEST_ROWS, Rows, alone, doubled
from student.loss.output_layer import in_mode, tolerance_of
from student.models.logit_agreement import agree, difference

PACKED = "packed"
"""How documents that share rows are read by a model that keeps them apart."""

_log = logging.getLogger(__name__)

_TRIED_TOKENS = 512
# Where a configuration does not say.
_HIDDEN_SIZE = 1024


_Span = tuple[int, int]  # of flattened ids


@dataclass(frozen=True)
class _Batch:
    """Rows of documents that are read together, padded to `length` tokens."""

    length: int
    rows: list[list[_Span]]


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
    the logits that it has alone. Of long rows the first tokens are tried: all their logits are held.
    """
    length = min(length, _TRIED_TOKENS)
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
    except torch.OutOfMemoryError:
        raise
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
        self._is_sharded = False

    def __call__(
        self, read: Callable[[Tensor, Tensor | None], Tensor], ids: Tensor, positions: Tensor | None
    ) -> Tensor:
        """What `read` makes of ids int64 [B, T] and their positions, or of ids alone: [B, T, ...]."""
        if positions is None:
            return read(ids, None)
        if self.how is None:
            self.how, self._is_sharded = self._tried_out(ids), _is_sharded(self._model)
        # A compiled model has one shape; other rows would run without it.
        as_they_lie = self.how == PACKED and torch.compiler.is_compiling()
        batches = None if as_they_lie else self._batches(ids, positions)
        if batches is None:
            return read(ids, positions)
        found: Tensor = _read_in(read, ids, batches)
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _batches(self, ids: Tensor, positions: Tensor) -> list[_Batch] | None:
        """The rows in which documents are read; None for those in which they lie."""
        model: Any = self._model
        if self._is_sharded:
            # How often a process reads would depend on its documents, and each read gathers weights from all processes.
            if self.how != PACKED:
                raise InputError(
                    f"{type(model).__name__}: documents cannot share its windows ({self.how}), and reading them one by "
                    "one does not go with sharded weights: give --pad-documents (pack_documents=False)"
                )
            return None
        if self.how == PACKED and ids.shape[1] <= SHORTEST_ROWS[0]:
            return None  # there are no shorter rows
        begins = (positions == 0).flatten().nonzero()[:, 0].tolist()
        spans = sorted(itertools.pairwise((*begins, ids.numel())), key=lambda span: (span[0] - span[1], span[0]))
        if self.how != PACKED:
            sizes = [stop - start for start, stop in spans]
            found = alone(sizes, ids.shape[1], ids.numel())
            return [_Batch(length, [[span] for span in spans[some]]) for length, some in found]
        # A checkpointed layer that runs twice in a step is ready twice, which DDP refuses.
        if torch.distributed.is_initialized() and getattr(model, "is_gradient_checkpointing", False):
            return None
        hidden = getattr(model.config, "hidden_size", None) or _HIDDEN_SIZE
        return _in_shorter_rows(spans, len(ids), ids.shape[1], hidden)

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
def _read_in(read: Callable[[Tensor, Tensor | None], Tensor], ids: Tensor, batches: Sequence[_Batch]) -> Tensor:
    """What `read` makes of ids [B, T] in other rows, [B, T, ...]."""
    flat = ids.flatten()
    found: list[Tensor] = []
    order: list[Tensor] = []
    for batch in batches:
        at = torch.zeros(len(batch.rows), batch.length, dtype=torch.long)
        positions, inside = torch.zeros_like(at), torch.zeros_like(at, dtype=torch.bool)
        for row, spans in enumerate(batch.rows):
            taken = torch.cat([torch.arange(start, stop) for start, stop in spans])
            at[row, : len(taken)], inside[row, : len(taken)] = taken, True
            positions[row, : len(taken)] = torch.cat([torch.arange(stop - start) for start, stop in spans])
        at, inside = at.to(ids.device), inside.to(ids.device)
        shared = any(len(spans) > 1 for spans in batch.rows)
        found.append(read(flat[at], positions.to(ids.device) if shared else None)[inside])
        order.append(at[inside])
    joined, places = torch.cat(found), torch.cat(order)
    return joined.index_select(0, places.argsort()).reshape(*ids.shape, *joined.shape[1:])


def _in_shorter_rows(spans: list[_Span], rows: int, length: int, hidden: int) -> list[_Batch] | None:
    """Spans, the longest first, in rows shorter than `length`; None where that is not much cheaper than as they lie.

    A token costs ``1 + L / 2H`` in a row of L tokens: attention grows with the row, all else with the hidden size H.
    """
    best, cheapest = None, 0.9 * rows * length * (1 + length / (2 * hidden))
    for shortest in SHORTEST_ROWS:
        packed = Rows.of([stop - start for start, stop in spans], doubled(shortest, length))
        cost = sum(each * (1 + each / (2 * hidden)) for each in packed.lengths)
        if cost < cheapest:
            best, cheapest = packed, cost
    if best is None:
        return None
    by_length: dict[int, list[list[_Span]]] = {}
    for items, own in zip(best.items, best.lengths, strict=True):
        by_length.setdefault(own, []).append([spans[item] for item in items])
    return [_Batch(own, by_length[own]) for own in sorted(by_length)]


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed's ZeRO-3 holds a part of each weight in each process."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())
