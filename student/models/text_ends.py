"""What a tokenizer puts around a text by itself."""

from __future__ import annotations

from typing import Any


def text_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text, such as BOS; () where it puts none."""
    return _ends(tokenizer)[0]


def text_suffix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts after a text; () where it puts none."""
    return _ends(tokenizer)[1]


def _ends(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for text in ("a", "1", "."):
        inner = tokenizer.encode(text, add_special_tokens=False)
        whole = tokenizer.encode(text, add_special_tokens=True)
        for start in range(len(whole) - len(inner) + 1):
            if inner and whole[start : start + len(inner)] == inner and _begins_at(tokenizer, text, start):
                return tuple(whole[:start]), tuple(whole[start + len(inner) :])
    return (), ()


def _begins_at(tokenizer: Any, text: str, start: int) -> bool:
    """Whether a text begins after `start` tokens of its own: a text's id may be the same as one before it."""
    if not tokenizer.is_fast:
        return True
    mask = tokenizer.backend_tokenizer.encode(text, add_special_tokens=True).special_tokens_mask
    return bool(mask[: start + 1] == [1] * start + [0])
