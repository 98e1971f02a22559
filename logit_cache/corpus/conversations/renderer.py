"""The conversations of a stream as chunks of text, by the tokenizer's chat templates."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import replace
from typing import Any

from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.conventions import Conventions
from logit_cache.corpus.conversations.replies import render
from logit_cache.corpus.conversations.template import RESERVED, ChatTemplate
from logit_cache.corpus.documents import Chunk, Conversation, UnfitTokenizer, checked_text
from storage.errors import InputError, error_text
from storage.text import counted


class Renderer:
    """Renders conversations, and keeps count of what a reader of the log should know about them.

    The variables and the date that a user gives must be read by some template of the tokenizer, where recorded ones
    need not be. Raises InputError where none does.
    """

    def __init__(self, tokenizer: Any, conventions: Conventions, config: CorpusConfig) -> None:
        self._tokenizer = tokenizer
        self._variables, self._version_1 = conventions.variables, conventions.version == 1
        self._date = conventions.date or datetime.date.today()
        self._templates: dict[str, ChatTemplate] = {}
        self._used: dict[str, ChatTemplate] = {}  # those that rendered a conversation
        self._conversations = self._without_reply = self._reasoning_left_out = self._endless = 0
        self._found_by: set[str] = set()
        self._record = {"date": self._date.isoformat()} if config.date is not None else {}
        if config.template_variables or config.date is not None:
            self._check(config)

    def chunk(self, conversation: Conversation) -> Chunk:
        """The text of a conversation, with the ranges that are trained on."""
        template = self._template_for(conversation)
        own = conversation.inputs.variables
        clash = sorted(RESERVED & own.keys())
        if clash:
            raise InputError(
                f"{conversation.where}: chat_template_kwargs has {clash[0]!r}, which the row or the tokenizer has"
            )
        given = {name: value for name, value in self._variables.items() if name in template.variables}
        inputs = replace(conversation.inputs, variables={**given, **own})
        written = render(template, replace(conversation, inputs=inputs), self._version_1)
        self._used[template.source] = template
        self._conversations += 1
        self._without_reply += not written.replies
        self._reasoning_left_out += written.reasoning_left_out
        self._endless += written.endless
        self._found_by.add(written.found_by)
        text = checked_text(written.text, conversation.where)
        # A template begins the text itself, and ends the turns.
        return Chunk(conversation.source, text, True, written.trained, begins=False, appended_trained=False)

    @property
    def record(self) -> dict[str, Any]:
        """The fields of a stream's record: what rendered its conversations, and what was given for them."""
        record: dict[str, Any] = {**self._record, "template_variables": dict(self._variables) or None}
        if self._used:
            sources = "\0".join(sorted(self._used))
            record["template_sha256"] = hashlib.sha256(sources.encode()).hexdigest()
        if any(template.prints_date for template in self._used.values()):
            record["date"] = self._date.isoformat()
        return record

    def notes(self) -> list[str]:
        if not self._conversations:
            return []
        lines = [
            f"{counted(self._conversations, 'conversation')}; the replies are found by "
            f"{' and '.join(sorted(self._found_by))}"
        ]
        if self._without_reply:
            lines.append(
                f"without a reply: {counted(self._without_reply, 'conversation')}, of which nothing is trained on"
            )
        if self._reasoning_left_out:
            lines.append(f"{counted(self._reasoning_left_out, 'reply')}: the chat template leaves out the reasoning")
        if self._endless:
            lines.append(
                f"{counted(self._endless, 'reply')}: the chat template puts nothing after it, so that a student does "
                f"not learn to end it"
            )
        return lines

    def _template_for(self, conversation: Conversation) -> ChatTemplate:
        tokenizer, where = self._tokenizer, conversation.where
        if not tokenizer.is_fast:
            raise UnfitTokenizer(
                f"{where}: the loss mask of a conversation needs the character offsets of its tokens, and this "
                f"tokenizer ({type(tokenizer).__name__}) has none; take one with a tokenizer.json"
            )
        if not tokenizer.chat_template:
            raise UnfitTokenizer(
                f"{where}: the row holds messages and the tokenizer has no chat template; give one with "
                f"--chat-template FILE, or take the tokenizer of an instruction model"
            )
        try:
            source = tokenizer.get_chat_template(tools=conversation.inputs.tools)
        except ValueError:
            raise UnfitTokenizer(
                f"{where}: of the tokenizer's chat templates ({', '.join(sorted(tokenizer.chat_template))}) none is "
                f"the default; name one with --chat-template"
            ) from None
        return self._template(source)

    def _template(self, source: str) -> ChatTemplate:
        if source not in self._templates:
            try:
                self._templates[source] = ChatTemplate(self._tokenizer, source, self._date)
            except Exception as error:
                # Jinja has errors of its own for what is no template.
                raise UnfitTokenizer(
                    f"the chat template is not valid ({error_text(error, 300)}); correct it, or give "
                    f"--chat-template FILE"
                ) from None
        return self._templates[source]

    def _check(self, config: CorpusConfig) -> None:
        own = self._tokenizer.chat_template or {}
        templates = [self._template(source) for source in (own.values() if isinstance(own, dict) else [own])]
        read = frozenset[str]().union(*(template.variables for template in templates)) - RESERVED
        for name in sorted(config.template_variables.keys() - read):
            raise InputError(
                f"--template-variable {name}: the chat template reads no such variable; it reads "
                f"{', '.join(sorted(read)) or 'none'}"
            )
        if config.date is not None and not any(template.prints_date for template in templates):
            raise InputError("--date: no chat template of this tokenizer prints a date; leave the flag out")
