"""The Teacher protocol: anything that turns windows of tokens into logits, a single model or an ensemble.

Legend: `B` windows, `C` tokens per window (context), `R` scored rows, `r` rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from storage.format.manifest.teacher import Teacher as TeacherRecord
from teachers.ranks import ColumnShard


class Teacher(Protocol):
    """A model that scores windows.

    identity      recorded in the cache, and compared when a job resumes
    head_columns  width of the logits; columns from the vocabulary's size on are padding
    device        where windows are expected; logits appear there too, unless layers are on several devices
    shard         the columns that this rank's logits cover, of a model that is sharded over ranks; else None. All ranks
                  score the same windows, in the same order
    head          "fast" (backbone, then the LM head on the requested rows in float32) or "general" (the model's own
                  forward); it can change the last bits of a result
    attention     the attention implementation that runs, such as "sdpa" or "eager"
    order         int64 [V], the ids in the order of the logits' columns; None where these are by id
    """

    @property
    def identity(self) -> TeacherRecord: ...

    @property
    def head_columns(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def shard(self) -> ColumnShard | None: ...

    @property
    def head(self) -> Literal["fast", "general"]: ...

    @property
    def attention(self) -> str: ...

    @property
    def order(self) -> Tensor | None: ...

    def packs(self, length: int) -> bool:
        """Whether documents may share a row of so many tokens, kept apart by their positions: tested on the model."""
        ...

    def score(self, windows: Tensor, rows: Tensor, positions: Tensor | None = None) -> Iterator[Tensor]:
        """The logits of the rows `rows` of the flattened windows, in chunks.

        windows: int64 [B, C], token ids. rows: int64 [R], ascending indices into the B * C positions. positions: int64
        [B, C], which restart where a document of its own begins; None where each window is one. Only where it `packs`.
        Yields float32 [r, head_columns], or of this rank's columns only, in the order of `rows`; every chunk stays
        within the teacher's byte budget, and the sizes follow from the arguments alone, so that a repeated call repeats
        every matrix product with the same shapes.
        """

    def output_embeddings(self) -> Tensor:
        """The output embedding of each column, float32 [head_columns, H], on the CPU; H is any number.

        The logits are their inner products with a hidden state, but for a bias and layers after that. They are by id,
        whatever order the logits come in, and the same on every rank. Not to be changed: they may be the model's.
        Raises InputError for a teacher whose output layer is not linear.
        """

    def in_order(self, order: Tensor) -> Teacher:
        """This teacher with the logits of id order[c] in column c, whatever order they come in now.

        order: int64 [V], a permutation; columns from V on stay where they are. The two share the model; a head in
        memory is copied.
        """
