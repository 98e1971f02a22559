"""Rollouts: rows of ids that name the model which sampled them. A stream is one model's, or nobody's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from logit_cache.corpus.pieces import Piece
from storage.errors import InputError
from storage.format.manifest.cache import Rollouts


def read_rollout(value: Any, where: str) -> Rollouts | None:
    """The field `rollout` of a row, of which absent fields may be nulls. Raises InputError for what is none."""
    if value is None:
        return None
    fields = {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value
    try:
        return Rollouts.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{where}: 'rollout' does not say which model sampled the row, and how ({name}: {first['msg']}); take it "
            f"from examples/sample_rollouts.py"
        ) from None


class StreamRollouts:
    """Whose rollouts the documents of a stream are; `made_by` is None where they are nobody's."""

    def __init__(self) -> None:
        self.made_by: Rollouts | None = None
        self._begun = False

    def add(self, piece: Piece, sources: Sequence[str]) -> None:
        """The next piece; sources: their names, by number. Raises InputError where it is not of the model of those
        before it."""
        made_by = None if piece.tokens is None else piece.tokens.rollout
        if not self._begun:
            self.made_by, self._begun = made_by, True
        elif made_by != self.made_by:
            where = sources[piece.source] if piece.tokens is None else piece.tokens.where
            raise InputError(
                f"{where}: a stream holds the rollouts of one model, sampled in one way, and nothing else: expected "
                f"{_in_words(self.made_by)}, found {_in_words(made_by)}; make a cache of each"
            )

    def refuse(self, out: str) -> None:
        """Raise InputError for rollouts, where the record at `out` cannot say that they are some."""
        if self.made_by is not None:
            raise InputError(
                f"{out} holds a stream of version 1, which does not say whose rollouts it is: give another --out"
            )

    def notes(self) -> Iterator[str]:
        if self.made_by is not None:
            yield f"its trained tokens are {_in_words(self.made_by)}"


def _in_words(made_by: Rollouts | None) -> str:
    if made_by is None:
        return "text that no model is said to have sampled"
    return (
        f"rollouts of {made_by.source} (weights {made_by.weights_sha256[:16]}…, temperature {made_by.temperature:g}, "
        f"top-p {made_by.top_p:g}, top-k {made_by.top_k}, seed {made_by.seed})"
    )
