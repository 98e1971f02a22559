"""Rows of data sets as documents: which form a row has, and what each of its fields means.

===========================================  ==========================================================================
`text`                                       a document, all of it trained on
`messages`, `conversations`                  a conversation: {role, content} or {from, value} objects; with `tools`,
                                             `documents`, `system` and `chat_template_kwargs` where a row has them
`prompt` + `completion` or `response`        texts, or lists of messages: only the completion is trained on
`instruction` (+ `input`, `context`,         a conversation of a question and its answer, after those of `history`
`system`, `history`) + `output`, `response`
`input_ids` (+ `labels`, a mask; `rollout`)  tokens as they are, and the model that sampled the trained ones
===========================================  ==========================================================================

A field that would change what is learnt and is not used by the row's form is refused, and so is a row of two forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from logit_cache.corpus.conversations.messages import (
    MEDIA,
    REASONING,
    WEIGHTS,
    check_roles,
    is_trained,
    message_list,
    read_json,
    read_message,
    read_objects,
)
from logit_cache.corpus.documents import Chunk, Conversation, Document, Inputs, Tokens, checked_text
from logit_cache.corpus.rollouts import read_rollout
from logit_cache.corpus.sources.names import check_source_name
from storage.errors import InputError
from student.labels import NOT_TRAINED

Row = Mapping[str, Any]
Form = Literal["text", "messages", "completion", "instruction", "input_ids"]

_CONVERSATIONS = ("conversations", "conversation")
_ANSWERS = ("completion", "response")
_OUTPUTS = ("output", "response")
_CONTEXTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask", "mask")
_SAMPLE_WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight")
# Values that change nothing.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys((*_SAMPLE_WEIGHTS, "train", "trainable"), 1),
    "train_on_inputs": False,
    "masked": False,
}

_COMPLETIONS = frozenset({"completion", "messages of a completion"})
_CHATS = _COMPLETIONS | {"messages", "instruction"}
_EVERY = _CHATS | {"text", "input_ids"}
# Every field that is read or looked for, besides those that a user names: the forms that do not read it though it would
# change what is learnt from their rows, and so are refused with it.
_FIELDS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("prompt", "instruction", "input_ids", "chosen", *_CONVERSATIONS), frozenset()),
    **dict.fromkeys((*_ANSWERS, *_OUTPUTS, "rejected", "labels", "attention_mask"), frozenset()),
    **dict.fromkeys((*_SAMPLE_WEIGHTS, *MEDIA, "masked", "train", "trainable", "train_on_inputs"), _EVERY),
    **dict.fromkeys((*_MASKS, "rollout"), _EVERY - {"input_ids"}),
    **dict.fromkeys(("functions", *REASONING), _CHATS),
    **dict.fromkeys(("tools", "chat_template_kwargs", *_SYSTEMS), frozenset({"completion"})),
    "documents": frozenset({"completion", "instruction"}),
    "history": _CHATS - {"instruction"},
    **dict.fromkeys(_CONTEXTS, _COMPLETIONS),
    **dict.fromkeys(("position_ids", "segment_ids", "seq_lengths"), frozenset({"input_ids"})),
}
# One of these at least makes a table one of documents.
_FORMS = frozenset({"prompt", "instruction", "input_ids", "chosen", *_CONVERSATIONS})


class RowReader:
    """Rows as documents. text_field, messages_field: names of the fields; chosen: the form of rows that can be read in
    several ways; source_column: the name of the field that names a row's source. columns: the fields that are looked
    for."""

    def __init__(
        self, text_field: str, messages_field: str, chosen: Form | None = None, source_column: str | None = None
    ) -> None:
        self.text_field, self.messages_field, self.source_column = text_field, messages_field, source_column
        self.columns = _FIELDS.keys() | {text_field, messages_field} | ({source_column} if source_column else set())
        self._chosen = chosen

    def columns_of(self, names: Sequence[str], where: str) -> list[str]:
        """Those of a table's columns that are looked for. Raises InputError for a table without any document."""
        if not (_FORMS | {self.text_field, self.messages_field}) & set(names):
            raise self._unknown(where, f"columns {', '.join(names[:12])}")
        if self.source_column is not None and self.source_column not in names:
            raise InputError(
                f"{where}: expected a column {self.source_column!r} with the source of each row, found columns "
                f"{', '.join(names[:12])}; correct --source-column"
            )
        found = [name for name in names if name in self.columns]
        if len(set(found)) < len(found):
            raise InputError(f"{where}: two columns have the same name ({', '.join(found)}); rename one of them")
        return found

    def source_of(self, row: Row, where: str) -> str:
        """The source that a row names. Raises InputError naming the row."""
        value = row.get(self.source_column or "")
        if not isinstance(value, str):
            raise InputError(
                f"{where}: expected a text in {self.source_column!r}, the source of the row, found "
                f"{'nothing' if value is None else type(value).__name__}; correct the row or --source-column"
            )
        check_source_name(value, f"{where}, {self.source_column!r}")
        return value

    def _unknown(self, where: str, found: str) -> InputError:
        return InputError(
            f"{where}: expected a string in {self.text_field!r} or messages in {self.messages_field!r} (or "
            f"conversations, prompt and completion, instruction and output, input_ids), found {found}; name the right "
            f"one with --text-field or --messages-field"
        )

    def document(self, source: int, row: Row, where: str, from_arrow: bool) -> Document:
        """The document that a row holds; from_arrow: absent fields of its objects appear as nulls.

        Raises InputError naming the row (`where`).
        """
        values = {name: value for name, value in row.items() if value is not None}
        form = self._form(values, row, where)
        if form is None:
            return Chunk(source, "", True)
        self._refuse_unused(values, form, where)
        if form == "text":
            return Chunk(source, checked_text(values[self.text_field], where), True)
        if form == "input_ids":
            return _tokens(source, values, where)
        if form == "completion":
            return _prompt_and_completion(source, values, where)
        return self._conversation(source, values, form, where, from_arrow)

    def _form(self, values: Row, row: Row, where: str) -> str | None:
        """The form of a row; None for one with no text in it."""
        answered = "prompt" in values and _first(values, _ANSWERS) is not None
        texts = isinstance(values.get("prompt"), str) and isinstance(_first(values, _ANSWERS), str)
        found = [
            form
            for form, there in (
                ("text", isinstance(values.get(self.text_field), str)),
                ("messages", self._messages(values, where) is not None),
                ("completion", answered and texts),
                ("messages of a completion", answered and not texts),
                ("instruction", "instruction" in values and _first(values, _OUTPUTS) is not None),
                ("input_ids", "input_ids" in values),
            )
            if there
        ]
        chosen = [form for form in found if self._chosen is not None and form.endswith(self._chosen)]
        if chosen:
            return chosen[0]
        if len(found) == 1:
            return found[0]
        fields = (
            ", ".join(f"{name} ({type(value).__name__})" for name, value in sorted(values.items())[:8]) or "nothing"
        )
        if found:
            raise InputError(
                f"{where}: the row can be read as {' and as '.join(found)} (it has {fields}); say which with "
                f"--row-form, or leave the other fields out"
            )
        empty = {self.text_field, self.messages_field} & row.keys() - values.keys()
        if empty and not {"prompt", "instruction", "chosen", *_ANSWERS} & values.keys():
            return None
        if "chosen" in values:
            raise InputError(
                f"{where}: the row holds preferences (chosen, rejected), and distillation learns from one text: write "
                f"the one that is meant as messages, or as prompt and completion"
            )
        raise self._unknown(where, fields)

    def _messages(self, values: Row, where: str) -> Any:
        return _only(values, (self.messages_field, *_CONVERSATIONS), where)

    def _refuse_unused(self, values: Row, form: str, where: str) -> None:
        own = {self.text_field, self.messages_field}
        for name in sorted(name for name in values.keys() & _FIELDS.keys() - own if form in _FIELDS[name]):
            value = values[name]
            if value not in ("", [], {}) and not (name in _NEUTRAL and value == _NEUTRAL[name]):
                raise InputError(
                    f"{where}: {name!r} ({str(value)[:40]}) would change what is learnt, and rows of {form} are read "
                    f"without it; take it into account in the data, or remove the field"
                )

    def _conversation(self, source: int, values: Row, form: str, where: str, from_arrow: bool) -> Conversation:
        untrained_before = 0
        if form == "messages":
            listed = self._messages(values, where)
            name = next(name for name in (self.messages_field, *_CONVERSATIONS) if values.get(name) is listed)
            messages = message_list(listed, name, where)
        elif form == "messages of a completion":
            prompt = message_list(_as_messages(values["prompt"], "user"), "prompt", where)
            answer = _as_messages(_only(values, _ANSWERS, where), "assistant")
            messages = [*prompt, *message_list(answer, "completion", where)]
            untrained_before = len(prompt)
        else:
            messages = _instruction(values, where)
        messages = [read_message(message, index, where, from_arrow) for index, message in enumerate(messages)]
        if form == "messages":
            _refuse_answers(values, messages, where)
        untrained = {i for i, m in enumerate(messages) if not is_trained(m, i, where) and m["role"] == "assistant"}
        messages = [{k: v for k, v in message.items() if k not in WEIGHTS} for message in messages]
        system = _only(values, _SYSTEMS, where)
        if system:
            if messages[0]["role"] == "system":
                raise InputError(f"{where}: the row has a system prompt beside one in its messages; leave one of them")
            messages = [{"role": "system", "content": checked_text(system, where)}, *messages]
            untrained = {index + 1 for index in untrained}
            untrained_before += 1
        check_roles(messages, where)
        before = {i for i in range(untrained_before) if messages[i]["role"] == "assistant"}
        variables = read_json(values.get("chat_template_kwargs"), "chat_template_kwargs", dict, where) or {}
        if from_arrow:  # absent fields of other rows
            variables = {name: value for name, value in variables.items() if value is not None}
        tools, documents = (read_objects(values.get(name), name, where, from_arrow) for name in ("tools", "documents"))
        inputs = Inputs(tools, documents, variables)
        return Conversation(source, messages, where, frozenset(untrained | before), inputs)


def _first(values: Row, names: Sequence[str]) -> Any:
    return next((values[name] for name in names if name in values), None)


def _only(values: Row, names: Sequence[str], where: str) -> Any:
    """The value of the only field of some that a row has; empty ones do not count, unless there is no other."""
    there = [name for name in names if values.get(name) not in (None, "", [])]
    if len(there) > 1:
        raise InputError(
            f"{where}: the row has {' and '.join(map(repr, there))}, of which one is read; leave one of them"
        )
    return values[there[0]] if there else _first(values, names)


def _refuse_answers(values: Row, messages: Sequence[Row], where: str) -> None:
    """Refuse an answer beside a conversation that does not have it."""
    said = [message.get("content") for message in messages]
    for name in dict.fromkeys((*_ANSWERS, *_OUTPUTS)):
        if isinstance(values.get(name), (str, list)) and values[name] and values[name] not in said:
            raise InputError(
                f"{where}: the row has {name!r} beside messages that do not have its text; add it to them, or remove it"
            )


def _prompt_and_completion(source: int, values: Row, where: str) -> Chunk:
    prompt, completion = (checked_text(value, where) for value in (values["prompt"], _only(values, _ANSWERS, where)))
    if not completion:
        raise InputError(f"{where}: the completion is empty, so there is nothing to learn from it; remove the row")
    whole = prompt + completion
    return Chunk(source, whole, True, ((len(prompt), len(whole)),), where=where)


def _tokens(source: int, values: Row, where: str) -> Tokens:
    """A row of ids: `labels` as transformers takes them (an id is its own label, or -100), or a mask of 0 and 1."""
    ids = _numbers(values["input_ids"], "input_ids", where)
    if len(ids) and (ids.min() < 0 or ids.max() >= 1 << 31):
        raise InputError(f"{where}: input_ids are from {ids.min()} to {ids.max()}, which are no ids; correct the row")
    masks = {name: _numbers(values[name], name, where) for name in _MASKS if name in values}
    for name, mask in masks.items():
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"{where}: {name!r} holds other values than 0 and 1; correct the row")
    if "labels" in values:
        labels = _numbers(values["labels"], "labels", where)
        masks["labels"] = labels != NOT_TRAINED
        if len(labels) == len(ids) and (labels != ids)[masks["labels"]].any():
            at = int(np.flatnonzero(masks["labels"] & (labels != ids))[0])
            raise InputError(
                f"{where}: label {at} is {labels[at]}, and id {at} is {ids[at]}: labels are the ids themselves, or "
                f"{NOT_TRAINED} where nothing is trained on (they are not moved); correct the row"
            )
    real = _numbers(values["attention_mask"], "attention_mask", where) if "attention_mask" in values else None
    for name, mask in {**masks, **({} if real is None else {"attention_mask": real})}.items():
        if len(mask) != len(ids):
            raise InputError(f"{where}: {len(ids)} input_ids and {len(mask)} values of {name!r}; correct the row")
    trained = None
    for mask in masks.values():
        if trained is not None and (trained != mask.astype(bool)).any():
            raise InputError(f"{where}: {' and '.join(masks)} disagree on what is trained on; leave one of them")
        trained = mask.astype(bool)
    if real is not None:
        there = np.flatnonzero(real == 1)
        if not np.isin(real, (0, 1)).all() or (len(there) and len(there) != there[-1] + 1 - there[0]):
            raise InputError(f"{where}: attention_mask is not one run of 1 among 0 of padding; give a row per document")
        ids = ids[there]
        trained = None if trained is None else trained[there]
    rollout = read_rollout(values.get("rollout"), where)
    return Tokens(source, ids.astype(np.uint32), trained, where, rollout=rollout)


def _numbers(value: Any, name: str, where: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    # Checked one by one: NumPy would cut 1.5 to 1, and take a text for a number. true and false are no ids.
    kinds = (int,) if name in ("input_ids", "labels") else (int, bool)
    if not isinstance(value, (list, tuple)) or not all(type(item) in kinds and abs(item) < 1 << 62 for item in value):
        raise InputError(f"{where}: {name!r} is not a list of whole numbers; correct the row")
    return np.asarray(value, dtype=np.int64).reshape(-1)


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _instruction(values: Row, where: str) -> list[dict[str, Any]]:
    messages = []
    history = values.get("history") or ()
    for turn in history if isinstance(history, (list, tuple)) else [None]:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise InputError(f"{where}: 'history' is not a list of [question, answer] pairs; correct the row")
        question, answer = (checked_text(text, where) for text in turn)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = checked_text(values["instruction"], where)
    context = _only(values, _CONTEXTS, where)
    if context:
        question = f"{question}\n\n{checked_text(context, where)}"
    answer = checked_text(_only(values, _OUTPUTS, where), where)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
