"""What vLLM and SGLang are asked, and what their answers mean: JSON and arrays, no connection.

Legend: `n` ids of a prompt, `r` rows that are wanted of it, `K` ids per row.

Both give, for the token i of a prompt, the likeliest ids *in its place*, given the tokens before it, and the log-prob
of the token that is there. A row describes the token after its position, so the row of position i is the entry i + 1,
and the token that is there is its label: a prompt is a window and the token that follows it.

vllm    ``POST /v1/completions``, `prompt_logprobs`: a map of ids to log-probs, the label among them
sglang  ``POST /generate``, `top_logprobs_num`: lists of (log-prob, id, text), the labels apart

Prompts are ids, so nothing is tokenised again. Both generate a token, which nobody needs: neither takes requests for
none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BESIDE_WINDOW = 2
"""Tokens that a server's context holds beside a window: the one that follows it, and one that is generated."""


class WrongAnswer(ValueError):
    """An answer that is none to what was asked; the text says what was expected and found."""


@dataclass(frozen=True)
class Prompt:
    """Ids to ask for, int64 [n], and the offsets in them of the wanted rows, int64 [r], each below n - 1."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class ServedRows:
    """The rows of an answer, most probable first, equal log-probs by ascending id.

    token_ids      int64 [r, K]
    logprobs       float64 [r, K]  nats, normalised over all columns of the model's head
    label_logprob  float64 [r]     of the id behind each row's position in the prompt
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    label_logprob: NDArray[np.float64]


Body = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How an engine is asked.

    generate  the path below the server's root where prompts are sent
    body      of the request for a prompt: of a model by its served name, for its ids, k ids per row
    rows      the answer to that body, for the prompt, as rows
    versions  paths that may state the engine's version
    tokenize  paths that may give the ids of a text
    """

    engine: Literal["vllm", "sglang"]
    generate: str
    body: Callable[[str, Sequence[int], int], Body]
    rows: Callable[[Any, Prompt, int], ServedRows]
    versions: tuple[str, ...]
    tokenize: tuple[str, ...]
    more_logprobs: str
    longer_context: str


def _vllm_body(model: str, ids: Sequence[int], k: int) -> Body:
    return {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": k,
        "return_token_ids": True,
    }


def _vllm_rows(answer: Any, prompt: Prompt, k: int) -> ServedRows:
    (choice,) = _at(answer, "choices")
    read = choice.get("prompt_token_ids")
    if read is not None and read != prompt.ids.tolist():
        raise WrongAnswer("it read other ids than it was sent: it adds or drops some of its own")
    entries = _whole(_at(choice, "prompt_logprobs"), prompt)
    labels = prompt.ids[prompt.offsets + 1]
    rows = [entries[offset + 1] for offset in prompt.offsets.tolist()]
    for row, label in zip(rows, labels.tolist(), strict=True):
        if not isinstance(row, Mapping) or str(label) not in row:
            raise WrongAnswer(f"a row without the token that is there, id {label}")
    return _sorted_rows(
        [(list(map(int, row)), [value["logprob"] for value in row.values()]) for row in rows],
        np.array([row[str(label)]["logprob"] for row, label in zip(rows, labels.tolist(), strict=True)], float),
        k,
    )


def _sglang_body(model: str, ids: Sequence[int], k: int) -> Body:
    return {
        "input_ids": list(ids),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
    }


def _sglang_rows(answer: Any, prompt: Prompt, k: int) -> ServedRows:
    meta = _at(answer, "meta_info")
    top = _whole(_at(meta, "input_top_logprobs"), prompt)
    there = _whole(_at(meta, "input_token_logprobs"), prompt)
    if [entry[1] for entry in there] != prompt.ids.tolist():
        raise WrongAnswer("it read other ids than it was sent: it adds or drops some of its own")
    rows = [top[offset + 1] or () for offset in prompt.offsets.tolist()]
    return _sorted_rows(
        [([entry[1] for entry in row], [entry[0] for entry in row]) for row in rows],
        np.array([there[offset + 1][0] for offset in prompt.offsets.tolist()], float),
        k,
    )


VLLM = Protocol(
    engine="vllm",
    generate="v1/completions",
    body=_vllm_body,
    rows=_vllm_rows,
    versions=("version",),
    tokenize=("tokenize",),
    more_logprobs="--max-logprobs",
    longer_context="--max-model-len",
)
SGLANG = Protocol(
    engine="sglang",
    generate="generate",
    body=_sglang_body,
    rows=_sglang_rows,
    versions=("server_info", "get_server_info"),
    tokenize=("tokenize", "v1/tokenize"),
    more_logprobs="--max-logprobs",
    longer_context="--context-length",
)
PROTOCOLS = {protocol.engine: protocol for protocol in (VLLM, SGLANG)}


def rows_of(protocol: Protocol, answer: Any, prompt: Prompt, k: int) -> ServedRows:
    """The rows of an answer. Raises WrongAnswer for one that has another form, or holds no log-probs."""
    try:
        rows = protocol.rows(answer, prompt, k)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, WrongAnswer):
            raise
        raise WrongAnswer(f"no answer in the form of {protocol.engine} ({type(error).__name__}: {error})") from None
    largest = max(rows.logprobs.max(initial=-math.inf), rows.label_logprob.max(initial=-math.inf))
    if not largest <= _MOST_LOGPROB:
        raise WrongAnswer(f"no log-probs: the largest is {largest:g}")
    mass = np.exp(rows.logprobs).sum(axis=1).max(initial=0.0)
    if mass > 1 + _MOST_LOGPROB:
        raise WrongAnswer(f"no log-probs: those of a row have a mass of {mass:.6g}")
    return rows


# What rounding may leave above 0; logits and normalised top-k rows are further off.
_MOST_LOGPROB = 1e-3


def _at(answer: Any, name: str) -> Any:
    if not isinstance(answer, Mapping) or answer.get(name) is None:
        raise WrongAnswer(f"an answer without {name}")
    return answer[name]


def _whole(entries: Any, prompt: Prompt) -> Any:
    if len(entries) != len(prompt.ids):
        raise WrongAnswer(f"log-probs for {len(entries)} tokens, {len(prompt.ids)} were sent")
    return entries


def _sorted_rows(rows: list[tuple[list[int], list[float]]], label: NDArray[np.float64], k: int) -> ServedRows:
    """The K best of each row's (ids, log-probs), which are in any order and may have the label as one more."""
    columns = k + 1
    ids = np.full((len(rows), columns), np.iinfo(np.int64).max)
    logprobs = np.full((len(rows), columns), -np.inf)
    for number, (own_ids, own) in enumerate(rows):
        if not k <= len(own_ids) <= columns:
            raise WrongAnswer(f"{len(own_ids)} ids in a row, {k} were asked for")
        given = np.array(own_ids)
        if given.dtype.kind != "i" or given.min() < 0 or len(set(own_ids)) < len(own_ids):
            raise WrongAnswer("ids in a row that are no ids, or come twice")
        ids[number, : len(own_ids)] = given
        logprobs[number, : len(own)] = own
    if np.isnan(logprobs).any() or np.isnan(label).any():
        raise WrongAnswer("a log-prob that is no number")
    order = np.lexsort((ids, -logprobs), axis=1)[:, :k]
    return ServedRows(np.take_along_axis(ids, order, axis=1), np.take_along_axis(logprobs, order, axis=1), label)
