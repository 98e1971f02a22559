"""Conversations as text, and the character ranges that the assistant wrote.

The text is the messages rendered by the tokenizer's own chat template. A template with `{% generation %}` marks the
assistant's characters itself. For others they are found by rendering prefixes of the conversation: the text that a
reply adds after the prompt for it is the reply, end-of-turn marker included. That needs a template whose output for a
conversation begins with its output for every prefix; one that rewrites earlier turns (some drop earlier reasoning) is
refused, with the row's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from logit_cache.corpus.tokenizer import Ranges, render_marked
from storage.errors import InputError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK_THE_REPLIES = "give a template that marks the replies with {% generation %}: --chat-template FILE"


def render(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple[str, Ranges]:
    """The conversation's text and the character ranges of the assistant's replies, in order.

    Raises InputError naming the row (`where`) when there is no template, when the template refuses the messages,
    or when the replies cannot be found in its text.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{where}: the loss mask of a conversation needs the character offsets of its tokens, and this tokenizer "
            f"({type(tokenizer).__name__}) has none; take one with a tokenizer.json"
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the row holds messages and the tokenizer has no chat template; give one with "
            f"--chat-template FILE, or take the tokenizer of an instruction model"
        )
    try:
        template = tokenizer.get_chat_template()
        if _GENERATION.search(template):
            return render_marked(tokenizer, template, messages)
        return _by_prefixes(tokenizer, messages, where)
    except InputError:
        raise
    except Exception as error:
        # Templates are programs: they raise errors of any type, and fail in any way on fields that they did not expect.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: the chat template refuses these messages ({reason}); correct the row") from None


def message_texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The text of each message, for training a tokenizer."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            texts = (part.get("text") for part in content if isinstance(part, dict))
            yield from (text for text in texts if isinstance(text, str))


def _by_prefixes(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple[str, Ranges]:
    def text_of(count: int, prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        return text

    whole = text_of(len(messages))
    ranges = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise InputError(
                f"{where}: the conversation begins with the assistant, and nothing can be rendered before that; "
                f"{_MARK_THE_REPLIES}"
            )
        before, after = text_of(index, prompt=True), text_of(index + 1)
        if not after.startswith(before) or not whole.startswith(after):
            raise InputError(
                f"{where}: message {index} cannot be found in the template's text, which does not begin with the "
                f"text of the messages before it; {_MARK_THE_REPLIES}"
            )
        reply = after[len(before) :]
        ranges.append((len(before), len(before) + _length_written(reply, message.get("content"))))
    return whole, tuple(ranges)


def _length_written(reply: str, content: Any) -> int:
    """Length of the part of a rendered reply that the assistant writes: all but white space after an end marker.

    Without a marker the white space itself ends the turn, and has to be learnt.
    """
    stripped = reply.rstrip()
    text = content.rstrip() if isinstance(content, str) else ""
    return len(reply) if text and stripped.endswith(text) else len(stripped)
