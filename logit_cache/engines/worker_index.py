"""Which of several workers this process is, by a flag or by the variables of its launcher.

    --worker 2/8                                    set by hand
    RANK, WORLD_SIZE, LOCAL_RANK                    torchrun, accelerate
    SLURM_PROCID, SLURM_STEP_NUM_TASKS              a task of `srun`
    SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT     a task of an array; with srun inside, both

A batch script of Slurm has SLURM_PROCID 0 and SLURM_NTASKS n without being one of n tasks: only processes under
`srun` have SLURM_STEP_NUM_TASKS, so that variable decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storage.errors import InputError


@dataclass(frozen=True)
class Rank:
    """Worker `index` of `count`, the `local`-th on its machine; `source` names the flag or variables that set it."""

    index: int = 0
    count: int = 1
    local: int = 0
    source: str = ""

    def owns(self, shard: int) -> bool:
        """Whether a shard is in this worker's share, the shards with number % `count` = `index`."""
        return shard % self.count == self.index


def rank_of(worker: str | None, environment: Mapping[str, str]) -> Rank:
    """The rank of this process. Raises InputError for an invalid flag or invalid variables."""
    if worker is not None:
        parts = worker.split("/")
        if len(parts) == 2 and all(part.isdecimal() for part in parts) and int(parts[0]) < int(parts[1]):
            return Rank(int(parts[0]), int(parts[1]), 0, "--worker")
        raise InputError(f"--worker {worker!r}: expected i/n with 0 <= i < n, such as 0/4")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        index, count, local = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return _checked(Rank(index, count, local, "RANK and WORLD_SIZE"))
    index, count, sources = 0, 1, []
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first, step = _number(environment, "SLURM_ARRAY_TASK_MIN"), _number(environment, "SLURM_ARRAY_TASK_STEP", 1)
        index = (_number(environment, "SLURM_ARRAY_TASK_ID") - first) // max(step, 1)
        count = _number(environment, "SLURM_ARRAY_TASK_COUNT")
        sources.append("SLURM_ARRAY_TASK_ID")
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
        index, count = index * tasks + _number(environment, "SLURM_PROCID"), count * tasks
        sources.append("SLURM_PROCID")
    return _checked(Rank(index, count, _number(environment, "SLURM_LOCALID"), " and ".join(sources)))


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment has {name}={text!r}, which is no number: give --worker i/n")
    return int(text)


def _checked(rank: Rank) -> Rank:
    # An array such as --array=0,3,9 has numbers that no count and step describe.
    if not 0 <= rank.index < rank.count:
        raise InputError(
            f"{rank.source} make this worker {rank.index} of {rank.count}, which cannot be: submit an array of "
            f"consecutive numbers, or give --worker i/n"
        )
    return rank
