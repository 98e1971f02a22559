"""What sources hold: text in chunks, conversations, and rows that are tokens already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.format.manifest.cache import Rollouts

Ids = NDArray[np.uint32]
# Ranges of characters, ascending and apart.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a document's text; `ends` with the last one.

    trained: the character ranges of the whole document that are trained on, or None for all of it; such a document is
    one chunk. begins: whether the document begins as the tokenizer begins a text. appended_trained: whether a token
    that is appended to it is trained on. where: names a row whose text is not all trained on, in errors.
    """

    source: int
    text: str
    ends: bool
    trained: Ranges | None = None
    begins: bool = True
    appended_trained: bool = True
    where: str = ""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a chat template is rendered with, besides messages."""

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, Any]:
        return {"tools": self.tools, "documents": self.documents, **self.variables}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row with messages, and its own inputs of the template. `where` names it in errors.

    untrained: the indices of replies that are not trained on.
    """

    source: int
    messages: list[dict[str, Any]]
    where: str
    untrained: frozenset[int] = frozenset()
    inputs: Inputs = Inputs()


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row that is tokens already: ids uint32 [n]; trained bool [n], which of them are trained on, None for all; their
    text, once it is known; and the model that sampled the trained ones."""

    source: int
    ids: Ids
    trained: NDArray[np.bool_] | None
    where: str
    text: str = ""
    rollout: Rollouts | None = None


Document = Chunk | Conversation | Tokens


class UnfitTokenizer(InputError):
    """The tokenizer does not go with rows of such a kind, whatever the single row holds."""


def checked_text(text: Any, where: str) -> str:
    """The text itself; raises InputError if it is not Unicode text (JSON can spell half a surrogate pair)."""
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a text, found {type(text).__name__} ({str(text)[:40]}); correct the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is {text[error.start]!r}, half of a surrogate pair, which is no text; "
            f"correct or remove the row"
        ) from None
    return text
