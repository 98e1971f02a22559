"""Rows as documents: every form has its right value; a field that would change what is learnt is used or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from logit_cache.corpus.documents import Chunk, Conversation, Document, Inputs, Tokens
from logit_cache.corpus.rows import RowReader
from storage.errors import InputError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]


def document(row: dict[str, Any], from_arrow: bool = False, **options: Any) -> Document:
    return RowReader("text", "messages", **options).document(0, row, "row 3", from_arrow)


def conversation(row: dict[str, Any], /, **options: Any) -> Conversation:
    found = document(row, **options)
    assert isinstance(found, Conversation)
    return found


def refused(row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        document(row, **options)
    assert str(caught.value).startswith("row 3: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": TURNS, "id": 7, "source": "x", "score": 0.5}, TURNS),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, TURNS),
        ({"conversations": [{"from": "Human", "value": "hi"}, {"from": "GPT", "value": "yo"}]}, TURNS),
        ({"conversations": [{"role": "user", "content": "hi"}, {"role": "model", "content": "yo"}]}, TURNS),
        ({"conversation": TURNS}, TURNS),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}, TURNS),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TURNS),
        ({"prompt": TURNS[:1], "completion": "yo"}, TURNS),
        ({"prompt": "hi", "response": TURNS[1:]}, TURNS),
        ({"instruction": "hi", "output": "yo", "input": ""}, TURNS),
        ({"instruction": "hi", "response": "yo", "context": None}, TURNS),
        ({"instruction": "say", "input": "it", "output": "yo"}, [{"role": "user", "content": "say\n\nit"}, TURNS[1]]),
        ({"instruction": "b", "output": "d", "history": [["hi", "yo"]]},
         [*TURNS, {"role": "user", "content": "b"}, {"role": "assistant", "content": "d"}]),
        ({"messages": TURNS, "system": "Be."}, [{"role": "system", "content": "Be."}, *TURNS]),
        ({"instruction": "hi", "output": "yo", "system_prompt": "Be."}, [{"role": "system", "content": "Be."}, *TURNS]),
        ({"messages": [{"role": "user", "content": ["hi", {"type": "text", "text": "!"}]}, TURNS[1]]},
         [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "!"}]}, TURNS[1]]),
    ],
)  # fmt: skip
def test_conversations(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert conversation(row).messages == messages


def test_what_stands_beside_the_messages_reaches_the_template() -> None:
    row = {"messages": TURNS, "tools": TOOLS, "documents": [{"text": "d"}], "chat_template_kwargs": {"think": None}}
    assert conversation(row).inputs == Inputs(TOOLS, [{"text": "d"}], {"think": None})
    assert conversation({"messages": TURNS, "tools": json.dumps(TOOLS)}).inputs.tools == TOOLS
    assert conversation({"messages": TURNS, "tools": []}).inputs.tools is None


def test_a_null_is_kept_where_it_is_a_value() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome", "unit": None}}, "id": None}
    reply = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    kept = {"role": "assistant", "tool_calls": [{key: call[key] for key in ("type", "function")}]}
    assert conversation({"messages": [TURNS[0], reply]}).messages[1] == kept
    # Arrow has nulls for absent fields, too: which one this is cannot be known.
    assert "message 1: 'arguments' holds a null" in refused({"messages": [TURNS[0], reply]}, from_arrow=True)
    assert "'tools' holds a null" in refused({"messages": TURNS, "tools": TOOLS}, from_arrow=True)
    assert conversation({"messages": TURNS, "tools": json.dumps(TOOLS)}, from_arrow=True).inputs.tools == TOOLS


def test_a_shared_gpt_function_call_is_a_tool_call() -> None:
    call = {"name": "f", "arguments": {"a": 1}}
    rows = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "yo"}]  # fmt: skip
    found = conversation({"conversations": rows}).messages
    assert found[1] == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert found[2] == {"role": "tool", "content": "3"}


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_replies_that_are_not_trained_on(flag: dict[str, Any]) -> None:
    messages = [TURNS[0], TURNS[1] | flag, TURNS[0], TURNS[1] | {next(iter(flag)): 1}]
    found = conversation({"messages": messages})
    assert found.untrained == {1}
    assert found.messages == TURNS * 2
    assert conversation({"messages": messages, "system": "Be."}).untrained == {2}
    assert conversation({"prompt": messages[:3], "completion": messages[3:]}).untrained == {1}


def test_replies_of_a_prompt_are_not_trained_on() -> None:
    assert conversation({"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]}).untrained == {1}


def test_a_prompt_and_its_completion_are_one_text() -> None:
    assert document({"prompt": "1+1=", "completion": " 2"}) == Chunk(0, "1+1= 2", True, ((4, 6),), where="row 3")


def test_tokens() -> None:
    def tokens(**row: Any) -> tuple[list[int], list[bool] | None]:
        found = document({"input_ids": [5, 6, 7], **row})
        assert isinstance(found, Tokens)
        return found.ids.tolist(), None if found.trained is None else found.trained.tolist()

    assert tokens() == ([5, 6, 7], None)
    assert tokens(labels=[-100, 6, 7]) == ([5, 6, 7], [False, True, True])
    for name in ("loss_mask", "completion_mask", "assistant_masks"):
        assert tokens(**{name: [0, 1, 1]}) == ([5, 6, 7], [False, True, True])
    assert tokens(labels=[-100, 6, -100], attention_mask=[1, 1, 0]) == ([5, 6], [False, True])
    assert tokens(attention_mask=[0, 1, 1], token_type_ids=[0, 0, 0]) == ([6, 7], None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [6, 7, 8]}, "label 0 is 6, and id 0 is 5"),
        ({"labels": [-100, 6]}, "3 input_ids and 2 values of 'labels'"),
        ({"loss_mask": [0, 1]}, "3 input_ids and 2 values of 'loss_mask'"),
        ({"loss_mask": [0, 0.5, 1]}, "'loss_mask' is not a list of whole numbers"),
        ({"loss_mask": [0, 2, 1]}, "'loss_mask' holds other values than 0 and 1"),
        ({"labels": [-100, 6, 7], "loss_mask": [1, 1, 1]}, "disagree on what is trained on"),
        ({"attention_mask": [1, 0, 1]}, "attention_mask is not one run of 1"),
        ({"attention_mask": [1, 1, 2]}, "attention_mask is not one run of 1"),
        ({"position_ids": [0, 0, 1]}, "'position_ids'"),
        ({"seq_lengths": [1, 2]}, "'seq_lengths'"),
        ({"input_ids": "5 6 7"}, "'input_ids' is not a list of whole numbers"),
        ({"input_ids": [[5, 6, 7]]}, "'input_ids' is not a list of whole numbers"),
        ({"input_ids": [5, -6, 7]}, "which are no ids"),
        ({"input_ids": [5, 10**20, 7]}, "'input_ids' is not a list of whole numbers"),
        ({"input_ids": [True, False]}, "'input_ids' is not a list of whole numbers"),
        ({"weight": 0.3}, "'weight' (0.3) would change what is learnt"),
    ],
)
def test_tokens_that_are_refused(row: dict[str, Any], message: str) -> None:
    assert message in refused({"input_ids": [5, 6, 7], **row})


CALL = {"role": "assistant", "content": "", "function_call": {"name": "f"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS, "text": "a"}, "the row can be read as text and as messages"),
        ({"text": "a", "instruction": "b", "output": "c"}, "as text and as instruction"),
        ({"chosen": TURNS, "rejected": TURNS}, "preferences (chosen, rejected)"),
        ({"prompt": "a"}, "expected a string in 'text'"),
        ({"messages": TURNS, "loss_mask": [1]}, "'loss_mask' ([1]) would change what is learnt"),
        ({"text": "a", "loss_mask": [1]}, "'loss_mask'"),
        ({"text": "a", "weight": 0.5}, "'weight' (0.5)"),
        ({"messages": TURNS, "images": ["a.png"]}, "'images'"),
        ({"messages": TURNS, "functions": [{"name": "f"}]}, "'functions'"),
        ({"messages": TURNS, "history": [["a", "b"]]}, "'history'"),
        ({"instruction": "a", "output": "b", "reasoning": "c"}, "'reasoning'"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "'tools'"),
        ({"messages": [{"role": "system", "content": "x"}, *TURNS], "system": "y"}, "a system prompt beside one"),
        ({"messages": [{"role": "expert", "content": "a"}, TURNS[0]]}, "no message has the role assistant"),
        ({"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]}, "message 1 has weight 0.5"),
        ({"messages": [TURNS[0] | {"train": True}, TURNS[1]]}, "message 0 has train True"),
        ({"messages": [TURNS[0], TURNS[1] | {"train_detail": []}]}, ""),
        ({"messages": [TURNS[0], TURNS[1] | {"train_detail": [1]}]}, "message 1 has 'train_detail'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}, TURNS[1]]}, "of type 'image'"),
        ({"messages": [{"role": "user", "content": 3}, TURNS[1]]}, "the content of message 0 is 3"),
        ({"messages": [{"role": 3, "content": "x"}]}, "message 0 has the role 3"),
        ({"messages": TURNS, "tools": "no json"}, "'tools' is a text that is no JSON"),
        ({"messages": TURNS, "tools": {"name": "f"}}, "'tools' is a dict, expected a list"),
        ({"messages": TURNS, "tools": ["f"]}, "'tools' is not a list of objects"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list, expected a dict"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' is not a list of [question, answer]"),
        ({"instruction": "a", "output": 3}, "expected a text, found int"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]}, "no JSON"),
        ({"messages": [TURNS[0], {"role": "assistant", "text": "yo"}]}, "message 1 (assistant) has no content"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "message 1 (assistant) has no content"),
        ({"messages": [TURNS[0] | {"reasoning": "hm"}, TURNS[1]]}, "message 0 (user): 'reasoning' is the text"),
        ({"messages": [TURNS[0], TURNS[1] | {"reasoning": ["hm"]}]}, "message 1 (assistant): 'reasoning' is the text"),
        ({"messages": [TURNS[0] | {"content": {"text": "x"}}, TURNS[1]]}, "the content of message 0 is {'text'"),
        ({"messages": [TURNS[0] | {"value": "other"}, TURNS[1]]}, "message 0 has 'content' and another 'value'"),
        ({"messages": [TURNS[0], TURNS[1] | {"masked": True}]}, "message 1 has 'masked'"),
        ({"messages": TURNS, "conversations": TURNS}, "the row has 'messages' and 'conversations'"),
        ({"messages": TURNS, "system": "a", "system_prompt": "b"}, "the row has 'system' and 'system_prompt'"),
        ({"messages": TURNS[:1], "response": "yo"}, "the row has 'response' beside messages"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "the row has 'input' and 'context'"),
        ({"instruction": "a", "output": "b", "response": "c"}, "the row has 'output' and 'response'"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "the row has 'completion' and 'response'"),
        ({"prompt": "a", "response": "b", "context": "c"}, "'context' (c) would change what is learnt"),
        ({"messages": TURNS, "train_on_inputs": True}, "'train_on_inputs'"),
        ({"instruction": "a", "output": "b", "history": 5}, "'history' is not a list of [question, answer]"),
        ({"instruction": "a", "output": "b", "history": [["a", None]]}, "expected a text, found NoneType"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "text"}, "'messages' is not a list"),
        ({"messages": [{"content": "x"}]}, "'messages' is not a list"),
    ],
)
def test_rows_that_are_refused(row: dict[str, Any], message: str) -> None:
    if message:
        assert message in refused(row)
    else:
        document(row)


def test_what_exports_write_for_absent_and_nested_values() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [TURNS[0] | {"tool_calls": []}, TURNS[1] | {"tool_calls": json.dumps([call])}]
    assert conversation({"messages": messages}).messages == [TURNS[0], TURNS[1] | {"tool_calls": [call]}]
    assert conversation({"messages": json.dumps(TURNS)}).messages == TURNS
    result = {"role": "tool", "content": {"city": "Rome", "unit": None}}
    assert conversation({"messages": [TURNS[0], result, TURNS[1]]}).messages[1] == result
    # Fields of other rows of a table.
    variables = {"enable_thinking": None, "style": "dry"}
    row = {"messages": TURNS, "chat_template_kwargs": variables}
    assert conversation(row, from_arrow=True).inputs.variables == {"style": "dry"}
    assert conversation(row).inputs.variables == variables


def test_a_weight_of_what_is_no_reply_changes_nothing() -> None:
    assert conversation({"messages": [TURNS[0] | {"weight": 0}, TURNS[1]]}).untrained == frozenset()


def test_a_named_field_decides() -> None:
    row = {"messages": TURNS, "text": "a", "instruction": "b", "output": "yo"}
    assert conversation(row, chosen="instruction").messages[0]["content"] == "b"
    assert document(row, chosen="text") == Chunk(0, "a", True)
    assert conversation(row, chosen="messages").messages == TURNS
