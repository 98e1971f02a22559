"""Conversations as text, and the character ranges that the assistant wrote.

The text is the messages rendered by the tokenizer's own chat template. A template with `{% generation %}` marks the
assistant's characters itself. Of others, the text of each message is known from the template's loops
(`logit_cache.corpus.conversations.template`); a reply is its message's text after what asks for a reply there (the
template's generation prompt), end-of-turn marker included. Only where a template has no such loop, prefixes of the
conversation are rendered, which needs a template whose text of a conversation begins with that of every prefix. But for
that last case, the time is linear in the turns.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from logit_cache.corpus.conversations.template import PROBE, REASONING, ChatTemplate, Inputs, Messages, Rendered
from logit_cache.corpus.documents import Conversation, Ranges
from storage.errors import InputError

_MARK_THE_REPLIES = "give a template that marks the replies with {% generation %}: --chat-template FILE"
# Fields of a message that the text has to show, where the row has them.
_SHOWN = ("tool_calls", "function_call", *REASONING)


@dataclass(frozen=True)
class Written:
    """A conversation's text and the character ranges that are trained on. replies: how many it has; found_by: how;
    reasoning_left_out: of how many the template does not print the reasoning."""

    text: str
    trained: Ranges
    replies: int
    found_by: str
    reasoning_left_out: int


def render(template: ChatTemplate, conversation: Conversation, version_1: bool = False) -> Written:
    """The text of a conversation, and what of it is trained on.

    version_1: as streams of format version 1 were made: a template's text after the last message is part of the last
    reply, also where the reply has an end marker; and what a template leaves out is left out.
    Raises InputError naming the row where the template refuses the messages or leaves out something of them, and where
    the replies cannot be found in its text.
    """
    where, messages = conversation.where, conversation.messages
    inputs = Inputs(conversation.tools, conversation.documents, conversation.variables)
    if not version_1:
        _check_inputs(template, conversation)
    try:
        messages = _as_taken(template, messages)
        rendered = template.render(messages, inputs)
        found_by, replies = _replies(template, messages, inputs, rendered, where, version_1)
    except InputError:
        raise
    except Exception as error:
        # Templates are programs: they raise errors of any type, and fail in any way on fields that they did not expect.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{where}: the chat template refuses these messages ({reason}); correct the row") from None
    if not version_1:
        _check_shown(messages, rendered, where)
    left_out = sum(_leaves_out_reasoning(message, rendered.text) for message in messages)
    return Written(rendered.text, _trained(replies, rendered, conversation), len(replies), found_by, left_out)


def message_texts(messages: Messages) -> Iterator[str]:
    """The text of each message, for training a tokenizer."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            texts = (part.get("text") for part in content if isinstance(part, dict))
            yield from (text for text in texts if isinstance(text, str))


def _check_inputs(template: ChatTemplate, conversation: Conversation) -> None:
    """Refuse what the template would not read."""
    where = conversation.where
    given = {"tools": conversation.tools, "documents": conversation.documents, **conversation.variables}
    for name, value in given.items():
        if value is not None and name not in template.variables:
            raise InputError(
                f"{where}: the row has {name!r}, and the chat template reads no such variable; take a template that "
                f"does (--chat-template FILE), or remove it from the row"
            )
    for index, message in enumerate(conversation.messages):
        for name in _SHOWN:
            read = REASONING if name in REASONING else (name,)
            if message.get(name) and template.words.isdisjoint(read):
                raise InputError(
                    f"{where}: message {index} has {name!r}, which the chat template does not print; take a template "
                    f"that does (--chat-template FILE), or remove it from the row"
                )


def _as_taken(template: ChatTemplate, messages: Messages) -> Messages:
    """The messages as the template takes them: text parts joined, arguments of calls parsed, where it wants them so."""
    parts, texts = template.takes_parts, template.takes_texts
    taken = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and texts and not parts:
            message = message | {"content": "".join(part["text"] for part in content)}
        elif isinstance(content, str) and parts and not texts:
            message = message | {"content": [{"type": "text", "text": content}]}
        # A template that tests for text prints arguments as they stand; another one would quote them once more.
        if message.get("tool_calls") and not {"is string", "is mapping"} & _tests(template):
            message = message | {"tool_calls": [_parsed(call) for call in message["tool_calls"]]}
        taken.append(message)
    return taken


def _parsed(call: Any) -> Any:
    """A tool call whose arguments, where they are the text of a JSON object, are that object."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": _parsed(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _tests(template: ChatTemplate) -> set[str]:
    return {f"is {test}" for test in ("string", "mapping") if f"arguments is {test}" in template.source}


def _replies(
    template: ChatTemplate, messages: Messages, inputs: Inputs, rendered: Rendered, where: str, version_1: bool
) -> tuple[str, dict[int, tuple[int, int]]]:
    """How replies are found, and the range of text of each by its message; generation blocks, which have none, are
    counted from -1 down."""
    if template.marks_replies:
        if rendered.replies is None:
            raise InputError(f"{where}: the text that the template marks with {{% generation %}} cannot be found")
        return "its {% generation %} marks", {-1 - number: found for number, found in enumerate(rendered.replies)}
    wanted = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    if rendered.messages is None or any(index not in rendered.messages for index in wanted):
        return "rendering every prefix", _by_prefixes(template, messages, inputs, rendered.text, where)
    prompts = _Prompts(template, messages, inputs)
    found = {}
    for index in wanted:
        start, stop = rendered.messages[index]
        own = rendered.text[start:stop]
        header = prompts.header(index, own)
        if header is None:
            raise InputError(
                f"{where}: message {index} cannot be found in the template's text, as its turn does not begin as the "
                f"template's generation prompt does; {_MARK_THE_REPLIES}"
            )
        content = messages[index].get("content")
        length = header + _length_written(own[header:], content)
        rest = rendered.text[stop:]
        if rest.strip() and index == len(messages) - 1 and (version_1 or not _has_end_marker(own, content)):
            # What the template puts after its last message ends a reply that has no end of its own.
            length = len(own) + len(rest.rstrip())
        found[index] = (start + header, start + length)
    return "its loop over the messages", found


class _Prompts:
    """The text that asks for a reply, at each point of a conversation."""

    def __init__(self, template: ChatTemplate, messages: Messages, inputs: Inputs) -> None:
        self._template, self._messages, self._inputs = template, messages, inputs
        self._after: dict[str, str | None] = {}

    def header(self, index: int, own: str) -> int | None:
        """The length of what stands before the reply in its message's text; None where that is not known."""
        prompt = self._prompt(index)
        if prompt is not None and own.startswith(prompt):
            return len(prompt)
        # The prompt may begin the reply, too (with an opened or an empty reasoning), and this one does not begin so:
        # what it and the turn of some reply have in common is the header.
        prompts = [prompt] if prompt is not None else [self._prompt(other) for other in range(len(self._messages))]
        common = {_common(before, asked) for before in self._before_replies for asked in prompts if asked}
        return max((len(header) for header in common if header and own.startswith(header)), default=None)

    def _prompt(self, index: int) -> str | None:
        """The generation prompt after the message before; the same one after every message of its role."""
        role = str(self._messages[index - 1].get("role")) if index else ""
        if role not in self._after:
            try:
                self._after[role] = self._rendered_prompt(index) if index else None
            except Exception:  # whatever a template raises on a part of a conversation
                self._after[role] = None
        return self._after[role]

    def _rendered_prompt(self, index: int) -> str | None:
        part = self._messages[:index]
        asked, told = (self._template.render(part, self._inputs, prompt) for prompt in (True, False))
        if not asked.messages or not told.messages or index - 1 not in asked.messages or index - 1 not in told.messages:
            return asked.text[len(told.text) :] if asked.text.startswith(told.text) else None
        with_prompt, without = (_text_of(each, index - 1) for each in (asked, told))
        if not with_prompt.startswith(without):
            return None
        return with_prompt[len(without) :] + asked.text[asked.messages[index - 1][1] :]

    @functools.cached_property
    def _before_replies(self) -> set[str]:
        """What the template puts before the content of a reply: of each one, and of one that others follow."""
        last = [{"role": "user", "content": PROBE}, {"role": "assistant"}]
        messages = [*self._messages, *(last if self._messages[-1].get("role") == "assistant" else [])]
        replies = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
        texts = {index: f"{PROBE} {index}." for index in replies}
        try:
            rendered = self._template.render(
                [
                    {"role": "assistant", "content": texts[index]} if index in texts else message
                    for index, message in enumerate(messages)
                ],
                self._inputs,
            )
        except Exception:  # whatever a template raises on replies of another kind
            return set()
        parts = [_text_of(rendered, index).partition(text) for index, text in texts.items()]
        return {before for before, found, _ in parts if found}


def _text_of(rendered: Rendered, index: int) -> str:
    start, stop = (rendered.messages or {}).get(index, (0, 0))
    return rendered.text[start:stop]


def _common(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _by_prefixes(
    template: ChatTemplate, messages: Messages, inputs: Inputs, whole: str, where: str
) -> dict[int, tuple[int, int]]:
    found = {}
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise InputError(
                f"{where}: the conversation begins with the assistant, and nothing can be rendered before that; "
                f"{_MARK_THE_REPLIES}"
            )
        before = template.text(messages[:index], inputs, prompt=True)
        after = template.text(messages[: index + 1], inputs)
        if not after.startswith(before) or not whole.startswith(after):
            raise InputError(
                f"{where}: message {index} cannot be found in the template's text, which does not begin with the "
                f"text of the messages before it; {_MARK_THE_REPLIES}"
            )
        reply = after[len(before) :]
        found[index] = (len(before), len(before) + _length_written(reply, message.get("content")))
    return found


def _length_written(reply: str, content: Any) -> int:
    """Length of the part of a rendered reply that the assistant writes: all but white space after an end marker.

    Without a marker the white space itself ends the turn, and has to be learnt.
    """
    return len(reply.rstrip()) if _has_end_marker(reply, content) else len(reply)


def _has_end_marker(reply: str, content: Any) -> bool:
    text = "".join(message_texts([{"content": content}])).rstrip()
    return not (text and reply.rstrip().endswith(text))


def _check_shown(messages: Messages, rendered: Rendered, where: str) -> None:
    """Refuse a template that leaves out what a message says: it would be lost without a word."""
    for index, message in enumerate(messages):
        if message.get("role") == "tool":  # results are printed in many forms
            continue
        own, whole = _text_of(rendered, index), rendered.text
        for text in message_texts([message]):
            # Templates may drop the reasoning of earlier replies.
            said = text.rpartition("</think>")[2].strip()
            if said not in own and said not in whole and json.dumps(said, ensure_ascii=False)[1:-1] not in whole:
                raise InputError(
                    f"{where}: the content of message {index} ({message.get('role')}: {said[:40]!r}) does not stand in "
                    f"the chat template's text; take a template that prints it (--chat-template FILE)"
                )


def _leaves_out_reasoning(message: dict[str, Any], text: str) -> bool:
    if message.get("role") != "assistant":
        return False
    inside = "".join(message_texts([message])).rpartition("</think>")[0].rpartition("<think>")[2]
    reasoning = next((message[name] for name in REASONING if message.get(name)), inside)
    return isinstance(reasoning, str) and reasoning.strip() not in text


def _trained(replies: dict[int, tuple[int, int]], rendered: Rendered, conversation: Conversation) -> Ranges:
    """The replies without those that the row says are not trained on."""
    if not conversation.untrained:
        return tuple(sorted(where for where in replies.values() if where[0] < where[1]))
    if min(replies, default=0) >= 0:
        return tuple(sorted(where for index, where in replies.items() if index not in conversation.untrained))
    if rendered.messages is None or not conversation.untrained <= rendered.messages.keys():
        raise InputError(
            f"{conversation.where}: which replies are not trained on cannot be seen in this chat template's text: "
            f"give one that loops over the messages, with --chat-template FILE"
        )
    out = [rendered.messages[index] for index in conversation.untrained]
    return tuple(where for where in sorted(replies.values()) if not any(a <= where[0] < b for a, b in out))
