"""The sbatch parameters of an array of `cache-logits --engine slurm`; no cluster is needed."""

from __future__ import annotations

from typing import Any

import pytest

from logit_cache.caching.job import CacheJob
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.slurm.parameters import array_parameters, minutes
from storage.config import build_config
from storage.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("1:30", 2), ("30:00", 30), ("1:00:00", 60), ("1:30:30", 91), ("2-0", 2880), ("1-2:30", 1590),
     ("1-0:0:1", 1441), ("0:01", 1)],
)  # fmt: skip
def test_time_limits_are_those_of_sbatch(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0:00", "soon", "1:2:3:4", "-5", "1-", "1.5", "1-1:1:1:1"])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--slurm time"):
        minutes(text)


def of_array(device: str = "cpu", workers: int = 4, **slurm: object) -> dict[str, Any]:
    from submitit import SlurmExecutor

    job = CacheJob(cache="c", teacher=("t",), name="llama", device=device)
    options = build_config(EngineOptions, {"engine": "slurm", "slurm": slurm, "worker_cpus": 2}, {}, "cache-logits")
    return array_parameters(job, options, workers, SlurmExecutor._valid_parameters())


def test_parameters_reach_sbatch_as_they_are_meant() -> None:
    found = of_array(
        **{"partition": "gpu", "cpus-per-task": 8, "account": "007", "exclusive": True, "time": "2:00:00",
           "reservation": "r", "mail-user": "a@b", "setup": "module load cuda", "srun-args": "--mpi none"}
    )  # fmt: skip
    assert found["additional_parameters"] == {"requeue": True, "reservation": "r"}
    assert (found["partition"], found["account"], found["mail_user"], found["cpus_per_task"]) == (
        "gpu",
        "007",
        "a@b",
        8,
    )
    assert (found["exclusive"], found["time"], found["srun_args"]) == (True, 120, ["--mpi", "none"])
    assert found["setup"][0] == "module load cuda"
    assert (found["array_parallelism"], found["signal_delay_s"], found["job_name"]) == (4, 90, "cache-llama")


def test_parameters_that_follow_from_the_job() -> None:
    assert of_array()["cpus_per_task"] == 2
    assert "gpus_per_node" not in of_array()
    assert of_array(device="cuda")["gpus_per_node"] == 1
    assert "gpus_per_node" not in of_array(device="cuda", gres="gpu:a100:1")
    assert of_array(requeue="false")["additional_parameters"] == {}
    assert of_array(**{"no-requeue": "true"})["additional_parameters"] == {"no_requeue": True}
    assert of_array(time=2)["signal_delay_s"] == 30


@pytest.mark.parametrize("name", ["array", "output", "signal", "chdir", "use-srun"])
def test_parameters_that_the_engine_sets_itself(name: str) -> None:
    with pytest.raises(InputError, match="sets this itself"):
        of_array(**{name: "1"})


def test_a_number_that_is_none() -> None:
    with pytest.raises(InputError, match="nodes=1-2"):
        of_array(nodes="1-2")
