"""The condition of lightning-opd: the stream is rollouts of the student as it is before training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.caches.small import dense_targets, make_corpus, make_entry_2, write_entry
from support.models.adapters import save_adapter, save_base
from support.runs import V, have_equal_weights, job_in

from storage.errors import IdentityMismatch, InputError
from storage.format.manifest.cache import Rollouts
from storage.format.manifest.entry import Windowing
from student import rollout_field
from student.training.run import train

SETTINGS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 8, "seed": 0}
TRAINING = {"max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `base`, an `adapter` of it, and streams of the rollouts of either, with a teacher of their labels alone;
    `nobody`: the same tokens, of which none is said to be a rollout."""
    folder, rng = tmp_path_factory.mktemp("rollouts"), np.random.default_rng(0)
    base = save_base(folder / "base", vocab_size=V)
    save_adapter(folder / "adapter", base)
    tokens = rng.integers(0, V, 600).astype(np.uint16)
    labels, table = np.append(tokens[1:], -1).astype(np.int64), 2 * rng.normal(size=(V, V))
    starts = np.arange(0, 600, 20)
    labels[starts[1:] - 1] = -1
    for name in ("base", "adapter", "nobody"):
        made_by = None if name == "nobody" else Rollouts(**rollout_field(str(folder / name), **SETTINGS))
        url = str(folder / f"of-{name}")
        record = make_corpus(url, tokens, V, starts, loss_mask=tokens % 3 > 0, rollouts=made_by)
        for teacher, isolated in (("t", True), ("behind-others", False)):
            windowing = Windowing(context_tokens=20, stride_tokens=20, isolate_documents=isolated)
            entry = make_entry_2(record, 0, ("label",), method="none", tail="unknown", windowing=windowing)
            known = labels if isolated else np.append(tokens[1:], -1).astype(np.int64)
            write_entry(url, teacher, entry, dense_targets(table[tokens], 5, known))
    return folder


def job_of(world: Path, out: Path, rollouts: str, model: str | Path, **changes: Any) -> Any:
    training = {**TRAINING, **changes.pop("training", {})}
    of = {"cache": str(world / f"of-{rollouts}"), "teachers": ["t"], "model": str(model), "temperature": 1.0}
    of["window_tokens"] = 20
    return job_in(world, out, **{**of, **changes}, loss="lightning-opd", training=training)


def test_a_student_is_known_by_its_tensors(world: Path, tmp_path: Path) -> None:
    """Not by its folder's name, how its weights are cut into files, or what else lies there; nor does a new LoRA on it
    change what it says."""
    moved = Path(shutil.copytree(world / "base", tmp_path / "moved"))
    tensors = load_file(moved / "model.safetensors")
    (moved / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: tensors[name] for name in part}, moved / f"{number}.safetensors", {"format": "pt"})
    index = {name: f"{int(name in names[3:])}.safetensors" for name in names}
    (moved / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    report = train(job_of(world, tmp_path / "whole", "base", moved))
    assert report.job.alpha == 0
    assert report.tokens_taught == {"t": report.tokens_trained}
    train(job_of(world, tmp_path / "lora", "base", world / "base", lora="r=2,targets=all-linear"))
    train(job_of(world, tmp_path / "again", "adapter", world / "adapter"))


def test_no_other_model_is_trained_on_them(world: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(world / "base", tmp_path / "changed"))
    tensors = load_file(changed / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + torch.full_like(tensors[name], 1e-3)
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    for rollouts, model, words in (
        ("base", changed, ("rollouts are of another model (base)", "weights_sha256")),
        ("base", world / "adapter", ("rollouts are of another model (base)", "adapter_sha256: theirs none")),
        ("adapter", world / "base", ("rollouts are of another model (adapter)", "adapter_sha256")),
        ("nobody", world / "base", ("names no model that made it", "sample_rollouts.py")),
        ("base", "llama-tiny", ("this is a new one", "--model")),
    ):
        with pytest.raises((InputError, IdentityMismatch)) as caught:
            train(job_of(world, tmp_path / "out", rollouts, model))
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"the teacher read a rollout behind others \(behind-others\)"):
        train(job_of(world, tmp_path / "out", "base", world / "base", teachers=["behind-others"]))
    with pytest.raises(InputError, match=r"longest rollout reads 19 tokens, windows of 16 .*: take --window-tokens 19"):
        train(job_of(world, tmp_path / "out", "base", world / "base", window_tokens=16))
    assert not (tmp_path / "out").exists()


def test_the_loss_is_measured_on_rollouts_of_the_student_alone(world: Path, tmp_path: Path) -> None:
    """Elsewhere a better student may have a higher one."""
    for held_out, known in (("base", True), ("adapter", False), ("nobody", False)):
        report = train(
            job_of(world, tmp_path / held_out, "base", world / "base", eval_cache=str(world / f"of-{held_out}"))
        )
        assert report.held_out is not None
        assert (report.held_out.distillation_loss is not None) == known


def test_micro_batches_change_nothing(world: Path, tmp_path: Path) -> None:
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for name, training in (("one", {}), ("four", parts)):
        train(job_of(world, tmp_path / name, "base", world / "base", training=training))
    assert have_equal_weights(tmp_path / "one", tmp_path / "four", 1e-5)
    assert not have_equal_weights(tmp_path / "one", world / "base", 1e-3)
