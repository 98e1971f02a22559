"""Which output layers are fused with the loss, by family; and training with one against holding the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from support.models.students import FAMILIES, IDS, SMALL, V, batch_of, loss_of, small_model
from support.runs import arguments, job_in, ranks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from storage.errors import InputError
from student.cli import train_student
from student.loss.output_layer import PlainHead, choose_head, plain_head
from student.training.bound_forward import bind_loss
from student.training.run import train


def gradients(model: PreTrainedModel, fused_head: str, *, seeds: tuple[int, ...] = (1,)) -> tuple[Tensor, list[Tensor]]:
    """The loss of some batches, and all parameters' gradients, with the dropout of one seed."""
    assert (bind_loss(model, loss_of(), fused_head) is None) == (fused_head == "on")
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    loss = torch.stack([model(**batch_of(seed), num_items_in_batch=40).loss for seed in seeds]).sum()
    loss.backward()
    assert model(**batch_of(1)).logits is None
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_known_and_train_as_with_their_own_logits(family: str) -> None:
    # Wide initial weights: with logits near 0, a softcap or a factor would hardly show in the gradients.
    model = small_model(family, initializer_range=0.5).double()
    head = plain_head(model)
    assert isinstance(head, PlainHead), head
    assert (head.logit_scale, head.softcap) == FAMILIES[family][1:]
    assert (head.linear.bias is not None) == ("bias" in family)
    plain, expected = gradients(model, "off")
    loss, found = gradients(small_model(family, initializer_range=0.5).double(), "on")
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    assert largest > 1e-3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * largest)


class Doubled(LlamaForCausalLM):
    def forward(self, input_ids: Tensor | None = None, **others: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=2 * super().forward(input_ids, **others).logits)


class Dropping(LlamaForCausalLM):
    """Drops hidden states in front of its output layer, which only training shows."""

    def forward(self, input_ids: Tensor | None = None, **others: Any) -> CausalLMOutput:
        hidden = self.model(input_ids, use_cache=False).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(F.dropout(hidden, 0.1, self.training)))


class Quantised(nn.Linear):
    pass


def other_model(kind: str) -> PreTrainedModel:
    if kind in ("doubled", "dropping"):
        return (Doubled if kind == "doubled" else Dropping)(LlamaConfig(**{**SMALL, **IDS}))
    if kind == "bert":
        return small_model("bert", is_decoder=True)
    model = small_model("llama")
    if kind == "quantised":
        model.lm_head = Quantised(16, V + 3, bias=False)
    elif kind == "hooked":
        model.lm_head.register_forward_hook(lambda layer, inputs, output: 2 * output)
    elif kind == "zero":
        nn.init.zeros_(model.lm_head.weight)
    elif kind == "bare":
        model = nn.Linear(3, 3)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("doubled", r"does not give its logits: up to .* from logits"),
        ("dropping", "does not give its logits"),
        ("bert", "does not give its logits"),
        ("quantised", "is a Quantised, not a plain Linear"),
        ("hooked", "hooks"),
        ("zero", "of size 0, so they cannot be compared"),
        ("bare", r"cannot be tested by itself \(AttributeError"),
    ],
)
def test_other_heads_keep_their_own_forward_or_are_refused_by_name(kind: str, reason: str) -> None:
    model = other_model(kind)
    name = type(model).__name__
    with pytest.raises(InputError, match=f"^{name}: the fused head was asked for, but .*{reason}.*; take auto or off"):
        choose_head(model, "on")
    found = choose_head(model, "auto")
    assert isinstance(found, str)
    with pytest.raises(InputError, match=name):
        bind_loss(model, loss_of(), "on")
    assert "forward" not in vars(model)
    if kind == "doubled":
        assert bind_loss(model, loss_of(), "auto") == found
        model.train()
        batch = batch_of(1)
        loss = model(**batch).loss
        logits = model(batch["input_ids"]).logits.flatten(0, 1)
        sums = loss_of()(logits, batch["labels"].flatten(), batch["targets"])
        torch.testing.assert_close(loss, sums.loss_sum / sums.count)


def test_turned_off_it_is_off() -> None:
    assert choose_head(small_model("llama"), "off") == "it was turned off"


def test_trying_a_head_leaves_no_trace() -> None:
    model = small_model("gpt2")
    model.eval()
    model.transformer.h[0].train()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert isinstance(plain_head(model), PlainHead)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


# The compiler looks at the gradients of what it resumes with, and warns about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("fused_head", ["on", "off"])
def test_a_compiled_model_has_the_same_loss(fused_head: str) -> None:
    model = small_model("llama")
    loss, expected = gradients(model, fused_head)
    model.zero_grad()
    found = torch.compile(model, backend="eager")(**batch_of(1), num_items_in_batch=40).loss
    found.backward()
    torch.testing.assert_close(found.detach(), loss)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_fused_run_is_the_run_that_holds_its_logits(world: Path, tmp_path: Path) -> None:
    common = {"model": str(world / "gpt2.json"), "eval_cache": str(world / "held")}
    reports = {}
    for choice in ("on", "off"):
        reports[choice] = train(job_in(world, tmp_path / choice, fused_head=choice, **common))
        assert reports[choice].fused_head == (choice == "on")
    on, off = reports["on"], reports["off"]
    assert len(on.train_log) > 3
    for mine, theirs in zip(on.train_log, off.train_log, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert on.held_out is not None
    assert off.held_out is not None
    assert on.held_out.cross_entropy == pytest.approx(off.held_out.cross_entropy, abs=1e-5)
    assert on.held_out.kl["b"].nats == pytest.approx(off.held_out.kl["b"].nats, abs=1e-5)


def test_the_command_refuses_before_it_writes_anything(world: Path, tmp_path: Path) -> None:
    config = {"model_type": "bert", "is_decoder": True, "hidden_size": 16, "intermediate_size": 32}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    (tmp_path / "bert.json").write_text(json.dumps(config))
    job = job_in(world, tmp_path / "out", model=str(tmp_path / "bert.json"))
    done = CliRunner().invoke(train_student, [*arguments(job), "--fused-head", "on"])
    assert done.exit_code == 2
    assert "error: BertLMHeadModel: the fused head was asked for, but" in done.stderr
    assert not (tmp_path / "out").exists()


TWO_PROCESSES = """
import contextlib, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from support.models.students import batch_of, loss_of, small_model
from student.training.bound_forward import bind_loss
dist.init_process_group("gloo")
gradients = []
for family in sys.argv[2:]:
    model = small_model(family)
    assert bind_loss(model, loss_of(), "on") is None
    model.train()
    arrived = []
    model.get_output_embeddings().weight.register_post_accumulate_grad_hook(lambda p: arrived.append(1))
    parallel = DistributedDataParallel(model)
    for i in range(2):
        with parallel.no_sync() if i == 0 else contextlib.nullcontext():
            # DDP takes the mean over the processes.
            loss = parallel(**batch_of(1 + 2 * dist.get_rank() + i), num_items_in_batch=40).loss
            (dist.get_world_size() * loss).backward()
    assert len(arrived) == 2, arrived
    gradients.append([p.grad for p in model.parameters()])
if dist.get_rank() == 0:
    torch.save(gradients, sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_and_accumulation_add_up_to_one_gradient(tmp_path: Path) -> None:
    families = ["llama", "llama, tied"]
    done = ranks(2, TWO_PROCESSES, str(tmp_path / "found"), *families)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    for family, found in zip(families, torch.load(tmp_path / "found"), strict=True):
        _, expected = gradients(small_model(family), "off", seeds=(1, 2, 3, 4))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
