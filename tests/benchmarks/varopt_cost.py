"""What VarOpt targets cost over top-k: a random Llama is run over windows, and its logits are reduced both ways.

    python tests/benchmarks/varopt_cost.py --vocabulary-size 16000 --hidden 512 --layers 6 --k 64

Times are the best of several rounds in which all ways take turns: of one thread's processor time on a CPU, which a
busy machine distorts least, and wall time on a GPU. What is compared is teacher and reducer together, all that
`cache-logits` does per batch before it encodes and writes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from storage.encoding import logprob_floor
from teachers.huggingface import HuggingFaceTeacher
from teachers.reduce import reduce_topk, reduce_varopt
from teachers.sample import Sampling, random_bits

FLOOR = logprob_floor(1 / 32)


def random_teacher(vocabulary_size: int, hidden: int, layers: int, context: int, device: str) -> HuggingFaceTeacher:
    """A Llama of random weights with logits as spread as a trained model's."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    # The last norm gives hidden states of unit variance.
    torch.nn.init.normal_(model.lm_head.weight, std=3 / hidden**0.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
        return HuggingFaceTeacher.load(folder, dtype=dtype, device=device)


def measure(teacher: HuggingFaceTeacher, windows: Tensor, k: int, rounds: int) -> dict[str, float]:
    """Seconds of the teacher alone, and with each reducer."""
    rows = torch.arange(windows.numel(), device=teacher.device)
    labels = torch.zeros_like(rows)
    random = torch.from_numpy(random_bits(0, 0, len(rows))).to(teacher.device)

    on_gpu = teacher.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time

    def cache(reduce: Callable[[Tensor, slice], Any] | None) -> None:
        done = 0
        for logits in teacher.score(windows, rows):
            if reduce is not None:
                reduce(logits, slice(done, done + len(logits)))
            done += len(logits)
        if on_gpu:
            torch.cuda.synchronize()

    def topk(logits: Tensor, at: slice) -> None:
        reduce_topk(logits, teacher.head_columns, k, labels[at], FLOOR)

    def varopt(temperature: float) -> Callable[[Tensor, slice], None]:
        def reduce(logits: Tensor, at: slice) -> None:
            sampling = Sampling(temperature, 0, random[at])
            reduce_varopt(logits, teacher.head_columns, k, labels[at], FLOOR, sampling)

        return reduce

    ways = {"teacher": None, "topk": topk, "varopt": varopt(1.0), "varopt_at_2": varopt(2.0)}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds + 1):
        for name, reduce in ways.items():
            began = clock()
            cache(reduce)
            best[name] = min(best[name], clock() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary-size", type=int, default=16_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--context-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = random_teacher(args.vocabulary_size, args.hidden, args.layers, args.context_tokens, args.device)
    windows = torch.randint(args.vocabulary_size, (args.windows, args.context_tokens), device=args.device)
    seconds = measure(teacher, windows, args.k, args.rounds)
    alone = seconds["teacher"]
    result = {
        **vars(args),
        "tokens": windows.numel(),
        "seconds": seconds,
        "cache_over_teacher": {name: value / alone for name, value in seconds.items()},
        "varopt_over_topk": seconds["varopt"] / seconds["topk"],
        "reducer_varopt_over_topk": (seconds["varopt"] - alone) / (seconds["topk"] - alone),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
