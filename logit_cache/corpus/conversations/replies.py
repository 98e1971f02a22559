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
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from logit_cache.corpus.conversations.messages import REASONING
from logit_cache.corpus.conversations.shown import forms, lost
from logit_cache.corpus.conversations.template import PROBE, ChatTemplate, Messages, Rendered
from logit_cache.corpus.documents import Conversation, Inputs, Ranges
from storage.errors import InputError, error_text

_MARK_THE_REPLIES = "give a template that marks the replies with {% generation %}: --chat-template FILE"
_PRINTS = "take a template that prints it (--chat-template FILE), or remove it from the row"
# Fields of a message that the text has to show, where the row has them.
_SHOWN = ("tool_calls", "function_call", "function_calls", "tools", "functions", "documents", *REASONING)


@dataclass(frozen=True)
class Written:
    """A conversation's text and the character ranges that are trained on. replies: how many it has; found_by: how;
    reasoning_left_out: of how many the template does not print the reasoning; endless: how many nothing ends."""

    text: str
    trained: Ranges
    replies: int
    found_by: str
    reasoning_left_out: int
    endless: int


def render(template: ChatTemplate, conversation: Conversation, version_1: bool = False) -> Written:
    """The text of a conversation, and what of it is trained on.

    version_1: as streams of format version 1 were made: a template's text after the last message is part of the last
    reply, also where the reply has an end marker; and what a template leaves out is left out.
    Raises InputError naming the row where the template refuses the messages or leaves out something of them, and where
    the replies cannot be found in its text.
    """
    where = conversation.where
    messages, inputs = conversation.messages, conversation.inputs
    if version_1:
        rendered = _rendered(template, messages, inputs, where)
    else:
        _check_inputs(template, conversation)
        messages, rendered = _in_a_form(template, messages, inputs, where)
    found_by, replies = _replies(template, messages, inputs, rendered, where, version_1)
    trained = _trained(replies, rendered, conversation)
    return Written(
        rendered.text,
        # A token around an empty range was trained on in version 1.
        tuple((start, stop) for start, stop in trained if version_1 or start < stop),
        sum(message.get("role") == "assistant" for message in messages),
        found_by,
        sum(_leaves_out_reasoning(message, rendered.text) for message in messages),
        sum(
            _is_endless(rendered.text[slice(*place)], messages[index]) for index, place in replies.items() if index >= 0
        ),
    )


def message_texts(messages: Messages) -> Iterator[str]:
    """The text of each message, for training a tokenizer."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif isinstance(content, list):
            yield from (part["text"] for part in content)


def _rendered(template: ChatTemplate, messages: Messages, inputs: Inputs, where: str) -> Rendered:
    try:
        return template.render(messages, inputs)
    except Exception as error:
        # Templates are programs: they raise errors of any type, and fail in any way on fields that they did not expect.
        raise InputError(
            f"{where}: the chat template refuses these messages ({error_text(error, 300)}); correct the row"
        ) from None


def _in_a_form(template: ChatTemplate, messages: Messages, inputs: Inputs, where: str) -> tuple[Messages, Rendered]:
    """The messages in the first form in which the template prints all of them."""
    failure: InputError | None = None
    for form in forms(template, messages):
        try:
            rendered = _rendered(template, form, inputs, where)
        except InputError as error:
            failure = failure or error
            continue
        missing = lost(template, form, inputs)
        if missing is None:
            return form, rendered
        failure = InputError(f"{where}: {missing} does not stand in the chat template's text; {_PRINTS}")
    assert failure is not None
    raise failure


def _check_inputs(template: ChatTemplate, conversation: Conversation) -> None:
    where = conversation.where
    for name, value in conversation.inputs.by_name.items():
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
                    f"{where}: message {index} has {name!r}, which the chat template does not print; {_PRINTS}"
                )


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
    turns = _Turns(template, messages, inputs)
    found = {}
    for index in wanted:
        start, stop = rendered.messages[index]
        own = rendered.text[start:stop]
        header = turns.header(index, own)
        if header is None:
            raise InputError(
                f"{where}: message {index} cannot be found in the template's text, as its turn does not begin as the "
                f"template's generation prompt does; {_MARK_THE_REPLIES}"
            )
        reply, content = own[header:], messages[index].get("content")
        marked = _has_end_marker(reply, content) if version_1 else turns.has_end_marker(index, reply, content)
        length = header + _length_written(reply, marked)
        rest = rendered.text[stop:]
        if rest.strip() and index == len(messages) - 1 and (version_1 or not marked):
            # What the template puts after its last message ends a reply that has no end of its own.
            length = len(own) + len(rest.rstrip())
        found[index] = (start + header, start + length)
    return "its loop over the messages", found


class _Turns:
    """What a template puts around the content of replies, and what asks for one, at each point of a conversation."""

    def __init__(self, template: ChatTemplate, messages: Messages, inputs: Inputs) -> None:
        self._template, self._messages, self._inputs = template, messages, inputs
        self._prompts: dict[tuple[str, str | None], str | None] = {}

    def header(self, index: int, own: str) -> int | None:
        """The length of what stands before the reply in its message's text; None where that is not known."""
        prompt = self._prompt(index)
        if prompt is not None and own.startswith(prompt):
            return len(prompt)
        # The prompt may begin the reply, too (with an opened or an empty reasoning), and this one does not begin so:
        # what it and the turn of some reply have in common is the header.
        prompts = [prompt] if prompt is not None else [self._prompt(other) for other in range(len(self._messages))]
        befores = {before for before, _ in self._around.values()}
        common = {_common(before, asked) for before in befores for asked in prompts if asked}
        return max((len(header) for header in common if header and own.startswith(header)), default=None)

    def has_end_marker(self, index: int, reply: str, content: Any) -> bool:
        """Whether something other than white space ends a reply in the text of its message."""
        if index not in self._around:
            return _has_end_marker(reply, content)
        return bool(self._around[index][1].strip())

    def _prompt(self, index: int) -> str | None:
        """The generation prompt after the message before. It is the same one after all messages of a role before turns
        that begin alike, and found once for those."""
        if not index:
            return None
        before = self._around.get(index, (None, ""))[0]
        key = str(self._messages[index - 1].get("role")), before
        if key not in self._prompts:
            try:
                self._prompts[key] = self._rendered_prompt(index)
            except Exception:  # whatever a template raises on a part of a conversation
                self._prompts[key] = None
        return self._prompts[key]

    def _rendered_prompt(self, index: int) -> str | None:
        part = self._messages[:index]
        asked, plain = (self._template.stand_in(part, self._inputs, prompt) for prompt in (True, False))
        found = [each.messages or {} for each in (asked, plain)]
        if any(index - 1 not in messages for messages in found):
            return asked.text[len(plain.text) :] if asked.text.startswith(plain.text) else None
        with_prompt, without = (_text_of(each, index - 1) for each in (asked, plain))
        if not with_prompt.startswith(without):
            return None
        return with_prompt[len(without) :] + asked.text[found[0][index - 1][1] :]

    @functools.cached_property
    def _around(self) -> dict[int, tuple[str, str]]:
        """By reply: what the template puts before and after its content, where it prints that. There is one reply more,
        so that others follow the last one."""
        last = [{"role": "user", "content": PROBE}, {"role": "assistant"}]
        messages = [*self._messages, *(last if self._messages[-1].get("role") == "assistant" else [])]
        texts = {i: f"{PROBE} {i}." for i, message in enumerate(messages) if message.get("role") == "assistant"}
        parts = not self._template.takes_texts and self._template.takes_parts
        stand_ins = [
            {"role": "assistant", "content": [{"type": "text", "text": texts[i]}] if parts else texts[i]}
            if i in texts
            else message
            for i, message in enumerate(messages)
        ]
        try:
            rendered = self._template.stand_in(stand_ins, self._inputs)
        except Exception:  # whatever a template raises on replies of another kind
            return {}
        found = {index: _text_of(rendered, index).partition(text) for index, text in texts.items()}
        return {index: (before, after) for index, (before, text, after) in found.items() if text}


def _text_of(rendered: Rendered, index: int) -> str:
    start, stop = (rendered.messages or {}).get(index, (0, 0))
    return rendered.text[start:stop]


def _common(a: str, b: str) -> str:
    """The beginning that two texts have in common, without a part of a word or of a tag."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    common = a[:length]
    return common if common in (a, b) else re.sub(r"(<[^<>\s]*|\w+)$", "", common)


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
        try:
            before = template.text(messages[:index], inputs, prompt=True)
            after = template.text(messages[: index + 1], inputs)
        except Exception as error:
            raise InputError(
                f"{where}: message {index} cannot be found in the template's text, and the template refuses the "
                f"messages up to it ({error_text(error, 300)}); {_MARK_THE_REPLIES}"
            ) from None
        if not after.startswith(before) or not whole.startswith(after):
            raise InputError(
                f"{where}: message {index} cannot be found in the template's text, which does not begin with the "
                f"text of the messages before it; {_MARK_THE_REPLIES}"
            )
        reply, content = after[len(before) :], message.get("content")
        found[index] = (len(before), len(before) + _length_written(reply, _has_end_marker(reply, content)))
    return found


def _length_written(reply: str, marked: bool) -> int:
    """Length of the part of a rendered reply that the assistant writes: all but white space after an end marker.

    Without a marker the white space itself ends the turn, and has to be learnt.
    """
    return len(reply.rstrip()) if marked else len(reply)


def _has_end_marker(reply: str, content: Any) -> bool:
    text = "".join(message_texts([{"content": content}])).rstrip()
    return not (text and reply.rstrip().endswith(text))


def _is_endless(written: str, message: dict[str, Any]) -> bool:
    """Whether a reply ends with its content: nothing that a student could learn tells that it is over."""
    text = "".join(message_texts([message]))
    return bool(text) and written.endswith(text) and not text.isspace()


def _leaves_out_reasoning(message: dict[str, Any], text: str) -> bool:
    if message.get("role") != "assistant":
        return False
    inside = "".join(message_texts([message])).rpartition("</think>")[0].rpartition("<think>")[2]
    reasoning = next((message[name] for name in REASONING if message.get(name)), inside)
    return reasoning.strip() not in text


def _trained(replies: dict[int, tuple[int, int]], rendered: Rendered, conversation: Conversation) -> Ranges:
    """The replies without those that the row says are not trained on."""
    if not conversation.untrained:
        return tuple(sorted(replies.values()))
    if min(replies, default=0) >= 0:
        return tuple(sorted(where for index, where in replies.items() if index not in conversation.untrained))
    if rendered.messages is None or not conversation.untrained <= rendered.messages.keys():
        raise InputError(
            f"{conversation.where}: which replies are not trained on cannot be seen in this chat template's text: "
            f"give one that loops over the messages, with --chat-template FILE"
        )
    out = [rendered.messages[index] for index in conversation.untrained]
    return tuple(where for where in sorted(replies.values()) if not any(a <= where[0] < b for a, b in out))
