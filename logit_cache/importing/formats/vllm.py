"""vLLM's answers as JSON lines: whole responses, or one prompt an object.

A line is a response of `/v1/completions` (`choices[].prompt_logprobs`, `choices[].prompt_token_ids`), one of chat
(both at the top), or any object with both. Entry i of `prompt_logprobs` is about token i, and the first is null. It
maps ids, as texts, to `logprob` and `rank`: the `k` best and, where it is none of them, the token that is there. That
one is the label, and is not stored among the ids: a row would know more just where the text is unlikely.

`FlatLogprobs`, vLLM's arrays, are read from objects with `prompt_token_ids`, `start_indices`, `end_indices`,
`token_ids`, `logprobs` and `ranks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_cache.importing.document import NO_ID, Document, Format, Rows, Source, ragged
from logit_cache.importing.files import (
    documents_of,
    first_object,
    json_rows,
    once,
    token_array,
    whole_numbers,
    wrong,
)
from storage.errors import InputError

# JSON has no infinity: vLLM writes this for the log-prob of what has no probability.
_LEAST = -9999.0
_FLAT = ("start_indices", "end_indices", "token_ids", "logprobs", "ranks")


def _documents(source: Source) -> Iterator[Document]:
    return documents_of(source, json_rows, _prompts)


def _prompts(file: int, where: str, answer: Any) -> Iterator[Document]:
    """The prompts of a response."""
    if not isinstance(answer, dict):
        wrong(where, "an object of vLLM's", answer)
    if "error" in answer or answer.get("object") == "error":
        wrong(where, "an answer", answer.get("error", answer))
    choices = answer.get("choices")
    found = choices if isinstance(choices, list) and "prompt_logprobs" not in answer else [answer]
    for index, one in enumerate(found):
        if not isinstance(one, dict):
            wrong(where, "objects in choices", one)
        yield _document(file, f"{where} prompt {index}" if index else where, one)


def _document(file: int, where: str, one: dict[str, Any]) -> Document:
    if one.get("prompt_token_ids") is None:
        raise InputError(
            f"{where}: it has no prompt_token_ids, without which its rows have no tokens: ask the server for them "
            f"(return_token_ids)"
        )
    ids = token_array(one["prompt_token_ids"], where, "prompt_token_ids")
    if one.get("prompt_logprobs") is None and "start_indices" not in one:
        raise InputError(f"{where}: it has no prompt_logprobs: ask the server for them (prompt_logprobs)")

    def rows() -> Rows:
        entries = _flat(one, where) if "start_indices" in one else _mapped(one["prompt_logprobs"], where)
        return _rows(ids, entries, where)

    return Document(file, where, ids, once(where, rows))


# Of each entry: its ids, log-probs and ranks.
Entry = tuple[list[int], list[float], list[int]]


def _mapped(entries: Any, where: str) -> list[Entry]:
    if not isinstance(entries, list):
        wrong(where, "a list of prompt_logprobs", entries)
    found: list[Entry] = []
    for index, entry in enumerate(entries):
        if entry is None:
            found.append(([], [], []))
            continue
        try:
            ids = [int(token.removeprefix("token_id:")) for token in entry]
            logprobs = [float(item["logprob"]) for item in entry.values()]
            ranks = [item.get("rank") for item in entry.values()]
        except (AttributeError, KeyError, TypeError, ValueError):
            wrong(f"{where}, entry {index}", "ids with their logprob and rank", entry)
        found.append((ids, logprobs, _ranked(logprobs) if None in ranks else ranks))
    return found


def _ranked(logprobs: list[float]) -> list[int]:
    """Ranks by the log-probs themselves."""
    order = np.argsort(-np.array(logprobs), kind="stable")
    ranks: list[int] = (np.argsort(order) + 1).tolist()
    return ranks


def _flat(one: dict[str, Any], where: str) -> list[Entry]:
    """The arrays hold the token that is there first, and once more where it is one of the best."""
    try:
        starts, ends, ids, logprobs, ranks = ([*one[name]] for name in _FLAT)
        found: list[Entry] = []
        for start, end in zip(starts, ends, strict=True):
            own = {ids[at]: (logprobs[at], ranks[at]) for at in range(start, end)}
            found.append(([*own], [value for value, _ in own.values()], [rank for _, rank in own.values()]))
        return found
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its arrays are not those of FlatLogprobs ({error})") from None


def _rows(tokens: NDArray[np.uint32], entries: list[Entry], where: str) -> Rows:
    if len(entries) != len(tokens):
        wrong(where, f"an entry for each of {len(tokens)} tokens", f"{len(entries)} entries; the answer was cut off")
    lengths = np.array([len(ids) for ids, _, _ in entries], dtype=np.int64)
    flat = [[item for entry in entries for item in entry[part]] for part in range(3)]
    ids, ranks = (ragged(lengths, whole_numbers(flat[part]), missing) for part, missing in ((0, NO_ID), (2, 0)))
    values = ragged(lengths, np.array(flat[1], dtype=np.float64), -np.inf)
    values = np.where(values <= _LEAST, -np.inf, values)
    own = (ids == tokens[:, None].astype(np.int64)) & (ids != NO_ID)
    label = np.where(own.any(axis=1), np.where(own, values, -np.inf).max(axis=1, initial=-np.inf), np.nan)
    # As many as were asked for: the shortest entry has no further one.
    k = int(lengths[lengths > 0].min(initial=np.iinfo(np.int32).max))
    asked = ranks <= k
    return Rows(0, np.where(asked, ids, NO_ID), np.where(asked, values, -np.inf), label)


def _recognises(path: Path) -> bool:
    found = first_object(path)
    choices = found.get("choices")
    inner = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    return "prompt_logprobs" in found or "prompt_logprobs" in inner or {*_FLAT} <= found.keys()


FORMAT = Format(
    name="vllm",
    about="vLLM's answers with prompt_logprobs, as JSON lines",
    suffixes=(".jsonl", ".ndjson", ".json"),
    recognises=_recognises,
    documents=_documents,
    reading="of",
)
