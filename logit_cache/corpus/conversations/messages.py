"""The messages of a conversation as rows write them, and the fields beside them, as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from storage.errors import InputError

Row = Mapping[str, Any]

_ROLES = {
    "human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_TEXT_ROLES = {"system", "developer", "user", "assistant"}
_KNOWN_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"}
# Of a message: whether it is trained on.
WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Inside of these a null is a value.
_VERBATIM = {"arguments", "parameters", "input_schema"}
# Names under which a message's reasoning is given.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What a message says; one without any of it says nothing, and may have its text under another name.
_SAYS = ("content", "tool_calls", "function_call", *REASONING)
# Fields that are not read, and would change what is learnt.
_NOT_READ = ("refusal", "train_detail", "mask", "masked", "prefix", *MEDIA)


def message_list(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """A list of messages, or its JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = read_json(value, name, list, where)
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in value):
        raise InputError(
            f"{where}: {name!r} is not a list of {{role, content}} or {{from, value}} objects; correct the row, or "
            f"name the right field with --messages-field"
        )
    if not value:
        raise InputError(f"{where}: {name!r} is an empty list; remove the row")
    return value


def read_message(message: Row, index: int, where: str, from_arrow: bool) -> dict[str, Any]:
    """A message as {role, content, …}, with the roles that templates know, and without the nulls of absent fields."""
    found: dict[str, Any] = _without_absent(dict(message), f"{where}: message {index}", from_arrow)
    if isinstance(found.get("tool_calls"), str):
        found["tool_calls"] = read_json(found["tool_calls"], f"tool_calls of message {index}", list, where)
    if not found.get("tool_calls", True):
        del found["tool_calls"]  # an empty list is how an absent call is exported
    for name, other in (("role", "from"), ("content", "value")):
        if other in found and found.setdefault(name, found[other]) != found.pop(other):
            raise InputError(f"{where}: message {index} has {name!r} and another {other!r}; leave one of them")
    role = found.get("role")
    if not isinstance(role, str):
        raise InputError(f"{where}: message {index} has the role {role!r}, which is no text; correct the row")
    lower = role.strip().lower()
    if lower == "function_call":
        return _function_call(found, index, where)
    found["role"] = _ROLES.get(lower, lower if lower in _KNOWN_ROLES else role)
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = [_text_part(part, index, where) for part in content]
    elif content is not None and not isinstance(content, (str, dict) if found["role"] not in _TEXT_ROLES else str):
        raise InputError(f"{where}: the content of message {index} is {content!r}, which is no text; correct the row")
    if not any(name in found for name in _SAYS):
        raise InputError(
            f"{where}: message {index} ({found['role']}) has no content, but {', '.join(sorted(found))}; correct it"
        )
    for name in REASONING:
        if found.get(name) and (found["role"] != "assistant" or not isinstance(found[name], str)):
            raise InputError(
                f"{where}: message {index} ({found['role']}): {name!r} is the text of a reply; correct the row"
            )
    for name in _NOT_READ:
        if found.get(name):
            raise InputError(
                f"{where}: message {index} has {name!r}, which is not read, and would change what is learnt; remove it"
            )
    return found


def _text_part(part: Any, index: int, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise InputError(
            f"{where}: message {index} has content of type {kind!r}, and only text is read; remove that part"
        )
    return part


def _function_call(message: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    """A turn that is a call, as ShareGPT's `function_call` rows write it: the JSON of {name, arguments}."""
    call = read_json(message.get("content"), f"the function_call of message {index}", dict, where)
    if not call or "name" not in call:
        raise InputError(f"{where}: the function_call of message {index} is no {{name, arguments}} object")
    return message | {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}


def is_trained(message: Row, index: int, where: str) -> bool:
    """Whether a message is trained on, by its own fields: a weight of 0 or 1, or true or false."""
    given = {name: message[name] for name in WEIGHTS if name in message}
    for name, value in given.items():
        if value not in (0, 1):
            raise InputError(
                f"{where}: message {index} has {name} {value!r}: a reply is trained on (1) or not (0); correct the row"
            )
        if value == 1 and message["role"] != "assistant" and name != "weight":
            raise InputError(f"{where}: message {index} has {name} {value!r}, and only replies are trained on")
    return all(given.values())


def check_roles(messages: Sequence[Row], where: str) -> None:
    roles = [str(message["role"]) for message in messages]
    unknown = sorted(set(roles) - _KNOWN_ROLES)
    if "assistant" not in roles and unknown:
        raise InputError(
            f"{where}: no message has the role assistant, so nothing would be learnt; found "
            f"{', '.join(unknown)}: rename the one that replies"
        )


def read_objects(value: Any, name: str, where: str, from_arrow: bool) -> list[dict[str, Any]] | None:
    """A list of objects, or its JSON text; None where it is empty."""
    found: list[Any] | None = read_json(value, name, list, where)
    if not found:
        return None
    if not all(isinstance(item, dict) for item in found):
        raise InputError(f"{where}: {name!r} is not a list of objects; correct the row")
    if from_arrow and not isinstance(value, str) and _has_null(found):
        raise _unclear_null(f"{where}: {name!r}")
    return found


def read_json(value: Any, name: str, kind: type, where: str) -> Any:
    """A list or an object, which may be written as JSON text; None where it is absent."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{where}: {name!r} is a text that is no JSON ({error}); correct the row") from None
    if value in (None, ""):
        return None
    if not isinstance(value, kind):
        raise InputError(f"{where}: {name!r} is a {type(value).__name__}, expected a {kind.__name__}; correct the row")
    return value


def _without_absent(value: Any, where: str, from_arrow: bool) -> Any:
    """A value without the nulls that stand for absent fields, by which Arrow fills up structs: templates ask whether a
    field is there. Inside arguments and schemas a null is a value, and what Arrow has there cannot be told."""
    if isinstance(value, dict):
        kept = {}
        for name, item in value.items():
            if item is None:
                continue
            verbatim = name in _VERBATIM or (name in ("content", "value") and isinstance(item, dict))
            if verbatim and from_arrow and _has_null(item):
                raise _unclear_null(f"{where}: {name!r}")
            kept[name] = item if verbatim else _without_absent(item, where, from_arrow)
        return kept
    if isinstance(value, list):
        return [_without_absent(item, where, from_arrow) for item in value]
    return value


def _has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_null, value.values()))
    return any(map(_has_null, value)) if isinstance(value, list) else value is None


def _unclear_null(where: str) -> InputError:
    return InputError(
        f"{where} holds a null, and in a column of structs that is also how an absent field looks: store the object as "
        f"JSON text, or take JSON lines"
    )
