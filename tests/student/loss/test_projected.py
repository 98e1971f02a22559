"""Targets from another vocabulary: an id that a row names several times counts as often, in loss and gradient."""

from __future__ import annotations

import pytest
import torch

from storage.errors import InputError
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.target_batch import TargetBatch

V = 30
ABSENT = frozenset({"entropy", "half-tail", "sampled-logprobs"})
MEMBER = Member("t", 1.0, None, V, 1.0, ABSENT, projected=True)


def test_repeated_ids_add_up() -> None:
    ids = torch.tensor([[4, 9, 4, 9, 9, 20], [1, 2, 2, 5, 5, 5]])
    p = torch.tensor([[0.5, 0.2], [0.4, 0.0]], dtype=torch.float64)
    certain, kept = torch.tensor([2, 1]), torch.tensor([6, 5])
    logprobs = torch.full((2, 6), torch.nan, dtype=torch.float64)
    logprobs[0, :2], logprobs[1, 0] = p[0].log(), p[1, 0].log()
    outside = torch.tensor([0.3, 0.6], dtype=torch.float64)
    targets = TargetBatch(ids, kept, certain, logprobs, outside.log())
    whole = torch.zeros(2, V, dtype=torch.float64)
    for row in range(2):
        for column in range(int(kept[row])):
            drawn = outside[row] / (kept[row] - certain[row])
            whole[row, ids[row, column]] += p[row, column] if column < certain[row] else drawn
    torch.testing.assert_close(whole.sum(1), torch.ones(2, dtype=torch.float64))

    logits = torch.randn(2, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = -(whole * logits.log_softmax(1)).sum()
    loss = DistillationLoss(V, 0.0, 1.0, [MEMBER])(logits, torch.zeros(2, dtype=torch.int64), {"t": targets}).loss_sum
    torch.testing.assert_close(loss, expected)
    (found,), (wanted,) = (torch.autograd.grad(each, logits) for each in (loss, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("options", [{"loss": "reverse-kl"}, {"tail": "bucket"}, {"tail": "blend"},
                                     {"tail": "controlled"}, {"tail": "renormalise"}])  # fmt: skip
def test_losses_that_are_not_linear_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"projected into this one.*take forward-kl with tail sampled"):
        DistillationLoss(V, 0.5, 1.0, [MEMBER], **options)
