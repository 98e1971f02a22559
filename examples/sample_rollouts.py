"""Sample continuations of prompts from a student, as rows for `logit-cache tokenize`: offline on-policy distillation.

    python examples/sample_rollouts.py run/student --prompts prompts.jsonl --out run/rollouts.jsonl
    logit-cache tokenize --text run/rollouts.jsonl --tokenizer run/student --out run/rollouts
    cache-logits --cache run/rollouts --teacher run/teacher --name t --targets none
    train-student --cache run/rollouts --teacher t --model run/student --loss lightning-opd --output-dir run/better

A prompt is a row with `prompt` (a text), `messages` (a conversation that the student is to continue) or `input_ids`. A
row that comes out holds the ids of prompt and continuation, a `loss_mask` that trains the sampled ids alone, an end of
text among them, and in `rollout` the digests of the student's files and the sampling settings: training refuses the
rollouts of another model. Nothing of the student's own generation settings is used, as a penalty of repetitions, since
the loss takes the sampled ids for the student's.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from student import rollout_field


def sample(
    student: str,
    prompts: str,
    out: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    samples: int = 1,
    batch_prompts: int = 16,
    seed: int = 0,
) -> int:
    """Write the rollouts of every prompt; returns how many. `samples`: of each prompt; `top_k` 0: of all ids."""
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_new_tokens": max_new_tokens}
    rollout = rollout_field(student, **settings, seed=seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(student).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(student)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    # In place of the model's own, from which `generate` would fill in what another one leaves open.
    model.generation_config = GenerationConfig(
        do_sample=True, **settings, num_return_sequences=samples, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    asked = sorted(_prompts(prompts, tokenizer), key=len)  # of about equal length in a batch: little padding
    torch.manual_seed(seed)
    count, partial = 0, Path(f"{out}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for first in range(0, len(asked), batch_prompts):
            batch = asked[first : first + batch_prompts]
            for ids, mask in _continued(model, batch, samples, ends, pad):
                file.write(json.dumps({"input_ids": ids, "loss_mask": mask, "rollout": rollout}) + "\n")
                count += 1
    os.replace(partial, out)
    return count


@torch.no_grad()
def _continued(
    model: Any, batch: list[list[int]], samples: int, ends: set[int], pad: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of prompt and continuation, and which of them were sampled: 0 or 1 for each."""
    longest = len(batch[-1])
    rows = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch], device=model.device)
    real = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
    for number, row in enumerate(model.generate(rows, attention_mask=real)[:, longest:].tolist()):
        stop = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
        prompt = batch[number // samples]
        yield prompt + row[:stop], [0] * len(prompt) + [1] * stop


def _prompts(path: str, tokenizer: Any) -> Iterator[list[int]]:
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if "input_ids" in row:
            ids = row["input_ids"]
        elif "messages" in row:
            ids = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(row["prompt"])["input_ids"]
        if not ids:
            raise SystemExit(f"{path} line {number}: a prompt has a token at least; give one, such as the BOS")
        yield ids


def main() -> None:
    parser = argparse.ArgumentParser(description="Rollouts of a student, for logit-cache tokenize.")
    parser.add_argument("student", help="Model directory or hub id.")
    parser.add_argument("--prompts", required=True, help="JSON lines with prompt, messages or input_ids.")
    parser.add_argument("--out", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1, help="Of each prompt.")
    parser.add_argument("--batch-prompts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    print(f"{given['out']}: {sample(**given)} rollouts")


if __name__ == "__main__":
    main()
