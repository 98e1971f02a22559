"""Students that are a LoRA on a model with weights: their gradients, their files, their resumption, and refusals.

Legend: `W` a layer's weight [outputs, inputs], `A` [r, inputs], `B` [outputs, r], `s` = alpha / r.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.commands import Run, refused, succeeded
from support.models.adapters import rename_base, save_base
from support.models.students import batch_of, loss_of, small_model
from support.runs import KILLED, V, arguments, job_in, ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from storage.config import build_config
from storage.errors import IdentityMismatch, InputError
from student.job import StudentJob
from student.models.adapters.attach import inner_model, with_lora
from student.models.adapters.lora import Lora
from student.sweep.run import sweep
from student.sweep.search_space import Search
from student.training.bound_forward import bind_loss, unbind_loss
from student.training.run import train
from student.training.run_folder import OutputDirectory

# peft itself, by which the tests load what we save, asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LORA = "r=4,alpha=8,targets=q_proj+v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(world: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report, `--merge`d in `merged` beside it. To be read only."""
    folder = tmp_path_factory.mktemp("trained")
    train(lora_job(world, folder / "run", base, eval_cache=str(world / "held")))
    train(lora_job(world, folder / "merged", base, merge=True))
    return folder / "run"


def lora_job(world: Path, output: Path, model: Path, **changes: Any) -> StudentJob:
    return job_in(world, output, **{"model": str(model), "lora": LORA, **changes})


def logits_of(model: Any) -> torch.Tensor:
    windows = torch.arange(24).reshape(2, 12) * 7 % V
    with torch.no_grad():
        return model.eval()(input_ids=windows).logits


def on_base(adapter: Path, base: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


# Gradients


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize(
    ("family", "targets"), [("llama", "q_proj+down_proj"), ("gpt2", "c_attn"), ("gemma2", "all-linear")]
)
def test_gradients_are_those_of_the_merged_weight(family: str, targets: str, fused: Any) -> None:
    """∇A = s·Bᵀ∇W and ∇B = s·∇W·Aᵀ, and nothing else has one: not the head, which the fused loss reads."""
    still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if family == "gpt2" else {}
    whole = small_model(family, attn_implementation="eager", **still).double()
    lora = Lora.model_validate(f"r=3,alpha=5,targets={targets}")
    adapted: Any = with_lora(copy.deepcopy(whole), lora, "base", seed=1)
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    layers = {name: inner_model(adapted).get_submodule(name) for name in adapted.base_model.targeted_module_names}
    for name, layer in layers.items():
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 5 / 3
        whole.get_submodule(name).weight.data += product.T if layer.fan_in_fan_out else product
    losses = []
    for model in (whole, adapted):
        assert bind_loss(model, loss_of(), fused) is None or fused == "off"
        model.train()
        found = model(**batch_of(3))
        found.loss.backward()
        losses.append(found.loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    for name, layer in layers.items():
        of_w = whole.get_submodule(name).weight.grad
        of_w = of_w.T if layer.fan_in_fan_out else of_w
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(a.grad, 5 / 3 * b.T @ of_w, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(b.grad, 5 / 3 * of_w @ a.T, rtol=1e-9, atol=1e-12)
    assert all((p.grad is not None) == ("lora_" in name) for name, p in adapted.named_parameters())


def test_an_unbound_adapter_is_as_it_was(base: Path, tmp_path: Path) -> None:
    adapted: Any = with_lora(AutoModelForCausalLM.from_pretrained(base), Lora.model_validate(LORA), str(base), seed=1)
    asked = torch.tensor([[4, 5, 6]])
    before = adapted.eval().generate(asked, max_new_tokens=5, do_sample=False)
    adapted.save_pretrained(tmp_path / "before")
    bind_loss(adapted, loss_of())
    assert torch.equal(adapted.generate(asked, max_new_tokens=5, do_sample=False), before), "bound"
    unbind_loss(adapted)
    assert torch.equal(adapted.generate(asked, max_new_tokens=5, do_sample=False), before)
    assert "forward" not in vars(inner_model(adapted))
    adapted.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


# A run and its files


def test_a_run_leaves_an_adapter_that_peft_loads_and_that_talks(trained: Path, base: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "report.json"} <= names
    assert not names & {"config.json", "model.safetensors", "README.md", "training_args.bin"}
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == str(base.resolve())
    model, tokenizer = on_base(trained, base), AutoTokenizer.from_pretrained(trained)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits_of(model), logits_of(plain), atol=1e-3), "it has learnt something"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "t3 t4"}], return_tensors="pt")
    assert model.generate(**chat, max_new_tokens=4, min_new_tokens=4).shape[1] == chat["input_ids"].shape[1] + 4
    report = json.loads((trained / "report.json").read_text())
    tensors = load_file(trained / "adapter_model.safetensors").values()
    assert report["trained_parameters"] == sum(tensor.numel() for tensor in tensors)
    assert report["parameters"] == report["trained_parameters"] + sum(p.numel() for p in plain.parameters())
    assert report["fused_head"]


def test_a_merged_run_is_the_whole_model_of_base_and_adapter(trained: Path, base: Path) -> None:
    whole = trained.parent / "merged"
    assert not (whole / "adapter_config.json").exists()
    one, two = logits_of(AutoModelForCausalLM.from_pretrained(whole)), logits_of(on_base(trained, base))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_an_adapter_may_be_saved_in_another_dtype(world: Path, base: Path, tmp_path: Path) -> None:
    train(lora_job(world, tmp_path / "out", base, save_dtype="bfloat16", training={"max_steps": 1}))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_the_command_says_what_it_trains(run: Run, world: Path, base: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("lora: {r: 2, targets: q_proj}\n")
    job = job_in(world, tmp_path / "out", model=str(base), training={"max_steps": 1})
    open_rate = job.model_copy(update={"training": {"max_steps": 1}})
    done = succeeded(run("train-student", *arguments(open_rate), "--config", config))
    assert "of which 64 (" in done.stderr
    assert "learning rate 0.0002, no weight decay (defaults of fine-tuning)" in done.stderr
    assert f"{tmp_path / 'out'}: the adapter in float32" in done.stderr
    assert "of which 64 (" in done.stdout


def test_evaluate_takes_an_adapter(run: Run, world: Path, trained: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / name, foreign)
    expected = json.loads((trained / "report.json").read_text())["held_out"]["cross_entropy"]
    for adapter in (trained, foreign):  # with a tokenizer of its own, and with that of its base
        done = run("logit-cache", "evaluate", adapter, "--cache", world / "held", "--window-tokens", 16, "--json")
        assert json.loads(succeeded(done).stdout)["held_out"]["cross_entropy_per_token"] == pytest.approx(
            expected, abs=1e-5
        )


# Resumption


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_to_the_same_adapter(world: Path, base: Path, tmp_path: Path, processes: int) -> None:
    lora = LORA + (",dropout=0.3" if processes == 1 else "")
    common = {"per_device_train_batch_size": 8 // processes, "save_steps": 4, "num_train_epochs": 1}
    if processes > 1:
        common["ddp_backend"] = "gloo"
    job = job_in(world, tmp_path / "killed", model=str(base), training=common)
    killed = ranks(processes, KILLED.format(step=6), *arguments(job), "--lora", lora)
    assert 9 in [one.returncode for one in killed], killed[0].stderr
    checkpoint = tmp_path / "killed" / "checkpoint-4"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists(), "the base is not in checkpoints"
    done = ranks(processes, None, "train-student", *arguments(job), "--lora", lora, "--json")
    assert [one.returncode for one in done] == [0] * processes, done[0].stderr
    assert json.loads(done[0].stdout)["resumed_from_step"] == 4
    whole = {"per_device_train_batch_size": 8, "save_steps": 4}
    train(job_in(world, tmp_path / "whole", model=str(base), lora=lora, training=whole))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("killed", "whole"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0 if processes == 1 else 1e-5)


def test_a_run_killed_before_its_model_is_published_publishes_it(world: Path, base: Path, tmp_path: Path) -> None:
    job = lora_job(world, tmp_path / "out", base, merge=True, training={"max_steps": 4})
    train(job)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for name in ("report.json", "config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert train(job).resumed_from_step == 4
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_the_best_checkpoint_is_loaded_at_the_end(world: Path, base: Path, tmp_path: Path) -> None:
    training = {
        "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "learning_rate": 3.0, "max_steps": 9, "save_total_limit": 9,
    }  # fmt: skip
    report = train(lora_job(world, tmp_path / "out", base, training=training, eval_cache=str(world / "held")))
    best = min(report.eval_log, key=lambda entry: entry["eval_loss"])
    assert report.held_out.cross_entropy == pytest.approx(best["eval_loss"], abs=1e-6)


def test_a_checkpoint_on_other_layers_is_refused(run: Run, world: Path, base: Path, tmp_path: Path) -> None:
    """As where peft chose them, and chooses others by now."""
    job = job_in(world, tmp_path / "out", model=str(base), training={"save_steps": 4})
    ranks(1, KILLED.format(step=6), *arguments(job), "--lora", LORA)
    path = tmp_path / "out" / "checkpoint-4" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["k_proj"]}))
    refused(run("train-student", *arguments(job), "--lora", LORA), "its adapter is on k_proj", "q_proj+v_proj")


def test_a_run_from_before_there_were_adapters_is_the_same_run(world: Path, tmp_path: Path) -> None:
    train(job_in(world, tmp_path / "out", training={"max_steps": 1}))
    path = tmp_path / "out" / "run.json"
    record = json.loads(path.read_text())
    now = dict(record["identity"])
    assert {"lora", "merge"} <= now.keys()
    path.write_text(json.dumps({**record, "identity": {k: v for k, v in now.items() if k not in ("lora", "merge")}}))
    OutputDirectory(str(tmp_path / "out")).check(now)


# An adapter as the model


def test_training_continues_with_an_adapter(world: Path, base: Path, trained: Path, tmp_path: Path) -> None:
    short = {"max_steps": 2, "learning_rate": 0.0}
    train(job_in(world, tmp_path / "same", model=str(trained), lora="r=4,alpha=8", training=short))
    assert torch.equal(logits_of(on_base(tmp_path / "same", base)), logits_of(on_base(trained, base)))
    train(job_in(world, tmp_path / "more", model=str(trained), training={"max_steps": 2}))
    assert not torch.equal(logits_of(on_base(tmp_path / "more", base)), logits_of(on_base(trained, base)))
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(base.resolve()))


def test_another_base_under_the_same_name_is_another_run(world: Path, trained: Path, tmp_path: Path) -> None:
    own = save_base(tmp_path / "base")
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    rename_base(adapter, str(own))
    job = job_in(world, tmp_path / "out", model=str(adapter), training={"max_steps": 1})
    train(job)
    model = AutoModelForCausalLM.from_pretrained(own)
    model.lm_head.weight.data += 1
    model.save_pretrained(own)
    with pytest.raises(IdentityMismatch, match="model_sha256"):
        train(job)


def test_a_relative_base_is_relative_to_the_current_directory(
    world: Path, base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in peft."""
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    rename_base(adapter, "base")
    monkeypatch.chdir(base.parent)
    train(job_in(world, tmp_path / "out", model=str(adapter), training={"max_steps": 1}))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


# Sweeps


def test_a_sweep_of_adapters(world: Path, base: Path, tmp_path: Path) -> None:
    search = Search.model_validate(
        {
            "trials": 2,
            "metric": "loss",
            "parameters": {"learning_rate": {"distribution": "log_uniform", "low": 1e-4, "high": 1e-2}},
        }
    )
    fields = {"model": str(base), "lora": LORA, "eval_cache": str(world / "held"), "training": {"max_steps": 2}}
    job = job_in(world, tmp_path / "out", **fields)
    job = job.model_copy(update={"training": {k: v for k, v in job.training.items() if k != "learning_rate"}})
    report = sweep(job, search, lambda _: None)
    assert [trial.state for trial in report.trials] == ["complete"] * 2
    assert (tmp_path / "out" / f"trial-{report.best}" / "adapter_model.safetensors").is_file()
    best = build_config(StudentJob, str(tmp_path / "out" / "best.yaml"), {}, "train-student")
    assert best.lora == job.lora


# Refusals


WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "a new model": (("--model", "llama-tiny", "--lora", "r=4"), ("llama-tiny", "random", "leave --lora out")),
    "no value": (("--lora", "r"), ("lora", "NAME=VALUE", "r=16,alpha=32")),
    "twice": (("--lora", "r=4,r=5"), ("lora", "r is given twice")),
    "unknown": (("--lora", "r=4,rank=5"), ("lora", "rank")),
    "no r": (("--lora", "alpha=4"), ("lora", "r")),
    "r": (("--lora", "r=0"), ("lora", "r")),
    "dropout": (("--lora", "r=4,dropout=1"), ("lora", "dropout")),
    "target twice": (("--lora", "r=4,targets=q_proj+q_proj"), ("lora", "name each layer once")),
    "no such target": (("--lora", "r=4,targets=q_proj+q_porj"), ("no layer of a LlamaForCausalLM is called q_porj",)),
    "none of the targets": (("--lora", "r=4,targets=q_porj"), ("no LoRA can be put on it", "q_porj")),
    "merge": (("--merge",), ("--merge merges a LoRA",)),
    "the head, fused": (("--lora", "r=4,targets=lm_head", "--fused-head", "on"), ("Linear of peft, not a plain",)),
    "deepspeed": (("--lora", "r=4", "--set", "deepspeed=d.json"), ("'deepspeed' cannot be set for a LoRA",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_line(run: Run, world: Path, base: Path, tmp_path: Path, case: str) -> None:
    words, said = WRONG[case]
    job = job_in(world, tmp_path / "out", model=str(base), training={"max_steps": 1})
    refused(run("train-student", *arguments(job), *words), *said)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_head_that_is_adapted_keeps_its_own_forward(world: Path, base: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    job = lora_job(world, tmp_path / "out", base, lora="r=4,targets=lm_head", training={"max_steps": 2})
    assert not train(job, lines.append).fused_head
    assert [line for line in lines if "its output layer is a Linear of peft, not a plain Linear" in line]
    train(job_in(world, tmp_path / "more", model=str(tmp_path / "out"), training={"max_steps": 2}), lines.append)
    out, more = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "more"))
    assert {name for name in out if not torch.equal(out[name], more[name])} == {n for n in out if "lora" in n}


def test_without_peft_the_extra_is_named(
    world: Path, base: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else found(name, *more))
    for model, lora in ((base, LORA), (trained, None)):
        with pytest.raises(InputError, match=r"adapters need peft: pip install 'logit-cache\[peft\]'"):
            train(lora_job(world, tmp_path / "out", model, lora=lora))
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_not_merged(run: Run, world: Path, tmp_path: Path) -> None:
    tied = save_base(tmp_path / "tied", tie_word_embeddings=True)
    job = job_in(world, tmp_path / "out", model=str(tied), training={"max_steps": 1})
    words = ("--lora", "r=4,targets=lm_head", "--merge")
    refused(run("train-student", *arguments(job), *words), "lm_head, whose weight another layer shares")
    assert not (tmp_path / "out").exists()


def test_a_broken_adapter_is_refused_before_anything_is_written(
    run: Run, world: Path, trained: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    job = job_in(world, tmp_path / "out", model=str(adapter))
    refused(run("train-student", *arguments(job)), "only adapter_model.bin, a pickle", "safetensors")
    assert not (tmp_path / "out").exists()
