"""`cache-logits` against the same teacher's bare forward: the same windows in the same batches, nothing kept.

What `cache-logits` runs is `build_missing` on a job that is open: forward, reduction, encoding, compression, objects
and receipts on a local disk, with the syncs that make them durable. The bare forward is the model's own, with the
logits of every position.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Table, in_child, in_turn, ratios, spread

CONTEXT, K, ROUNDS = 128, 64, 3
# Windows in a pass: small, so that a short run has several batches and shards.
BATCH, SHARD = 8, 1_024
# name, V, layers, hidden size, positions. Random weights: the time of a forward does not depend on them.
TEACHERS = [
    ("Llama, 8 layers, H = 512", 16_000, 8, 512, 8_192),
    ("Llama, 12 layers, H = 768", 50_000, 12, 768, 3_072),
    ("Llama, 6 layers, H = 768", 128_000, 6, 768, 3_072),
]
# Every kind of head: scaled, capped, biased, tied. One size for all of them; what a head does beside that is tiny.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "opt": {"ffn_dim": 768, "word_embed_proj_dim": 256},
    "qwen2": {"num_key_value_heads": 4},
    "gpt_neox": {},
    "phi": {},
    "mamba": {"state_size": 16},
    "gemma2": {"head_dim": 64, "num_key_value_heads": 4, "final_logit_softcapping": 30.0},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
}
FAMILY_SIZE = {
    "vocab_size": 16_000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 768, "max_position_embeddings": 256,
}  # fmt: skip
FAMILY_POSITIONS, FAMILY_ROUNDS = 2_048, 2


def tables() -> Iterator[Table]:
    """Time and peak memory, and where the time goes."""
    times, memory = [], []
    for title, vocabulary, layers, hidden, positions in TEACHERS:
        with tempfile.TemporaryDirectory() as folder:
            shape = {
                "folder": folder, "vocabulary": vocabulary, "layers": layers, "hidden": hidden, "positions": positions,
            }  # fmt: skip
            in_child("bench_caching", "prepare", **shape)
            found, _ = in_child("bench_caching", "measure", folder=folder, positions=positions)
            seconds, processor = found["seconds"], found["processor"]
            bare = seconds["bare"]
            for way in ("top-k", "VarOpt"):
                times.append(
                    (
                        title if way == "top-k" else "", f"{vocabulary:,}", way,
                        spread([positions / value for value in seconds[way]], 0),
                        spread(ratios(seconds[way], bare)),
                        spread(ratios(processor[way], processor["bare"])),
                    )
                )  # fmt: skip
            peaks = {
                way: in_child("bench_caching", "peak", folder=folder, positions=positions, way=way)[0]
                for way in ("bare", "VarOpt")
            }
            memory.append(
                (
                    title, f"{vocabulary:,}", f"{peaks['bare'] / 2**20:,.0f}",
                    *(f"{peaks[way] / 2**20:,.0f} ({peaks[way] / peaks['bare']:.2f})" for way in ("VarOpt",)),
                )
            )  # fmt: skip
    yield Table(
        "Time against the model's bare forward",
        ("teacher", "V", "way", "positions/s", "time / bare", "processor time / bare"),
        times,
        f"Windows of {CONTEXT}, K = {K}, float32, {ROUNDS} rounds; batches of {BATCH} windows, shards of {SHARD:,} "
        "positions, where a job would have "
        "65,536. To reach on a CPU: 1.15.",
    )
    yield Table(
        "Peak memory above the loaded teacher, MiB",
        ("teacher", "V", "bare", "cache-logits, VarOpt (of bare)"),
        memory,
    )
    families = []
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            in_child("bench_caching", "prepare_family", folder=folder, family=family)
            found, _ = in_child(
                "bench_caching", "measure", folder=folder, positions=FAMILY_POSITIONS, rounds=FAMILY_ROUNDS
            )
            processor = found["processor"]
            families.append(
                (
                    family,
                    found["head"],
                    *(spread(ratios(processor[way], processor["bare"])) for way in processor if way != "bare"),
                )
            )
    yield Table(
        "Processor time against the bare forward, by architecture",
        ("model type", "head", "top-k / bare", "VarOpt / bare"),
        families,
        "V = 16,000, H = 256, 4 layers: small models, beside which the reducer weighs more. fast: backbone, then the "
        "head on the wanted rows; general: the model's own forward.",
    )


def prepare(folder: str, vocabulary: int, layers: int, hidden: int, positions: int) -> None:
    """A teacher with random weights whose logits are as far apart as a trained one's, and a token stream."""
    import numpy as np
    import torch
    from support.caches.small import make_corpus
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    model.save_pretrained(f"{folder}/teacher")
    tokens = np.random.default_rng(0).integers(0, vocabulary, positions)
    make_corpus(f"{folder}/cache", tokens.astype(np.uint16 if vocabulary <= 65_535 else np.uint32), vocabulary)


def prepare_family(folder: str, family: str) -> None:
    """The same for a small model of a family."""
    import numpy as np
    import torch
    from support.caches.small import make_corpus
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILY_SIZE, "initializer_range": 0.1, **FAMILIES[family]})
    AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/teacher")
    vocabulary = FAMILY_SIZE["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocabulary, FAMILY_POSITIONS).astype(np.uint16)
    make_corpus(f"{folder}/cache", tokens, vocabulary)


class _Ways:
    """The ways, over one teacher that is loaded once."""

    def __init__(self, folder: str, positions: int) -> None:
        from logit_cache.caching.prepare import load_teachers

        logging.disable(logging.WARNING)
        self._cache = f"{folder}/cache"
        self._teacher = f"{folder}/teacher"
        self._positions = positions
        self._teachers: Any = load_teachers(self._job("topk"))
        self.head = self._teachers[0].head

    def run(self, way: str) -> None:
        """One pass over all positions."""
        if way in ("top-k", "VarOpt"):
            self._cached("topk" if way == "top-k" else "varopt")
        else:
            self._forward()

    def _job(self, targets: Any) -> Any:
        from logit_cache.caching.job import CacheJob

        return CacheJob(
            cache=self._cache, teacher=(self._teacher,), name="a", targets=targets, k=K, context_tokens=CONTEXT,
            dtype="float32", device="cpu", shard_tokens=SHARD, chunk_tokens=SHARD,
            batch_windows=BATCH,
        )  # fmt: skip

    def _cached(self, targets: str) -> None:
        from logit_cache.caching.prepare import open_job
        from logit_cache.engines.this_machine import build_missing

        shutil.rmtree(Path(self._cache) / "teachers/a", ignore_errors=True)
        opened = open_job(self._job(targets), self._teachers)
        build_missing(opened)
        assert opened.writer.pending() == []

    def _forward(self) -> None:
        import numpy as np
        import torch

        from storage import LogitCache

        teacher = self._teachers[0]
        tokens = LogitCache.open(self._cache).tokens.read(0, self._positions)
        windows = torch.from_numpy(tokens.astype(np.int64)).reshape(-1, CONTEXT)
        for batch in windows.split(BATCH):
            with torch.inference_mode():
                teacher._model(input_ids=batch, use_cache=False)


def measure(folder: str, positions: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds, passed and of processor time, of each way in each round."""
    ways = _Ways(folder, positions)
    processor: dict[str, list[float]] = {}

    def run(way: str) -> float:
        began, began_processor = time.perf_counter(), time.process_time()
        ways.run(way)
        processor.setdefault(way, []).append(time.process_time() - began_processor)
        return time.perf_counter() - began

    names = ("bare", "top-k", "VarOpt")
    run("bare")  # the first pass of a process pays for much that is made once
    processor.clear()
    processor.update({name: [] for name in names})
    seconds = in_turn({name: lambda name=name: run(name) for name in names}, rounds)
    return {"seconds": seconds, "processor": processor, "head": ways.head}


def peak(folder: str, positions: int, way: str) -> int:
    """Bytes by which one way raises the process's peak."""
    from harness import peak_above

    ways = _Ways(folder, positions)
    return peak_above(lambda: ways.run(way))
