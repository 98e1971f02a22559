"""The loss mask of conversations, for templates like those of seven families, against a mask that needs no template."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.streams import documents, stream
from support.models.saved import make_tokenizer, sample_text
from support.references.chat_families import FAMILIES, SPECIAL, Family

DATE = datetime.date(2026, 2, 3)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "default": None}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "unit": None}}}

PLAIN = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is four, naïvely."},
    {"role": "user", "content": "assistant\nand then? 日本 😀"},
    {"role": "assistant", "content": "- one\n- two"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PLAIN]
EMPTY_REPLY = [*PLAIN[:1], {"role": "assistant", "content": ""}, *PLAIN[2:]]
LONE_QUESTION = [*PLAIN, {"role": "user", "content": "no reply"}]
THINKING = [
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "<think>\nearly thoughts\n</think>\n\nAn answer."},
    {"role": "user", "content": "Second?"},
    {"role": "assistant", "content": "<think>\nlate thoughts\n</think>\n\nAnother answer."},
]
WITH_TOOLS = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "rain"},
    {"role": "tool", "name": "weather", "content": "wind"},
    {"role": "assistant", "content": "It rains."},
]


def long_conversation() -> list[dict[str, Any]]:
    """Some 6,000 tokens in 40 turns."""
    text = sample_text()
    turns = [" ".join(text[i * 400 : (i + 1) * 400].split()) for i in range(40)]
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def check(folder: Path, family: Family, rows: list[dict[str, Any]], **options: Any) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL), "bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = family.template
    cache = stream(folder, tokenizer, *rows, **options)
    variables = options.get("template_variables", {})
    assert cache.loss_mask is not None
    for row, (tokens, mask) in zip(rows, documents(cache), strict=True):
        segments = list(family.reference(row["messages"], tools=row.get("tools"), date=f"{DATE:%d %b %Y}", **variables))
        text = "".join(part for part, _ in segments)
        trained = np.concatenate([np.full(len(part), wanted) for part, wanted in segments])
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert tokens.tolist() == encoded["input_ids"]
        of_token = [bool(trained[a:b].any()) for a, b in encoded["offset_mapping"]]
        # The position before a token is the one that learns it, and the last one of a document learns nothing.
        assert mask.tolist() == [*of_token[1:], False]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_is_that_of_the_family(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    rows = [PLAIN, EMPTY_REPLY, LONE_QUESTION, THINKING, long_conversation()] + [SYSTEM] * family.system
    if not family.calls:
        rows = [row for row in rows if row is not THINKING]
    conversations: list[dict[str, Any]] = [{"messages": messages} for messages in rows]
    if family.calls:
        conversations += [{"messages": WITH_TOOLS, **({"tools": TOOLS} if family.tools else {})}]
        conversations += [{"messages": WITH_TOOLS[:4]}]
    options = {"date": DATE} if "strftime_now" in family.template else {}
    check(tmp_path, family, conversations, **options)


def test_without_thinking(tmp_path: Path) -> None:
    rows = [{"messages": messages} for messages in (PLAIN, SYSTEM, THINKING, WITH_TOOLS)]
    check(tmp_path, FAMILIES["qwen-3"], rows, template_variables={"enable_thinking": False})
