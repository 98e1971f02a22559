"""Isolated documents that share rows have the targets that each has alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import make_corpus
from support.caches.streams import chat_lengths
from support.commands import Run, succeeded
from support.jobs import cache_logits, contents
from support.models.families import COMMON, families
from support.models.saved import dense_logprobs, saver
from transformers import AutoConfig

from logit_cache.caching.packing import one_by_one, packed, row_lengths
from logit_cache.caching.windows import windows
from storage.cache.verify import verify
from storage.format.manifest.entry import Windowing

V, BEGIN = 61, 1


OTHERS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8}, "gemma3_text": {"head_dim": 8, "sliding_window": 7}, "mistral": {"sliding_window": 7},
    "mixtral": {"num_local_experts": 3},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 7, "head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 16},
}  # fmt: skip
PACKED = ("gpt2", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_neox", "mixtral")
SORTED = ("opt", "gpt_oss", "mamba", "falcon_h1")


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **{**COMMON, "vocab_size": V, "num_key_value_heads": 2, **OTHERS[family]})


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    others = {family: partial(config_of, family) for family in OTHERS}
    return saver(tmp_path_factory.mktemp("models"), families(V) | others)


@pytest.mark.parametrize("longest", [1, 40, 512, 513, 1_500, 9_000])
def test_rows_hold_every_window_once_and_no_more_than_their_length(longest: int) -> None:
    lengths = chat_lengths(900, min(104, longest), longest)
    starts = np.cumsum(lengths) - lengths
    windowing = Windowing(context_tokens=longest, stride_tokens=longest, isolate_documents=True)
    made = list(windows(0, int(lengths.sum()), int(lengths.sum()), windowing, starts.astype(np.uint64)))
    choices = row_lengths(longest + 1, [window.stop - window.start + 1 for window in made])
    assert choices[-1] == max(choices[0], longest + 1)
    assert all(one < other <= 2 * one for one, other in pairwise(choices))
    for rows in (packed(made, choices, 1), one_by_one(made, longest + 1, 1, 4_096)):
        found = []
        for length, some in rows:
            sizes = [sum(window.stop - window.start + 1 for window in row) for row in some]
            assert max(sizes, default=0) <= length <= choices[-1]
            found += [window for row in some for window in row]
        assert sorted(found, key=lambda window: window.start) == made
    read = sum(length * len(some) for length, some in packed(made, choices, 1))
    assert read < 1.03 * (lengths.sum() + len(lengths)) + choices[-1]


# Of every family whether its mask keeps documents apart; of a kind of mask, that whole documents are no other case.
WHOLE, WHOLE_IN = {"context_tokens": 64, "positions": "all"}, ("gpt2", "gemma3_text", "opt", "mamba")
LONGER = {"context_tokens": 24, "stride_tokens": 8, "bos_each_window": True, "positions": "trained"}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *(pytest.param(family, LONGER, id=f"longer than the context-{family}") for family in (*PACKED, *SORTED)),
        *(pytest.param(family, WHOLE, id=f"whole documents-{family}") for family in WHOLE_IN),
    ],
)
def test_targets_are_those_of_each_document_alone(
    family: str, fields: dict[str, Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    teacher, url = save(family), tmp_path / "cache"
    lengths = chat_lengths(20, 20, 60)
    starts = np.cumsum(lengths) - lengths
    tokens = np.random.default_rng(3).integers(2, V, lengths.sum()).astype(np.uint16)
    mask = np.random.default_rng(4).random(len(tokens)) < 0.4
    make_corpus(str(url), tokens, V, document_starts=starts, loss_mask=mask)
    job = {"targets": "topk", "k": 12, "encoding": "float32", "fields": ("all",), "isolate_documents": True, **fields}
    entry, stored = cache_logits(url, "a", teacher, shard_tokens=256, chunk_tokens=256, **job)
    packs = family in PACKED
    assert entry.entry.execution.rows == ("packed" if packs else "sorted")
    assert entry.entry.execution.row_tokens in {(128,), (256,), (512,)} if packs else {None}
    context, begin = fields["context_tokens"], (BEGIN,) if "bos_each_window" in fields else ()
    stride = fields.get("stride_tokens", context)
    parts = [
        dense_logprobs(teacher, tokens[start : start + length], context, stride, begin)[:, :V]
        for start, length in zip(starts, lengths, strict=True)
    ]
    dense = torch.cat(parts).double()
    wanted = mask if fields["positions"] == "trained" else np.ones(len(tokens), dtype=bool)
    assert (stored.kept > 0).tolist() == wanted.tolist()
    gathered = dense.gather(1, torch.from_numpy(stored.token_ids.astype(np.int64)).clamp(max=V - 1)).numpy()
    assert np.abs(stored.logprobs - gathered)[wanted].max() < 1e-4
    assert (np.sort(gathered)[:, ::-1] == gathered)[wanted].mean() > 0.99
    following = np.append(tokens[1:], 0).astype(np.int64)
    has_next = np.ones(len(tokens), dtype=bool)
    has_next[np.append(starts[1:], len(tokens)) - 1] = False
    labels = dense.gather(1, torch.from_numpy(following)[:, None])[:, 0].numpy()
    assert np.abs(stored.label_logprob - labels)[wanted & has_next].max() < 1e-4
    assert np.isnan(stored.label_logprob[~has_next]).all()
    # Other shards have other rows, and the same targets to rounding.
    _, again = cache_logits(url, "b", teacher, shard_tokens=128, chunk_tokens=128, **job)
    np.testing.assert_allclose(again.entropy[wanted], stored.entropy[wanted], atol=1e-4)
    assert verify(str(url), deep=True).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_workers_and_restarts_leave_the_same_bytes(
    family: str, save: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    lengths = chat_lengths(200, 20, 60)
    starts = np.cumsum(lengths) - lengths
    tokens = np.random.default_rng(3).integers(2, V, lengths.sum()).astype(np.uint16)
    found = []
    for name, options in {"one": ("--workers", 1), "two": ("--workers", 2), "part": ("--worker", "1/3")}.items():
        make_corpus(str(tmp_path / name), tokens, V, document_starts=starts)
        line = ("cache-logits", "--cache", tmp_path / name, "--teacher", save(family), "--name", "a", "-k", 8)
        line = (*line, "--isolate-documents", "--context-tokens", 64, "--shard-tokens", 512)
        succeeded(run(*line, *options, *(("--no-help-others",) if name == "part" else ())))
        if name == "part":  # the others' shares in one process, after a restart
            succeeded(run(*line))
        found.append(contents(tmp_path / name))
    assert len(found[0]) > 20
    assert found[0] == found[1] == found[2]
