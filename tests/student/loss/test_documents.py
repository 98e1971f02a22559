"""Documents that share rows are read as each is alone: by models that keep them apart, and by those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models.students import V, loss_of, small_model
from support.references.dense_targets import dense, stored
from transformers import PreTrainedModel

from student.labels import NOT_TRAINED
from student.loss.documents import PACKED, DocumentReader, model_inputs
from student.target_batch import TargetBatch
from student.training.bound_forward import bind_loss

SLIDING = {"sliding_window": 3}
KEEP_APART: dict[str, dict[str, Any]] = {
    "gpt2": {}, "llama": {}, "qwen2": {}, "qwen3": {}, "gemma2": SLIDING, "gemma3_text": SLIDING, "mistral": SLIDING,
    "mixtral": {"num_local_experts": 3}, "gpt_neox": {}, "gptj, with a bias": {}, "phi": {}, "olmo2": {}, "cohere2": {},
}  # fmt: skip
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, **SLIDING}
MIX: dict[str, dict[str, Any]] = {
    "opt, projected": {"dropout": 0.0}, "gpt_oss": GPT_OSS, "mamba": {}, "falcon_h1": {}, "bloom": {},
}  # fmt: skip
LENGTHS = ((5, 1, 9, 3), (2, 11, 4))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 18 ids in documents of these lengths, the rest of the second is padding; and their positions."""
    ids = torch.randint(0, V, (2, 18), generator=torch.Generator().manual_seed(5))
    ends = [torch.cat([torch.arange(length) for length in (*lengths, 18 - sum(lengths))]) for lengths in LENGTHS]
    return ids, torch.stack(ends)


def alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of each document by itself, [B, T, W]; 0 for padding."""
    rows = []
    for row, lengths in zip(ids, LENGTHS, strict=True):
        parts = [model(**model_inputs(part[None], None)).logits[0] for part in row[: sum(lengths)].split(lengths)]
        rows.append(F.pad(torch.cat(parts), (0, 0, 0, len(row) - sum(lengths))))
    return torch.stack(rows)


@pytest.mark.parametrize("family", [*KEEP_APART, *MIX])
def test_logits_and_gradients_are_those_of_each_document_alone(family: str) -> None:
    model = small_model(family, **(KEEP_APART | MIX)[family]).eval()
    ids, positions = batch()
    inside = torch.stack([torch.arange(18) < sum(lengths) for lengths in LENGTHS])[..., None]
    reader = DocumentReader(model)
    found = reader(lambda *read: model(**model_inputs(*read)).logits, ids, positions) * inside
    assert (reader.how == PACKED) == (family in KEEP_APART), reader.how
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(6))
    gradients = []
    expected = alone(model, ids)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    for logits in (found, expected):
        model.zero_grad()
        (logits * weights).sum().backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=1e-5 * max(1.0, scale), msg=name)


def test_a_model_that_is_silently_wrong_is_caught(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model("llama").eval()
    own = model.forward

    def forward(*, position_ids: torch.Tensor | None = None, **given: Any) -> Any:
        # As a model whose rotary embedding knows the positions, and whose mask does not.
        batch, length = given["input_ids"].shape
        mask = torch.ones(batch, length, dtype=torch.long)
        return own(position_ids=position_ids, attention_mask=mask, **given)

    model.forward = forward  # type: ignore[method-assign]
    ids, positions = batch()
    reader = DocumentReader(model)
    found = reader(lambda *read: model(**model_inputs(*read)).logits, ids, positions)
    torch.testing.assert_close(found[0], alone(model, ids)[0], rtol=2e-5, atol=2e-5)
    assert "with others in its row, logits of a document differ by" in str(reader.how)
    assert "LlamaForCausalLM: documents are read in rows of their own, not packed" in caplog.text


def test_short_documents_of_long_rows_are_read_in_shorter_ones() -> None:
    model = small_model("llama", max_position_embeddings=2_048, hidden_size=32, num_attention_heads=2).eval()
    lengths = [130, 7, 300, 1, 90, 44, 520, 61, 250, 33, 97, 12, 200, 155, 148]
    assert sum(lengths) == 2_048
    ids = torch.randint(0, V, (2, 2_048), generator=torch.Generator().manual_seed(2))
    positions = torch.stack([torch.cat([torch.arange(n) for n in order]) for order in (lengths, lengths[::-1])])
    reader, read = DocumentReader(model), []

    def logits(some: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
        read.append(some.shape)
        found: torch.Tensor = model(**model_inputs(some, at)).logits
        return found

    with torch.no_grad():
        found, expected = reader(logits, ids, positions), logits(ids, positions)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    *shorter, _ = read
    assert max(length for _, length in shorter) == 1_024, "the longest document has 520 tokens"
    assert sum(rows * length for rows, length in shorter) < 1.1 * ids.numel()
    assert sum(rows * length**2 for rows, length in shorter) < 0.35 * 2 * 2_048**2


@pytest.mark.parametrize("family", ["llama", "opt, projected"])
@pytest.mark.parametrize("fused", ["on", "off"])
def test_the_bound_loss_is_the_sum_over_documents(family: str, fused: Any) -> None:
    """Also where only some rows are trained: the output layer sees no others."""
    model = small_model(family, **(KEEP_APART | MIX)[family])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bind_loss(model, loss_of(), fused)
    ids, positions = batch()
    labels = torch.randint(0, V, ids.shape, generator=torch.Generator().manual_seed(7))
    labels[torch.rand(ids.shape, generator=torch.Generator().manual_seed(8)) < 0.6] = NOT_TRAINED
    labels[1, sum(LENGTHS[1]) :] = NOT_TRAINED
    flat = stored(dense(3, labels.numel(), vocabulary_size=V), 9)
    targets = TargetBatch(**{k: v.unflatten(0, ids.shape) for k, v in vars(flat).items() if v is not None})
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].numel()))
    out = model(input_ids=ids, labels=labels, targets={"t": targets}, position_ids=positions, use_cache=False)
    hook.remove()
    hidden = model.get_output_embeddings().in_features
    if fused == "on":
        assert seen[-1] == int((labels != NOT_TRAINED).sum()) * hidden
    out.loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    count, total = int((labels != NOT_TRAINED).sum()), 0.0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            one = {
                "input_ids": ids[row : row + 1, part],
                "labels": labels[row : row + 1, part],
                "targets": {"t": TargetBatch(**{
                    k: v[row : row + 1, part] for k, v in vars(targets).items() if v is not None
                })},
            }  # fmt: skip
            loss = model(**one, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
            start += length
    assert float(out.loss.detach()) == pytest.approx(total, rel=1e-5)
    for name, each in model.named_parameters():
        if each.grad is not None:
            torch.testing.assert_close(found[name], each.grad, rtol=1e-4, atol=1e-6, msg=name)
