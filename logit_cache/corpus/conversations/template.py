"""A chat template that also says which characters of its text come from which message.

The text is what transformers renders. A copy of the template's syntax tree is rendered beside it, in which every loop
says at the start of each turn whether it stands at a message; from that mark to the next, text belongs to the message.
`{% generation %}` blocks are marked in the same way. Without its marks the copy's text must be the template's own, or
the marks are not used.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import meta, nodes

from logit_cache.corpus.conversations.messages import REASONING
from logit_cache.corpus.documents import Inputs, Ranges
from logit_cache.corpus.tokenizer import template_environment

Messages = list[dict[str, Any]]

# A template's own inputs, which no variable of a user may replace.
RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "strftime_now"}
)
PROBE = "logit cache probe"
# Private-use characters: two that a text does not have stand around a mark in it.
_PRIVATE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Rendered:
    """messages: the range of text of each message by its index, where it has one; replies: those that
    `{% generation %}` marks. Both None where the marks could not be used."""

    text: str
    messages: dict[int, tuple[int, int]] | None
    replies: Ranges | None


class ChatTemplate:
    """One template of a tokenizer, for a date that it may print (None: today's)."""

    def __init__(self, tokenizer: Any, source: str, date: datetime.date | None = None) -> None:
        self.source = source
        self._tokenizer = tokenizer
        environment = template_environment(source)
        tree = environment.parse(source)
        day = datetime.datetime.combine(date or datetime.date.today(), datetime.time())
        functions = {"strftime_now": day.strftime}
        self._plain = environment.from_string(source, functions)
        self._marked = environment.from_string(_marked_tree(environment.parse(source)), functions)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        self.words = frozenset(_words(tree))
        self.marks_replies = any(map(_is_generation, tree.find_all(nodes.CallBlock)))
        self.prints_date = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))

    def text(self, messages: Messages, inputs: Inputs, prompt: bool = False) -> str:
        """The text of messages, as transformers renders it; prompt: with what asks for a reply after them."""
        if self.prints_date:  # transformers would print today's
            return str(self._plain.render(**self._values(messages, inputs, prompt)))
        text: str = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=prompt,
            **inputs.by_name,
        )
        return text

    def render(self, messages: Messages, inputs: Inputs) -> Rendered:
        """The text, and whose it is."""
        text, found = self.text(messages, inputs), self.stand_in(messages, inputs)
        return found if found.text == text else Rendered(text, None, None)

    def stand_in(self, messages: Messages, inputs: Inputs, prompt: bool = False) -> Rendered:
        """As `render`, for messages that stand in for others or are a part of them: transformers is not asked."""
        values = self._values(messages, inputs, prompt)
        given = json.dumps([messages, inputs.tools, inputs.documents], ensure_ascii=False, default=str)
        free = (character for character in map(chr, _PRIVATE) if character not in given)
        marks = _Marks(values["messages"], next(free), next(free))
        return marks.read(
            self._marked.render(
                _logit_cache_at=marks.at, _logit_cache_after=marks.after, _logit_cache_mark=marks.mark, **values
            )
        )

    @functools.cached_property
    def takes_texts(self) -> bool:
        """Whether it prints content that is a text."""
        return PROBE in self._probe(PROBE)

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether it prints the text of content that is a list of parts, and not the list."""
        text = self._probe([{"type": "text", "text": PROBE}])
        return PROBE in text and "'type'" not in text and '"type"' not in text

    def _probe(self, content: Any) -> str:
        try:
            return self.text([{"role": "user", "content": content}], Inputs())
        except Exception:  # whatever a template raises: it does not take this
            return ""

    def _values(self, messages: Messages, inputs: Inputs, prompt: bool) -> dict[str, Any]:
        """What transformers gives to a template."""
        return {
            **self._tokenizer.special_tokens_map,
            "messages": [_with_reasoning(message) for message in messages],
            "add_generation_prompt": prompt,
            **inputs.by_name,
        }


class _Marks:
    """The functions that a marked template calls. The message at which a loop stands ends with the loop."""

    def __init__(self, messages: Messages, opening: str, closing: str) -> None:
        self._opening, self._closing = opening, closing
        self._index = {id(message): index for index, message in enumerate(messages)}
        self._at: list[tuple[int, int]] = []  # loops that stand at a message, the inner ones last: (loop, message)

    def at(self, loop: int, *values: Any) -> str:
        """A loop begins a turn with these values."""
        found = [self._index[id(value)] for value in values if id(value) in self._index]
        if not found:
            return ""
        self._leave(loop)
        self._at.append((loop, found[0]))
        return self._here()

    def after(self, loop: int) -> str:
        return self._here() if self._leave(loop) else ""

    def mark(self, what: str) -> str:
        return f"{self._opening}{what}{self._closing}"

    def _leave(self, loop: int) -> bool:
        depth = next((depth for depth, (number, _) in enumerate(self._at) if number == loop), len(self._at))
        left = len(self._at) > depth
        del self._at[depth:]
        return left

    def _here(self) -> str:
        return self.mark(str(self._at[-1][1]) if self._at else "")

    def read(self, marked: str) -> Rendered:
        """A text without its marks, and the ranges that they stand for."""
        return _ranges(re.split(f"{self._opening}([^{self._closing}]*){self._closing}", marked))


def _ranges(parts: Sequence[str]) -> Rendered:
    """The ranges of a text that is given in parts, with marks between them."""
    found: dict[int, tuple[int, int]] = {}
    replies: list[tuple[int, int]] = []
    message, position, opened = "", 0, 0
    twice = set()
    for index, part in enumerate(parts):
        if not index % 2:
            if message and part:
                start, stop = found.get(int(message), (position, position))
                twice |= {int(message)} if stop != position else set()
                found[int(message)] = (start, position + len(part))
            position += len(part)
        elif part == "(":
            opened = position
        elif part == ")":
            replies.append((opened, position))
        else:
            message = part
    # A message whose text stands in two places has no range.
    return Rendered(
        "".join(parts[::2]),
        {index: where for index, where in found.items() if index not in twice},
        tuple(where for where in replies if where[0] < where[1]),
    )


def _marked_tree(tree: nodes.Template) -> nodes.Template:
    environment = tree.environment
    assert environment is not None
    tree.body = _with_marks(tree.body, itertools.count())
    tree.set_environment(environment)
    return tree


def _with_marks(body: list[nodes.Node], numbers: Iterator[int]) -> list[nodes.Node]:
    """Statements with a mark at the start of each turn of a loop, after each loop, and around each generation block."""
    marked: list[nodes.Node] = []
    for node in body:
        for name in ("body", "else_", "elif_"):
            inner = getattr(node, name, None)
            if isinstance(inner, list):
                setattr(node, name, _with_marks(inner, numbers))
        marked.append(node)
        if isinstance(node, nodes.For):
            loop = nodes.Const(next(numbers))
            targets = [nodes.Name(name.name, "load") for name in _names(node.target)]
            node.body.insert(0, _call("_logit_cache_at", [loop, *targets]))
            marked.append(_call("_logit_cache_after", [loop]))
        elif isinstance(node, nodes.CallBlock) and _is_generation(node):
            opened, closed = (_call("_logit_cache_mark", [nodes.Const(mark)]) for mark in "()")
            node.body = [opened, *node.body, closed]
    return marked


def _names(target: nodes.Node) -> list[nodes.Name]:
    return [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))


def _call(name: str, arguments: Sequence[nodes.Expr]) -> nodes.Output:
    return nodes.Output([nodes.Call(nodes.Name(name, "load"), list(arguments), [], None, None)], lineno=1)


def _is_generation(node: nodes.CallBlock) -> bool:
    """Whether it is the block of transformers' extension, which is the only one of its environment that makes any."""
    return isinstance(node.call.node, nodes.ExtensionAttribute)


def _words(tree: nodes.Template) -> Iterator[str]:
    """Every attribute and every string that a template names."""
    for attribute in tree.find_all(nodes.Getattr):
        yield attribute.attr
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that transformers gives it, whichever a template reads; always
    another object."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
