"""A task of a Slurm array, which builds its share of the job in each run that Slurm gives it.

submitit calls the task in a process of its own, and takes it for done once it has returned, or raised an `Exception`;
`SystemExit` alone leaves no result, so a task that is to be called again ends with it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from logit_cache.caching.job import CacheJob
from logit_cache.caching.log import JobLog
from logit_cache.caching.survey import survey
from logit_cache.engines.options import EngineOptions
from logit_cache.engines.outcome import NotDone, Outcome
from storage.errors import LogitCacheError

# Runs in a row that the time limit ended without progress: the next would be no better.
_MOST_FRUITLESS = 3

RunJob = Callable[[CacheJob, EngineOptions, JobLog], Outcome]
"""`logit_cache.engines.run.run_job`, which knows this engine, and not this one it."""

TaskError = tuple[Literal["refused", "failed"], str]
"""How a task failed: the message of a user's error ("refused"), or the reason ("failed")."""


@dataclass
class ArrayTask:
    """The job and its engine options, as plain data, and the function that runs them in the task, by its name.

    missing: positions that were missing when this run, or the one before, started; fruitless: runs in a row, each
    ended by the time limit, after which no fewer were missing.
    """

    run: RunJob
    job: dict[str, Any]
    options: dict[str, Any]
    missing: int | None = None
    fruitless: int = 0

    def __call__(self) -> TaskError | None:
        # submitit has SIGTERM ignored; its default is restored, as nothing needs to drain until a shard is under way.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        job = CacheJob.model_validate(self.job)
        how = EngineOptions(**self.options)
        try:
            if self._is_hopeless(job):
                return _report("failed", f"no shard was done in {self.fruitless} times the time limit: give a longer "
                               f"--slurm time, or a new entry with a smaller --shard-tokens")  # fmt: skip
            self.run(job, how, JobLog(how.log_format, cache=job.cache, entry=job.name))
        except LogitCacheError as error:
            return _report("refused", str(error))
        except NotDone as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        return None

    def checkpoint(self) -> Any:
        """The task that submitit calls in the next run; it asks once the signal before the time limit has arrived."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(ArrayTask(self.run, self.job, self.options, self.missing, self.fruitless))

    def _is_hopeless(self, job: CacheJob) -> bool:
        missing = survey(job).missing
        self.fruitless = 0 if self.missing is None or missing < self.missing else self.fruitless + 1
        self.missing = missing
        return self.fruitless >= _MOST_FRUITLESS


def _report(kind: Literal["refused", "failed"], text: str) -> TaskError:
    print(f"error: {text}", file=sys.stderr)
    return kind, text
