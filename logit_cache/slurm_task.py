"""What a task of a Slurm array does: its share of the job, as often as Slurm has it run.

submitit calls the task in a process of its own, and takes it for done once it has returned, or raised an `Exception`;
`SystemExit` alone leaves no result, so that is how a task ends that is to be called again.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from typing import Any, Literal

from logit_cache.engine_options import EngineOptions
from logit_cache.job import CacheJob
from logit_cache.job_log import JobLog
from storage.errors import LogitCacheError

# Lives of a task in a row, ended by the time limit, in which it built nothing: the next would be no better.
_MOST_FRUITLESS = 3

Told = tuple[Literal["refused", "failed"], str]
"""What a task has to say: the message of a user's error, or why it went wrong."""


class _Fruitless(BaseException):
    """The task is not to be requeued. Raised by a signal's handler; what handles a shard's errors lets it pass."""


class _CountingLog(JobLog):
    """Knows how many shards were built; a signal's handler can ask it, unlike the store."""

    built = 0

    def event(self, name: str, text: str, **fields: Any) -> None:
        self.built += name == "shard"
        super().event(name, text, **fields)


@dataclass
class ArrayTask:
    """The job and how it is run, as plain data; fruitless: lives in a row before this one that built nothing."""

    job: dict[str, Any]
    options: dict[str, Any]
    fruitless: int = 0
    log: JobLog | None = None

    def __call__(self) -> Told | None:
        from logit_cache.engines import NotDone, run_job

        # submitit has SIGTERM ignored. While no shard is under way there is nothing to be ended in good order.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        job = CacheJob.model_validate(self.job)
        how = EngineOptions(**self.options)
        self.log = _CountingLog(how.log_format, cache=job.cache, entry=job.name)
        try:
            run_job(job, how, self.log)
        except LogitCacheError as error:
            print(f"error: {error}", file=sys.stderr)
            return "refused", str(error)
        except _Fruitless as error:
            print(f"error: {error}", file=sys.stderr)
            return "failed", str(error)
        except NotDone as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        return None

    def checkpoint(self) -> Any:
        """What submitit is to have called in the task's next life, when the signal before the time limit has come."""
        from submitit.helpers import DelayedSubmission

        idle = isinstance(self.log, _CountingLog) and not self.log.built
        fruitless = self.fruitless + 1 if idle else 0
        if fruitless == _MOST_FRUITLESS:
            raise _Fruitless(
                f"no shard was done in {fruitless} times the time limit: give a longer --slurm time, or a new entry "
                f"with a smaller --shard-tokens"
            )
        return DelayedSubmission(ArrayTask(self.job, self.options, fruitless))
