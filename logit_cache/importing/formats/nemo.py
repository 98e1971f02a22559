"""NeMo-Aligner's JSON lines: items of its collated batches, with the best logits and the log of the normaliser.

`tokens`, `labels` and `loss_mask` [S], `topk_logits` and `topk_token_ids` [S][k], `log_sum_exp_logits` [S]. Entry s is
about the token after `tokens[s]`, which is `labels[s]`; `loss_mask[s]` is about that one, too. Items are padded to
their batch, and the mask says where an item ends: the last label that it trains is the last token of the document.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from logit_cache.importing.document import Document, Format, Rows, Source
from logit_cache.importing.files import first_object, json_rows, once, token_array, wrong
from storage.errors import InputError

_NEEDED = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")


def _documents(source: Source) -> Iterator[Document]:
    for file, path in enumerate(source.files):
        for where, item in json_rows(path):
            missing = [name for name in _NEEDED if not isinstance(item, dict) or item.get(name) is None]
            if missing:
                raise InputError(f"{where}: it has no {missing[0]}; expected an item of NeMo-Aligner's top-k logits")
            document = _document(file, where, item)
            if document is None:
                source.note("items are left out, of which nothing is trained")
            else:
                yield document


def _document(file: int, where: str, item: dict[str, Any]) -> Document | None:
    tokens, labels = (token_array(item[name], where, name) for name in ("tokens", "labels"))
    mask = np.asarray(item["loss_mask"])
    for name in _NEEDED:
        if len(item[name]) != len(tokens):
            wrong(where, f"{name} of each of {len(tokens)} tokens", len(item[name]))
    if not mask.any():
        return None
    end = int(np.flatnonzero(mask)[-1]) + 1
    if not np.array_equal(labels[: end - 1], tokens[1:end]):
        wrong(where, "labels that are the next tokens", "others: the item was cut otherwise")

    def rows() -> Rows:
        try:
            ids = np.asarray(item["topk_token_ids"][:end], dtype=np.int64)
            logits = np.asarray(item["topk_logits"][:end], dtype=np.float64)
            normaliser = np.asarray(item["log_sum_exp_logits"][:end], dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}: its logits are no numbers in rows of one length ({error})") from None
        if ids.ndim != 2 or ids.shape != logits.shape or normaliser.ndim != 1:
            wrong(where, "as many logits as ids in each row", f"{logits.shape} and {ids.shape}")
        return Rows(0, ids, logits - normaliser[:, None])

    ids = np.append(tokens[:end], labels[end - 1])
    return Document(file, where, ids, once(rows), np.append(False, mask[:end] != 0))


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
