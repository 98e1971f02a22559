"""The trainer: the loss inside the forward, invariance to how a step is cut up, the order, the held-out figures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.caches.small import dense_targets, make_corpus, make_entry, write_entry
from support.models.students import small_model
from support.references.dense_targets import dense, write_varopt
from support.runs import job_in
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from storage.errors import InputError
from student.data.batches import collate
from student.data.windows import DistillationWindows, reading_order
from student.evaluation.held_out import HeldOutSums
from student.labels import NOT_TRAINED
from student.loss.distillation import DistillationLoss
from student.loss.teacher_targets import Member
from student.training.bound_forward import bind_loss, unbind_loss
from student.training.run import train
from student.training.trainer import DistillationTrainer, SaveByTime

V, T = 61, 8


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """600 tokens of which about a third is not trained on, two teachers, and two samples of one at temperature 1."""
    url = str(tmp_path_factory.mktemp("trainer") / "cache")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, 600).astype(np.uint16)
    record = make_corpus(url, tokens, V, loss_mask=rng.random(600) < 0.65)
    labels = np.append(tokens[1:], -1).astype(np.int64)
    for name, k, encoding in (("a", 9, "codes"), ("b", V, "float32")):
        entry = make_entry(record, k, encoding=encoding)
        write_entry(url, name, entry, dense_targets(2 * rng.normal(size=(600, V)), k, labels))
    for name, seed in (("s", 0), ("t", 1)):
        write_varopt(url, name, dense(5, 600, vocabulary_size=V), 12, seed=seed)
    return url


def members(windows: DistillationWindows, weights: dict[str, float] | None = None) -> list[Member]:
    return [Member.of(name, entry, (weights or {}).get(name, 1.0)) for name, entry in windows.entries.items()]


def trainer_for(
    cache: str,
    folder: Path,
    teachers: tuple[str, ...] = ("a", "b"),
    alpha: float = 0.5,
    temperature: float = 2.0,
    options: dict[str, Any] | None = None,
    eval_windows: DistillationWindows | None = None,
    **training: Any,
) -> DistillationTrainer:
    windows = DistillationWindows(cache, teachers, T, "random", seed=3)
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "optim": "sgd",
            "learning_rate": 0.5,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "dataloader_drop_last": True,
            **training,
        }
    )
    loss = DistillationLoss(V, alpha, temperature, members(windows, {"a": 2.0}), window_tokens=T, **(options or {}))
    return DistillationTrainer(
        small_model("llama"),
        args,
        train_dataset=windows,
        eval_dataset=eval_windows,
        loss=loss,
        eval_members=members(eval_windows) if eval_windows else (),
    )


def test_bound_forward_is_the_loss_on_the_original_logits(cache: str) -> None:
    windows = DistillationWindows(cache, ["a", "b"], T)
    batch = collate(windows.__getitems__(range(6)))
    model = small_model("llama")
    logits = model(batch["input_ids"]).logits
    loss = DistillationLoss(V, 0.3, 2.0, members(windows))
    sums = loss(logits.flatten(0, 1), batch["labels"].flatten(), batch["targets"])
    (sums.loss_sum / sums.count).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    bind_loss(model, loss)
    model.train()
    output = model(**batch)
    assert output.logits is None
    assert torch.allclose(output.loss, sums.loss_sum / sums.count)
    sizes = [sums.cross_entropy, sums.divergence["a"], sums.divergence["b"]]
    assert torch.allclose(output.parts, torch.stack([torch.stack([sums.count, size]) for size in sizes]))
    output.loss.backward()
    assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.allclose(model(**batch, num_items_in_batch=7).loss, sums.loss_sum / 7)
    model.eval()
    assert model(**batch).logits.shape == (6, T, 64)
    assert torch.equal(model(batch["input_ids"]).logits, logits)


def test_a_batch_without_trained_tokens_has_loss_zero(cache: str) -> None:
    windows = DistillationWindows(cache, ["a", "b"], T)
    batch = collate(windows.__getitems__([0]))
    batch["labels"][:] = -100
    model = small_model("llama")
    bind_loss(model, DistillationLoss(V, 0.3, 1.0, members(windows)))
    model(**batch).loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_bound_model_saves_generates_and_copies_like_any_other(cache: str, tmp_path: Path) -> None:
    model, plain = small_model("llama"), small_model("llama")
    bind_loss(model, DistillationLoss(V, 1.0, 1.0, []))
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(
        model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0),
        plain.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0),
    )
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))
    assert "forward" not in again.__dict__
    unbind_loss(model)
    unbind_loss(model)
    assert model.forward.__func__ is LlamaForCausalLM.forward
    copy.deepcopy(model)


def train_cut_up(cache: str, folder: Path, accumulation: int, **others: Any) -> tuple[list[torch.Tensor], list[dict]]:
    """The weights and the log of a run whose steps of 12 windows are cut into so many micro-batches."""
    step = {"per_device_train_batch_size": 12 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trainer_for(cache, folder, max_steps=6, **step, **others)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [p.detach().clone() for p in trainer.model.parameters()], history


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"alpha": 0.9, "options": {"alpha_end": 0.1, "min_entropy": 2.5}},
        {"learning_rate": 0.05, "options": {"loss_scale": "babyllama", "tail": "renormalise"}},
        {
            "teachers": ("a",),
            "options": {"loss": "jsd", "mix": 0.3, "mix_end": 0.8, "temperature_end": 1.0, "interpolate_tail": True},
        },
        {"teachers": ("b",), "temperature": 1.0, "options": {"loss": "skew-reverse-kl", "alpha_end": 1.0}},
        {"teachers": ("a",), "options": {"loss": "tail-aware-kl", "head_ids": 3}},
        {"teachers": ("s", "t"), "temperature": 1.0, "options": {"tail": "controlled", "min_entropy": 1.0}},
    ],
    ids=str,
)
def test_loss_and_weights_do_not_depend_on_accumulation(cache: str, tmp_path: Path, others: dict[str, Any]) -> None:
    weights, history = train_cut_up(cache, tmp_path / "1", 1, **others)
    start = list(small_model("llama").parameters())
    assert not torch.allclose(weights[0], start[0], atol=1e-3), "the model was trained at all"
    keys = [key for key in history[0] if key not in ("epoch", "step", "grad_norm")]
    assert any(key.endswith(("_a", "_b", "control_t")) for key in keys)
    for accumulation in (2, 4, 12):
        again, other_history = train_cut_up(cache, tmp_path / str(accumulation), accumulation, **others)
        for one, other in zip(weights, again, strict=True):
            assert torch.allclose(one, other, atol=5e-6)
        for one, other in zip(history, other_history, strict=True):
            assert {key: one[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, abs=5e-5)


def test_weights_of_positions_come_with_the_batch(cache: str) -> None:
    windows = DistillationWindows(cache, ["b"], T)
    batch = collate(windows.__getitems__(range(4)))
    batch["position_weights"] = torch.rand(4, T, generator=torch.Generator().manual_seed(0))
    model = small_model("llama")
    logits = model(batch["input_ids"]).logits.flatten(0, 1)
    loss = DistillationLoss(V, 0.3, 2.0, members(windows))
    expected = loss(logits, batch["labels"].flatten(), batch["targets"], batch["position_weights"].flatten())
    plain = loss(logits, batch["labels"].flatten(), batch["targets"])
    bind_loss(model, loss)
    model.train()
    assert torch.allclose(model(**batch).loss, expected.loss_sum / expected.count)
    assert not torch.allclose(expected.loss_sum, plain.loss_sum, rtol=0.1)


def test_logged_parts_make_up_the_loss(cache: str, tmp_path: Path) -> None:
    trainer = trainer_for(cache, tmp_path, per_device_train_batch_size=4, max_steps=3)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        mixture = 2 / 3 * entry["kl_a"] + 1 / 3 * entry["kl_b"]
        assert entry["loss"] == pytest.approx(0.5 * entry["cross_entropy"] + 0.5 * 4 * mixture, abs=1e-5)


def batches_read(trainer: DistillationTrainer) -> list[torch.Tensor]:
    """The input ids of every forward of a training."""
    read: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    trainer.train()
    return read


@pytest.mark.parametrize(
    "of_loss", [{}, {"teachers": (), "alpha": 1.0, "temperature": 1.0}], ids=["student", "control"]
)
def test_epochs_follow_the_reading_order(cache: str, tmp_path: Path, of_loss: dict[str, Any]) -> None:
    """Each has its own; a student and its control see the same windows in the same order."""
    trainer = trainer_for(cache, tmp_path, per_device_train_batch_size=8, num_train_epochs=2, **of_loss)
    windows = trainer.train_dataset
    assert isinstance(windows, DistillationWindows)
    order = reading_order(windows, 8)
    expected = [
        collate(windows.__getitems__((order.permutation(epoch) + epoch * len(windows))[i : i + 8].tolist()))
        for epoch in range(2)
        for i in range(0, 8 * (len(windows) // 8), 8)
    ]
    read = batches_read(trainer)
    assert len(read) == len(expected)
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(read, expected, strict=True))
    assert not torch.equal(read[0], read[len(read) // 2])


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_held_out_figures_are_those_of_a_single_pass(cache: str, tmp_path: Path, batch: int) -> None:
    held_out = DistillationWindows(cache, ["a", "b"], T)
    trainer = trainer_for(cache, tmp_path, eval_windows=held_out, per_device_eval_batch_size=batch)
    trainer.model.train()
    metrics = trainer.evaluate()
    assert trainer.model.training

    tokens = collate(held_out.__getitems__(range(len(held_out))))
    with torch.no_grad():
        logits = small_model("llama").eval()(tokens["input_ids"]).logits
    sums = HeldOutSums(V, members(held_out))
    sums.add(logits.flatten(0, 1), tokens["labels"].flatten(), tokens["targets"])
    expected = sums.result()
    assert {name: metrics[name] for name in expected.logged()} == pytest.approx(expected.logged(), rel=1e-5)
    assert trainer.held_out(held_out).tokens == expected.tokens == int((tokens["labels"] != NOT_TRAINED).sum())


def test_other_datasets_are_refused(cache: str, tmp_path: Path) -> None:
    trainer = trainer_for(cache, tmp_path)
    with pytest.raises(InputError, match="DistillationWindows"):
        trainer.evaluate([1, 2, 3])


def test_bf16_autocast_trains(cache: str, tmp_path: Path) -> None:
    trainer = trainer_for(cache, tmp_path, bf16=True, per_device_train_batch_size=8, max_steps=2)
    trainer.train()
    plain = trainer_for(cache, tmp_path, per_device_train_batch_size=8, max_steps=2)
    plain.train()
    one, other = (t.state.log_history[0] for t in (trainer, plain))
    # The losses of a new student, whose logits are near 0, can agree to the last bit.
    assert one["grad_norm"] != other["grad_norm"]
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)
    assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_checkpoints_by_time_take_a_twentieth_of_it_at_most() -> None:
    """By a clock of our own, on which a step takes a second and a checkpoint two, then ten."""
    now = 0.0
    by_time, args = SaveByTime(lambda: now), TrainingArguments(output_dir="/nowhere", use_cpu=True)
    state, saved = TrainerState(), []
    by_time.on_train_begin(args, state, TrainerControl())
    for step in range(1, 500):
        now += 1
        control = TrainerControl()
        by_time.on_step_end(args, state, control)
        by_time.on_log(args, state, control, logs={"eval_loss": 1.0})
        assert not control.should_save
        if step % 10 == 0:
            by_time.on_log(args, state, control, logs={"loss": 1.0})
        if control.should_save:
            now += 2 if not saved else 10
            by_time.on_save(args, state, control)
            saved.append(step)
    assert saved == [60, 120, 320]


def test_a_run_without_an_interval_of_its_own_resumes_from_a_checkpoint_by_time(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("student.training.trainer.CHECKPOINT_SECONDS", 0.0)

    class Killed(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    def resumed_from(name: str, **training: Any) -> int:
        job = job_in(world, tmp_path / name, training=training)
        with pytest.raises(KeyboardInterrupt):
            train(job, callbacks=[Killed()])
        return train(job).resumed_from_step

    assert resumed_from("default") in (2, 4, 6)
    assert resumed_from("steps", save_steps=5) == 5
    assert resumed_from("none", save_strategy="no") == 0
