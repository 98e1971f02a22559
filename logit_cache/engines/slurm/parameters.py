"""The sbatch parameters of an array: `--slurm NAME=VALUE` as submitit takes it, and those that follow from the job."""

from __future__ import annotations

import re
import shlex
from typing import Any

from logit_cache.caching.job import CacheJob
from logit_cache.engines.options import EngineOptions
from storage.errors import InputError

_DEFAULT_MINUTES = 60
_SIGNAL_SECONDS = 90

_OF_THE_ENGINE = {
    "array": "--workers sets the number of tasks",
    "chdir": "run the command in that folder",
    "output": "--slurm-folder sets the folder of the logs",
    "error": "--slurm-folder sets the folder of the logs",
    "signal": "signal-delay-s sets how long before the time limit it is sent",
    "wait": "--wait and --no-wait set it",
    **dict.fromkeys(("use_srun", "stderr_to_stdout", "additional_parameters", "wrap"), "it cannot be changed"),
}
_NUMBERS = {"nodes", "ntasks_per_node", "signal_delay_s", "array_parallelism"}
_MAY_BE_NUMBERS = {"cpus_per_task", "cpus_per_gpu", "gpus_per_node", "gpus_per_task"}
_GPUS = {"gres", "gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket"}

# srun does not pass on the CPUs of the batch script by itself, and torch would take all that it sees.
_SETUP = [
    'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
    'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"',
]


def array_parameters(job: CacheJob, options: EngineOptions, workers: int, known: set[str]) -> dict[str, Any]:
    """The parameters of an array for submitit, which knows some by name; the others go to sbatch as they are.

    Raises InputError for an invalid value, and for a parameter that the engine sets itself.
    """
    asked: dict[str, str] = dict(options.slurm)
    for name in asked.keys() & _OF_THE_ENGINE.keys():
        raise InputError(f"--slurm {name}={asked[name]}: cache-logits sets this itself; {_OF_THE_ENGINE[name]}")
    limit = minutes(asked.pop("time", str(_DEFAULT_MINUTES)))
    own: dict[str, Any] = {
        "job_name": f"cache-{job.name}",
        "time": limit,
        "cpus_per_task": options.worker_cpus,
        # A short job would receive it as soon as it starts, as Slurm may be a minute early.
        "signal_delay_s": min(_SIGNAL_SECONDS, 15 * limit),
        "array_parallelism": workers,
        "setup": list(_SETUP),
    }
    if job.device.startswith("cuda") and not _GPUS & asked.keys():
        own["gpus_per_node"] = 1
    more: dict[str, str | bool] = {} if "no_requeue" in asked else {"requeue": True}
    for name, value in asked.items():
        if name in _NUMBERS and not value.isdecimal():
            raise InputError(f"--slurm {name}={value}: expected a whole number")
        if name == "setup":
            own["setup"] = [value, *_SETUP]
        elif name == "teardown":
            own[name] = [value]
        elif name == "srun_args":
            own[name] = shlex.split(value)
        elif value == "false":
            more.pop(name, None)
        elif name in known:
            number = name in _NUMBERS | _MAY_BE_NUMBERS and value.isdecimal()
            own[name] = int(value) if number else True if value == "true" else value
        else:
            more[name] = True if value == "true" else value
    return {**own, "additional_parameters": more}


def minutes(text: str) -> int:
    """A time limit in sbatch's notation, in whole minutes: m, m:s, h:m:s, d-h, d-h:m, d-h:m:s. Raises InputError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise InputError(f"--slurm time={text}: expected minutes, or hours:minutes:seconds, or days-hours")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, mins, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, (mins, seconds) = 0, (*numbers, 0)[:2]
    whole = int(days or 0) * 1440 + hours * 60 + mins + -(-seconds // 60)
    if not whole:
        raise InputError(f"--slurm time={text}: give at least one minute")
    return whole
