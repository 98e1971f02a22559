"""axolotl's data sets for distillation, Parquet or JSON lines: tokens, or conversations with the log-probs of a reply.

Tokens: `input_ids` [L], `target_logprobs` and `target_token_ids` [L][k] with `target_mask` [L][k], as its trainer holds
them. Its own rows are about their own token, and since June 2025 its loss takes them for rows of the next one: the data
say which they are. `labels` [L] are -100 where nothing is trained.

Conversations: a column of messages, and the reply that a teacher gave to them, entry j about its token j: lists of
`token` ("token_id:<n>") and `logprob` in one column, or `target_token_ids` and a column of log-probs. What the tokens
of the reply were is not there. The conversation is tokenised by the chat template, and the reply is where its entries
hold the tokens; axolotl itself puts it at the end, which moves all of it where a template goes on after the reply.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import NO_ID, Document, Format, Rows, Source, ragged
from logit_cache.importing.files import (
    documents_of,
    first_object,
    json_rows,
    of_any_kind,
    once,
    parquet_columns,
    parquet_rows,
    token_array,
    trained_by_labels,
    whole_numbers,
    wrong,
)
from storage.errors import InputError, error_text

TOKENS, IDS, VALUES, MASK = "input_ids", "target_token_ids", "target_logprobs", "target_mask"
_PREFIX = "token_id:"
_MESSAGES = ("messages", "messages_combined", "conversations", "conversation")
_NAMES = {"role": ("role", "from"), "content": ("content", "value")}
_ROLES = {"human": "user", "gpt": "assistant"}
# Of the first entries of a reply, those that must hold the tokens where it is looked for; and of all of them.
_FIRST = 8
_LEAST_HELD = 0.9


def _rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row: where it is, and its columns as Python's values."""
    names = list(parquet_columns(path))
    if names:
        for where, columns in parquet_rows(path, names, nulls=True):
            yield where, {name: value.as_py() for name, value in columns.items()}
        return
    for where, row in json_rows(path):
        if not isinstance(row, dict):
            wrong(where, "an object", row)
        yield where, row


def _documents(source: Source) -> Iterator[Document]:
    def read(file: int, where: str, row: dict[str, Any]) -> Iterator[Document]:
        if TOKENS in row:
            yield _tokens(file, where, row)
        else:
            yield from _conversation(source, file, where, row)

    return documents_of(source, _rows_of, read)


def _tokens(file: int, where: str, row: dict[str, Any]) -> Document:
    ids = token_array(row[TOKENS], where, TOKENS)
    labels = row.get("labels")
    if labels is not None and len(labels) != len(ids):
        wrong(where, f"a label for each of {len(ids)} tokens", f"{len(labels)} labels")
    end = _end(row.get("attention_mask"), len(ids), where)

    def rows() -> Rows:
        found, values = _columns(row.get(IDS), row.get(VALUES), where)
        if len(found) != len(ids):
            wrong(where, f"an entry for each of {len(ids)} tokens", f"{len(found)} entries")
        if row.get(MASK) is not None:
            lengths = np.array([len(each) for each in row[MASK]], dtype=np.int64)
            mask = ragged(lengths, whole_numbers([item for each in row[MASK] for item in each]), 0)
            if mask.shape != found.shape:
                wrong(where, f"{MASK} like {IDS}, {found.shape}", mask.shape)
            found, values = np.where(mask > 0, found, NO_ID), np.where(mask > 0, values, -np.inf)
        return Rows(0, found[:end], values[:end])

    trained = None if labels is None else trained_by_labels(ids[:end], np.asarray(labels)[:end], where)
    return Document(file, where, ids[:end], once(where, rows), trained)


def _end(mask: Any, length: int, where: str) -> int:
    """The tokens before the padding at the end of a row."""
    if mask is None:
        return length
    here = np.flatnonzero(np.asarray(mask))
    end = int(here[-1]) + 1 if len(here) else 0
    if len(mask) != length or len(here) != end:
        wrong(where, "an attention_mask of all tokens that is 0 at their end alone", mask)
    return end


def _columns(ids: Any, values: Any, where: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    lengths = np.array([len(each) for each in ids], dtype=np.int64)
    if [len(each) for each in values] != lengths.tolist():
        wrong(where, "lists of ids and of their log-probs", "others, which differ in length")
    return (
        ragged(lengths, whole_numbers([item for each in ids for item in each]), NO_ID),
        ragged(lengths, np.array([item for each in values for item in each], dtype=np.float64), -np.inf),
    )


def _conversation(source: Source, file: int, where: str, row: dict[str, Any]) -> Iterator[Document]:
    """The conversation with its reply; nothing where that is not found, which the record says."""
    messages = next((row[name] for name in _MESSAGES if row.get(name)), None)
    if messages is None:
        wrong(where, f"{TOKENS}, or messages in one of {', '.join(_MESSAGES)}", ", ".join(row))
    ids = _tokenised(source.tokenizer, messages, where)
    found, values = _reply(row, where)
    start = _place(ids, found)
    if start is None:
        source.note("conversations are left out, as the tokens of their reply are not those of its log-probs")
        return
    trained = np.zeros(len(ids), dtype=bool)
    trained[start : start + len(found)] = True
    yield Document(file, where, ids, once(where, lambda: Rows(start, found, values)), trained)


def _tokenised(tokenizer: Any, messages: Any, where: str) -> NDArray[np.uint32]:
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: it holds messages, and the tokenizer has no chat template: give another --tokenizer"
        )
    try:
        turns = [{key: next(turn[n] for n in names if n in turn) for key, names in _NAMES.items()} for turn in messages]
    except (StopIteration, TypeError):
        wrong(where, "messages of a role and a content", messages)
    for turn in turns:
        turn["role"] = _ROLES.get(turn["role"], turn["role"])
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError as error:
        raise InputError(f"{where}: the tokenizer's chat template refuses its messages ({error_text(error)})") from None
    return token_array(tokenizer(text, add_special_tokens=False)["input_ids"], where, "the conversation")


def _reply(row: dict[str, Any], where: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and log-probs [n, k] of a reply."""
    if row.get(IDS):
        names = [name for name, value in row.items() if name != IDS and _are_lists(value, float)]
        if len(names) != 1:
            wrong(where, f"one column of log-probs beside {IDS}", ", ".join(names) or "none")
        return _columns(row[IDS], row[names[0]], where)
    names = [name for name, value in row.items() if _are_lists(value, dict)]
    if len(names) != 1:
        wrong(where, f"{IDS}, or one column with a token and a logprob of each id", ", ".join(names) or "none")
    entries = row[names[0]]
    try:
        ids = [[int(item["token"].removeprefix(_PREFIX)) for item in entry] for entry in entries]
        return _columns(ids, [[item["logprob"] for item in entry] for entry in entries], where)
    except (KeyError, TypeError, ValueError, AttributeError):
        wrong(f"{where}, {names[0]}", f"'{_PREFIX}<id>' and a logprob", next(entry for entry in entries if entry))


def _are_lists(value: Any, kind: type) -> bool:
    """Whether a value is a list of lists of a kind."""
    if not isinstance(value, list) or not all(isinstance(each, list) for each in value):
        return False
    first = next((item for each in value for item in each), None)
    return isinstance(first, kind)


def _place(ids: NDArray[np.uint32], reply: NDArray[np.int64]) -> int | None:
    """Where the entries of a reply hold the tokens: the place at which most do, if it is the only one."""
    count = len(reply)
    starts = np.arange(1, len(ids) - count + 1)
    if not count or not len(starts):
        return None
    first = min(count, _FIRST)
    held = sum(np.isin(ids[starts + row], reply[row]).astype(int) for row in range(first))
    starts = starts[held >= first / 2]
    shares = [
        float((reply == ids[start : start + count, None].astype(np.int64)).any(axis=1).mean()) for start in starts
    ]
    most = max(shares, default=0.0)
    best = [int(start) for start, share in zip(starts, shares, strict=True) if share == most]
    return best[0] if len(best) == 1 and most >= _LEAST_HELD else None


def _recognises(path: Path) -> bool:
    names = set(parquet_columns(path))
    if {TOKENS, IDS, VALUES} <= names:
        return True
    if names and not names & set(_MESSAGES):
        return False
    if not names and not first_object(path):
        return False
    try:
        _, row = next(iter(_rows_of(path)))
        if {TOKENS, IDS, VALUES} <= row.keys():
            return True
        with of_any_kind(str(path)):
            return bool(row.keys() & set(_MESSAGES)) and len(_reply(row, str(path))[0]) > 0
    except (InputError, StopIteration):
        return False


FORMAT = Format(
    name="axolotl",
    about="axolotl's data sets with log-probs, of tokens or of conversations",
    suffixes=(".parquet", ".jsonl"),
    recognises=_recognises,
    documents=_documents,
    values=("logprobs", "unnormalised"),
)
