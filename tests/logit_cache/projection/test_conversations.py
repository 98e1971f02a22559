"""`logit-cache project` between streams of the same conversations that two chat templates rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.caches.projection import write_entries
from support.caches.streams import write_rows
from support.commands import in_process, refused, succeeded
from support.models.saved import make_tokenizer, sample_text
from support.references import chat_families

import logit_cache.projection.symbols
from logit_cache.projection.run import _spelling
from storage import LogitCache

Conversation = list[dict[str, str]]
LINES = [line.strip() for line in sample_text().splitlines() if len(line.strip()) > 20]
# Of one to three turns; some replies of several lines.
CHATS: list[Conversation] = [
    [
        {"role": role, "content": "\n".join(LINES[7 * n + 2 * turn + side :][: 1 + (n + turn) % 3 * side])}
        for turn in range(1 + n % 3)
        for side, role in enumerate(("user", "assistant"))
    ]
    for n in range(12)
]
# The student's tokenizer, its template, and the marker that ends its replies.
STUDENTS = {
    "llama-3": ("llama3", chat_families.LLAMA_3, "<|eot_id|>"),
    "gemma": ("llama2", chat_families.GEMMA, "<end_of_turn>"),
    "mistral": ("gpt2", chat_families.MISTRAL, "</s>"),  # a space begins its replies
    "the same tokenizer": ("gpt2", chat_families.LLAMA_3, "<|eot_id|>"),
}


def chats(folder: Path, kind: str, template: str, rows: list[Conversation] = CHATS, *flags: object) -> Path:
    """A cache of conversations."""
    folder.mkdir(exist_ok=True)
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": list(chat_families.SPECIAL)})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "tokenizer")
    text = write_rows(folder / "chats.jsonl", *({"messages": messages} for messages in rows))
    words = ("--text", text, "--tokenizer", folder / "tokenizer", "--out", folder / "cache")
    succeeded(in_process("logit-cache", "tokenize", *words, *flags))
    return folder / "cache"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChatML by a tokenizer as GPT-2's, with entries that expect the text."""
    url = chats(tmp_path_factory.mktemp("teacher") / "chatml", "gpt2", chat_families.CHATML)
    write_entries(url)
    return url


def project(source: Path, to: Path, name: str = "exact", *flags: object) -> Any:
    return in_process("logit-cache", "project", source, "--name", name, "--to", to, *flags)


def replies_until(url: Path) -> dict[tuple[int, int, bytes], int]:
    """The trained positions of a stream by what was read there: document, reply, and its text without spaces before."""
    cache = LogitCache.open(str(url))
    spelling, starts, total = _spelling(cache), cache.document_starts.tolist(), cache.record.corpus.positions
    tokens = cache.tokens.read(0, total).tolist()
    assert cache.loss_mask is not None
    mask = cache.loss_mask.read(0, total)
    found: dict[tuple[int, int, bytes], int] = {}
    document = reply = -1
    read = b""
    for at in range(total):
        if at in starts:
            document, reply = document + 1, -1
        if mask[at] and (at == 0 or not mask[at - 1]):
            reply, read = reply + 1, b""
        elif mask[at]:
            read += spelling[tokens[at]]
        if mask[at]:
            found[document, reply, read.lstrip(b" ")] = at
    return found


@pytest.mark.parametrize("student", STUDENTS)
def test_targets_are_where_both_have_read_the_same_of_a_reply(teacher: Path, tmp_path: Path, student: str) -> None:
    kind, template, end = STUDENTS[student]
    to = chats(tmp_path, kind, template)
    done = succeeded(project(teacher, to, "exact", "--most-uncertain", 1))
    assert "aligned by the replies of conversations" in done.stdout
    cache, source = LogitCache.open(str(to)), LogitCache.open(str(teacher))
    targets = cache.teacher("exact").read(0, cache.record.corpus.positions)
    theirs, ours = replies_until(teacher), replies_until(to)
    shared = {at: theirs[read] for read, at in ours.items() if read in theirs}
    # A space before a reply is a token of its own in one stream, so that what follows is another.
    if student == "mistral":
        shared = {ours[read]: theirs[read] for read in ours.keys() & theirs.keys() if read[2]}
    assert len(shared) > 0.5 * len(ours)
    given = set(np.flatnonzero(targets.kept).tolist())
    assert given == shared.keys()
    # The likeliest id is the text's next one, as it is the teacher's; behind a reply it is the marker of the student.
    tokens = cache.tokens.read(0, cache.record.corpus.positions)
    here = np.array(sorted(given))
    assert (targets.token_ids[here, 0] == tokens[here + 1]).mean() > 0.7
    marker = id_of(to, end)
    ends = here[tokens[here + 1] == marker]
    assert len(ends) > 0.8 * sum(m["role"] == "assistant" for messages in CHATS for m in messages)
    assert (targets.token_ids[ends, 0] == marker).mean() > 0.8
    entry = cache.teacher("exact").entry
    assert entry.projected_from is not None
    assert entry.projected_from.entry_sha256 == source.teacher("exact").record_sha256
    succeeded(project(teacher, to, "exact", "--most-uncertain", 1))  # it is found complete
    succeeded(in_process("logit-cache", "verify", to))
    assert "aligned by the replies" in succeeded(in_process("logit-cache", "inspect", to)).stdout


def id_of(url: Path, marker: str) -> int:
    """The id of a marker in a cache's tokenizer."""
    file = json.loads(LogitCache.open(str(url)).tokenizer_files()["tokenizer.json"])
    return next(each["id"] for each in file["added_tokens"] if each["content"] == marker)


def test_another_date_is_another_rendering(tmp_path: Path) -> None:
    one, other = (
        chats(tmp_path / date, kind, chat_families.LLAMA_3, CHATS, "--date", date)
        for date, kind in (("2026-01-01", "gpt2"), ("2027-02-03", "llama3"))
    )
    write_entries(one)
    assert "aligned by the replies" in succeeded(project(one, other, "drawn")).stdout


def test_equal_renderings_are_aligned_as_text(teacher: Path, tmp_path: Path) -> None:
    to = chats(tmp_path, "llama3", chat_families.CHATML)
    assert "aligned by the replies" not in succeeded(project(teacher, to)).stdout
    made = LogitCache.open(str(to)).teacher("exact").entry.projected_from
    assert made is not None
    assert made.aligned is None


def test_white_space_around_replies_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = ("", "  ", "\n", " \n\t", "")
    rows = [
        [{**m, "content": spaces[n % 5] + m["content"] + spaces[(n + i) % 5]} for i, m in enumerate(messages)]
        for n, messages in enumerate(CHATS)
    ]
    source = chats(tmp_path / "kept", "gpt2", chat_families.CHATML, rows)
    write_entries(source)
    to = chats(tmp_path / "trimmed", "llama3", chat_families.LLAMA_3, rows)
    succeeded(project(source, to, "exact", "--most-uncertain", 1))
    cache = LogitCache.open(str(to))
    total = cache.record.corpus.positions
    targets, tokens = cache.teacher("exact").read(0, total), cache.tokens.read(0, total)
    here = np.flatnonzero(targets.kept)
    assert (tokens[here + 1] == id_of(to, "<|eot_id|>")).sum() == sum(len(messages) // 2 for messages in CHATS)
    assert (targets.token_ids[here, 0] == tokens[here + 1]).mean() > 0.7
    # No targets at the beginning of a reply before which the teacher reads white space, and the student does not.
    begins = [at for (_, _, read), at in replies_until(to).items() if not read]
    alike = sum(len(messages) // 2 for n, messages in enumerate(CHATS) if not spaces[n % 5])
    assert (targets.kept[begins] > 0).sum() == alike

    monkeypatch.setattr(logit_cache.projection.symbols, "BLOCK_TOKENS", 8)  # fewer than most replies have
    again = chats(tmp_path / "again", "llama3", chat_families.LLAMA_3, rows)
    succeeded(project(source, again, "exact", "--most-uncertain", 1))
    other = LogitCache.open(str(again)).teacher("exact").read(0, total)
    np.testing.assert_array_equal(other.token_ids, targets.token_ids)


def _with(change: dict[tuple[int, int], str]) -> list[Conversation]:
    return [
        [{**message, "content": change.get((n, i), message["content"])} for i, message in enumerate(messages)]
        for n, messages in enumerate(CHATS)
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (_with({(5, 3): CHATS[5][3]["content"][:4] + "X" + CHATS[5][3]["content"][5:]}),
         "at byte 4 of reply 1 of document 5"),
        ([CHATS[1], CHATS[0], *CHATS[2:]], "at byte 0 of reply 0 of document 0"),
        (CHATS[:-1], "⟨next document⟩"),
    ],
)  # fmt: skip
def test_other_replies_are_refused_by_their_first_byte(
    teacher: Path, tmp_path: Path, rows: list[Conversation], said: str
) -> None:
    to = chats(tmp_path, "llama3", chat_families.LLAMA_3, rows)
    refused(project(teacher, to), "have other replies", said)
    assert not LogitCache.open(str(to)).teachers


def test_a_student_learns_from_it(teacher: Path, tmp_path: Path) -> None:
    to = chats(tmp_path, "llama3", chat_families.LLAMA_3)
    succeeded(project(teacher, to, "drawn"))
    words = ("--cache", to, "--teacher", "drawn", "--model", "llama-tiny", "--output-dir", tmp_path / "student",
             "--set", "max_steps=3", "--set", "per_device_train_batch_size=4")  # fmt: skip
    succeeded(in_process("train-student", *words))
    assert json.loads((tmp_path / "student" / "report.json").read_text())["steps"] == 3
