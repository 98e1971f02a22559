"""Conversations read each by itself, against the same tokens as one stream: caching them, and training from them.

400 documents of 104 tokens on average, the longest cut at the largest context; their last 38 % are trained, as replies
are. What is compared is processor time of one process and one thread, for each token, or for each trained one.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import Table, in_child, in_turn, ratios, spread

DOCUMENTS, MEAN, TRAINED, K, ROUNDS = 400, 104, 0.38, 64, 3
CONTEXTS, WINDOWS = (128, 512, 2_048), (512, 2_048)
STEP_TOKENS = 4_096
MODEL = {
    "vocab_size": 16_000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 768, "max_position_embeddings": 4_096, "tie_word_embeddings": False,
}  # fmt: skip
JOINED, ALONE, REPLIES, IDEAL = (
    "one stream",
    "isolated",
    "isolated, trained positions",
    "sorted by length, trained rows",
)


def tables() -> Iterator[Table]:
    """Caching, by context; bytes; training, by window."""
    with tempfile.TemporaryDirectory() as folder:
        in_child("bench_conversations", "prepare", folder=folder)
        rows = []
        for context in CONTEXTS:
            found, _ = in_child("bench_conversations", "caching", threads=1, folder=folder, context=context)
            base = found["seconds"][JOINED]
            rows += [
                (
                    f"{context:,}" if way == JOINED else "",
                    way,
                    spread(ratios(taken, base)),
                    spread([1e6 * value / found["tokens"] for value in taken], 0),
                    f"{found['padding'][way]:.1%}" if way in found["padding"] else "",
                    f"{found['bytes'][way]:.0f}" if way in found["bytes"] else "",
                )
                for way, taken in found["seconds"].items()
            ]
        yield Table(
            "Caching conversations",
            ("context", "way", "processor time, over one stream's", "µs per token", "padding", "bytes / trained token"),
            rows,
            f"{DOCUMENTS} documents of {MEAN} tokens on average, {TRAINED:.0%} of them trained; V = 16,000, 4 layers "
            f"of 256, K = {K}, one thread, {ROUNDS} rounds. The last way is a plain loop: documents sorted by length, "
            "padded to the longest of a batch, the head on the trained rows, and nothing stored. To reach: 1.15 for "
            "isolated ones, less where only trained positions have targets, and less than 5 % of padding.",
        )
        rows = []
        for window in WINDOWS:
            found, _ = in_child("bench_conversations", "training", threads=1, folder=folder, window=window)
            base = found[JOINED]
            rows += [
                (
                    f"{window:,}" if way == JOINED else "",
                    way,
                    spread(ratios(base, taken)),
                    spread([1 / value for value in taken], 0),
                )
                for way, taken in found.items()
            ]
        yield Table(
            "Training from conversations",
            ("window", "way", "trained tokens/s, over one stream's", "trained tokens/s"),
            rows,
            f"A student of the teacher's size, AdamW, steps of {STEP_TOKENS:,} tokens, an epoch a round; per second of "
            "processor time. The last way reads each document in a row of its own, those of about equal length "
            "together. To reach: 0.91.",
        )


def prepare(folder: str) -> None:
    """A teacher with random weights whose logits are as far apart as a trained one's, and the documents."""
    import numpy as np
    import torch
    from support.caches.small import make_corpus
    from support.caches.streams import chat_lengths
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    model.save_pretrained(f"{folder}/teacher")
    lengths = chat_lengths(DOCUMENTS, MEAN, max(CONTEXTS))
    starts = np.cumsum(lengths) - lengths
    tokens = np.random.default_rng(0).integers(0, MODEL["vocab_size"], int(lengths.sum())).astype(np.uint16)
    place = (np.arange(len(tokens)) - np.repeat(starts, lengths)) / np.repeat(lengths, lengths)
    mask = place >= 1 - TRAINED
    make_corpus(f"{folder}/cache", tokens, MODEL["vocab_size"], document_starts=starts, loss_mask=mask)


def caching(folder: str, context: int) -> dict[str, Any]:
    """Processor seconds of each way in each round, shares of padding, bytes per trained token."""
    from logit_cache.caching.prepare import load_teachers, open_job
    from logit_cache.caching.score_shard import padding_share
    from logit_cache.engines.this_machine import build_missing
    from storage import LogitCache

    logging.disable(logging.WARNING)
    cache = Path(folder, "cache")
    ways = {
        JOINED: {"isolate_documents": False, "positions": "all"},
        ALONE: {"isolate_documents": True, "positions": "all"},
        REPLIES: {"isolate_documents": True, "positions": "trained"},
    }
    teachers = load_teachers(_job(folder, context, {}))
    opened = LogitCache.open(str(cache))
    trained = opened.loss_mask.read(0, len(opened.tokens)).sum()
    size: dict[str, float] = {}
    padding: dict[str, float] = {}

    def cached(way: str) -> None:
        shutil.rmtree(cache / "teachers/a", ignore_errors=True)
        job = open_job(_job(folder, context, ways[way]), teachers)
        build_missing(job)
        files = (file for file in (cache / "teachers/a").rglob("*") if file.is_file() and "receipts" not in file.parts)
        size[way] = sum(file.stat().st_size for file in files) / trained
        padding[way] = padding_share(job.cache, job.writer.entry)

    runs: dict[str, Callable[[], float]] = {way: lambda way=way: _processor(lambda: cached(way)) for way in ways}
    runs[IDEAL] = lambda: _processor(lambda: _plain_loop(opened, teachers[0]._model))
    cached(JOINED)  # the first pass of a process pays for much that is made once
    return {"seconds": in_turn(runs, ROUNDS), "padding": padding, "bytes": size, "tokens": len(opened.tokens)}


def _job(folder: str, context: int, fields: dict[str, Any]) -> Any:
    from logit_cache.caching.job import CacheJob

    return CacheJob(
        cache=f"{folder}/cache", teacher=(f"{folder}/teacher",), name="a", k=K, context_tokens=context, device="cpu",
        dtype="float32", **fields,
    )  # fmt: skip


def _plain_loop(cache: Any, model: Any) -> None:
    import numpy as np
    import torch

    starts, total = cache.document_starts.astype(np.int64), len(cache.tokens)
    tokens, mask = cache.tokens.read(0, total).astype(np.int64), cache.loss_mask.read(0, total)
    spans = sorted(zip(starts.tolist(), [*starts[1:].tolist(), total], strict=True), key=lambda span: span[0] - span[1])
    while spans:
        length = spans[0][1] - spans[0][0]
        some, spans = spans[: max(1, STEP_TOKENS // length)], spans[max(1, STEP_TOKENS // length) :]
        ids, wanted = np.zeros((len(some), length), np.int64), np.zeros((len(some), length), bool)
        for row, (start, stop) in enumerate(some):
            ids[row, : stop - start], wanted[row, : stop - start] = tokens[start:stop], mask[start:stop]
        with torch.inference_mode():
            hidden = model.model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
            model.lm_head(hidden[torch.from_numpy(wanted)])


def training(folder: str, window: int) -> dict[str, list[float]]:
    """Processor seconds per trained token of each way in each round."""
    import torch
    from support.jobs import cache_logits
    from transformers import LlamaConfig, LlamaForCausalLM

    from student.data.batches import collate
    from student.data.windows import DistillationWindows, reading_order
    from student.loss.distillation import DistillationLoss
    from student.loss.teacher_targets import Member
    from student.training.bound_forward import bind_loss

    logging.disable(logging.WARNING)
    cache, teacher = Path(folder, "cache"), Path(folder, "teacher")
    for name, isolated in (("joined", False), ("alone", True)):
        if not (cache / "teachers" / name).exists():
            context = {"context_tokens": max(CONTEXTS), "isolate_documents": isolated, "fidelity_positions": 0}
            cache_logits(cache, name, teacher, k=K, device="cpu", **context)
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def epoch(name: str, how: str | None = None) -> float:
        windows = DistillationWindows(str(cache), [name], window)
        loss = DistillationLoss(windows.vocabulary_size, 0.0, 1.0, [Member.of(name, windows.entries[name])])
        bound = model.forward
        bind_loss(model, loss, "on")
        if how is not None:
            model.forward.documents.how = how
        order, step = list(reading_order(windows, STEP_TOKENS // window)), STEP_TOKENS // window
        began = time.process_time()
        for first in range(0, len(order), step):
            batch = collate(windows.__getitems__(order[first : first + step]))
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        took = time.process_time() - began
        model.forward = bound
        return took / windows.trained_positions(order)

    runs = {JOINED: lambda: epoch("joined"), ALONE: lambda: epoch("alone"), IDEAL: lambda: epoch("alone", "apart")}
    runs[ALONE]()
    return in_turn(runs, ROUNDS)


def _processor(run: Callable[[], None]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began
