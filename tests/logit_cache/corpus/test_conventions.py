"""How documents begin and conversations are rendered: by the tokenizer, by flags, and as recorded."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import ValidationError
from support.caches.streams import CHATML, chat_tokenizer, documents, learnt, stream, write_rows
from support.commands import COMMANDS, ROOT
from support.models.saved import make_tokenizer, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.conventions import Conventions
from logit_cache.corpus.conversations.template import ChatTemplate
from logit_cache.corpus.tokenize import tokenize
from storage import LogitCache
from storage.errors import IdentityMismatch, InputError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
DATED = "{{ bos_token }}Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML
CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}]}
PRINTED = "{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
CALLS_WITHOUT_CONTENT = CHATML.replace(
    "{{ m['content'] }}", "{% if m.content %}{{ m.content }}{% else %}" + PRINTED + "{% endif %}"
)
CHATML_OF_TEXTS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
TOOLS_BESIDE_SYSTEM = "{% if messages[0].role == 'system' %}{{ tools | tojson }}{% endif %}" + CHATML
NAMED = CHATML + "{% if style is defined %}{{ style }}{% endif %}"


def save(folder: Path, template: str | dict[str, str] | None = CHATML, begins: bool = True, ends: bool = False) -> str:
    """A tokenizer that puts <s> before a text, or </s> after it, by itself."""
    tokenizer = chat_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    parts = ["<s>"] * begins + ["$A"] + ["</s>"] * ends
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=" ".join(parts), special_tokens=ids)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make(out: Path, tokenizer: str, *text: str, **options: Any) -> LogitCache:
    tokenize(CorpusConfig(text=text, out=str(out), tokenizer=tokenizer, **options))
    return LogitCache.open(str(out))


def tokenizer_of(cache: LogitCache) -> Any:
    return AutoTokenizer.from_pretrained(f"{cache.url}/tokenizer")


def texts(cache: LogitCache) -> list[str]:
    decode = tokenizer_of(cache).decode
    return [decode(tokens) for tokens, _ in documents(cache)]


def trained(cache: LogitCache) -> list[bool]:
    return [wanted for _, mask in documents(cache) for wanted in mask.tolist()]


def learnt_of(cache: LogitCache) -> str:
    """The text that is trained on in a stream of one document."""
    [(tokens, mask)] = documents(cache)
    return learnt(tokenizer_of(cache), tokens, mask)


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in files)).hexdigest()


@pytest.fixture
def as_version_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Conventions, "of", lambda *_: Conventions(version=1, bos=False))


def test_documents_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tok")
    rows = [{"text": "one"}, {"text": "<s>two"}, {"prompt": "1+", "completion": "1"}, {"messages": TURNS},
            {"input_ids": [5, 6]}]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    cache = make(tmp_path / "cache", tokenizer, path)
    found = texts(cache)
    assert found[:3] == ["<s>one", "<s>two", "<s>1+1"]
    assert found[3].startswith("<|im_start|>user")
    assert cache.tokens.read(len(cache.tokens) - 2, len(cache.tokens)).tolist() == [5, 6]
    assert cache.record.format_version == 2
    assert cache.record.corpus.begins_with_bos is True
    without = make(tmp_path / "without", tokenizer, path, bos=False)
    assert texts(without)[:3] == ["one", "<s>two", "1+1"]
    assert without.record.corpus.begins_with_bos is False


def test_a_tokenizer_without_a_beginning_adds_none_unless_asked(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tok", begins=False)
    path = write_rows(tmp_path / "rows.jsonl", {"text": "one"})
    assert texts(make(tmp_path / "a", tokenizer, path)) == ["one"]
    assert texts(make(tmp_path / "b", tokenizer, path, bos=True)) == ["<s>one"]


def test_an_appended_token_is_trained_on_after_a_completion(tmp_path: Path) -> None:
    cache = stream(tmp_path, save(tmp_path / "tok"), {"prompt": "ab cd", "completion": " ef"}, append_token="</s>")
    assert texts(cache) == ["<s>ab cd ef</s>"]
    mask = trained(cache)
    assert mask[-3:] == [True, True, False]
    assert sum(mask) == len(make_tokenizer("gpt2")(" ef")["input_ids"]) + 1


def test_tokens_keep_their_mask(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tok")
    cache = stream(tmp_path, tokenizer, {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8]})
    assert cache.tokens.read(0, 4).tolist() == [5, 6, 7, 8]
    assert trained(cache) == [False, True, False, False]
    assert cache.record.corpus.text_bytes > 0
    too_large = write_rows(tmp_path / "large.jsonl", {"input_ids": [5, 1 << 20]})
    with pytest.raises(InputError, match=r"large\.jsonl line 1: it holds the id 1048576, and the tokenizer has"):
        make(tmp_path / "no", tokenizer, too_large)


@pytest.mark.usefixtures("as_version_1")
def test_a_stream_of_version_1_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = save(tmp_path / "tok")
    path = write_rows(tmp_path / "rows.jsonl", {"text": "one"}, {"messages": TURNS})
    old = make(tmp_path / "old", tokenizer, path)
    assert old.record.format_version == 1
    assert old.document_sources is None
    before = digest(tmp_path / "old")
    monkeypatch.undo()
    make(tmp_path / "old", tokenizer, path)
    assert digest(tmp_path / "old") == before
    with pytest.raises(IdentityMismatch, match="stream_sha256"):
        make(tmp_path / "old", tokenizer, path, bos=True)
    for named, column in ((f"rows.jsonl={path}", None), (path, "domain")):
        with pytest.raises(InputError, match="a stream of version 1, which does not say where its documents are from"):
            make(tmp_path / "old", tokenizer, named, source_column=column)
    assert digest(tmp_path / "old") == before
    # Held-out text is made as the first stream was, wherever its tokenizer is looked for.
    (tmp_path / "link").symlink_to(tmp_path / "old" / "tokenizer")
    again = make(tmp_path / "linked", str(tmp_path / "link"), path)
    assert again.record.corpus.begins_with_bos is False
    held_out = make(tmp_path / "held-out", str(tmp_path / "old" / "tokenizer"), path)
    assert texts(held_out)[0] == "one"
    assert held_out.record.corpus.begins_with_bos is False


@pytest.mark.usefixtures("as_version_1")
def test_a_text_after_the_last_reply_was_trained_on_in_version_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save(tmp_path / "tok", CHATML + "{% if not add_generation_prompt %}</s>{% endif %}")
    path = write_rows(tmp_path / "rows.jsonl", {"messages": TURNS})
    old = trained(make(tmp_path / "old", tokenizer, path))
    monkeypatch.undo()
    assert trained(make(tmp_path / "old", tokenizer, path)) == old
    new = trained(make(tmp_path / "new", tokenizer, path))
    # "\n</s>" stands behind the marker that ends the reply.
    assert sum(old) == sum(new) + 2


def test_a_date_is_recorded_and_holds(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tok", DATED)
    path = write_rows(tmp_path / "rows.jsonl", {"messages": TURNS})
    day = datetime.date(2020, 2, 3)
    cache = make(tmp_path / "cache", tokenizer, path, date=day)
    assert texts(cache)[0].startswith("<s>Today is 03 February 2020.")
    assert cache.record.corpus.date == "2020-02-03"
    before = digest(tmp_path / "cache")
    make(tmp_path / "cache", tokenizer, path)
    assert digest(tmp_path / "cache") == before
    of_cache = make(tmp_path / "held-out", str(tmp_path / "cache" / "tokenizer"), path)
    assert of_cache.record.corpus.date == "2020-02-03"
    today = make(tmp_path / "today", tokenizer, path).record.corpus.date
    assert today is not None
    assert abs(datetime.date.fromisoformat(today) - datetime.date.today()) <= datetime.timedelta(days=1)


def test_variables_of_templates_are_recorded_and_hold(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "tok", NAMED)
    path = write_rows(
        tmp_path / "rows.jsonl", {"messages": TURNS}, {"messages": TURNS, "chat_template_kwargs": {"style": 3}}
    )
    cache = make(tmp_path / "cache", tokenizer, path, template_variables=("style=dry",))
    first, second = texts(cache)
    assert (first[-3:], second[-1]) == ("dry", "3")
    assert cache.record.corpus.template_variables == {"style": "dry"}
    assert cache.record.corpus.template_sha256 == hashlib.sha256(NAMED.encode()).hexdigest()
    before = digest(tmp_path / "cache")
    make(tmp_path / "cache", tokenizer, path)
    assert digest(tmp_path / "cache") == before
    with pytest.raises(IdentityMismatch, match="template_variables"):
        make(tmp_path / "cache", tokenizer, path, template_variables={"style": "wet"})


def test_a_tokenizer_with_several_templates(tmp_path: Path) -> None:
    named = {"default": CHATML, "tool_use": "{% for tool in tools %}{{ tool.name }}{% endfor %}" + CHATML}
    tokenizer = save(tmp_path / "tok", named)
    path = write_rows(tmp_path / "rows.jsonl", {"messages": TURNS}, {"messages": TURNS, "tools": [{"name": "f"}]})
    cache = make(tmp_path / "cache", tokenizer, path)
    plain, with_tools = texts(cache)
    assert (plain[:12], with_tools[:13]) == ("<|im_start|>", "f<|im_start|>")
    assert cache.record.corpus.template_sha256 is not None
    before = digest(tmp_path / "cache")
    make(tmp_path / "cache", tokenizer, path)
    assert digest(tmp_path / "cache") == before
    # Held-out text has both again; plain text needs none of them.
    again = make(tmp_path / "held-out", str(tmp_path / "cache"), path)
    assert texts(again) == [plain, with_tools]
    only = write_rows(tmp_path / "tools.jsonl", {"messages": TURNS, "tools": [{"name": "f"}]})
    assert texts(make(tmp_path / "b", tokenizer, only, chat_template="tool_use")) == [with_tools]
    without_default = save(tmp_path / "tok-2", {"rag": CHATML, "tool_use": CHATML})
    with pytest.raises(InputError, match=r"line 1: of the tokenizer's chat templates \(rag, tool_use\) none is"):
        make(tmp_path / "c", without_default, path)
    assert texts(make(tmp_path / "d", without_default, write_rows(tmp_path / "t.jsonl", {"text": "a"})))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_variables": {"stile": 1}}, "--template-variable stile: .* it reads style"),
        ({"date": datetime.date(2020, 1, 1)}, "--date: no chat template of this tokenizer prints a date"),
        ({"chat_template": "rag"}, "rag: cannot be read as a chat template"),
    ],
)
def test_what_no_template_reads_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(tmp_path, save(tmp_path / "tok", NAMED), {"text": "a"}, **options)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (CHATML, {"messages": TURNS, "tools": [{"name": "f"}]}, "the row has 'tools', and the chat template reads no"),
        (CHATML, {"messages": TURNS, "documents": [{"text": "d"}]}, "the row has 'documents'"),
        (CHATML, {"messages": TURNS, "chat_template_kwargs": {"think": True}}, "the row has 'think'"),
        (CHATML, {"messages": TURNS, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has 'tools'"),
        (CHATML, {"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"name": "f"}]}]}, "message 1 has 'tool_calls'"),
        (CHATML, {"messages": [TURNS[0], {**TURNS[1], "thinking": "hm"}]}, "message 1 has 'thinking'"),
        (
            "{{ messages[0].content }}",
            {"messages": TURNS},
            "content of message 1 .assistant., 'yo', does not stand",
        ),
        (CALLS_WITHOUT_CONTENT, {"messages": [TURNS[0], {**TURNS[1], **CALL}]}, "tool_calls of message 1 .assistant."),
        (
            CHATML_OF_TEXTS,
            {"messages": [TURNS[0], {"role": "tool", "content": "sunny"}, TURNS[1]]},
            "message 2|message 1",
        ),
        (TOOLS_BESIDE_SYSTEM, {"messages": TURNS, "tools": [{"name": "f"}]}, "the tool 'f' does not stand"),
        (CHATML, {"messages": TURNS[:1]}, "no token of it is trained on"),
        (CHATML, {"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}, "no token of it is trained on"),
        ("{% for", {"messages": TURNS}, "the chat template is not valid"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path: Path, template: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(tmp_path, save(tmp_path / "tok", template), row)
    assert not (tmp_path / "cache").exists()


def test_content_is_given_as_the_template_takes_it(tmp_path: Path) -> None:
    of_parts = CHATML.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part.text }}{% endfor %}")
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, TURNS[1]]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    for name, template, messages in (("a", CHATML, parts), ("b", of_parts, TURNS), ("c", of_parts, parts)):
        folder = tmp_path / name
        assert texts(stream(folder, save(folder / "tok", template), {"messages": messages})) == [expected]


@pytest.mark.parametrize("arguments", ['{"b": 2, "a": null}', {"b": 2, "a": None}])
def test_arguments_of_calls_are_not_quoted_twice(tmp_path: Path, arguments: Any) -> None:
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] or (m.tool_calls[0].function.name + (m.tool_calls[0].function.arguments | tojson)) }}",
    )
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {"messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    [text] = texts(stream(tmp_path, save(tmp_path / "tok", template), row))
    assert 'assistant\nf{"b": 2, "a": null}<|im_end|>' in text


@pytest.mark.parametrize("content", [None, ""])
def test_calls_are_given_in_the_form_that_the_template_prints(tmp_path: Path, content: str | None) -> None:
    """Their arguments as text, with a content that is one."""
    printed = "{{ '`' + m.tool_calls[0].function.name + m.tool_calls[0].function.arguments + '`' }}"
    template = CHATML.replace(
        "{{ m['content'] }}", "{{ m['content'] + '' }}{% if m.tool_calls %}" + printed + "{% endif %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    row = {"messages": [TURNS[0], {"role": "assistant", "content": content, "tool_calls": [call]}]}
    [text] = texts(stream(tmp_path, save(tmp_path / "tok", template), row))
    assert text.endswith('assistant\n`f{"a": 1}`<|im_end|>\n')


def test_content_like_the_end_marker_and_private_characters(tmp_path: Path) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "a >"}, {"role": "user", "content": "\ue0f0 \ue0f1"}, TURNS[1]]
    cache = stream(tmp_path, save(tmp_path / "tok", CHATML), {"messages": turns})
    assert learnt_of(cache) == "a ><|im_end|>yo<|im_end|>"


def test_a_prompt_that_depends_on_the_question(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and 'brief' in messages[loop.index0 - 1].content %}BRIEF {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if 'brief' in messages[-1].content %}BRIEF {% endif %}{% endif %}"
    )
    turns = [*TURNS, {"role": "user", "content": "be brief"}, TURNS[1], *TURNS]
    cache = stream(tmp_path, save(tmp_path / "tok", template), {"messages": turns})
    assert learnt_of(cache).replace(" ", "") == "yo<|im_end|>" * 3


@pytest.mark.parametrize(
    ("given", "value"),
    [("style=", ""), ("style=007", "007"), ("style=12:30", "12:30"), ("style=2024-07-26", "2024-07-26"),
     ("style=.nan", ".nan"), ("style=False", False), ("style=true", True), ("style=3", 3), ('style="3"', "3")],
)  # fmt: skip
def test_values_of_variables_are_json_or_text(given: str, value: Any) -> None:
    config = CorpusConfig(text=("t",), out="o", tokenizer="x", template_variables=(given,))
    assert config.template_variables == {"style": value}


@pytest.mark.parametrize(
    "field", [{"date": 0}, {"date": "20240726"}, {"date": "2024-07-26T01:00"}, {"template_variables": {"a": math.nan}}]
)
def test_other_values_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CorpusConfig(text=("t",), out="o", tokenizer="x", **field)


def test_a_mask_needs_offsets(tmp_path: Path) -> None:
    for row in ({"prompt": "a", "completion": "b"}, {"messages": TURNS}):
        with pytest.raises(
            InputError, match=r"rows\.jsonl line 1: .*character offsets.*ByT5Tokenizer.*tokenizer\.json"
        ):
            stream(tmp_path, tiny_tokenizer("bytes"), row)
    cache = stream(tmp_path, tiny_tokenizer("bytes"), {"input_ids": [5, 6], "labels": [-100, 6]})
    assert trained(cache) == [True, False]


def test_the_template_is_rendered_a_fixed_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    text = ChatTemplate.text
    monkeypatch.setattr(
        ChatTemplate, "text", lambda self, *rest, **named: calls.append(1) or text(self, *rest, **named)
    )
    tokenizer = save(tmp_path / "tok")
    numbers = []
    for turns in (2, 200):
        calls.clear()
        make(tmp_path / str(turns), tokenizer, write_rows(tmp_path / "rows.jsonl", {"messages": TURNS * turns}))
        numbers.append(len(calls))
    assert numbers[0] == numbers[1]


def test_the_log_says_what_a_user_should_know(tmp_path: Path) -> None:
    drops = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}]
    rows.append({"messages": [TURNS[0], {"role": "assistant", "content": "<think>hm</think>yo"}]})
    config = CorpusConfig(
        text=(write_rows(tmp_path / "rows.jsonl", *rows),),
        out=str(tmp_path / "cache"),
        tokenizer=save(tmp_path / "tok", drops, ends=True),
    )
    lines: list[str] = []
    tokenize(config, log=lines.append)
    assert lines == [
        "3 conversations; the replies are found by its loop over the messages",
        "without a reply: 1 conversation, of which nothing is trained on",
        "1 reply: the chat template leaves out the reasoning",
        "the tokenizer ends a text with '</s>'; documents here end so with --append-token '</s>'",
    ]


def test_the_page_s_example_is_true(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
    [row] = (json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    [shown] = re.findall(r"^```\n(<\|im_start\|>.*?)^```", page, re.MULTILINE | re.DOTALL)
    template = (
        "<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
        "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    cache = stream(tmp_path, save(tmp_path / "tok", template), row)
    schema = json.dumps(row["tools"][0])
    [text] = texts(cache)
    assert text.replace(schema, schema[: schema.index('"parameters"')] + "…}}") == re.sub("[‹›]", "", shown)
    assert learnt_of(cache) == "".join(re.findall("‹(.*?)›", shown))


def test_the_page_names_every_option_of_the_command() -> None:
    page = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
    group = COMMANDS["logit-cache"]
    assert isinstance(group, click.Group)
    options = {name for option in group.commands["tokenize"].params for name in option.opts} - {"--version"}
    assert {name for name in options if name not in page} == set()
