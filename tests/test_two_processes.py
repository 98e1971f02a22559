"""Two processes under torchrun, killed and resumed, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import KILLED, ROOT, arguments, job_in, make_world, python, weights

from student.run import train


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    world = tmp_path / "world"
    world.mkdir()
    make_world(world)
    common = {"eval_cache": str(world / "held"), "alpha_end": 0.1, "min_entropy": 2.0}
    one = job_in(world, tmp_path / "one", training={"num_train_epochs": 2}, **common)
    alone = train(one)
    two = job_in(
        world,
        tmp_path / "two",
        training={"num_train_epochs": 2, "per_device_train_batch_size": 4, "ddp_backend": "gloo", "save_steps": 4},
        **common,
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Killed in the second epoch, so that what goes on is a resumed run of two processes.
    (tmp_path / "killed.py").write_text(KILLED.format(step=18))
    killed = python(*launcher, str(tmp_path / "killed.py"), *arguments(two), PYTHONPATH=str(ROOT))
    assert killed.returncode != 0
    assert (tmp_path / "two" / "checkpoint-16").is_dir(), killed.stderr
    done = python(*launcher, "-m", "student.cli", *arguments(two), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["processes"], report["resumed_from_step"], report["steps"]) == (2, 16, alone.steps)
    assert report["tokens_seen"] == alone.tokens_seen
    for mine, theirs in zip(alone.train_log, report["train_log"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["kl_a"] == pytest.approx(theirs["kl_a"], abs=1e-5)
    assert alone.held_out is not None
    assert report["held_out"]["tokens"] == alone.held_out.tokens
    assert report["held_out"]["cross_entropy"] == pytest.approx(alone.held_out.cross_entropy, abs=1e-5)
    assert report["held_out"]["ece"] == pytest.approx(alone.held_out.ece, abs=1e-4)
    first, second = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
