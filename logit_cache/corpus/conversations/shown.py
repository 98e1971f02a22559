"""Whether all that a conversation says stands in a template's text, and the forms in which a template takes it.

A template can drop anything without an error: a role, a call beside content, a result that is an object, content where
it expects parts. So every text of a conversation is replaced by a stand-in, and the template rendered with those: a
stand-in that is missing is a text that would be lost. A reasoning is not looked for: templates leave it out on purpose.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from logit_cache.corpus.conversations.template import ChatTemplate, Messages
from logit_cache.corpus.documents import Inputs

_CALLS = ("tool_calls", "function_call")
# Of a document, the fields that templates print.
_OF_DOCUMENTS = ("text", "content", "contents")

StandIn = Callable[[str], str]


def lost(template: ChatTemplate, messages: Messages, inputs: Inputs) -> str | None:
    """What of a conversation does not stand in the template's text, in words; None if all does, or if the template
    refuses stand-ins, and so cannot be asked."""
    named: dict[str, str] = {}

    def stand_in(what: str) -> str:
        token = f"logitcache{len(named)}q"
        named[token] = what
        return token

    replaced = [
        _message(message, f"message {index} ({message['role']})", stand_in) for index, message in enumerate(messages)
    ]
    tools = _in_calls(inputs.tools, functools.partial(_tool, stand_in=stand_in))
    documents = None if inputs.documents is None else [_document(one, stand_in) for one in inputs.documents]
    try:
        text = template.stand_in(replaced, Inputs(tools, documents, inputs.variables)).text
    except Exception:  # whatever a template raises on texts of another kind
        return None
    return next((what for token, what in named.items() if token not in text), None)


def forms(template: ChatTemplate, messages: Messages) -> Iterator[Messages]:
    """The messages in the forms that templates take, the likeliest first: content as a text or as parts; arguments of
    calls as objects or as they are given; no content beside calls as it is given, and as an empty text."""
    messages = [_with_content(template, message) for message in messages]
    if not any(message.get(name) for message in messages for name in _CALLS):
        yield messages
        return
    as_text = any(f"arguments is {test}" in template.source for test in ("string", "mapping"))
    seen = []
    for parsed in (not as_text, as_text):
        # (A null is no third spelling: transformers takes it for no content.)
        for blank in ({}, {"content": ""}):
            form = [_with_calls(message, parsed, blank) for message in messages]
            if form not in seen:
                seen.append(form)
                yield form


def _with_content(template: ChatTemplate, message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and (template.takes_texts or not template.takes_parts):
        return message | {"content": "".join(part["text"] for part in content)}
    if isinstance(content, str) and template.takes_parts and not template.takes_texts:
        return message | {"content": [{"type": "text", "text": content}]}
    return message


def _with_calls(message: dict[str, Any], parsed: bool, blank: dict[str, Any]) -> dict[str, Any]:
    calls = {name: message[name] for name in _CALLS if message.get(name)}
    if not calls:
        return message
    found = dict(message)
    if parsed:
        # A template that prints arguments as JSON would quote a text once more.
        found |= {name: _in_calls(value, _parsed) for name, value in calls.items()}
    return found if found.get("content") else found | blank


def _in_calls(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """Calls or tools, each changed where its name is: in its `function`, if it has one."""
    if isinstance(value, list):
        return [_in_calls(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("function"), dict):
        return value | {"function": _in_calls(value["function"], change)}
    return change(value)


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments, where they are the text of a JSON object, are that object."""
    arguments = _object(call.get("arguments"))
    return call if arguments is None else call | {"arguments": arguments}


def _object(text: Any) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _message(message: dict[str, Any], where: str, stand_in: StandIn) -> dict[str, Any]:
    replaced = dict(message)
    if message.get("content"):
        replaced["content"] = _content(message["content"], f"the content of {where}", stand_in)
    for name in _CALLS:
        if message.get(name):
            change = functools.partial(_call, what=f"{name} of {where}", stand_in=stand_in)
            replaced[name] = _in_calls(message[name], change)
    return replaced


def _content(content: Any, what: str, stand_in: StandIn) -> Any:
    if isinstance(content, list):
        return [part | {"text": _text(part["text"], what, stand_in)} for part in content]
    return _leaves(content, what, stand_in)


def _text(text: str, what: str, stand_in: StandIn) -> str:
    return stand_in(f"{what}, {text.strip()[:40]!r},") if text.strip() else text


def _leaves(value: Any, what: str, stand_in: StandIn) -> Any:
    """A value with stand-ins for its texts."""
    if isinstance(value, str):
        return _text(value, what, stand_in)
    if isinstance(value, dict):
        return {name: _leaves(item, what, stand_in) for name, item in value.items()}
    return [_leaves(item, what, stand_in) for item in value] if isinstance(value, list) else value


def _call(call: dict[str, Any], what: str, stand_in: StandIn) -> dict[str, Any]:
    """A call with stand-ins for its name and the texts of its arguments."""
    replaced = dict(call)
    if isinstance(call.get("name"), str):
        replaced["name"] = _text(call["name"], what, stand_in)
    arguments = call.get("arguments")
    parsed = _object(arguments)
    if parsed is not None:
        replaced["arguments"] = json.dumps(_leaves(parsed, what, stand_in), ensure_ascii=False)
    elif isinstance(arguments, dict):
        replaced["arguments"] = _leaves(arguments, what, stand_in)
    return replaced


def _tool(tool: dict[str, Any], stand_in: StandIn) -> dict[str, Any]:
    name = tool.get("name")
    return tool | {"name": stand_in(f"the tool {name!r}")} if isinstance(name, str) else tool


def _document(document: dict[str, Any], stand_in: StandIn) -> dict[str, Any]:
    texts = {name: value for name, value in document.items() if name in _OF_DOCUMENTS and isinstance(value, str)}
    return document | {name: _text(value, "a document", stand_in) for name, value in texts.items()}
