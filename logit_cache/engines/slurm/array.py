"""The workers of a job as the tasks of a Slurm job array, submitted and requeued by submitit (extra `slurm`).

A task is `cache-logits` in a process of its own: worker i of n, by SLURM_ARRAY_TASK_ID. submitit's folder holds only
the task's arguments; its progress is in the cache. So a task may be requeued at any moment, and its next run resumes.

time limit      Slurm sends SIGUSR2 90 seconds before, submitit requeues the task, as often as needed
preemption      SIGTERM; the task finishes or drops its shard, and Slurm requeues it
a lost node     Slurm requeues its tasks
an error        the task ends; its shards are left to the other tasks, or to the next run of the command

squeue is polled for the state of the array, and the cache for its progress: Slurm's accounting, which submitit asks,
is not available on every cluster.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.prepare import check_stream
from logit_cache.caching.survey import survey
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import NotDone, Outcome
from logit_cache.engines.shutdown import Stopping
from logit_cache.engines.slurm.parameters import array_parameters
from logit_cache.engines.slurm.task import ArrayTask, RunJob, TaskError
from storage.cache.failures import FailedShard, failures_of
from storage.cache.reader import LogitCache
from storage.errors import InputError, LogitCacheError
from storage.text import counted

# Polls become rarer as a job ages, to spare the controller.
_MOST_SECONDS_BETWEEN_POLLS = 15.0
# A task may be requeued however long it has run: each run commits shards.
_MOST_REQUEUES = 10_000
# Answers of squeue in a row without the job that mean its end: one alone may precede its registration.
_GONE_TIMES = 2
_MOST_LOG_BYTES = 8_192
_ERROR = re.compile(r"((srun|slurmstepd)\S*: )?error: ")


def run_array(job: CacheJob, options: EngineOptions, log: JobLog, stopping: Stopping, run_job: RunJob) -> Outcome:
    """Submit an array of `options.workers` tasks, each of which calls `run_job`; wait for its end if `options.wait`.

    Raises InputError where there is no Slurm, for parameters that it refuses, and for a refusal of a task; NotDone
    where the array has ended before its work was done, or continues after this process was asked to stop.
    """
    check_stream(job)
    found, notes = survey(job), failures_of(job.cache, job.name).all()
    # For a complete entry one task checks that it is this job's, and writes a missing index or report.
    workers = found.workers(options.workers or 1)
    ended = False
    # A signal during the submission takes effect once the job number of the array is known.
    with stopping.on_sigterm():
        array, folder = _submit(job, options, workers, run_job)
        hint = f"logit-cache status {job.cache} follows it, scancel {array} ends it"
        log.event(
            "start",
            f"submitted job {array} with {counted(workers, 'task')}, logs in {folder}; {hint}",
            job=array,
            engine="slurm",
            workers=workers,
            shards=found.missing_shards,
            positions=found.missing,
        )
        if not options.wait:
            return Outcome(submitted=True)
        done = found.positions - found.missing
        with (
            contextlib.suppress(KeyboardInterrupt),
            log.progress(f"cache {job.name}", found.positions, "tokens", done) as advance,
        ):
            ended = _wait(job, array, log, stopping, advance, done)
    if not ended:
        raise NotDone(f"job {array} continues without this command: {hint}")
    return _outcome(job, array, workers, folder, notes)


def _submit(job: CacheJob, options: EngineOptions, workers: int, run_job: RunJob) -> tuple[str, Path]:
    """Submit the array; returns its job number and the folder of its logs."""
    try:
        import submitit
    except ImportError:
        raise InputError("--engine slurm needs submitit: pip install 'logit-cache[slurm]'") from None
    logging.getLogger("submitit").setLevel(logging.CRITICAL)  # it writes to stdout as well
    parameters = array_parameters(job, options, workers, submitit.SlurmExecutor._valid_parameters())
    own = {"attempts": options.attempts, "grace_seconds": options.grace_seconds, "log_format": options.log_format}
    task = ArrayTask(run_job, job.model_dump(mode="json"), own)
    folder = None
    try:
        folder = _new_folder(Path(options.slurm_folder), job.name)
        with _outside_of_jobs():
            executor = submitit.SlurmExecutor(folder=folder.absolute(), max_num_timeout=_MOST_REQUEUES)
            executor.update_parameters(**parameters)
            with executor.batch():
                tasks = [executor.submit(task) for _ in range(workers)]
        return str(tasks[0].job_id).partition("_")[0], folder
    # Missing commands, parameters that sbatch refuses, a folder that cannot be created.
    except (OSError, RuntimeError, ValueError) as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line.lower()), lines[0] if lines else repr(error))
        raise InputError(f"Slurm does not take the job: {reason[:400]}") from None


def _new_folder(parent: Path, name: str) -> Path:
    """Create a folder for one array. Slurm creates none for its logs, so it must exist before the first task starts."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (parent / f"{name}-{number}").mkdir()
            return parent / f"{name}-{number}"
    raise AssertionError("numbers do not end")


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a job that this process may be part of: the tasks would take them for their own."""

    def is_foreign(name: str) -> bool:
        of_a_job = name.startswith(("SLURM_", "SLURMD_")) and name not in ("SLURM_CONF", "SLURM_CLUSTERS")
        return of_a_job or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")

    hidden = {name: os.environ.pop(name) for name in list(os.environ) if is_foreign(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _wait(
    job: CacheJob, array: str, log: JobLog, stopping: Stopping, advance: Callable[[int], None], done: int
) -> bool:
    """Wait until the array has ended; False if this process was asked to stop before."""
    began, gone, logged = time.monotonic(), 0, ""
    while gone < _GONE_TIMES:
        now = time.monotonic()
        until = now + (1.0 if gone else min(_MOST_SECONDS_BETWEEN_POLLS, 1.0 + (now - began) / 20))
        while time.monotonic() < until:
            if stopping.wanted:
                return False
            time.sleep(0.1)
        with contextlib.suppress(LogitCacheError, OSError):  # the store does not answer now; the next poll retries
            found = survey(job)
            advance(found.positions - found.missing - done)
            done = found.positions - found.missing
        states = _states(array)
        gone = gone + 1 if states == "" else 0
        if states and states != logged:
            logged = states
            log.event("queue", f"job {array}: {states}", job=array, states=states)
    return True


def _states(array: str) -> str | None:
    """The states of an array's tasks, such as `running, pending (Resources)`; empty where none waits or runs.

    None where the controller does not answer, which is no sign of an end.
    """
    command = ["squeue", "--noheader", "--format=%T|%r", "--jobs", array]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        # The controller no longer has the job in memory.
        return "" if "Invalid job id" in answer.stderr else None
    states = set()
    for line in answer.stdout.splitlines():
        state, _, reason = line.strip().partition("|")
        states.add(state.lower() + (f" ({reason})" if reason not in ("", "None") else ""))
    return ", ".join(sorted(states, reverse=True))


def _outcome(job: CacheJob, array: str, workers: int, folder: Path, before: dict[int, FailedShard]) -> Outcome:
    """The outcome of a job whose array has ended. `before`: the notes on failed shards from before the array."""
    left, errors = survey(job), _task_errors(folder)
    done = left.complete and _is_concluded(job)
    refusals = [text for kind, text in errors if kind == "refused"]
    # An entry that every task refuses is not this job's, even if complete; one refusal may be its machine's fault.
    if refusals and (not done or len(refusals) >= workers):
        raise InputError(f"a task of job {array} refused: {refusals[0]}")
    if done:
        return Outcome()
    notes = failures_of(job.cache, job.name).all()
    failed = {shard: note.error for shard, note in notes.items() if before.get(shard) != note}
    if failed:
        return Outcome(failed=failed)
    state = "without the report that belongs to a complete entry" if left.complete else f"with {left}"
    reason = errors[0][1] if errors else _last_error(folder)
    raise NotDone(
        f"{job.cache}: {job.name}: job {array} has ended {state}{f' ({reason})' if reason else ''}; its logs are in "
        f"{folder}; run the same command again to resume"
    )


def _is_concluded(job: CacheJob) -> bool:
    entry = LogitCache.open(job.cache).teacher(job.name)
    return entry.receipts.index is not None and (not job.fidelity_positions or entry.fidelity() is not None)


def _task_errors(folder: Path) -> list[TaskError]:
    errors: list[TaskError] = []
    for path in sorted(folder.glob("*_result.pkl")):
        outcome, result = pickle.loads(path.read_bytes())
        if outcome == "success" and result is not None:
            errors.append(result)
        elif outcome != "success":
            errors.append(("failed", str(result).strip().splitlines()[-1]))
    return errors


def _last_error(folder: Path) -> str:
    """The last error line in the logs of an array, Slurm's own included; empty where there is none."""
    for path in sorted(folder.glob("*_log.err"), key=lambda path: path.stat().st_mtime, reverse=True):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            if _ERROR.match(line):
                return line.strip()
    return ""
