"""Opens a cache and reads one position, and prints what that cost beyond the imports; a process of `test_billion`.

python tests/support/programs/billion.py URL POSITION
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time

import numpy as np
import zarr

import storage.cache.verify  # noqa: F401
from storage import LogitCache


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(url: str, position: int) -> None:
    gc.collect()
    before = resident_bytes()
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    laps = [time.perf_counter()]

    cache = LogitCache.open(url)
    laps.append(time.perf_counter())
    targets = cache.teacher("a")
    laps.append(time.perf_counter())
    missing = targets.missing()
    laps.append(time.perf_counter())
    statistics, _ = targets.statistics()
    stored = targets.stored_bytes()
    laps.append(time.perf_counter())
    read = targets.read(position, position + 1)
    laps.append(time.perf_counter())
    token = cache.tokens.read(position, position + 1)
    laps.append(time.perf_counter())

    # The peak, where it rose above that of the imports; else what is held now.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    grown = (peak - before) if peak > peak_before else resident_bytes() - before
    names = ("open", "teacher", "missing", "statistics", "read", "read a token")
    print(
        json.dumps(
            {
                "seconds": laps[-1] - laps[0],
                "laps": dict(zip(names, np.diff(laps).round(4).tolist(), strict=True)),
                "bytes": grown,
                "missing": missing,
                "statistics": statistics.positions if statistics else None,
                "stored": stored,
                "token_ids": read.token_ids[0].tolist(),
                "token": int(token[0]),
                "zarr": zarr.__version__,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
