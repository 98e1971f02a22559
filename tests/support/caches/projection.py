"""Caches of one text by several tokenizers, with made-up entries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from support.caches.small import dense_targets, entry_2, make_entry, varopt_targets, write_entry
from support.commands import in_process, succeeded
from support.models.saved import sample_text, tiny_tokenizer

from storage import LogitCache

K = 12
DOCUMENTS = [sample_text()[start : start + 700] for start in range(0, 5600, 700)] + [" begins with a space", "Ends. "]


def write_cache(folder: Path, kind: str, documents: list[str] = DOCUMENTS) -> Path:
    """A cache of the documents, by a tokenizer of a kind of `tiny_tokenizer`."""
    folder.mkdir(exist_ok=True)
    tiny_tokenizer(kind).save_pretrained(folder / f"tokenizer-{kind}")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    url = folder / kind
    succeeded(in_process("logit-cache", "tokenize", "--text", text, "--tokenizer", folder / f"tokenizer-{kind}",
                         "--out", url))  # fmt: skip
    return url


def write_entries(url: Path) -> None:
    """Entries `exact` (top-k) and `drawn` (sampled ids without log-probs), likely of the text."""
    cache = LogitCache.open(str(url))
    tokens, size = cache.tokens.read(0, cache.record.corpus.positions).astype(np.int64), cache.vocabulary_size
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(tokens), size)) * 2
    logits[np.arange(len(tokens) - 1), tokens[1:]] += 10
    entry, labels = make_entry(cache.record, K, shard_tokens=512, chunk_tokens=128), np.append(tokens[1:], -1)
    write_entry(url, "exact", entry_2(entry), dense_targets(logits, K, labels))
    write_entry(url, "drawn", entry_2(entry, method="varopt"), varopt_targets(logits, K, labels))
