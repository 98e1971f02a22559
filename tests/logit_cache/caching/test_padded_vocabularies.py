"""Conversations through models whose heads are padded by different amounts, as those of one family are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.caches.small import make_corpus
from support.jobs import cache_logits
from transformers import LlamaConfig, LlamaForCausalLM

from student.data.batches import collate
from student.data.windows import DistillationWindows
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.training.bound_forward import bind_loss

V, K, ALPHA = 151_669, 12, 0.3
LENGTHS = np.array([9, 30, 5, 17, 12])
STARTS = np.cumsum(LENGTHS) - LENGTHS


def model(columns: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=columns, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.5,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        made.lm_head.weight[V:] += 0.5  # what a pad says is as likely as anything
    return made


@pytest.mark.parametrize(("of_teacher", "of_student"), [(152_064, 151_936), (151_936, 152_064)])
def test_targets_and_masked_loss_are_those_by_hand_in_float64(tmp_path: Path, of_teacher: int, of_student: int) -> None:
    url, rng = tmp_path / "cache", np.random.default_rng(0)
    tokens = rng.integers(2, V, LENGTHS.sum()).astype(np.uint32)
    mask = rng.random(len(tokens)) < 0.5
    make_corpus(str(url), tokens, V, document_starts=STARTS, loss_mask=mask)
    teacher = model(of_teacher, 0)
    teacher.save_pretrained(tmp_path / "teacher")
    job = {"targets": "topk", "k": K, "context_tokens": 16, "encoding": "float32", "fidelity_positions": 0}
    _, stored = cache_logits(url, "a", tmp_path / "teacher", **job)
    student = model(of_student, 1)
    bind_loss(
        student,
        DistillationLoss(V, ALPHA, 1.0, [Member.of("a", DistillationWindows(str(url), ["a"], 40).entries["a"])]),
    )
    windows = DistillationWindows(str(url), ["a"], 40)
    out = student(**collate(windows[:]))
    total, count, worst = 0.0, 0, 0.0
    for start, length in zip(STARTS, LENGTHS, strict=True):
        ids = torch.from_numpy(tokens[start : start + length].astype(np.int64))
        with torch.no_grad():
            own = student.forward.original(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        for at in range(length):
            if not mask[start + at]:
                assert stored.kept[start + at] == 0
                continue
            # Windows of 16 tokens within the document: position r is in the one that begins at 16 * (r // 16).
            window = ids[16 * (at // 16) : 16 * (at // 16) + 16]
            with torch.no_grad():
                logits = teacher(input_ids=window[None]).logits[0, at % 16].double()
            log_p = logits[:V].log_softmax(-1)  # of the ids that there are: a pad is no token
            row = torch.from_numpy(stored.token_ids[start + at].astype(np.int64))
            worst = max(worst, float((torch.from_numpy(stored.logprobs[start + at]) - log_p[row]).abs().max()))
            if at + 1 == length:
                continue
            tail = (1 - log_p[row].exp().sum()).log()
            others = torch.ones(of_student, dtype=torch.bool)
            others[V:] = False
            others[row] = False
            theta = own[at][others].logsumexp(0)
            divergence = (log_p[row].exp() * (log_p[row] - own[at][row])).sum() + tail.exp() * (tail - theta)
            total += float(-ALPHA * own[at][ids[at + 1]] + (1 - ALPHA) * divergence)
            count += 1
    assert worst < 1e-5
    assert float(out.loss.detach()) == pytest.approx(total / count, rel=1e-5)
    assert float(out.parts[0, 0]) == count
