"""A small cache of real text with everything in it that is hard to show, and made-up targets of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support.caches.small import (
    dense_targets,
    entry_2,
    make_corpus,
    make_entry,
    random_sample,
    without_rows,
    write_entry,
)

# Of the two emoji, the first is one token and the second is bytes that are no text by themselves.
TEXT = (
    "<s>The cat sat on the mat.\n\n\tIt saw 😀 and 🦊; café.\u202e</p><script>alert(1)</script> The cat sat on the mat."
)
K = 12


def byte_level() -> Any:
    """A byte-level BPE of some 300 ids, with all bytes in its alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" 😀" * 9, *["The cat sat on the mat."] * 9], trainer)
    return tokenizer


def write_text_cache(url: Path) -> list[int]:
    """Entries `exact` (top-k with entropy), `lean` (sampled ids without log-probs), and `some` (sampled ids at every
    third position); returns the tokens."""
    tokenizer = byte_level()
    tokens, vocabulary = np.array(tokenizer.encode(TEXT).ids, dtype=np.uint16), tokenizer.get_vocab_size()
    record = make_corpus(str(url), tokens, vocabulary, tokenizer_files={"tokenizer.json": tokenizer.to_str().encode()})
    n, rng = len(tokens), np.random.default_rng(0)
    logits = rng.normal(size=(n, vocabulary)) * rng.uniform(0.1, 6, (n, 1))
    logits[np.arange(n - 1), tokens[1:]] += 5
    entry, sample = make_entry(record, K), random_sample(n, vocabulary, K)
    write_entry(url, "exact", entry, dense_targets(logits, K, np.append(tokens[1:], -1).astype(np.int64)))
    write_entry(url, "lean", entry_2(entry, method="varopt"), sample)
    some = entry_2(entry, "label", "sampled-logprobs", method="varopt", positions="some")
    write_entry(url, "some", some, without_rows(sample, np.arange(n) % 3 > 0))
    return [int(token) for token in tokens]
