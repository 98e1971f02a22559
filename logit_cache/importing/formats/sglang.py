"""SGLang's answers of `/generate` as JSON lines: `return_logprob`, `top_logprobs_num`, and `logprob_start_len` 0.

A line is a response, or a list of them. `meta_info.input_top_logprobs` has for each token null, or its best ids as
[log-prob, id, text]; entry i is about token i. `meta_info.input_token_logprobs` has the token that is there, in the
same form, which gives both the tokens and their own log-probs; the first one's is null.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from logit_cache.importing.document import NO_ID, Document, Format, Rows, Source, ragged
from logit_cache.importing.files import documents_of, json_rows, once, token_array, whole_numbers, wrong
from storage.errors import InputError

_TOKENS, _TOP = "input_token_logprobs", "input_top_logprobs"


def _documents(source: Source) -> Iterator[Document]:
    return documents_of(source, json_rows, _answers)


def _answers(file: int, where: str, answer: Any) -> Iterator[Document]:
    for one in answer if isinstance(answer, list) else [answer]:
        yield _document(file, where, one)


def _document(file: int, where: str, answer: Any) -> Document:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict) or not isinstance(meta.get(_TOP), list) or not isinstance(meta.get(_TOKENS), list):
        raise InputError(
            f"{where}: it has no meta_info with {_TOKENS} and {_TOP}: ask the server with return_logprob, "
            f"top_logprobs_num and logprob_start_len 0"
        )
    tokens = token_array([item[1] for item in meta[_TOKENS]], where, _TOKENS)
    if "prompt_tokens" in meta and meta["prompt_tokens"] != len(tokens):
        wrong(where, f"log-probs of all {meta['prompt_tokens']} tokens (logprob_start_len 0)", len(tokens))
    if len(meta[_TOP]) != len(tokens):
        wrong(where, f"an entry of {_TOP} for each of {len(tokens)} tokens", len(meta[_TOP]))
    return Document(file, where, tokens, once(where, lambda: _rows(meta)))


def _rows(meta: dict[str, Any]) -> Rows:
    entries = [entry or [] for entry in meta[_TOP]]
    lengths = np.array([len(entry) for entry in entries], dtype=np.int64)
    values = np.array([item[0] for entry in entries for item in entry], dtype=np.float64)
    ids = whole_numbers([item[1] for entry in entries for item in entry])
    label = np.array([item[0] for item in meta[_TOKENS]], dtype=np.float64)  # NaN where it is null
    return Rows(0, ragged(lengths, ids, NO_ID), ragged(lengths, values, -np.inf), label)


def _recognises(path: Path) -> bool:
    try:
        _, first = next(iter(json_rows(path)))
    except (InputError, StopIteration):
        return False
    first = first[0] if isinstance(first, list) and first else first
    meta = first.get("meta_info") if isinstance(first, dict) else None
    return isinstance(meta, dict) and _TOP in meta


FORMAT = Format(
    name="sglang",
    about="SGLang's answers of /generate with input_top_logprobs, as JSON lines",
    suffixes=(".jsonl", ".ndjson", ".json"),
    recognises=_recognises,
    documents=_documents,
    reading="of",
)
