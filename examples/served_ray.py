"""A teacher behind servers on Ray: a vLLM on every node with GPUs, and one job that asks all of them.

    python served_ray.py s3://bucket/train /models/big-fp8

The engine has an environment of its own (`--vllm`); `cache-logits` is that of this one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(max_retries=-1, retry_exceptions=True)
def serve(command: list[str]) -> None:
    """A server, until it is cancelled; one that ends by itself is started again."""
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            time.sleep(1)
        raise RuntimeError(f"{command[0]} ended with status {process.returncode}")
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("cache")
    parser.add_argument("model")
    parser.add_argument("--name", default="big")
    parser.add_argument("--vllm", default="/envs/vllm/bin/vllm")
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("-k", type=int, default=64)
    given = parser.parse_args()

    ray.init(address=given.address)
    caps = ["--max-logprobs", str(given.k), "--max-model-len", str(given.context + 2)]
    command = [given.vllm, "serve", given.model, "--host", "0.0.0.0", "--port", str(given.port)]
    command += ["--served-model-name", given.name, "--tensor-parallel-size", str(given.gpus), *caps]
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= given.gpus]
    servers = [
        serve.options(
            num_gpus=given.gpus, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(command)
        for node in nodes
    ]
    urls = [f"http://{node['NodeManagerAddress']}:{given.port}/v1" for node in nodes]
    job = [str(Path(sysconfig.get_path("scripts")) / "cache-logits"), "--cache", given.cache, "--name", given.name]
    job += ["-k", str(given.k), "--targets", "topk", "--context-tokens", str(given.context)]
    job += ["--patience-seconds", "1800", *(word for url in urls for word in ("--teacher", url))]
    try:
        return subprocess.run(job, check=False).returncode
    finally:
        for server in servers:
            ray.cancel(server)
        ray.wait(servers, num_returns=len(servers), timeout=60)


if __name__ == "__main__":
    sys.exit(main())
