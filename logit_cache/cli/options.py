"""The options of a caching job, which `cache-logits` and `logit-cache plan` share, under the titles of the help."""

from __future__ import annotations

from student.cli_command import Decorator, under

_job, _targets, _windows = under("Job"), under("Targets"), under("Windows")
_teacher, _server, _device, _output = under("Teacher"), under("Server"), under("Device"), under("Output")

JOB_OPTIONS: tuple[Decorator, ...] = (
    _job("--cache", help="Path or URL of a cache that holds the token stream."),
    _job("--teacher", multiple=True, help="Directory of a model or adapter, hub id, or a server's URL. Repeatable."),
    _job("--name", help="Name of the entry: lower-case letters, digits, '_' and '-'."),
    _job("-k", "--k", type=int, help="Ids stored per position, at most.  [default: 64]"),
    _job(
        "--targets",
        help="varopt: likely ids and an unbiased sample of the others; topk; or none: the log-probs of the text's own "
        "tokens, and no ids.  [default: varopt]",
    ),
    _job(
        "--context-tokens",
        type=int,
        help="Length of the windows that the teacher reads.  [default: 128; of conversations, the longest]",
    ),
    _job("--config", type=str, help="YAML file with these fields; flags override it."),
    _targets("--top-p", type=float, help="Top-k, each position cut where its mass first reaches this, such as 0.98."),
    _targets("--head-ids", type=int, help="varopt: the likeliest ids that are stored for certain.  [default: 0]"),
    _targets("--seed", type=int, help="varopt: keys the sample, together with each position.  [default: 0]"),
    _targets("--target-temperature", type=float, help="varopt: 1 or 2, where the sample is unbiased.  [default: 1]"),
    _targets(
        "--fields",
        multiple=True,
        help="Stored beside the ids: lean, all, or entropy, half-tail, label, sampled-logprobs. Repeatable.",
    ),
    _targets(
        "--positions",
        help="Rows with targets: all, or trained: where the loss mask trains, if there is one.  [default: trained]",
    ),
    _targets("--sources", multiple=True, metavar="NAME", help="Targets in documents of this source alone. Repeatable."),
    _targets("--sampling", help="varopt: systematic or pivotal.  [default: systematic]"),
    _targets(
        "--sample-size",
        help="varopt: K ids in each row (fixed), or fewer, none sampled that stands for more than 1 / K of the mass "
        "(threshold).  [default: threshold]",
    ),
    _targets("--order", help="varopt: ids lie as numbered (ids), or by the teacher's output embeddings (embeddings)."),
    _windows("--stride-tokens", type=int, help="Tokens from one window to the next.  [default: the context]"),
    _windows(
        "--isolate-documents/--no-isolate-documents",
        default=None,
        help="Windows do not cross documents.  [default: where a loss mask makes them conversations]",
    ),
    _windows(
        "--long-documents",
        help="Isolated ones longer than the context: cut (into windows), truncate or drop (without targets behind it, "
        "or at all), refuse.  [default: cut]",
    ),
    _windows("--bos-each-window", is_flag=True, default=None, help="Put BOS before windows that start elsewhere."),
    _windows("--batch-windows", type=int, help="Windows in one pass; recorded in the entry.  [default: measured]"),
    _teacher("--combine", help="Combine several teachers: logit-mean (of their logits) or mixture."),
    _teacher("--weight", type=float, multiple=True, help="Of each --teacher, in their order.  [default: equal]"),
    _teacher("--revision", multiple=True, help="Revision of a hub teacher; for each --teacher, in their order."),
    _teacher("--attention", help="Attention implementation of transformers, such as sdpa or eager."),
    _teacher("--trust-remote-code", is_flag=True, default=None, help="Run model code from the hub; recorded."),
    _server("--served-model", help="Name of the model behind --teacher http://HOST:PORT/v1, where there are several."),
    _server("--requests", type=int, help="In flight at each server.  [default: 16]"),
    _server("--request-seconds", type=float, help="For the answer to one request.  [default: 300]"),
    _server("--patience-seconds", type=float, help="Without an answer of any server.  [default: 600]"),
    _device("--device", help="cpu, cuda, cuda:1, …  [default: CUDA where there is one]"),
    _device("--dtype", help="float32, bfloat16 or float16.  [default: bfloat16 on CUDA, float32 on CPU]"),
    _device("--device-map", help="Spread one teacher's layers over devices: auto, balanced or sequential."),
    _device(
        "--max-memory", multiple=True, metavar="DEVICE=SIZE", help="With --device-map: a limit, 0=20GiB. Repeatable."
    ),
    _device("--offload", help="With --device-map: where layers go that fit on no device: cpu or disk. Slow."),
    _device("--tensor-parallel", is_flag=True, default=None, help="Spread each layer over the processes of torchrun."),
    _output("--encoding", help="codes (1/32 nat) or float32 (exact).  [default: codes]"),
    _output("--step-nats", type=float, help="Unit of the codes.  [default: 0.03125]"),
    _output("--sampled-step-nats", type=float, help="Unit of the log-probs of sampled ids.  [default: 0.5]"),
    _output("--format-version", type=int, help="Of the entry: 1 or 2.  [default: 2]"),
    _output("--profile", help="small (zstd) or fast to read (lz4).  [default: small]"),
    _output("--shard-tokens", type=int, help="Positions per shard: a killed worker loses at most one."),
    _output("--chunk-tokens", type=int, help="Positions per compressed chunk: the unit of reading."),
    _output("--fidelity-positions", type=int, help="Rescored for the fidelity report; 0: no report.  [default: 2048]"),
)
