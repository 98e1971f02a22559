"""The reducer against `torch.topk` and `torch.logsumexp`, which give less: no tails, no entropy, ties in any order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from harness import Table, in_child, in_turn, ratios, spread

K, ROUNDS, LEAST_S = 64, 5, 0.4
SIZES = {16_000: 1_024, 50_000: 512, 128_000: 256}
THREADS = (1, 2)


def tables() -> Iterator[Table]:
    """One table: ratios by vocabulary and threads."""
    columns = ("V", "rows", "threads", "torch, ns per logit", "top-k / torch", "VarOpt / torch")
    rows = []
    for vocabulary, count in SIZES.items():
        for threads in THREADS:
            found, _ = in_child("bench_reducer", "measure", threads, vocabulary=vocabulary, rows=count)
            torch_s = found["torch"]
            rows.append(
                (
                    f"{vocabulary:,}", f"{count:,}", str(threads),
                    spread([1e9 * seconds / (vocabulary * count) for seconds in torch_s]),
                    spread(ratios(found["top-k"], torch_s)), spread(ratios(found["VarOpt"], torch_s)),
                )
            )  # fmt: skip
    yield Table(
        "Time of the reducer against torch.topk + torch.logsumexp",
        columns,
        rows,
        f"K = {K}, float32 logits in memory. torch's two calls give the largest ids and the normaliser; the reducer "
        "besides tails, label, entropy and a defined order, and VarOpt targets a sample of the other ids.",
    )


def measure(vocabulary: int, rows: int) -> dict[str, list[float]]:
    """Seconds of one call of each way in each round."""
    import torch

    from teachers.reduction.reduce import reduce_topk, reduce_varopt
    from teachers.reduction.varopt import Sampling, random_bits

    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary) * 3
    labels = torch.randint(vocabulary, (rows,))
    sampling = Sampling(1.0, 0, torch.from_numpy(random_bits(0, 0, rows)))

    def with_torch() -> Any:
        return torch.topk(logits, K), torch.logsumexp(logits, 1)

    ways = {
        "torch": with_torch,
        "top-k": lambda: reduce_topk(logits, vocabulary, K, labels, -2000.0),
        "VarOpt": lambda: reduce_varopt(logits, vocabulary, K, labels, -2000.0, sampling),
    }
    with torch.inference_mode():
        return in_turn({name: _timed(run) for name, run in ways.items()}, ROUNDS)


def _timed(run: Callable[[], Any]) -> Callable[[], float]:
    """One call's seconds, from as many as take a while."""

    def timed() -> float:
        run()
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < LEAST_S:
            run()
            calls += 1
        return (time.perf_counter() - began) / calls

    return timed
