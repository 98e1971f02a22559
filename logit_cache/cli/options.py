"""What the help of several commands shares: the options of a caching job, for `cache-logits` and `plan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Options = tuple[Callable[[Any], Any], ...]

EXAMPLE = "\b\nExample:\n  "
"""What the example of a command's help begins with."""

JOB_OPTIONS: Options = (
    click.option("--cache", help="Path or URL of a cache that holds the token stream."),
    click.option(
        "--teacher", multiple=True, help="Model directory or hub id (AutoModelForCausalLM, safetensors). Repeatable."
    ),
    click.option("--combine", help="What several teachers become: logit-mean (of their logits) or mixture."),
    click.option("--weight", type=float, multiple=True, help="Of each --teacher, in their order.  [default: equal]"),
    click.option("--name", help="Name of the entry: lower-case letters, digits, '_' and '-'."),
    click.option(
        "--targets", help="varopt: likely ids and an unbiased sample of the others; or topk.  [default: varopt]"
    ),
    click.option("-k", "--k", type=int, help="Ids stored per position.  [default: 64]"),
    click.option(
        "--top-p", type=float, help="Top-k, each position cut where its mass first reaches this, such as 0.98."
    ),
    click.option("--head-ids", type=int, help="varopt: the likeliest ids that are stored for certain.  [default: 0]"),
    click.option("--seed", type=int, help="varopt: keys the sample, together with each position.  [default: 0]"),
    click.option(
        "--target-temperature", type=float, help="varopt: 1 or 2, where the sample is unbiased.  [default: 1]"
    ),
    click.option("--context-tokens", type=int, help="Length of the windows that the teacher reads.  [default: 128]"),
    click.option("--stride-tokens", type=int, help="Tokens from one window to the next.  [default: the context]"),
    click.option("--isolate-documents/--no-isolate-documents", default=None, help="Windows do not cross documents."),
    click.option("--dtype", help="float32, bfloat16 or float16.  [default: bfloat16 on CUDA, float32 on CPU]"),
    click.option("--device", help="cpu, cuda, cuda:1, …  [default: CUDA where there is one]"),
    click.option("--device-map", help="Spread one teacher's layers over devices: auto, balanced or sequential."),
    click.option(
        "--max-memory", multiple=True, metavar="DEVICE=SIZE", help="With --device-map: a limit, 0=20GiB. Repeatable."
    ),
    click.option("--offload", help="With --device-map: where layers lie that fit on no device: cpu or disk. Slow."),
    click.option(
        "--tensor-parallel", is_flag=True, default=None, help="Spread each layer over the processes of torchrun."
    ),
    click.option("--encoding", help="codes (1/32 nat) or float32 (exact).  [default: codes]"),
    click.option("--step-nats", type=float, help="Unit of the codes.  [default: 0.03125]"),
    click.option("--profile", help="small (zstd) or fast to read (lz4).  [default: small]"),
    click.option("--shard-tokens", type=int, help="Positions per shard: what a killed worker loses at most."),
    click.option("--chunk-tokens", type=int, help="Positions per compressed chunk: the unit of reading."),
    click.option("--batch-windows", type=int, help="Windows in one pass; recorded in the entry.  [default: tried out]"),
    click.option(
        "--fidelity-positions", type=int, help="Scored again for the fidelity report; 0: no report.  [default: 2048]"
    ),
    click.option("--revision", multiple=True, help="Revision of a hub teacher; for each --teacher, in their order."),
    click.option("--attention", help="Attention implementation of transformers, such as sdpa or eager."),
    click.option("--trust-remote-code", is_flag=True, default=None, help="Run model code from the hub; recorded."),
    click.option("--config", type=str, help="YAML file with these fields; flags override it."),
)


def options(shared: Options) -> Callable[[Any], Any]:
    """A decorator that gives a command these options, in their order."""

    def apply(function: Any) -> Any:
        for option in reversed(shared):
            function = option(function)
        return function

    return apply
