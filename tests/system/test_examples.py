"""The examples run, and a loop written out by hand is the trainer's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from support.commands import ROOT
from support.processes import start_code
from support.runs import V, job_in, make_world
from transformers import AutoModelForCausalLM

from student.training.run import train

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    make_world(folder)
    return folder


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_plain_loop_trains_as_the_trainer_does(world: Path, tmp_path: Path, micro_batches: int) -> None:
    options = {"loss": "jsd", "mix": 0.3, "alpha_end": 0.9}
    losses = load("plain_torch").train(
        str(world / "train"), ["a"], str(world / "llama.json"), str(tmp_path / "plain"), alpha=0.25, temperature=2.0,
        window_tokens=16, batch_windows=8, micro_batches=micro_batches, steps=15, learning_rate=0.01, seed=5, **options,
    )  # fmt: skip
    training = {
        "max_steps": 15, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 0.0, "logging_steps": 1,
    }  # fmt: skip
    report = train(job_in(world, tmp_path / "out", teachers=["a"], alpha=0.25, training=training, **options))
    assert losses == pytest.approx([entry["loss"] for entry in report.train_log], abs=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.model_type == "llama"


def test_the_plain_loop_is_a_command(world: Path, tmp_path: Path) -> None:
    arguments = ["--teacher", "a", "--teacher", "b", "--steps", "2", "--batch-windows", "4", "--out", tmp_path / "out"]
    code = f"import runpy; runpy.run_path({str(EXAMPLES / 'plain_torch.py')!r}, run_name='__main__')"
    done = start_code(code, world / "train", *arguments).end()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 2: loss ")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == V


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_where_it_is_installed(world: Path) -> None:
    pytest.importorskip("lightning")
    module = load("lightning_module").train(
        str(world / "train"), ["a", "b"], "llama-tiny", 2, window_tokens=16, batch_windows=4, accelerator="cpu"
    )
    assert module.global_step == 2
