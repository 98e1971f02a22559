"""Token streams of rows and conversations: what makes them, and their documents read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from support.models.saved import make_tokenizer

from logit_cache.corpus.config import CorpusConfig
from logit_cache.corpus.tokenize import tokenize
from storage import LogitCache

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path: Path, text: str) -> str:
    """A file with exactly this text; its path."""
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def write_rows(path: Path, *rows: object) -> str:
    """A file of JSON lines; a row that is a text is written as it is."""
    return write(path, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def stream(folder: Path, tokenizer: Any, *rows: object, **options: Any) -> LogitCache:
    """A cache in a folder, of rows that are written there; so is the tokenizer, where it is not given by its folder."""
    if not isinstance(tokenizer, str):
        tokenizer.save_pretrained(folder / "tokenizer")
        tokenizer = str(folder / "tokenizer")
    path, out = write_rows(folder / "rows.jsonl", *rows), str(folder / "cache")
    tokenize(CorpusConfig(text=(path,), out=out, tokenizer=tokenizer, **options))
    return LogitCache.open(out)


def chat_tokenizer(template: Any, kind: str = "gpt2") -> Any:
    """A tokenizer with the markers of `CHATML` and a chat template."""
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def documents(cache: LogitCache) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each document and which of its positions are trained on."""
    ends = [*cache.document_starts[1:].tolist(), len(cache.tokens)]
    return [
        (
            cache.tokens.read(start, stop),
            np.ones(stop - start, bool) if cache.loss_mask is None else cache.loss_mask.read(start, stop),
        )
        for start, stop in zip(cache.document_starts.tolist(), ends, strict=True)
    ]


def learnt(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray) -> str:
    """The text of tokens[p + 1] for every p with mask[p]."""
    assert not mask[-1]
    text: str = tokenizer.decode(tokens[1:][mask[:-1]], clean_up_tokenization_spaces=False)
    return text


def chat_lengths(number: int, mean: float, longest: int) -> np.ndarray:
    """Tokens of some conversations, int64: most are short, some long, none shorter than 2."""
    drawn = np.random.default_rng(number).gamma(2.0, mean / 2, number).astype(np.int64) + 2
    return np.minimum(drawn, longest)
