"""Rows that cannot be read: errors of their own, or left out and counted, but never all of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.caches.streams import write_rows

from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.tokenize import tokenize
from storage import LogitCache
from storage.errors import IdentityMismatch, InputError

GOOD = {"text": "fine"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    """Rows that cannot be read for every kind of reason, each between good ones."""
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    bad = (
        '{"text": "cut',
        [1],
        {"body": "x"},
        {"text": 3},
        {"text": "\ud800"},
        {"text": "x", "weight": 0.5},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [*CHAT["messages"], {"role": "tool", "content": "3"}]},
    )
    return write_rows(tmp_path / "a.jsonl", CHAT, *(row for each in bad for row in (each, GOOD)))


def made(tmp_path: Path, gpt2: str, *text: str, **options: object) -> tuple[LogitCache, list[str]]:
    lines: list[str] = []
    template = {"chat_template": str(tmp_path / "template.jinja")} if (tmp_path / "template.jinja").exists() else {}
    given = {} if "train_tokenizer" in options else {"tokenizer": gpt2}
    fields = {"text": text, "out": str(tmp_path / "cache"), **given, **template, **options}
    tokenize(CorpusConfig.model_validate(fields), log=lines.append)
    return LogitCache.open(str(tmp_path / "cache")), lines


def test_bad_rows_are_left_out_and_counted(tmp_path: Path, gpt2: str, bad: str) -> None:
    cache, lines = made(tmp_path, gpt2, bad, skip_bad_rows=True)
    assert cache.record.corpus.documents == 9
    assert cache.record.corpus.skipped_rows == 8
    at = lines.index("left out, which the record says: 8 rows that cannot be read; the first:")
    assert [line.partition(": ")[0] for line in lines[at + 1 : at + 6]] == [f"{bad} line {n}" for n in (2, 4, 6, 8, 10)]
    assert lines[at + 6].startswith("1 conversation; ")


def test_by_default_the_first_bad_row_is_refused(tmp_path: Path, gpt2: str, bad: str) -> None:
    with pytest.raises(InputError) as caught:
        made(tmp_path, gpt2, bad)
    assert str(caught.value).startswith(f"{bad} line 2: expected one JSON object per line")
    assert str(caught.value).endswith("(--skip-bad-rows leaves such rows out)")
    assert not (tmp_path / "cache").exists()


def test_rows_are_left_out_when_a_tokenizer_is_trained(tmp_path: Path, gpt2: str, bad: str) -> None:
    cache, _ = made(tmp_path, gpt2, bad, train_tokenizer=300, skip_bad_rows=True)
    assert cache.record.corpus.skipped_rows == 8


def test_a_stream_is_the_same_however_many_rows_were_left_out(tmp_path: Path, gpt2: str) -> None:
    text = write_rows(tmp_path / "a.jsonl", GOOD, "bad")
    cache, _ = made(tmp_path, gpt2, text, skip_bad_rows=True)
    before = cache.record
    write_rows(tmp_path / "a.jsonl", GOOD)
    for options in ({}, {"skip_bad_rows": True}):
        cache, _ = made(tmp_path, gpt2, text, **options)
        assert cache.record == before
    write_rows(tmp_path / "a.jsonl", GOOD, GOOD, "bad")
    with pytest.raises(IdentityMismatch, match="stream_sha256"):
        made(tmp_path, gpt2, text, skip_bad_rows=True)


def test_where_nothing_is_left_out_nothing_is_recorded(tmp_path: Path, gpt2: str) -> None:
    cache, _ = made(tmp_path, gpt2, write_rows(tmp_path / "a.jsonl", GOOD, {"text": None}), skip_bad_rows=True)
    assert "skipped_rows" not in cache.record.corpus.model_dump()


def test_a_file_of_bad_rows_alone_is_refused(tmp_path: Path, gpt2: str) -> None:
    good, wrong = write_rows(tmp_path / "a.jsonl", GOOD), write_rows(tmp_path / "b.jsonl", {"body": "x"}, {"body": "y"})
    with pytest.raises(InputError) as caught:
        made(tmp_path, gpt2, good, wrong, skip_bad_rows=True)
    assert str(caught.value).startswith(f"{wrong}: none of its 2 rows can be read")
    assert f"The first: {wrong} line 1: expected a string in 'text'" in str(caught.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (CHAT, {}, "the tokenizer has no chat template"),
        ({"input_ids": [70_000]}, {}, "it holds the id 70000, and the tokenizer has"),
        (CHAT, {"train_tokenizer": 300}, "a new tokenizer has no chat template"),
        ({"input_ids": [1]}, {"train_tokenizer": 300}, "no tokenizer can be trained on"),
    ],
)
def test_a_tokenizer_that_does_not_fit_makes_no_row_bad(
    tmp_path: Path, gpt2: str, row: object, options: dict[str, object], message: str
) -> None:
    text = write_rows(tmp_path / "a.jsonl", GOOD, row, GOOD)
    with pytest.raises(InputError, match=rf"a\.jsonl line 2: .*{message}"):
        made(tmp_path, gpt2, text, skip_bad_rows=True, **options)


def test_files_without_documents_are_named(tmp_path: Path, gpt2: str) -> None:
    good, empty = write_rows(tmp_path / "a.jsonl", GOOD), write_rows(tmp_path / "b.jsonl", {"text": ""})
    assert "without a document: 1 of 2 files: b.jsonl" in made(tmp_path, gpt2, good, empty)[1]
