"""The ids of a text, and what a tokenizer puts around it by itself."""

from __future__ import annotations

from typing import Any


def text_ids(tokenizer: Any, text: str, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text, by the rules of the tokenizer's backend where it has one: some classes act on marks in it."""
    if tokenizer.is_fast:
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def text_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text, such as BOS; () where it puts none."""
    return _ends(tokenizer)[0]


def text_suffix(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts after a text; () where it puts none."""
    return _ends(tokenizer)[1]


def _ends(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for text in ("a", "1", "."):
        inner = text_ids(tokenizer, text)
        whole = text_ids(tokenizer, text, add_special_tokens=True)
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
