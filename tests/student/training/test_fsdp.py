"""FSDP2 on CPUs, by torch's own sharding and through the Trainer; and that a run is never silently something else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.programs import fsdp_ranks
from support.runs import LLAMA, NOTED, arguments, have_equal_weights, job_in, ranks
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from storage.errors import InputError
from student.job import StudentJob
from student.report import TrainingReport
from student.training.fsdp import FSDPIsOn, check_checkpoint
from student.training.run import train

SHARDED = "from support.programs import fsdp_ranks; fsdp_ranks.on_cpus()\n" + NOTED
G = 8

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="shards on CPUs")


def cases(world: Path, **environment: str) -> dict[tuple[Any, ...], dict[str, float]]:
    code = "import sys; from support.programs import fsdp_ranks; fsdp_ranks.gradients(sys.argv[1])"
    done = ranks(2, code, str(world / "train"), **environment)
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    return {tuple(case): figures for *case, figures in map(json.loads, done[0].stdout.splitlines())}


def test_a_sharded_model_has_the_loss_and_the_gradients_of_a_whole_one(world: Path) -> None:
    """Fused and not, tied embeddings and not, the head in several units, two micro-batches, float32 and bfloat16."""
    found = cases(world)
    assert list(found) == fsdp_ranks.CASES
    for (*case, bf16), figures in found.items():
        assert figures["count"] == 0, case
        assert figures["loss"] < (1e-4 if bf16 else 1e-5), case
        assert figures["parts"] < (1e-4 if bf16 else 1e-6), case
        # In bfloat16 it is the whole model's two micro-batches that are summed in 8 bits.
        assert figures["gradient"] < (0.02 if bf16 else 2e-6), case


@pytest.mark.slow
def test_the_casts_of_accelerates_policy_would_show(world: Path) -> None:
    found = cases(world, AS_ACCELERATE_CASTS="1")
    assert max(figures["parts"] for case, figures in found.items() if case[-1]) > 4e-4


def sharded_job(world: Path, output: Path, **training: Any) -> StudentJob:
    common = {"num_train_epochs": 2, "save_steps": 4, "per_device_train_batch_size": 2}
    return job_in(world, output, windows_per_step=G, eval_cache=str(world / "held"), training={**common, **training})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_adapter_is_killed_resumes_and_is_that_of_one_process(
    world: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **{n: v for n, v in LLAMA.items() if n != "model_type"}, vocab_size=61)
    ).save_pretrained(tmp_path / "base")
    job, lora = sharded_job(world, tmp_path / "run"), "r=4,targets=q_proj+v_proj"
    job = job.model_copy(update={"model": str(tmp_path / "base")})
    train(StudentJob.model_validate({**dict(job), "lora": lora, "output_dir": str(tmp_path / "alone")}))
    line = [*arguments(job), "--lora", lora, "--set", "fsdp=true"]
    line += ["--set", f"fsdp_config={{state_dict_type: {kind}}}", "--json"]
    killed = ranks(2, SHARDED, *line, NOTES=str(tmp_path / "first"), STOP="17")
    assert 9 in [one.returncode for one in killed], killed[0].stderr
    done = ranks(2, SHARDED, *line, NOTES=str(tmp_path / "then"))
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert json.loads(done[0].stdout)["resumed_from_step"] == 16
    run, alone = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "alone"))
    assert run.keys() == alone.keys()
    for name in run:
        torch.testing.assert_close(run[name], alone[name], rtol=0, atol=1e-5)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("student.training.arguments.check_fsdp", lambda args: None)
    with pytest.raises(InputError, match="--merge needs the whole model in one process"):
        train(StudentJob.model_validate({**dict(job), "lora": lora, "merge": True, "output_dir": str(tmp_path / "m")}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_sharded_run_is_killed_resumes_and_publishes_one_model(world: Path, tmp_path: Path, kind: str) -> None:
    """All of it through the Trainer and accelerate, but for the one condition that keeps FSDP from CPUs."""
    alone = train(sharded_job(world, tmp_path / "alone"))
    line = [*arguments(sharded_job(world, tmp_path / "run")), "--set", "fsdp=true"]
    line += ["--set", f"fsdp_config={{state_dict_type: {kind}}}", "--json"]
    killed = ranks(2, SHARDED, *line, NOTES=str(tmp_path / "first"), STOP="17")
    assert 9 in [one.returncode for one in killed], killed[0].stderr
    for resumed in (16, 22):  # then once more, with nothing left to do but publish
        done = ranks(2, SHARDED, *line, NOTES=str(tmp_path / "then"))
        assert [one.returncode for one in done] == [0, 0], done[0].stderr
        report = TrainingReport.model_validate_json(done[0].stdout)
        assert (report.resumed_from_step, report.steps, report.processes) == (resumed, alone.steps, 2)
        for mine, other in zip(report.train_log, alone.train_log, strict=True):
            for key in ("loss", "kl_a", "grad_norm"):
                assert mine[key] == pytest.approx(other[key], abs=1e-5)
        assert report.held_out.cross_entropy == pytest.approx(alone.held_out.cross_entropy, abs=1e-5)
        assert have_equal_weights(tmp_path / "run", tmp_path / "alone", atol=1e-5)
        for name in ("report.json", "config.json", "model.safetensors"):
            (tmp_path / "run" / name).unlink()


def test_fsdp_where_it_cannot_be_is_refused_before_anything_is_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="fsdp was asked for on a CPU, where accelerate would train without it"):
        train(sharded_job(world, tmp_path / "run", fsdp=True))
    with pytest.raises(InputError, match="fsdp of version 1 was asked for, and only FSDP2 is supported"):
        train(sharded_job(world, tmp_path / "run", fsdp=True, fsdp_config={"version": 1}))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="on a CPU"):
        train(sharded_job(world, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_turns_out_whole_is_refused_before_the_first_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever accelerate did: here, what it does on a CPU."""
    monkeypatch.setattr("student.training.arguments.check_fsdp", lambda args: None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"12 parameters not sharded"):
        train(sharded_job(world, tmp_path / "run"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    nothing_asked: Any = SimpleNamespace(fsdp=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    FSDPIsOn().on_train_begin(nothing_asked, None, None, model=nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"])
def test_a_checkpoint_resumes_as_it_was_written(tmp_path: Path, name: str) -> None:
    check_checkpoint(tmp_path, False)
    with pytest.raises(InputError, match="was written without fsdp, and this run is sharded"):
        check_checkpoint(tmp_path, True)
    (tmp_path / name).touch()
    check_checkpoint(tmp_path, True)
    with pytest.raises(InputError, match="was written with fsdp, and this run is not sharded"):
        check_checkpoint(tmp_path, False)
