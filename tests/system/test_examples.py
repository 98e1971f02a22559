"""The examples run, and a loop written out by hand is the trainer's."""

from __future__ import annotations

import importlib.util
import json
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.caches.streams import chat_lengths
from support.commands import ROOT, Run
from support.processes import start_code
from support.runs import LLAMA, V, have_equal_weights, job_in, make_world
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from storage import LogitCache
from storage.format.manifest.entry import Windowing
from student import DistillationLoss, DistillationWindows, Member, collate, load_student, reading_order
from student.training.run import train

EXAMPLES = ROOT / "examples"
# Attention that is spread out by its initial weights, so that a document which sees others gets other logits.
PACKS = {**LLAMA, "initializer_range": 0.4}
MIXES = {
    "model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of a stream, and `chats`, of isolated conversations; a model that can keep these apart, and one not."""
    folder = tmp_path_factory.mktemp("examples")
    make_world(folder)
    rng, lengths = np.random.default_rng(0), chat_lengths(60, 9, 20)
    starts, tokens = np.cumsum(lengths) - lengths, rng.integers(0, V, lengths.sum()).astype(np.uint16)
    labels = np.append(tokens[1:], -1).astype(np.int64)
    labels[starts[1:] - 1] = -1
    url, mask = str(folder / "chats"), rng.random(len(tokens)) < 0.6
    record = make_corpus(url, tokens, V, document_starts=starts, loss_mask=mask)
    entry = make_entry(record, 9, windowing=Windowing(context_tokens=24, stride_tokens=24, isolate_documents=True))
    write_entry(url, "a", entry, dense_targets(2 * rng.normal(size=(V, V))[tokens], 9, labels))
    for name, model in (("packs", PACKS), ("mixes", MIXES)):
        (folder / f"{name}.json").write_text(json.dumps(model))
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports its use to the hub otherwise."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_loss(name: str, cache: str, model: str, out: Path) -> float:
    """The loss of the first step of an example, of 4 windows of 24 positions."""
    given: dict[str, Any] = {"window_tokens": 24, "batch_windows": 4, "steps": 1}
    if name == "plain_torch":
        return float(load(name).train(cache, ["a"], model, None, **given)[0])
    if name == "lightning_module":
        module = load(name).train(cache, ["a"], model, accelerator="cpu", **given)
        return float(module.trainer.logged_metrics["train_loss"])
    trainer = load(name).train(cache, ["a"], model, str(out), bf16=False, logging_steps=1, **given)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx((first["cross_entropy"] + first["kl_a"]) / 2, abs=1e-5)
    return float(first["loss"])


def loss_of_documents_alone(cache: str, model_name: str) -> float:
    """The same, of every document by itself, from logits."""
    windows = DistillationWindows(cache, ["a"], 24, "random")
    batch = collate(windows.__getitems__(list(islice(reading_order(windows, 4), 4))))
    ids, special = batch["input_ids"].flatten(), {"bos": 1, "eos": 1, "pad": 0}
    model = load_student(model_name, vocabulary_size=V, special_ids=special, window_tokens=24, seed=0)
    begins = (batch["position_ids"].flatten() == 0).nonzero()[:, 0].tolist()
    assert len(begins) > 2 * len(batch["labels"])
    logits = [model(ids[None, start:stop]).logits[0] for start, stop in pairwise([*begins, len(ids)])]
    members = [Member.of(name, entry) for name, entry in windows.entries.items()]
    sums = DistillationLoss(V, 0.5, 1.0, members)(torch.cat(logits), batch["labels"].flatten(), batch["targets"])
    return float(sums.loss_sum / sums.count)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["packs", "mixes"])
@pytest.mark.parametrize(
    ("name", "package"), [("plain_torch", "torch"), ("lightning_module", "lightning"), ("trl_sft", "trl")]
)
def test_documents_that_share_windows_are_learnt_as_if_each_were_alone(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, package: str, model: str
) -> None:
    pytest.importorskip(package)
    cache, model_name = str(world / "chats"), str(world / f"{model}.json")
    expected = loss_of_documents_alone(cache, model_name)
    assert first_loss(name, cache, model_name, tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    assert ("rows of their own, not packed" in caplog.text) == (model == "mixes")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [5, 9])
def test_a_run_under_trl_resumes_with_the_windows_that_it_would_have_read(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Epochs have 6 steps, and checkpoints are of steps 4 and 8: in the middle of the first and of the second epoch."""
    pytest.importorskip("trl")
    example, read = load("trl_sft"), []
    arguments = (str(world / "chats"), ["a"], str(world / "packs.json"))
    options = {
        "steps": 11, "window_tokens": 24, "batch_windows": 2, "gradient_accumulation_steps": 2, "bf16": False,
        "save_steps": 4, "learning_rate": 0.01,
    }  # fmt: skip
    trained = example.DistillingSFTTrainer.training_step

    def noted(self: Any, model: Any, inputs: Any, *others: Any) -> Any:
        read.append((self.state.global_step, inputs["input_ids"].tolist()))
        if self.state.global_step == stop:
            raise KeyboardInterrupt
        return trained(self, model, inputs, *others)

    monkeypatch.setattr(example.DistillingSFTTrainer, "training_step", noted)
    stop = None
    example.train(*arguments, str(tmp_path / "whole"), **options)
    whole, read = read, []
    assert len({str(windows) for _, windows in whole}) == 22, "an epoch's windows are cut elsewhere than another's"
    stop = step
    with pytest.raises(KeyboardInterrupt):
        example.train(*arguments, str(tmp_path / "cut"), **options)
    stop, read = None, []
    example.train(*arguments, str(tmp_path / "cut"), **options)
    assert read == [found for found in whole if found[0] >= step - step % 4]
    assert have_equal_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(("cache", "micro_batches"), [("train", 1), ("chats", 2)])
def test_a_plain_loop_trains_as_the_trainer_does(world: Path, tmp_path: Path, cache: str, micro_batches: int) -> None:
    options = {"loss": "jsd", "mix": 0.3, "alpha_end": 0.9}
    losses = load("plain_torch").train(
        str(world / cache), ["a"], str(world / "llama.json"), str(tmp_path / "plain"), alpha=0.25, temperature=2.0,
        window_tokens=16, batch_windows=8, micro_batches=micro_batches, steps=15, learning_rate=0.01, seed=5, **options,
    )  # fmt: skip
    training = {
        "max_steps": 15, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 0.0, "logging_steps": 1,
    }  # fmt: skip
    options |= {"cache": str(world / cache), "teachers": ["a"], "alpha": 0.25}
    report = train(job_in(world, tmp_path / "out", training=training, **options))
    assert losses == pytest.approx([entry["loss"] for entry in report.train_log], abs=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.model_type == "llama"


@pytest.mark.parametrize(("name", "package"), [("plain_torch", "torch"), ("trl_sft", "trl")])
def test_an_example_is_a_command(world: Path, tmp_path: Path, name: str, package: str) -> None:
    pytest.importorskip(package)
    code = f"import runpy; runpy.run_path({str(EXAMPLES / name)!r} + '.py', run_name='__main__')"
    sizes = ["--steps", "10", "--window-tokens", "24", "--batch-windows", "4"]
    teachers = ["--teacher", "a", "--teacher", "b"]
    done = start_code(code, world / "train", *teachers, *sizes, "--out", tmp_path / "out").end()
    assert done.returncode == 0, done.stderr
    assert "kl_a" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == V


# --- offline on-policy distillation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory, small_cache: Path) -> Path:
    """`student`, `other`, and a `teacher` that is the student, but surer; prompts of a few ids."""
    folder, tokenizer = tmp_path_factory.mktemp("policies"), AutoTokenizer.from_pretrained(small_cache / "tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=400, max_position_embeddings=64, initializer_range=0.2, **shape)
    for name, seed, sharper in (("student", 7, 1.0), ("teacher", 7, 2.5), ("other", 8, 1.0)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(sharper)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    prompts = [{"input_ids": rng.integers(3, 400, 2 + n % 4).tolist()} for n in range(240)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return folder


def reverse_kl(folder: Path, student: Path, rows: list[dict[str, Any]]) -> float:
    """The mean of KL(q || p) over the sampled tokens' positions, of a student's rollouts."""
    q, p = (AutoModelForCausalLM.from_pretrained(model) for model in (student, folder / "teacher"))
    total, count = 0.0, 0
    for row in rows:
        ids, first = torch.tensor([row["input_ids"]]), row["loss_mask"].index(1)
        with torch.no_grad():
            log_q, log_p = (torch.log_softmax(model(ids).logits[0, first - 1 : -1], 1) for model in (q, p))
        total += float((log_q.exp() * (log_q - log_p)).sum())
        count += len(log_q)
    return total / count


def rollouts_of(folder: Path, student: Path, out: Path, seed: int, samples: int) -> list[dict[str, Any]]:
    load("sample_rollouts").sample(
        str(student),
        str(folder / "prompts.jsonl"),
        str(out),
        max_new_tokens=12,
        samples=samples,
        batch_prompts=120,
        seed=seed,
    )
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.filterwarnings("ignore")
def test_a_student_of_its_own_rollouts_comes_nearer_to_its_teacher(policies: Path, tmp_path: Path, run: Run) -> None:
    """From rollouts to a better student by the commands, measured on fresh rollouts of either; and another student is
    refused the rollouts."""
    rows = rollouts_of(policies, policies / "student", tmp_path / "rows.jsonl", 0, samples=8)
    assert len(rows) == 8 * 240
    assert all(row["loss_mask"] == sorted(row["loss_mask"]) and 1 in row["loss_mask"] for row in rows)
    cache = tmp_path / "cache"
    for line in (
        (
            "logit-cache",
            "tokenize",
            "--text",
            tmp_path / "rows.jsonl",
            "--tokenizer",
            policies / "student",
            "--out",
            cache,
        ),
        ("cache-logits", "--cache", cache, "--teacher", policies / "teacher", "--name", "t", "--targets", "none"),
    ):
        done = run(*line)
        assert done.returncode == 0, done.stderr
    opened = LogitCache.open(str(cache))
    assert opened.record.corpus.rollouts.model_dump(mode="json") == rows[0]["rollout"]
    assert "rollouts of student (weights sha256" in run("logit-cache", "inspect", cache).stdout
    tokens = [token for row in rows for token in row["input_ids"]]
    assert sorted(opened.tokens.read(0, len(tokens)).tolist()) == sorted(tokens)
    train_line = ("train-student", "--cache", cache, "--teacher", "t", "--loss", "lightning-opd", "--window-tokens", 16)
    refused = run(*train_line, "--model", policies / "other", "--output-dir", tmp_path / "no")
    assert refused.returncode == 2
    assert "its rollouts are of another model (student) than the student" in refused.stderr
    assert "weights_sha256: theirs" in refused.stderr
    assert refused.stderr.count("\n") == 1
    steps = ("num_train_epochs=2", "per_device_train_batch_size=64", "learning_rate=3e-3", "lr_scheduler_type=constant")
    settings = [
        word for step in (*steps, "weight_decay=0", "warmup_steps=0", "logging_steps=1") for word in ("--set", step)
    ]
    out = tmp_path / "out"
    done = run(*train_line, "--model", policies / "student", "--output-dir", out, *settings, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"]["alpha"] == 0
    before, after = (
        reverse_kl(policies, model, rollouts_of(policies, model, tmp_path / "fresh.jsonl", 9, samples=2))
        for model in (policies / "student", out)
    )
    logged = json.loads(done.stdout)["train_log"]
    assert logged[0]["lightning_opd_t"] == pytest.approx(before, rel=0.2), "at first an estimate of the reverse KL"
    assert after < 0.8 * before, (before, after)
