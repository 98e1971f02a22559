"""The run that a cache replaces: the same steps with the teacher in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.caches.small import make_corpus
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from logit_cache.caching.job import CacheJob
from logit_cache.caching.prepare import open_job
from logit_cache.engines.this_machine import build_missing
from storage import LogitCache
from student.data.windows import DistillationWindows, reading_order
from student.job import StudentJob
from student.models.loading import load_student
from student.training.run import train

V, T, STEPS, BATCH = 67, 24, 20, 6
N = 125 * T + 1  # every block has T labels
TRAINING: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with entries a and b in both encodings, all V ids, and the teachers they came from."""
    folder = tmp_path_factory.mktemp("world")
    make_corpus(str(folder / "cache"), (5 * np.arange(N) % V).astype(np.uint16), V)
    torch.manual_seed(0)
    small = {"vocab_size": V, "initializer_range": 0.4}
    a = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1, **small)
    )
    b = LlamaForCausalLM(
        # A head with 5 columns more than the tokenizer has ids: they must not count.
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=64, **{**small, "vocab_size": V + 5})
    )  # fmt: skip
    for name, model in (("a", a), ("b", b)):
        model.save_pretrained(folder / name)
        for encoding, entry in (("float32", name), ("codes", f"{name}-codes")):
            job = CacheJob(
                cache=str(folder / "cache"), teacher=str(folder / name), name=entry, k=V, targets="topk",
                encoding=encoding, context_tokens=T, device="cpu",
            )  # fmt: skip
            opened = open_job(job)
            build_missing(opened)
    student = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    (folder / "student.json").write_text(
        json.dumps({**student, "num_attention_heads": 2, "max_position_embeddings": 64})
    )
    return folder


def cached_losses(world: Path, out: Path, teachers: dict[str, float], temperature: float) -> list[float]:
    job = StudentJob.model_validate({
        "cache": str(world / "cache"), "teachers": teachers, "model": str(world / "student.json"), "alpha": 0.5,
        "temperature": temperature, "window_tokens": T, "output_dir": str(out), "seed": 3, "training": TRAINING,
    })  # fmt: skip
    return [entry["loss"] for entry in train(job, lambda line: None).train_log if "loss" in entry]


def live_losses(world: Path, teachers: dict[str, float], temperature: float, combine: str = "") -> list[float]:
    """0.5·CE + 0.5·τ²·Σ w KL(softmax(z_teacher/τ) ‖ softmax(z_student/τ)), mean over positions, teachers run live.

    combine: the KL to one teacher, with the logits Σ w z (logit-mean) or log Σ w softmax(z) (mixture).
    """
    cache = LogitCache.open(str(world / "cache"))
    tokens = torch.from_numpy(cache.tokens.read(0, N).astype(np.int64))
    models = {name: AutoModelForCausalLM.from_pretrained(world / name).eval() for name in teachers}
    student = load_student(
        str(world / "student.json"), vocabulary_size=V, special_ids={"bos": 1, "eos": 1, "pad": 0},
        window_tokens=T, seed=3,
    )  # fmt: skip
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    order = reading_order(DistillationWindows(str(world / "cache"), (), T, "fixed", seed=3), BATCH).permutation(0)
    losses = []
    for step in range(STEPS):
        starts = [int(window) * T for window in order[step * BATCH : (step + 1) * BATCH]]
        x = torch.stack([tokens[start : start + T] for start in starts])
        y = torch.stack([tokens[start + 1 : start + T + 1] for start in starts])
        log_q = F.log_softmax(student(x).logits / temperature, -1)
        ce = F.cross_entropy(student(x).logits.flatten(0, 1), y.flatten())
        kl = torch.zeros(())
        with torch.no_grad():
            logits = {name: models[name](x).logits[..., :V] for name in teachers}
        if combine == "logit-mean":
            logits = {"all": sum((weight * logits[name] for name, weight in teachers.items()), torch.zeros(()))}
        elif combine == "mixture":
            shares = [w * F.softmax(logits[name], -1) for name, w in teachers.items()]
            logits = {"all": torch.stack(shares).sum(0).log()}
        for name, z in logits.items():
            weight = teachers.get(name, 1.0)
            log_p = F.log_softmax(z / temperature, -1)
            kl = kl + weight * F.kl_div(log_q, log_p, log_target=True, reduction="sum") / y.numel()
        loss = 0.5 * ce + 0.5 * temperature**2 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
