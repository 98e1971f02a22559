"""Conversations: the loss mask marks exactly the assistant's text, at the position before each of its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.caches.streams import CHATML, chat_tokenizer, documents, learnt, stream, write_rows
from support.models.saved import sample_text

from logit_cache.corpus import pieces
from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.tokenize import tokenize
from storage import LogitCache
from storage.errors import InputError

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
# No end marker but the line feed, and a space between name and reply that the prompt already holds.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERSATIONS = [
    [("user", "What is 2+2?"), ("assistant", "It is four, naïvely.")],
    [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello there!"),
        ("user", "A list\nplease"),
        ("assistant", "- one\n- two 日本"),
    ],
    [("user", "assistant"), ("assistant", "assistant said: assistant"), ("user", "no reply")],
    [("user", "Say nothing"), ("assistant", "x"), ("assistant", "and again")],
]


def messages_of(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (PLAIN, "\n")],
    ids=["chatml", "marked", "plain"],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "seeds", "unigram", "llama2", "metaspace"])
def test_the_mask_marks_the_replies_and_nothing_else(tmp_path: Path, template: str, end: str, kind: str) -> None:
    tokenizer = chat_tokenizer(template, kind)
    cache = stream(tmp_path, tokenizer, *({"messages": messages_of(turns)} for turns in CONVERSATIONS))
    text_bytes = 0
    for (tokens, mask), turns in zip(documents(cache), CONVERSATIONS, strict=True):
        expected = "".join(content + end for role, content in turns if role == "assistant")
        text = learnt(tokenizer, tokens, mask)
        if kind not in ("gpt2", "llama3") or template is PLAIN:
            # Some put spaces where they join words, or fold characters; the space before a reply may be in one token
            # with its first word. Letters and markers are what must agree.
            text, expected = "".join(text.split()), "".join(expected.split())
        assert text == expected
        rendered = tokenizer.apply_chat_template(messages_of(turns), tokenize=False)
        assert tokens.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        text_bytes += len(rendered.encode())
    assert cache.record.corpus.text_bytes == text_bytes


@pytest.mark.parametrize("reply", [" leading space", "trailing space ", "  ", "\n\nlines\n"])
@pytest.mark.parametrize("kind", ["seeds", "gpt2"])
def test_white_space_of_a_reply_is_trained_on(tmp_path: Path, kind: str, reply: str) -> None:
    tokenizer = chat_tokenizer(MARKED, kind)
    turns = [("user", "Hi"), ("assistant", reply), ("user", "more"), ("assistant", "the end")]
    cache = stream(tmp_path, tokenizer, {"messages": messages_of(turns)})
    [(tokens, mask)] = documents(cache)
    text = learnt(tokenizer, tokens, mask)
    assert text.count("<|im_end|>") == 2
    assert "more" not in text
    assert text.split("<|im_end|>")[0].strip(" ") == reply.strip(" ")
    if kind == "gpt2":
        assert text == f"{reply}<|im_end|>the end<|im_end|>"


def test_a_conversation_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1_000)
    monkeypatch.setattr(pieces, "MARGIN_CHARACTERS", 200)
    tokenizer = chat_tokenizer(CHATML)
    lines = sample_text()
    turns = [(("user", "assistant")[i % 2], lines[i * 700 : (i + 1) * 700]) for i in range(14)]
    cache = stream(tmp_path, tokenizer, {"messages": messages_of(turns)})
    [(tokens, mask)] = documents(cache)
    assert learnt(tokenizer, tokens, mask) == "".join(f"{text}<|im_end|>" for role, text in turns[1::2])


def test_text_rows_are_trained_on_wholly_and_never_across_documents(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML)
    rows: list[dict[str, Any]] = [
        {"text": "A plain document."},
        {"messages": messages_of(CONVERSATIONS[0])},
        {"text": "x"},
        {"text": "And the last one."},
    ]
    cache = stream(tmp_path, tokenizer, *rows, append_token="</s>")
    found = documents(cache)
    last = tokenizer.get_vocab()["</s>"]
    assert [tokens[-1] for tokens, _ in found] == [last] * 4
    for index in (0, 2, 3):
        tokens, mask = found[index]
        assert mask.tolist() == [True] * (len(tokens) - 1) + [False]
    tokens, mask = found[1]
    assert learnt(tokenizer, tokens, mask) == "It is four, naïvely.<|im_end|>"


def test_a_template_from_a_file_and_a_tokenizer_trained_on_the_messages(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(CHATML, encoding="utf-8")
    parts = [{"type": "text", "text": text} for text in (sample_text()[:2_000], sample_text()[2_000:3_000])]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "fine, thanks"}]}
    config = CorpusConfig(
        text=(write_rows(tmp_path / "chat.jsonl", row),),
        out=str(tmp_path / "cache"),
        train_tokenizer=400,
        special_tokens=("<|im_start|>", "<|im_end|>"),
        chat_template=str(tmp_path / "template.jinja"),
    )
    tokenize(config)
    cache = LogitCache.open(config.out)
    assert cache.vocabulary_size == 400, "all of the messages' text was trained on"
    assert cache.tokenizer_files()["chat_template.jinja"].decode() == CHATML
    vocabulary = json.loads(cache.tokenizer_files()["tokenizer.json"])["model"]["vocab"]
    assert {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}.items() <= vocabulary.items()
    [(tokens, mask)] = documents(cache)
    assert tokens[1:][mask[:-1]][-1] == 4
    assert int((tokens[:-1][mask[:-1]] == 4).sum()) == 0


def _refused(tmp_path: Path, tokenizer: Any, messages: Any) -> str:
    with pytest.raises(InputError) as caught:
        stream(tmp_path, tokenizer, {"text": "a document before"}, {"messages": messages})
    assert not (tmp_path / "cache").exists()
    return str(caught.value)


def test_messages_that_cannot_be_rendered_are_refused_with_their_row(tmp_path: Path) -> None:
    good = messages_of(CONVERSATIONS[1])
    where = f"{tmp_path / 'rows.jsonl'} line 2"
    # Earlier turns are rewritten once a later one follows, and no loop stands at the messages themselves.
    forgetful = (
        "{% for i in range(messages|length) %}{{ messages[i]['content'] }}{% if loop.last %}END{% endif %}{% endfor %}"
    )
    message = _refused(tmp_path, chat_tokenizer(forgetful), good)
    assert message.startswith(f"{where}: message 2 cannot be found")
    assert "{% generation %}" in message
    message = _refused(tmp_path, chat_tokenizer(CHATML), messages_of([("assistant", "I am alone")]))
    assert message.startswith(f"{where}: message 0 cannot be found")
    message = _refused(tmp_path, chat_tokenizer("{{ raise_exception('roles must\nalternate') }}"), good)
    assert message.startswith(f"{where}: the chat template refuses these messages (roles must alternate)")
