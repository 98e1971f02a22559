"""NeMo-Aligner's JSON lines: items of its collated batches, with the best logits and the log of the normaliser.

`tokens`, `labels` and `loss_mask` [S], `topk_logits` and `topk_token_ids` [S][k], `log_sum_exp_logits` [S]. Entry s is
about the token after `tokens[s]`, which is `labels[s]`; `loss_mask[s]` is about that one, too. Items are padded to
their batch, and the mask says where an item ends: the last label that it trains is the last token of the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from logit_cache.importing.document import Document, Format, Rows, Source
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

_NEEDED = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")


def _documents(source: Source) -> Iterator[Document]:
    return documents_of(source, json_rows, partial(_document, source))


def _document(source: Source, file: int, where: str, item: Any) -> Iterator[Document]:
    missing = [name for name in _NEEDED if not isinstance(item, dict) or item.get(name) is None]
    if missing:
        raise InputError(f"{where}: it has no {missing[0]}; expected an item of NeMo-Aligner's top-k logits")
    tokens, labels = (token_array(item[name], where, name) for name in ("tokens", "labels"))
    mask = np.asarray(item["loss_mask"], dtype=np.float64)
    for name in _NEEDED:
        if len(item[name]) != len(tokens):
            wrong(where, f"{name} of each of {len(tokens)} tokens", len(item[name]))
    if not mask.any():
        source.note("items are left out, of which nothing is trained")
        return
    end = int(np.flatnonzero(mask)[-1]) + 1
    if not np.array_equal(labels[: end - 1], tokens[1:end]):
        wrong(where, "labels that are the next tokens", "others: the item was cut otherwise")

    def rows() -> Rows:
        ids = whole_numbers(item["topk_token_ids"][:end])
        logits = np.asarray(item["topk_logits"][:end], dtype=np.float64)
        normaliser = np.asarray(item["log_sum_exp_logits"][:end], dtype=np.float64)
        if ids.ndim != 2 or ids.shape != logits.shape or normaliser.ndim != 1:
            wrong(where, "as many logits as ids in each row", f"{logits.shape} and {ids.shape}")
        return Rows(0, ids, logits - normaliser[:, None])

    ids = np.append(tokens[:end], labels[end - 1])
    yield Document(file, where, ids, once(where, rows), np.append(False, mask[:end] != 0))


def _recognises(path: Path) -> bool:
    return {"topk_logits", "topk_token_ids", "log_sum_exp_logits"} <= first_object(path).keys()


FORMAT = Format(
    name="nemo",
    about="NeMo-Aligner's JSON lines with topk_logits and log_sum_exp_logits",
    suffixes=(".jsonl",),
    recognises=_recognises,
    documents=_documents,
    reading="after",
)
