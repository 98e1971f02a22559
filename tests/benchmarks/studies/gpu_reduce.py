"""The reducer on a CUDA device: its Triton kernels beside torch's passes, and torch.topk with torch.logsumexp.

    python tests/benchmarks/studies/gpu_reduce.py
        [--vocabulary 16000 50000 128000] [--k 64] [--logits-mib 256] [--rounds 7]

Logits are float32, as many rows as fit the MiB: by default what `cache-logits` hands over at once, which is more than
a GPU's cache. Ways take turns, CUDA events give the time, host work between kernels included, and torch's allocator
the peak above what is held before, results included. The limits stand in the same table: the time in which a copy
that was measured in the same run moves as many bytes as one, two and three reads of the logits. The last column
compares ids with those of torch's passes: VarOpt's may differ where a tooth lies within rounding of an id's end.
A way that fails says so in its row. Where there is no CUDA device nothing is measured, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import Table, copy_bandwidth, in_turn, spread, timed_on_gpu

if TYPE_CHECKING:
    from torch import Tensor

DEVICE = "cuda"
FLOOR = -2000.0
NONE = "–"
TORCH_ALONE, TORCH, TRITON = "torch.topk + torch.logsumexp", "torch's passes", "Triton kernels"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[16_000, 50_000, 128_000])
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--logits-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"gpu_reduce was not run: torch {torch.__version__} finds no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    for table in tables(arguments):
        print(table.markdown(), flush=True)


def tables(arguments: argparse.Namespace) -> Iterator[Table]:
    """One for each vocabulary."""
    import torch

    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    for vocabulary in arguments.vocabulary:
        yield reduced(vocabulary, bandwidth, arguments)


def reduced(vocabulary: int, bandwidth: float, arguments: argparse.Namespace) -> Table:
    """All ways on one tensor of logits."""
    import torch

    rows = max(1, (arguments.logits_mib << 18) // vocabulary)
    logits = torch.randn(rows, vocabulary, device=DEVICE).mul_(3)
    peaks: dict[str, int] = {}
    ids: dict[str, Tensor] = {}
    steps: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, way in ways(logits, arguments.k).items():
        found = _tried(way)
        if isinstance(found, str):
            failed[name] = found
        else:
            (peaks[name], ids[name]), steps[name] = found, timed_on_gpu(way, 4)
    one_read = logits.nbytes / bandwidth
    table = Table(
        f"{rows:,} × {vocabulary:,} float32 logits, K = {arguments.k}",
        ("way", "time, ms", "times one read", "peak, MiB", "rows with equal ids"),
        [
            (f"limit: logits read {often}", f"{1e3 * reads * one_read:.3f}", f"{reads:.2f}", NONE, NONE)
            for reads, often in enumerate(("once", "twice", "three times"), start=1)
        ],
        f"A copy moves {bandwidth / 1e9:,.0f} GB/s, the logits take {logits.nbytes / 2**20:,.0f} MiB. The kernels read "
        "them twice for top-k targets and three times for VarOpt, besides the blocks that are looked into.",
    )
    for name, seconds in in_turn(steps, arguments.rounds).items():
        true = ids.get(name.replace(TRITON, TORCH))
        equal = NONE
        if true is not None and TRITON in name:
            equal = f"{float((ids[name] == true).all(1).double().mean()):.2%}"
        in_ms = spread([1e3 * each for each in seconds], 3)
        times = spread([each / one_read for each in seconds])
        table.rows.append((name, in_ms, times, f"{peaks[name] / 2**20:,.0f}", equal))
    table.rows.extend((name, reason, NONE, NONE, NONE) for name, reason in failed.items())
    return table


def ways(logits: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """Each gives ids [R, K]."""
    import torch

    import teachers.reduction.passes
    from teachers.reduction.reduce import reduce_topk, reduce_varopt
    from teachers.reduction.varopt import Sampling, random_bits

    rows, vocabulary = logits.shape
    labels = torch.randint(vocabulary, (rows,), device=DEVICE)
    random = torch.from_numpy(random_bits(0, 0, rows)).to(DEVICE)

    def with_torch() -> Tensor:
        torch.logsumexp(logits, 1)
        return torch.topk(logits, k).indices

    def reducer(kernels: bool, temperature: float | None) -> Callable[[], Tensor]:
        def way() -> Tensor:
            if kernels and importlib.util.find_spec("triton") is None:
                raise ImportError("triton is not installed")
            with mock.patch.object(teachers.reduction.passes, "has_kernels", return_value=kernels):
                if temperature is None:
                    return reduce_topk(logits, vocabulary, k, labels, FLOOR).token_ids
                sampling = Sampling(temperature, 0, random)
                return reduce_varopt(logits, vocabulary, k, labels, FLOOR, sampling).token_ids

        return way

    found = {TORCH_ALONE: with_torch}
    for what, temperature in (("top-k", None), ("VarOpt", 1.0), ("VarOpt at temperature 2", 2.0)):
        for name, kernels in ((TORCH, False), (TRITON, True)):
            found[f"{what}, {name}"] = reducer(kernels, temperature)
    return found


def _tried(way: Callable[[], Any]) -> tuple[int, Tensor] | str:
    """The peak bytes of a call after the first, which compiles, and its ids; or why there is none."""
    import torch

    try:
        way()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ids = way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, ids
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:  # a row says so, and the table goes on
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}".replace("|", "/")
    finally:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
