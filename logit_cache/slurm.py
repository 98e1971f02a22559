"""The workers of a job as the tasks of a Slurm job array, submitted and requeued by submitit (extra `slurm`).

A task is `cache-logits` in a process of its own: worker i of n, by SLURM_ARRAY_TASK_ID. Nothing but its arguments lies
in submitit's folder; what is done is in the cache. So a task may be requeued at any moment, and its next life goes on.

time limit      Slurm sends SIGUSR2 90 seconds before, submitit has the task requeued, as often as it takes
preemption      SIGTERM; the task finishes or drops its shard, and Slurm requeues it
a lost node     Slurm requeues its tasks
an error        the task ends; its shards are left to the others, or to the next run
"""

from __future__ import annotations

import contextlib
import logging
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logit_cache.driver import Outcome
from logit_cache.engine_options import EngineOptions
from logit_cache.job import CacheJob, check_stream
from logit_cache.job_log import JobLog
from logit_cache.survey import survey
from storage.errors import InputError, LogitCacheError

_POLL_SECONDS = 5.0
_DEFAULT_MINUTES = 60
# Whatever time a task has had before, it may be requeued: each life leaves shards behind.
_MOST_REQUEUES = 10_000
# Of squeue's answers in a row that lack the job: one alone may come before the controller knows it.
_GONE_TIMES = 2


@dataclass
class ArrayTask:
    """What a task does when it is called: its share of the job. Returns what the user is to be told, or None."""

    job: dict[str, Any]
    options: dict[str, Any]

    def __call__(self) -> str | None:
        from logit_cache.engines import NotDone, run_job

        job = CacheJob.model_validate(self.job)
        how = EngineOptions(**self.options)
        try:
            run_job(job, how, JobLog(how.log_format, cache=job.cache, entry=job.name))
        except LogitCacheError as error:
            return str(error)
        except NotDone as error:
            print(f"error: {error}", file=sys.stderr)
            # A task that returns is taken for done, and one that was asked to stop will be called again.
            raise SystemExit(1) from None
        return None

    def checkpoint(self) -> Any:
        """What submitit is to call after a requeue: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_array(job: CacheJob, options: EngineOptions, log: JobLog) -> Outcome:
    """Submit an array of `options.workers` tasks, and wait for it unless told not to.

    Raises InputError where there is no Slurm, for parameters that it refuses, and with what a task refused.
    """
    check_stream(job)
    workers = options.workers or 1
    found = survey(job)
    if found.complete:
        workers = 1  # it looks whether the entry is this job's, and concludes it
    own = {"attempts": options.attempts, "grace_seconds": options.grace_seconds, "log_format": options.log_format}
    task = ArrayTask(job.model_dump(mode="json"), own)
    tasks = _submit(job, options, [task] * workers)
    array = str(tasks[0].job_id).partition("_")[0]
    log.event(
        "start",
        f"submitted job {array} with {workers} task(s); logs in {options.slurm_folder}",
        job=array,
        engine="slurm",
        workers=workers,
        positions=found.missing,
    )
    if not options.wait:
        return Outcome(submitted=True)
    done = found.positions - found.missing
    with log.progress(f"cache {job.name}", found.positions, "tokens", done) as advance:
        gone = 0
        while gone < _GONE_TIMES:
            time.sleep(_POLL_SECONDS)
            now = survey(job)
            advance(now.positions - now.missing - done)
            done = now.positions - now.missing
            gone = 0 if _is_queued(array) else gone + 1
    said = _said(tasks)
    if said and not survey(job).complete:
        raise InputError(f"a task of job {array} refused: {said}")
    return Outcome()


def _submit(job: CacheJob, options: EngineOptions, tasks: list[ArrayTask]) -> list[Any]:
    try:
        import submitit
    except ImportError:
        raise InputError("--engine slurm needs submitit: pip install 'logit-cache[slurm]'") from None
    folder = Path(options.slurm_folder)
    logging.getLogger("submitit").setLevel(logging.ERROR)
    try:
        executor = submitit.SlurmExecutor(folder=folder / "%A", max_num_timeout=_MOST_REQUEUES)
        executor.update_parameters(**_parameters(job, options, executor._valid_parameters()))
        with executor.batch():
            return [executor.submit(task) for task in tasks]
    except Exception as error:  # what is missing, what sbatch refuses, a folder that cannot be made
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[0] if lines else repr(error))
        raise InputError(f"Slurm does not take the job: {reason.strip()[:400]}") from None


def _parameters(job: CacheJob, options: EngineOptions, known: set[str]) -> dict[str, Any]:
    """The parameters of the array; what submitit does not know by name goes to sbatch as it is."""
    asked: dict[str, Any] = dict(options.slurm)
    own: dict[str, Any] = {
        "job_name": f"cache-{job.name}",
        "time": minutes(asked.pop("time", str(_DEFAULT_MINUTES))),
        "cpus_per_task": options.worker_cpus,
    }
    if job.device.startswith("cuda") and not {"gres", "gpus", "gpus_per_node", "gpus_per_task"} & asked.keys():
        own["gpus_per_node"] = 1
    more: dict[str, str | bool] = {"requeue": True}
    for name, value in asked.items():
        if name in known:
            own[name] = int(value) if value.isdecimal() else value
        else:
            more[name] = True if value == "true" else value
    return {**own, "additional_parameters": more}


def minutes(text: str) -> int:
    """A time limit as sbatch has them, in whole minutes: m, m:s, h:m:s, d-h, d-h:m, d-h:m:s. Raises InputError."""
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
    whole = int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)
    if not whole:
        raise InputError(f"--slurm time={text}: give at least one minute")
    return whole


def _is_queued(array: str) -> bool:
    """Whether any task of an array waits or runs. A controller that does not answer is no sign of an end."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        asked = ["squeue", "--noheader", "--format=%T", "--jobs", array]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return bool(done.stdout.strip())
        # A job that has left the controller's memory.
        return "Invalid job id" not in done.stderr
    return True


def _last_line(error: Any) -> str:
    """Of the trace that submitit hands on, without its frame."""
    lines = [line.strip() for line in str(error).splitlines()]
    trace = [line for line in lines if line and not line.startswith(("-", "You can check"))]
    return trace[-1] if trace else type(error).__name__


def _said(tasks: list[Any]) -> str | None:
    """The first thing that a task had to say to the user."""
    for task in tasks:
        if task.paths.result_pickle.exists():
            error = task.exception()
            told = task.result() if error is None else _last_line(error)
            if told is not None:
                return str(told)
    return None
