"""The examples of engines on a cluster run as they stand, on real schedulers, with a stand-in for the engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.clusters.ray_nodes import RayNodes
from support.clusters.slurm import Cluster, until
from support.commands import ROOT, TESTS, environment

from storage import LogitCache
from storage.cache.verify import verify

K, CONTEXT = 16, 64
# As `vllm serve MODEL`, whose options all have a value.
VLLM = """#!/bin/bash
model=$2
shift 2
while [ $# -gt 0 ]; do
    case $1 in --host) host=$2 ;; --port) port=$2 ;; --max-logprobs) k=$2 ;; esac
    shift 2
done
PYTHONPATH={tests} exec {python} {tests}/support/servers/engine.py vllm $model --tokenizer {tokenizer} --host $host \\
    --port $port --max-logprobs $k
"""


@pytest.fixture
def cache(small_cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_cache, tmp_path / "cache"))


@pytest.fixture
def vllm(cache: Path, tmp_path: Path) -> Path:
    path = tmp_path / "vllm"
    path.write_text(VLLM.format(tests=TESTS, python=sys.executable, tokenizer=cache / "tokenizer"), encoding="utf-8")
    path.chmod(0o755)
    return path


def check(cache: Path, teacher: Path, run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The entry is whole, and its targets are those of the model in process."""
    assert verify(str(cache), deep=True).sound
    line = ("--name", "local", "-k", K, "--targets", "topk", "--context-tokens", CONTEXT)
    done = run("cache-logits", "--cache", cache, "--teacher", teacher, *line)
    assert done.returncode == 0, done.stderr
    targets = [LogitCache.open(str(cache)).teacher(name) for name in ("big", "local")]
    assert targets[0].entry.made == "served"
    served, local = (each.read(0, len(each)) for each in targets)
    np.testing.assert_allclose(served.logprobs, local.logprobs, atol=2 * (targets[0].entry.encoding.step_nats or 0))


@pytest.mark.slurm
def test_every_task_of_an_array_has_its_server(
    slurm: Cluster, cache: Path, vllm: Path, teacher: Path, tmp_path: Path, run: Callable[..., object]
) -> None:
    script = (ROOT / "examples/served_slurm.sh").read_text(encoding="utf-8")
    own = {"CACHE": cache, "MODEL": teacher, "VLLM": vllm, "K": K, "CONTEXT": CONTEXT, "GPUS": 1}
    own["CACHE_LOGITS"] = Path(sys.executable).parent / "cache-logits"
    given = "".join(f"export {name}={value}\n" for name, value in own.items())
    # Nodes here have no GPUs to ask for.
    slurm.submit(given + script.replace("#SBATCH", "#"), tmp_path, "--array=0-1", "--signal=B:TERM@60", "--time=10")
    until(lambda: not slurm.queue(), slurm, "both tasks end", 240)
    check(cache, teacher, run)  # type: ignore[arg-type]


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    started = RayNodes(environment(), gpus=1)
    try:
        yield started
    finally:
        started.stop()


@pytest.mark.slow
@pytest.mark.xdist_group("ray nodes")
def test_a_job_asks_the_servers_of_a_ray_cluster(
    nodes: RayNodes, cache: Path, vllm: Path, teacher: Path, run: Callable[..., object]
) -> None:
    command = [sys.executable, ROOT / "examples/served_ray.py", cache, teacher, "--vllm", vllm, "-k", K]
    command += ["--context", CONTEXT, "--gpus", 1, "--address", nodes.address, "--port", 8_471]
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **environment(), **nodes.access}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [each for each in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True)
                .stdout.splitlines() if "engine.py" in each and "8471" in each]  # fmt: skip
    check(cache, teacher, run)  # type: ignore[arg-type]
