"""What a saved model computes, under any version of transformers: logits, where texts end, a tokenizer's ids.

python saved_models.py DIR...    prints a JSON object by directory
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

IDS = [[3, 4, 7, 9, 50, 60, 3, 8, 1, 33, 58, 12, 13, 14, 15, 16, 17, 18, 19, 20]]
TEXT = "t3 t60 t7 t9"
ENDS = (1, 5, 7, 8, 9)


class Forced(LogitsProcessor):
    """One of the ids after some tokens, and none of them elsewhere: a random model ends a text with that one or not."""

    def __init__(self, id: int, after: int) -> None:
        self.id, self.after = id, after

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, ENDS] = -1e9
        if input_ids.shape[1] == self.after:
            scores[:, self.id] = 1e9
        return scores


def texts(folder: Path) -> dict[str, list[int]]:
    """By id: the prompt, three tokens, that id, and what follows of twelve new tokens if it is no end."""
    model, prompt = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[11, 12]])
    found = {}
    for id in ENDS:
        forced = LogitsProcessorList([Forced(id, after=5)])
        mask = torch.ones_like(prompt)
        text = model.generate(prompt, attention_mask=mask, max_new_tokens=12, logits_processor=forced, do_sample=False)
        found[str(id)] = text[0].tolist()
    return found


def outcome(folder: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(IDS)).logits[0].tolist()
    return {
        "logits": logits,
        "texts": texts(folder),
        "ids": AutoTokenizer.from_pretrained(folder).encode(TEXT),
        "dtype": str(model.dtype),
    }


if __name__ == "__main__":
    print(json.dumps({folder: outcome(Path(folder)) for folder in sys.argv[1:]}))
