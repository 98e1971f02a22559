"""`cache-logits` on Ray with workers that fail at one shard, always or once; `test_ray` starts it as a process.

    python tests/support/clusters/ray_faulty.py SHARD ERROR ONCE ARGUMENTS…

ONCE is a file that the fault creates and that keeps it from happening again; "" for a fault every time.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import ray

from logit_cache.cli.main import cache_logits


def hook(shard: int, error: str, once: str) -> Any:
    """A function that Ray calls in each worker process before all else, pickled by value as part of this script."""

    def install() -> None:
        import logit_cache.engines.worker

        score = logit_cache.engines.worker.score_shard

        def faulty(opened: Any, number: int, progress: Any = None) -> Any:
            if number == shard and not (once and Path(once).exists()):
                if once:
                    Path(once).touch()
                raise RuntimeError(error)
            return score(opened, number, progress)

        logit_cache.engines.worker.score_shard = faulty

    return install


if __name__ == "__main__":
    environment = {"worker_process_setup_hook": hook(int(sys.argv[1]), sys.argv[2], sys.argv[3])}
    ray.init = functools.partial(ray.init, runtime_env=environment)
    cache_logits(sys.argv[4:])
